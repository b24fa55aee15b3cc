"""Real images: exact conversions, the split that keeps the reference apart, and every way a set can be wrong."""

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


def test_digits_in_another_size_and_in_colour() -> None:
    splits = load_images(DataConfig(image_size=16, channels=3, held_out=0.25))
    assert splits.train.shape == (3, 16, 16)
    assert len(splits.reference) == round(0.25 * 1797)
    assert np.array_equal(splits.train.images[..., 0], splits.train.images[..., 2])


@given(total=st.integers(2, 60), held_out=st.integers(1, 59), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_split_is_a_partition(tmp_path_factory: pytest.TempPathFactory, total: int, held_out: int, seed: int) -> None:
    path = tmp_path_factory.mktemp("npz") / "images.npz"
    numbered = np.arange(total, dtype=np.uint8)
    np.savez(path, x=np.broadcast_to(numbered[:, None, None], (total, 2, 3)), y=numbered % 7)
    config = DataConfig(kind="npz", path=str(path), held_out=held_out, split_seed=seed)
    if held_out >= total:
        with pytest.raises(ValueError, match=f"held_out {held_out} of {total} images"):
            load_images(config)
        return
    splits = load_images(config)
    assert len(splits.reference) == held_out
    assert sorted(fills(splits.train) + fills(splits.reference)) == numbered.tolist()
    for part in (splits.train, splits.reference):
        assert part.labels.tolist() == [fill % 7 for fill in fills(part)]


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
    """Palette, transparent, CMYK and 1-bit pictures, one of 1x1 and one that EXIF turns."""
    for index, mode in enumerate(("P", "RGBA", "CMYK", "1", "L", "LA")):
        Image.new("RGB", (5, 7), (255, 255, 255)).convert(mode).save(tmp_path / f"{index}.tiff")
    Image.new("RGB", (1, 1), (255, 255, 255)).save(tmp_path / "one.bmp")
    turned = Image.fromarray(np.repeat(np.array([[0] * 8, [255] * 8], np.uint8), 4, axis=0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    splits = load_images(folder_config(tmp_path, image_size=8))
    images = np.concatenate([splits.train.images, splits.reference.images])
    assert len(images) == 8
    dark = [image for image in images if image.min() < 250]
    assert len(dark) == 1 and (dark[0][:, 0] == 255).all() and (dark[0][:, -1] == 0).all()


FOLDER_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda _root: None, "no folder of pictures at .*pictures"),
    "no pictures": (lambda root: root.mkdir(), r"holds no pictures \(.bmp .jpeg"),
    "text": (lambda root: broken(root, b"hello"), "cannot read the picture .*eel/broken.png"),
    "truncated": (lambda root: broken(root, png(64)[:300]), "cannot read the picture .*eel/broken.png"),
    "deep": (lambda root: Image.new("I;16", (6, 6)).save(written(root) / "a.png"), "a.png: it has more than 8 bits"),
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


def broken(root: Path, contents: bytes) -> None:
    (written(root) / "eel" / "broken.png").write_bytes(contents)


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_faulty_folder(fault: str, tmp_path: Path) -> None:
    breaking, message = FOLDER_FAULTS[fault]
    breaking(tmp_path / "pictures")
    with pytest.raises(ValueError, match=message):
        load_images(folder_config(tmp_path / "pictures"))


def test_sets_too_large_for_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path / "pictures")
    np.savez(tmp_path / "a.npz", x=pixels(5, 4, 4))
    monkeypatch.setattr(data, "MAX_BYTES", 50)
    for config in (folder_config(tmp_path / "pictures"), DataConfig(kind="npz", path=str(tmp_path / "a.npz"))):
        with pytest.raises(ValueError, match=r"kept in memory, up to .* GiB"):
            load_images(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "video"}, "digits, npz or folder; given 'video'"),
        ({"kind": "npz"}, "npz needs a path"),
        ({"path": "a"}, "digits has no path"),
        ({"image_size": -1}, "image_size"),
        ({"channels": 2}, "channels must be 1, 3 or 0"),
        ({"fit": "stretch"}, "fit must be resize or pad; given 'stretch'"),
        ({"fit": "pad"}, "fit pad needs an image_size"),
        ({"held_out": 0}, "held_out must be"),
        ({"held_out": 1.0}, "share between 0 and 1"),
        ({"held_out": float("nan")}, "share between 0 and 1"),
        ({"split_seed": -1}, "split_seed"),
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
