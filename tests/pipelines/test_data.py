"""Real images: exact conversions, the split that keeps the reference apart, and every way a set can be wrong."""

import dataclasses
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from PIL import Image

from pipelines import data
from pipelines.data import DataConfig, ImageSet, load_images, to_model, to_uint8

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 3]))


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def fills(parts: ImageSet) -> list[int]:
    return [int(image.flat[0]) for image in parts.images]


@given(st_np.arrays(np.uint8, SHAPES))
@settings(max_examples=50, deadline=None)
def test_conversions_are_inverse(images: np.ndarray) -> None:
    model = to_model(images)
    assert model.dtype == torch.float32 and model.shape == tuple(images.shape[i] for i in (0, 3, 1, 2))
    assert model.abs().max() <= 1 and model.is_contiguous()
    assert np.array_equal(to_uint8(model), images)


def test_every_level_survives() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    model = to_model(levels)
    assert np.array_equal(to_uint8(model), levels)
    assert np.array_equal(to_uint8(model + 0.9 / 255), levels) and np.array_equal(to_uint8(model - 0.9 / 255), levels)
    assert model.min() == -1 and model.max() == 1


def test_outside_is_clamped() -> None:
    values = torch.tensor([-9.0, -1.0, 1.0, 9.0]).reshape(1, 1, 2, 2)
    assert to_uint8(values).flatten().tolist() == [0, 0, 255, 255]


def test_digits_longhand() -> None:
    """The same permutation as written out here: a teacher trained elsewhere on it has not seen the reference."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    order = np.random.RandomState(0).permutation(1797)
    splits = load_images(DataConfig())
    for part, rows in ((splits.train, order[:-600]), (splits.reference, order[-600:])):
        assert np.array_equal(part.images[..., 0], np.round(digits.images[rows] * 255 / 16))
        assert np.array_equal(part.labels, digits.target[rows])
        assert part.num_classes == 10 and part.shape == (1, 8, 8)
    assert (len(splits.train), len(splits.reference)) == (1197, 600)


def test_fingerprint_follows_the_contents() -> None:
    configs = (DataConfig(), DataConfig(), DataConfig(split_seed=1), DataConfig(held_out=599))
    marks = [load_images(config).fingerprint for config in configs]
    assert marks[0] == marks[1] and len(set(marks)) == 3


def test_fingerprints_of_finished_runs_still_hold(tmp_path: Path) -> None:
    """Found by the version before captions and skipped pictures."""
    write_pictures(tmp_path / "p")
    np.savez(tmp_path / "a.npz", x=pixels(5, 4, 6, 3), y=np.arange(5))
    for config, mark in (
        (DataConfig(), "fe10456e4b8c28d3e57943d31d8bd1ddec41c476087b0b28df29f9b0907fb5f5"),
        (folder_config(tmp_path / "p"), "8eb0829ba0517547be046fa838de27e01c8931a1c69fef4cf31abef0a80c56dd"),
        (
            folder_config(tmp_path / "p", image_size=8, fit="pad", channels=1),
            "c81ad50b0df7ea54c03ac259c0b76a2181c447165f3ac8a7e8e2b26654a459fd",
        ),
        (
            DataConfig(kind="npz", path=str(tmp_path / "a.npz"), held_out=2),
            "4fafd8207dfd1c9173cb569d592ffe69525072cb889baa9d98d5d2dfccfea22f",
        ),
    ):
        assert load_images(config).fingerprint == mark


def test_digits_in_another_size_and_in_colour() -> None:
    splits = load_images(DataConfig(image_size=16, channels=3, held_out=0.25))
    assert splits.train.shape == (3, 16, 16)
    assert len(splits.reference) == round(0.25 * 1797)
    assert np.array_equal(splits.train.images[..., 0], splits.train.images[..., 2])


@given(
    total=st.integers(2, 60),
    held_out=st.integers(1, 59),
    validation=st.sampled_from([0, 1, 7, 0.3]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_split_is_a_partition(
    tmp_path_factory: pytest.TempPathFactory, total: int, held_out: int, validation: int | float, seed: int
) -> None:
    path = tmp_path_factory.mktemp("npz") / "images.npz"
    numbered = np.arange(total, dtype=np.uint8)
    np.savez(path, x=np.broadcast_to(numbered[:, None, None], (total, 2, 3)), y=numbered % 7)
    config = DataConfig(kind="npz", path=str(path), held_out=held_out, validation=validation, split_seed=seed)
    kept = validation if isinstance(validation, int) else round(validation * (total - held_out))
    faults = {f"held_out {held_out} of {total} images": held_out >= total}
    faults[f"validation {validation} of {total - held_out} images"] = bool(validation) and (
        not 0 < kept < total - held_out
    )
    if fault := next((text for text, is_there in faults.items() if is_there), None):
        with pytest.raises(ValueError, match=fault):
            load_images(config)
        return
    splits = load_images(config)
    assert len(splits.reference) == held_out and (splits.validation is None) == (validation == 0)
    parts = [part for part in (splits.train, splits.reference, splits.validation) if part is not None]
    assert sorted(fill for part in parts for fill in fills(part)) == numbered.tolist()
    for part in parts:
        assert part.labels.tolist() == [fill % 7 for fill in fills(part)]
    if splits.validation is not None:
        assert len(splits.validation) == kept
        whole = load_images(dataclasses.replace(config, validation=0))
        assert fills(whole.reference) == fills(splits.reference) and whole.fingerprint != splits.fingerprint


@pytest.mark.parametrize("keys", [("x", "y"), ("images", "labels"), ("x_train", "y_train")])
def test_npz_keys(keys: tuple[str, str], tmp_path: Path) -> None:
    images, labels = pixels(5, 4, 6, 3), np.array([[0], [4], [1], [2], [3]], np.uint8)
    np.savez_compressed(tmp_path / "a.npz", **{keys[0]: images, keys[1]: labels})  # pyright: ignore[reportArgumentType]
    splits = load_images(DataConfig(kind="npz", path=str(tmp_path / "a.npz"), held_out=2))
    order = np.random.RandomState(0).permutation(5)
    assert np.array_equal(splits.train.images, images[order[:-2]])
    assert splits.reference.labels.tolist() == labels[order[-2:], 0].tolist()
    assert splits.train.num_classes == 5


def test_npz_brings_its_own_reference(tmp_path: Path) -> None:
    train, test = pixels(5, 4, 4), pixels(3, 4, 4, seed=1)
    np.savez(tmp_path / "a.npz", x_train=train, y_train=np.arange(5), x_test=test, y_test=np.full(3, 8))
    splits = load_images(DataConfig(kind="npz", path=str(tmp_path / "a.npz"), held_out=4000))
    assert np.array_equal(splits.train.images[..., 0], train) and np.array_equal(splits.reference.images[..., 0], test)
    assert splits.train.num_classes == splits.reference.num_classes == 9


def test_npz_without_classes(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=pixels(5, 4, 4))
    splits = load_images(DataConfig(kind="npz", path=str(tmp_path / "a.npz"), held_out=0.4))
    assert splits.train.num_classes == 0 and splits.train.labels.tolist() == [0, 0, 0] and len(splits.reference) == 2


def write_npz(**arrays: Any) -> Callable[[Path], object]:
    return lambda path: np.savez(path, **arrays)


def truncated(path: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=pixels(50, 8, 8))
    path.write_bytes(buffer.getvalue()[:1000])


def damaged(path: Path) -> None:
    """Whole as an archive, wrong inside."""
    np.savez_compressed(path, x=pixels(50, 8, 8))
    contents = bytearray(path.read_bytes())
    contents[400:420] = bytes(20)
    path.write_bytes(contents)


def without_header(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"not an array")


NPZ_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda _path: None, "no npz file at .*a.npz"),
    "text": (lambda path: path.write_text("hello"), "a.npz is not a readable npz file"),
    "truncated": (truncated, "not a readable npz file"),
    "damaged": (damaged, "not a readable npz file"),
    "no header": (without_header, "it must be uint8"),
    "pickled": (write_npz(x=np.array([{}, {}], object)), "not a readable npz file: .*allow_pickle"),
    "no images": (write_npz(pictures=pixels(5, 4, 4)), "no images: none of the keys x, images, x_train"),
    "floats": (write_npz(x=np.zeros((5, 4, 4), np.float32)), r"x is float32 \(5, 4, 4\); it must be uint8"),
    "channels first": (
        write_npz(x=pixels(5, 3, 8, 8)),
        r"x is uint8 \(5, 3, 8, 8\); it must be uint8 .* 1 or 3 channels",
    ),
    "flat": (write_npz(x=pixels(5, 64)), "it must be uint8"),
    "few labels": (write_npz(x=pixels(5, 4, 4), y=np.arange(4)), r"y is int64 \(4,\); .* for each of 5 images"),
    "float labels": (write_npz(x=pixels(5, 4, 4), y=np.zeros(5)), "one whole number for each"),
    "negative labels": (write_npz(x=pixels(5, 4, 4), y=np.arange(5) - 1), "y holds -1; classes count from 0"),
    "test alone has classes": (
        write_npz(x=pixels(5, 4, 4), x_test=pixels(5, 4, 4), y_test=np.arange(5)),
        "classes for only one",
    ),
    "other test size": (write_npz(x=pixels(5, 4, 4), x_test=pixels(5, 4, 5)), r"x_test is uint8 \(5, 4, 5, 1\)"),
    "empty": (write_npz(x=pixels(0, 4, 4)), "held_out 2 of 0 images"),
    "few": (write_npz(x=pixels(2, 4, 4)), "held_out 2 of 2 images leaves too few"),
}


@pytest.mark.parametrize("fault", NPZ_FAULTS)
def test_faulty_npz(fault: str, tmp_path: Path) -> None:
    breaking, message = NPZ_FAULTS[fault]
    breaking(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=message) as error:
        load_images(DataConfig(kind="npz", path=str(tmp_path / "a.npz"), held_out=2))
    assert str(error.value).count("\n") < 2


def write_pictures(root: Path, *, size: tuple[int, int] = (6, 6)) -> None:
    """Twelve pictures of three classes, each of one grey level that tells its place in the order."""
    for index in range(12):
        folder = root / ("cat", "dog", "eel")[index // 4]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", size, 20 * index).save(folder / f"{index % 4}.png")


def folder_config(root: Path, **changes: Any) -> DataConfig:
    return DataConfig(**{"kind": "folder", "path": str(root), "held_out": 3, **changes})


def test_folder_order_and_classes(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    (tmp_path / "cat" / "._0.png").write_bytes(b"left by a file manager")
    (tmp_path / "notes.txt").write_text("not a picture")
    splits = load_images(folder_config(tmp_path))
    order = np.random.RandomState(0).permutation(12)
    assert fills(splits.train) == [20 * index for index in order[:-3]]
    assert splits.reference.labels.tolist() == [index // 4 for index in order[-3:]]
    assert splits.train.num_classes == 3 and splits.train.shape == (3, 6, 6)
    assert load_images(folder_config(tmp_path)).fingerprint == splits.fingerprint


def test_folder_without_classes_in_grey(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    splits = load_images(folder_config(tmp_path / "cat", channels=1, held_out=0.5))
    assert splits.train.num_classes == 0 and splits.train.shape == (1, 6, 6) and len(splits.train) == 2


def test_mixed_sizes_are_cropped_and_resized(tmp_path: Path) -> None:
    """Bands left and right of the centre are cut off; the squares are averaged down, not sampled."""
    write_pictures(tmp_path)
    wide = np.zeros((40, 100, 3), np.uint8)
    wide[:, 30:70] = 105
    wide[::2, 30:70] += 50
    Image.fromarray(wide).save(tmp_path / "eel" / "wide.png")
    with pytest.raises(ValueError, match=r"wide.png is 100x40 and .*0.png is 6x6: mixed sizes need an image_size"):
        load_images(folder_config(tmp_path))
    splits = load_images(folder_config(tmp_path, image_size=4))
    images = np.concatenate([splits.train.images, splits.reference.images])
    (row,) = [image for image in images if image.max() in range(125, 136)]
    assert row.shape == (4, 4, 3) and row.min() >= 125


@pytest.mark.parametrize("channels", [0, 3])
def test_padding_changes_no_pixel(channels: Any, tmp_path: Path) -> None:
    """28x28 in 32x32 has two black pixels on each side; an odd border is wider right and below."""
    train, test = pixels(5, 28, 28), pixels(3, 27, 30, seed=1)
    np.savez(tmp_path / "a.npz", x_train=train, x_test=test)
    config = DataConfig(kind="npz", path=str(tmp_path / "a.npz"), image_size=32, channels=channels or 1, fit="pad")
    splits = load_images(config)
    assert splits.train.shape == splits.reference.shape == (channels or 1, 32, 32)
    for channel in range(channels or 1):
        expected = np.pad(train, ((0, 0), (2, 2), (2, 2)))
        assert np.array_equal(splits.train.images[..., channel], expected)
        expected = np.pad(test, ((0, 0), (2, 3), (1, 1)))
        assert np.array_equal(splits.reference.images[..., channel], expected)


def test_pictures_of_a_folder_are_padded(tmp_path: Path) -> None:
    write_pictures(tmp_path, size=(4, 6))
    splits = load_images(folder_config(tmp_path, image_size=8, fit="pad", channels=1))
    for part in (splits.train, splits.reference):
        assert np.array_equal(
            part.images[..., 0] > 0, np.pad(part.images[:, 1:7, 2:6, 0] > 0, ((0,) * 2, (1,) * 2, (2,) * 2))
        )
    order = np.random.RandomState(0).permutation(12)
    assert splits.train.images[:, 4, 4, 0].tolist() == [20 * index for index in order[:-3]]


def test_padding_does_not_shrink(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", size=(6, 9))
    np.savez(tmp_path / "a.npz", x=pixels(5, 4, 9))
    for config, message in (
        (folder_config(tmp_path / "pictures", image_size=8, fit="pad"), r"cat/0.png: images of 6x9 do not fit"),
        (DataConfig(kind="npz", path=str(tmp_path / "a.npz"), image_size=8, fit="pad"), "of 9x4 .*image_size 8"),
    ):
        with pytest.raises(ValueError, match=message):
            load_images(config)


def test_modes_become_colour(tmp_path: Path) -> None:
    """Palette, transparent, CMYK and 1-bit pictures, and one that EXIF turns."""
    for index, mode in enumerate(("P", "RGBA", "CMYK", "1", "L", "LA")):
        Image.new("RGB", (5, 7), (255, 255, 255)).convert(mode).save(tmp_path / f"{index}.tiff")
    turned = Image.fromarray(np.repeat(np.array([[0] * 8, [255] * 8], np.uint8), 4, axis=0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    splits = load_images(folder_config(tmp_path, image_size=8))
    images = np.concatenate([splits.train.images, splits.reference.images])
    assert len(images) == 7 and not splits.skipped
    dark = [image for image in images if image.min() < 250]
    assert len(dark) == 1 and (dark[0][:, 0] == 255).all() and (dark[0][:, -1] == 0).all()


FOLDER_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda _root: None, "no folder of pictures at .*pictures"),
    "no pictures": (lambda root: root.mkdir(), r"holds no pictures \(.bmp .jpeg"),
    "all bad": (
        lambda root: [(made(root) / f"{i}.png").write_bytes(b"hello") for i in range(4)],
        r"pictures: all 4 pictures are bad; the first is 0.png: no picture of a known format",
    ),
    "loose": (lambda root: Image.new("L", (6, 6)).save(written(root) / "a.png"), r"pictures \(a.png, ...\) beside"),
    "few": (lambda root: [Image.new("L", (6, 6)).save(made(root) / f"{i}.png") for i in range(3)], "held_out 3 of 3"),
}


def made(root: Path) -> Path:
    root.mkdir(exist_ok=True)
    return root


def written(root: Path) -> Path:
    write_pictures(root)
    return root


def png(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(side, side, 3)).save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_faulty_folder(fault: str, tmp_path: Path) -> None:
    breaking, message = FOLDER_FAULTS[fault]
    breaking(tmp_path / "pictures")
    with pytest.raises(ValueError, match=message):
        load_images(folder_config(tmp_path / "pictures"))


def spoil(root: Path) -> None:
    """Four bad pictures and two unusual good ones beside the twelve."""
    (root / "cat" / "0a text.png").write_bytes(b"hello")
    (root / "dog" / "0b half.png").write_bytes(png(64)[:300])
    Image.new("I;16", (6, 6)).save(root / "dog" / "0c deep.png")
    Image.new("L", (1, 1)).save(root / "eel" / "0d small.png")
    Image.new("CMYK", (9, 9), (0, 0, 0, 0)).save(root / "cat" / "0e print.jpg")
    Image.new("RGB", (5472, 3648), (255, 0, 0)).save(root / "eel" / "0f large.jpg")


def test_bad_pictures_are_skipped_named_and_counted(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    spoil(tmp_path)
    splits = load_images(folder_config(tmp_path, image_size=6))
    assert [(skip.name, skip.reason) for skip in splits.skipped] == [
        ("cat/0a text.png", "no picture of a known format"),
        ("dog/0b half.png", "image file is truncated"),
        ("dog/0c deep.png", "more than 8 bits a channel (mode I;16)"),
        ("eel/0d small.png", "1x1: would be enlarged more than twice"),
    ]
    images = np.concatenate([splits.train.images, splits.reference.images])  # pyright: ignore[reportArgumentType]
    assert len(images) == 14
    assert sum(bool((image >= 254).all()) for image in images) == 1
    assert sum(bool((abs(image.astype(int) - [255, 0, 0]) <= 2).all()) for image in images) == 1


def test_bad_pictures_do_not_matter(tmp_path: Path) -> None:
    """The split, the classes and the fingerprint are those of a folder without them; a bad first picture, too."""
    write_pictures(tmp_path / "whole")
    write_pictures(tmp_path / "spoiled")
    for name in ("cat/.png", "cat/0 first.png", "cat/9.png", "eel/1a.png"):
        (tmp_path / "spoiled" / name).write_bytes(b"hello")
    whole, spoiled = (load_images(folder_config(tmp_path / name)) for name in ("whole", "spoiled"))
    assert len(spoiled.skipped) == 3 and not whole.skipped
    assert whole.fingerprint == spoiled.fingerprint
    for ours, theirs in ((whole.train, spoiled.train), (whole.reference, spoiled.reference)):
        assert np.array_equal(ours.in_memory(), theirs.in_memory()) and np.array_equal(ours.labels, theirs.labels)


def test_what_is_held_out_is_of_the_good_pictures(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    for index in range(4):
        (tmp_path / "dog" / f"{index}.png").write_bytes(b"hello")
    assert len(load_images(folder_config(tmp_path, held_out=7)).reference) == 7
    with pytest.raises(ValueError, match="held_out 8 of 8 images leaves too few"):
        load_images(folder_config(tmp_path, held_out=8))


def test_sets_too_large_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays are refused; pictures are read as they are needed, for which their size must be known."""
    write_pictures(tmp_path / "pictures")
    np.savez(tmp_path / "a.npz", x=pixels(5, 4, 4))
    monkeypatch.setattr(data, "MAX_BYTES", 50)
    npz, folder = DataConfig(kind="npz", path=str(tmp_path / "a.npz")), folder_config(tmp_path / "pictures")
    for config, remedy in ((npz, "a smaller image_size"), (folder, "an image_size, with which they are read as")):
        with pytest.raises(ValueError, match=f"kept in memory, up to .* GiB: give {remedy}"):
            load_images(config)
    lazy = load_images(folder_config(tmp_path / "pictures", image_size=4)).train
    assert lazy.images.shape == (9, 4, 4, 3) and lazy.images.dtype == np.uint8 and lazy.images.nbytes == 9 * 48
    with pytest.raises(ValueError, match=r"this needs all images in memory, and they are 0.0 GiB of pixels"):
        lazy.in_memory()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "video"}, "digits, npz, folder, parquet, webdataset or huggingface; given 'video'"),
        ({"kind": "npz"}, "npz needs a path"),
        ({"path": "a"}, "digits has no path"),
        ({"image_size": -1}, "image_size"),
        ({"channels": 2}, "channels must be 1, 3 or 0"),
        ({"fit": "stretch"}, "fit must be resize or pad; given 'stretch'"),
        ({"fit": "pad"}, "fit pad needs an image_size"),
        ({"held_out": 0}, "held_out must be"),
        ({"held_out": 1.0}, "share between 0 and 1"),
        ({"held_out": float("nan")}, "share between 0 and 1"),
        ({"validation": -1}, "validation must be 0, a number of images or a share between 0 and 1; given -1"),
        ({"validation": 1.0}, "validation must be 0, a number of images or a share between 0 and 1; given 1.0"),
        ({"split_seed": -1}, "split_seed"),
        ({"kind": "parquet"}, "parquet needs a path"),
        ({"image_column": ""}, "image_column must name the column"),
        ({"kind": "parquet", "path": "a", "split": "test"}, "are for data of kind huggingface; the kind is parquet"),
        ({"kind": "folder", "path": "a", "reference_split": "test"}, "reference_split are for data of kind hugging"),
        ({"kind": "huggingface", "path": "a", "split": ""}, "split must name a split"),
        ({"kind": "huggingface", "path": "a", "reference_split": "train"}, "both are 'train'"),
    ],
)
def test_config_is_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


def test_image_set_is_checked() -> None:
    with pytest.raises(ValueError, match=r"images must be uint8 .*float32 \(1, 2, 2, 1\)"):
        ImageSet(images=np.zeros((1, 2, 2, 1), np.float32), labels=np.zeros(1, np.int64), num_classes=0)
    with pytest.raises(ValueError, match=r"labels must be int64 \(1,\)"):
        ImageSet(images=pixels(1, 2, 2, 1), labels=np.zeros(2, np.int64), num_classes=0)
    with pytest.raises(ValueError, match="captions must be one for each of 1 images; given 2"):
        ImageSet(images=pixels(1, 2, 2, 1), labels=np.zeros(1, np.int64), num_classes=0, captions=("a", "b"))
