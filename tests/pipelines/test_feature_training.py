"""Feature nets of one's own: losses against longhand, training that repeats, folders that come back, refusals."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hd_core.random import Draws
from pipelines.artifacts import file_hash
from pipelines.data import DataSplits, ImageSet
from pipelines.feature_training import (
    FeatureTraining,
    classes_loss,
    denoise_loss,
    make_feature_net,
    network,
    reconstruction_error,
    shifted,
)
from pipelines.features import FeatureNet, FeatureNetConfig, FeatureTask, load_extractor, load_feature_net
from tests.pipelines.tiny import hdistill

QUICK = FeatureTraining(num_steps=3, batch_size=8)


def images_of(count: int, side: int = 8, channels: int = 1, classes: int = 3, seed: int = 0) -> ImageSet:
    """Pictures whose class is the height of a bright bar, under noise."""
    labels = np.arange(count) % max(classes, 1)
    images = np.random.default_rng(seed).integers(0, 40, (count, side, side, channels), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[1 + 2 * label : 3 + 2 * label] += 200
    return ImageSet(images=images, labels=labels * (classes > 0), num_classes=classes)


def splits_of(**shape: int) -> DataSplits:
    return DataSplits(train=images_of(30, **shape), reference=images_of(12, seed=1, **shape), fingerprint="bars")


def made(folder: Path, task: FeatureTask, splits: DataSplits | None = None, **changes: Any) -> dict[str, float]:
    config = replace(QUICK, **{key: changes[key] for key in changes if key != "seed"})
    return make_feature_net(folder, splits or splits_of(), task, config, changes.get("seed", 0), lambda _: None)


def draws_of(seed: int = 0) -> Draws:
    return Draws(seed=seed, rows=slice(0, 5), total=5)


# Losses


class Mirror(torch.nn.Module):
    """Rebuilds what it is shown, noise included; its logits are the corner pixels."""

    def rebuilt(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :1] / 127.5 - 1

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, :3, 0] / 100


def test_the_denoising_loss_is_the_distance_to_the_clean_picture():
    """Of a net that returns its input: the mean square of the noise, whose level is drawn for each row."""
    images = torch.randint(256, (5, 1, 8, 8)).float()
    mirror: Any = Mirror()
    for seed in range(3):
        draws = draws_of(seed)
        level = draws.uniform("level", 0.0, 255 / 4)
        noise = draws.normal("noise", (1, 8, 8)) * level[:, None, None, None] / 127.5
        found = denoise_loss(mirror, images, torch.zeros(5, dtype=torch.int64), draws)
        assert found.item() == pytest.approx(noise.square().mean().item(), rel=1e-4)
        assert level.unique().numel() == 5


def test_the_classes_loss_is_a_smoothed_cross_entropy_of_noisy_shifted_pictures():
    images, labels, draws = torch.randint(256, (5, 1, 8, 8)).float(), torch.tensor([0, 1, 2, 0, 1]), draws_of(3)
    seen = shifted(images + 255 / 20 * draws.normal("noise", (1, 8, 8)), draws)
    log_p = torch.log_softmax(seen[:, 0, :3, 0] / 100, 1)
    targets = 0.95 * torch.eye(3)[labels] + 0.05 / 3
    wanted = -(targets * log_p).sum(1).mean()
    assert classes_loss(Mirror(), images, labels, draws).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_shifts_bring_black_in_and_come_in_all_nine_directions():
    images = torch.rand(5, 1, 4, 4) + 1
    bordered = torch.zeros(5, 1, 6, 6)
    bordered[:, :, 1:5, 1:5] = images
    windows = {(i, j): bordered[:, :, i : i + 4, j : j + 4] for i in range(3) for j in range(3)}
    found = [shifted(images, draws_of(seed)) for seed in range(80)]
    hit = {place for place, window in windows.items() if any(torch.equal(window, one) for one in found)}
    assert hit == windows.keys()
    assert all(any(torch.equal(window, one) for window in windows.values()) for one in found)


# Training


@pytest.mark.parametrize("task", ["classes", "denoise"])
def test_equal_seeds_make_equal_files_of_the_training_images_alone(tmp_path: Path, task: FeatureTask):
    splits = splits_of()
    made(tmp_path / "a", task)
    torch.manual_seed(1234)
    made(tmp_path / "b", task, replace(splits, reference=images_of(20, seed=5)))
    made(tmp_path / "c", task, seed=1)
    made(tmp_path / "d", task, replace(splits, train=images_of(30, seed=5)))
    hashes = [file_hash(tmp_path / name / "model.safetensors") for name in "abcd"]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_a_classifier_learns_classes_that_it_never_saw(tmp_path: Path):
    quality = made(tmp_path / "net", "classes", num_steps=60, batch_size=32)
    assert quality == {"accuracy": 1.0}
    assert made(tmp_path / "untrained", "classes", num_steps=1)["accuracy"] < 0.8


def test_a_denoiser_rebuilds_pictures_that_it_never_saw(tmp_path: Path):
    """Its error is far below that of the best single picture, the mean; the features know which bar it is."""
    splits = splits_of()
    quick = {"num_steps": 150, "batch_size": 32, "learning_rate": 8e-3}
    found = made(tmp_path / "net", "denoise", splits, **quick)["reconstruction_error"]
    values = splits.reference.images / 127.5 - 1
    mean_picture = np.sqrt(np.square(values - values.mean(0)).mean())
    assert found < 0.4 * mean_picture
    net = load_feature_net(tmp_path / "net")
    assert reconstruction_error(net, splits.reference) == pytest.approx(found, rel=1e-5)
    shown = torch.from_numpy(splits.reference.images.transpose(0, 3, 1, 2).copy()).float().expand(-1, 3, -1, -1)
    by_hand = (net.rebuilt(shown).permute(0, 2, 3, 1).numpy() - values).astype(np.float64)
    assert found == pytest.approx(np.sqrt(np.square(by_hand).mean()), rel=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [4, 8, 12, 16, 28, 32, 64])
def test_there_is_a_net_for_every_side_that_is_a_multiple_of_four(side: int, channels: int):
    images = torch.rand(2, 3, side, side) * 255
    for task in ("classes", "denoise"):
        splits = images_of(4, side=side, channels=channels, classes=1 + (task == "classes"))
        net = FeatureNet(network(splits, task))
        assert net(images).shape == (2, 64)
        if task == "classes":
            assert net.logits(images).shape == (2, 2)
        else:
            assert net.rebuilt(images).shape == (2, channels, side, side)


# Folders


@pytest.mark.parametrize(("task", "channels"), [("classes", 1), ("denoise", 3)])
def test_a_folder_comes_back_as_an_extractor_of_the_same_features(tmp_path: Path, task: FeatureTask, channels: int):
    splits = splits_of(channels=channels)
    quality = made(tmp_path / "bars_net", task, splits)
    extractor = load_extractor(str(tmp_path / "bars_net"))
    assert (extractor.name, extractor.size, extractor.shape) == ("bars_net", 8, (channels, 8, 8))
    assert extractor.fingerprint == file_hash(tmp_path / "bars_net" / "model.safetensors")
    net = load_feature_net(tmp_path / "bars_net")
    assert not net.training and not any(parameter.requires_grad for parameter in net.parameters())
    images = splits.reference.images
    by_hand = net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float().expand(-1, 3, -1, -1)).numpy()
    assert np.allclose(extractor(images), by_hand, atol=1e-5) and np.ptp(by_hand) > 0.01
    config = json.loads((tmp_path / "bars_net" / "config.json").read_text())
    assert config["_class_name"] == "FeatureNet" and (config["task"], config["channels"]) == (task, channels)
    assert config["data"] == "bars" and config["training"]["num_steps"] == 3
    assert quality.items() <= config.items() and len(quality) == 1


def test_many_images_go_through_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made(tmp_path / "net", "classes")
    extractor, images = load_extractor(str(tmp_path / "net")), images_of(30).images
    whole = extractor(images)
    monkeypatch.setattr("pipelines.extractor._PIXELS_AT_ONCE", 7 * 8 * 8)
    assert extractor(images).shape == (30, 64) and np.abs(extractor(images) - whole).max() < 1e-5


def test_an_existing_folder_is_refused_before_anything_is_trained(tmp_path: Path):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "mine.txt").write_text("mine")

    def fail(_: int) -> None:
        raise AssertionError("trained")

    with pytest.raises(ValueError, match="net exists already; it is not overwritten"):
        make_feature_net(tmp_path / "net", splits_of(), "classes", QUICK, 0, fail)
    with pytest.raises(ValueError, match="must not be called digits, which names another net"):
        make_feature_net(tmp_path / "digits", splits_of(), "classes", QUICK, 0, fail)
    assert [path.name for path in tmp_path.rglob("*")] == ["net", "mine.txt"]


def test_a_training_that_is_stopped_leaves_nothing(tmp_path: Path):
    def stop(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_feature_net(tmp_path / "net", splits_of(), "classes", QUICK, 0, stop)
    assert list(tmp_path.iterdir()) == []


def test_images_that_fit_no_net_are_refused():
    tall = ImageSet(images=np.zeros((2, 8, 4, 1), np.uint8), labels=np.zeros(2, np.int64), num_classes=2)
    for images in (tall, images_of(2, side=10)):
        with pytest.raises(ValueError, match=r"a multiple of 4; these are (8x4|10x10): set data.image_size"):
            network(images, "denoise")
    with pytest.raises(ValueError, match="no classes to tell apart: train with --task denoise"):
        network(images_of(2, classes=0), "classes")


def test_images_of_another_shape_are_refused_in_a_line(tmp_path: Path):
    made(tmp_path / "net", "classes")
    extractor = load_extractor(str(tmp_path / "net"))
    for images in (images_of(2, side=12), images_of(2, channels=3)):
        with pytest.raises(ValueError, match=r"net takes images of .* \(1, 8, 8\); these are \((1, 12, 12|3, 8, 8)\)"):
            extractor(images.images)


def spoil_config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


FAULTS: dict[str, tuple[Any, str]] = {
    "no weights": (
        lambda net: (net / "model.safetensors").unlink(),
        "no feature net at .*: give digits, inception, or",
    ),
    "another class": (lambda net: spoil_config(net, _class_name="DiT"), "holds a DiT, not a FeatureNet"),
    "not JSON": (lambda net: (net / "config.json").write_text("{"), "config.json is not readable JSON"),
    "other widths": (lambda net: spoil_config(net, widths=[8, 8]), "is damaged: "),
    "no widths": (lambda net: spoil_config(net, widths=None), "is damaged: "),
    "other task": (lambda net: spoil_config(net, task="guess"), "is damaged: task must be classes or denoise"),
    "cut off": (lambda net: (net / "model.safetensors").write_bytes(b"cut"), "is damaged: "),
    "fewer tensors": (lambda net: save_file({"x": torch.ones(1)}, net / "model.safetensors"), "is damaged: "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_no_net_is_explained_in_a_line(tmp_path: Path, fault: str):
    made(tmp_path / "net", "classes")
    breaking, message = FAULTS[fault]
    breaking(tmp_path / "net")
    with pytest.raises(ValueError, match=message) as raised:
        load_extractor(str(tmp_path / "net"))
    assert "\n" not in str(raised.value)


def test_a_name_that_is_no_net_says_what_is_allowed():
    with pytest.raises(ValueError, match="no feature net at inceptoin: give digits, inception, or a folder that"):
        load_extractor("inceptoin")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "guess"}, "task must be classes or denoise; given 'guess'"),
        ({"channels": 2}, "channels must be 1 or 3; given 2"),
        ({"stem": "third"}, "stem must be full or half; given 'third'"),
        ({"widths": ()}, "widths must hold at least one"),
        ({"size": 6, "widths": (4, 4, 4)}, "size must be a multiple of 4, for 3 widths; given 6"),
        ({"size": 4, "widths": (4, 4, 4), "stem": "half"}, "size must be a multiple of 8"),
        ({"num_classes": 1}, "needs at least 2 classes; given 1"),
    ],
)
def test_a_net_that_cannot_be_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        FeatureNetConfig(**{"size": 8, "channels": 1, "widths": (4, 4), "num_classes": 2, **changes})


@pytest.mark.parametrize(
    "changes", [{"num_steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"weight_decay": -1.0}]
)
def test_a_training_that_cannot_be_is_refused(changes: dict[str, Any]):
    with pytest.raises(ValueError, match="must be"):
        FeatureTraining(**changes)


# The command


def test_the_command_trains_says_how_good_and_where_and_refuses_a_second_time(tmp_path: Path):
    arguments = ("features", "digits", "--out", tmp_path / "net", "--steps", "2")
    result = hdistill(*arguments, "--task", "denoise", "--seed", "7")
    assert result.exit_code == 0, result.output
    assert "rebuilds the 600 held-out images with an RMS error of" in " ".join(result.output.split())
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    assert (config["seed"], config["training"]["num_steps"], config["size"]) == (7, 2, 8)
    assert set(load_file(tmp_path / "net" / "model.safetensors")) >= {"features.weight", "decoder.0.weight"}
    again = hdistill(*arguments)
    assert again.exit_code == 2 and "exists already" in again.output
    assert hdistill("features", "digits", "--out", tmp_path / "none", "--steps", "0").exit_code == 2
    assert "classifies" in hdistill("features", "digits", "--out", tmp_path / "other", "--steps", "1").output
