"""Features are clean-fid's own: the same numbers as its path over PNG files, for every size and colour."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.torchvision_ops import declare_missing_operators

declare_missing_operators()

from cleanfid import fid as cleanfid  # noqa: E402
from cleanfid.inception_torchscript import InceptionV3W  # noqa: E402
from cleanfid.resize import make_resizer  # noqa: E402

from hd_core.metrics.frechet import frechet_distance  # noqa: E402
from hd_core.metrics.statistics import Moments  # noqa: E402
from pipelines.artifacts import file_hash  # noqa: E402
from pipelines.data import DataConfig, load_images  # noqa: E402
from pipelines.extractor import Extractor  # noqa: E402
from pipelines.features import DigitsFeatureNet, load_extractor  # noqa: E402


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return load_extractor("digits")


def pictures(count: int, size: int, channels: int, seed: int = 0) -> np.ndarray:
    """Smooth random pictures, uint8 (n, size, size, c)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, channels), dtype=np.uint8)
    resized = (Image.fromarray(image.squeeze()).resize((size, size), Image.Resampling.BICUBIC) for image in coarse)
    made = [np.atleast_3d(np.asarray(image)) for image in resized]
    return np.stack(made)


def write_pngs(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(folder / f"{index:05d}.png")
    return folder


def own_resize(extractor: Extractor) -> Any:
    """clean-fid's resize to the net's size; none where a picture has that size, as Inception's 299 would need none."""
    resize = make_resizer("PIL", False, "bicubic", (extractor.size, extractor.size))
    return lambda image: image if image.shape[:2] == (extractor.size, extractor.size) else resize(image)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 5, 32])
def test_features_are_those_of_clean_fid_over_png_files(extractor: Extractor, tmp_path: Path, size: int, channels: int):
    images = pictures(20, size, channels)
    folder = write_pngs(tmp_path / "png", images)
    theirs = cleanfid.get_folder_features(
        str(folder),
        extractor.model,
        num_workers=0,
        batch_size=20,
        device=torch.device("cpu"),
        mode="clean",
        custom_fn_resize=own_resize(extractor),
        verbose=False,
    )
    ours = extractor(images)
    assert ours.shape == (20, 32) and ours.dtype == np.float32
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_fid_is_that_of_clean_fid(extractor: Extractor, tmp_path: Path):
    splits = load_images(DataConfig())
    real, other = splits.reference.images[:300], splits.train.images[:200] // 2
    theirs = cleanfid.compute_fid(
        str(write_pngs(tmp_path / "real", real)),
        str(write_pngs(tmp_path / "other", other)),
        num_workers=0,
        device=torch.device("cpu"),
        use_dataparallel=False,
        custom_feat_extractor=extractor.model,
        custom_fn_resize=own_resize(extractor),
        verbose=False,
    )
    ours = frechet_distance(Moments.of(extractor(other)), Moments.of(extractor(real)))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours > 10


def test_a_grey_picture_is_the_same_in_colour(extractor: Extractor):
    grey = pictures(6, 8, 1)
    assert np.array_equal(extractor(grey), extractor(np.repeat(grey, 3, axis=3)))


def test_features_do_not_depend_on_the_batch(extractor: Extractor):
    images = pictures(30, 8, 1)
    parts = np.concatenate([extractor(images[start : start + 7]) for start in range(0, 30, 7)])
    assert np.abs(parts - extractor(images)).max() < 1e-5


def test_the_net_knows_held_out_digits(extractor: Extractor):
    reference = load_images(DataConfig()).reference
    net = extractor.model
    assert isinstance(net, DigitsFeatureNet) and not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())
    batch = torch.from_numpy(reference.images.copy()).permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1)
    with torch.no_grad():
        right = (net.logits(batch).argmax(1).numpy() == reference.labels).mean()
    assert right > 0.97


def test_an_extractor_names_itself_and_its_weights(extractor: Extractor):
    assert extractor.name == "digits" and extractor.size == 8
    assert extractor.fingerprint == load_extractor("digits").fingerprint and len(extractor.fingerprint) == 64


# Inception


# Inception


class StandIn(torch.nn.Module):
    """What TorchScript of NVIDIA's Inception offers, with layers that cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        pooled = [torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 2048), torch.nn.Tanh()]
        self.layers, self.output = torch.nn.Sequential(*pooled), torch.nn.Linear(2048, 1008)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.layers(x))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "inception-2015-12-05.pt"
    torch.jit.save(torch.jit.script(StandIn()), path)
    return path


def test_inception_of_a_file_is_clean_fids_over_png_files(weights: Path, tmp_path: Path):
    images = pictures(5, 32, 3)
    folder = write_pngs(tmp_path / "png", images)
    net = InceptionV3W(str(weights.parent), download=False)
    theirs = cleanfid.get_folder_features(str(folder), net, num_workers=0, batch_size=5, device=torch.device("cpu"))
    inception = load_extractor(str(weights))
    assert inception.name == "inception" and inception.fingerprint == file_hash(weights)
    np.testing.assert_allclose(inception(images), theirs, atol=1e-6)  # of values in (-1, 1), in another layout
    assert theirs.std() > 0.01
    assert inception.logits is not None
    wanted = theirs @ torch.jit.load(weights).output.weight.detach().numpy().T
    assert np.allclose(inception.logits(torch.tensor(theirs)).numpy(), wanted, atol=1e-5)


def test_inception_is_fetched_once_and_appears_whole(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fetched: list[str] = []

    def fetch(folder: str) -> str:
        fetched.append(folder)
        return str(shutil.copy(weights, folder))

    monkeypatch.setattr("cleanfid.downloads_helper.check_download_inception", fetch)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert [load_extractor("inception").fingerprint for _ in range(2)] == [file_hash(weights)] * 2
    assert len(fetched) == 1 and [path.name for path in tmp_path.iterdir()] == [weights.name]


def test_missing_inception_weights_are_explained_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def away(_: str) -> None:
        raise OSError("Name or service not known\nand more")

    monkeypatch.setattr("cleanfid.downloads_helper.check_download_inception", away)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ValueError, match="clean-fid's Inception weights are not on this machine") as raised:
        load_extractor("inception")
    said = str(raised.value)
    assert "Name or service not known" in said and "evaluate.features" in said and len(said.splitlines()) == 1
    assert str(tmp_path / "inception-2015-12-05.pt") in said and not list(tmp_path.iterdir())


def test_files_that_are_no_inception_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"a file called inception-2015-12-05.pt; there is none at .*/other.pt"):
        load_extractor(str(tmp_path / "other.pt"))
    (tmp_path / "inception-2015-12-05.pt").write_bytes(b"no zip archive")
    with pytest.raises(ValueError, match=r"inception-2015-12-05\.pt is damaged") as raised:
        load_extractor(str(tmp_path / "inception-2015-12-05.pt"))
    assert len(str(raised.value).splitlines()) == 1


def test_logits_are_the_last_layer_of_the_net(extractor: Extractor):
    images = load_images(DataConfig()).reference.images[:200]
    labels = load_images(DataConfig()).reference.labels[:200]
    assert extractor.logits is not None
    guessed = extractor.logits(torch.tensor(extractor(images))).argmax(1).numpy()
    assert (guessed == labels).mean() > 0.95
