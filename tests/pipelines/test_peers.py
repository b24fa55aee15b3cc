"""Generators of others in the same table: folders of their pictures, and pipelines of diffusers."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.data import DataConfig, load_images, to_uint8
from pipelines.peers import PeerConfig
from pipelines.report import Row, read_report
from tests.pipelines import tiny
from tests.pipelines.conftest import Finished
from tests.pipelines.diffusers_folders import DDPMPipeline, DDPMScheduler, dit, seeded, stable_diffusion, unet_model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits to train on, of which one is larger."""
    folder, images = tmp_path_factory.mktemp("theirs"), load_images(DataConfig(held_out=1597)).train.images
    assert isinstance(images, np.ndarray)
    for number, image in enumerate(images[:120, :, :, 0]):
        Image.fromarray(image).resize((16, 16) if number == 3 else (8, 8)).save(folder / f"{number:03}.png")
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    DDPMPipeline(unet=seeded(lambda: unet_model(channels=1)), scheduler=DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def evaluated(copied: Finished, peers: str) -> tuple[list[Row], str]:
    recipe = copied.run_dir.parent / "with_peers.yaml"
    recipe.write_text(tiny.RECIPE.replace("evaluate: {", f"evaluate: {{peers: {peers}, "))
    result = tiny.hdistill("evaluate", recipe, "--run-dir", copied.run_dir, *tiny.UNTRACKED)
    assert result.exit_code == 0, result.output + result.stderr
    return read_report(copied.run_dir / "report.json").rows, result.output


@pytest.mark.slow
def test_peers_stand_in_the_same_table_and_are_measured_once(
    copied: Finished, pictures: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch
):
    before = read_report(copied.run_dir / "report.json").rows
    peers = f"{{copies: {{path: {pictures}, calls: 3}}, noisy: {{path: {pipeline}, steps: 2}}}}"
    rows, output = evaluated(copied, peers)
    assert rows[:-2] == before
    copies, noisy = rows[-2:]
    assert (copies.generator, copies.nfe, copies.num_samples, copies.solver) == ("copies", 3, 120, "pictures")
    assert copies.fid < min(row.fid for row in before) and copies.precision > 0.9
    assert copies.images_per_second is None and copies.gflops_per_image is None
    assert (noisy.generator, noisy.nfe, noisy.num_samples, noisy.solver) == ("noisy", 2, 200, "pipeline")
    assert noisy.fid > copies.fid and noisy.precision < 0.5
    assert (noisy.images_per_second or 0) > 0 and (noisy.gflops_per_image or 0) > 0
    assert "Copies" in output and "pictures" in output and "Noisy" in output
    for row in (copies, noisy):
        kept = np.load(copied.run_dir / "evaluate" / row.samples)["images"]
        assert kept.shape == (16, 8, 8, 1) and kept.std() > 1
    monkeypatch.setattr(PeerConfig, "load", None)  # its calls are known
    again, output = evaluated(copied, peers)
    assert again == rows and "evaluate     reused" in output


def test_a_pipelines_pictures_follow_from_their_ids(pipeline: Path):
    peer = PeerConfig(path=str(pipeline), steps=2).load("cpu")
    whole = peer(range(4), [0] * 4, None, 5)
    assert whole.shape == (4, 1, 8, 8) and whole.min() >= -1 and whole.max() <= 1
    halves = torch.cat([peer(range(2), [0] * 2, None, 5), peer(range(2, 4), [0] * 2, None, 5)])
    # Pictures come as [0, 1], of which float32 holds no more than 1.2e-7 of [-1, 1]: near 0, too.
    assert torch.allclose(halves, whole, rtol=0, atol=1e-6)
    assert not torch.equal(peer(range(4), [0] * 4, None, 6), whole)
    stock = DDPMPipeline.from_pretrained(pipeline)
    stock.set_progress_bar_config(disable=True)
    assert to_uint8(whole).shape == np.asarray(stock(4, num_inference_steps=2, output_type="np").images).shape


def test_calls_are_counted_with_both_branches_of_guidance(pipeline: Path, tmp_path: Path):
    dit(tmp_path)
    for path, scale, wanted in ((pipeline, None, 3), (tmp_path, 1.0, 3), (tmp_path, 4.0, 6)):
        peer = PeerConfig(path=str(path), steps=3, guidance_scale=scale).load("cpu")
        assert peer.calls([1], None) == wanted


def test_a_pipelines_identity_is_its_weights_and_settings(pipeline: Path, tmp_path: Path):
    copy = shutil.copytree(pipeline, tmp_path / "copy")
    one = PeerConfig(path=str(pipeline), steps=2)
    assert PeerConfig(path=str(copy), steps=2).identity == one.identity != PeerConfig(path=str(copy), steps=3).identity
    DDPMPipeline(unet=seeded(lambda: unet_model(channels=1), 8), scheduler=DDPMScheduler()).save_pretrained(copy)
    assert PeerConfig(path=str(copy), steps=2).identity != one.identity


def test_mistakes_are_explained(pipeline: Path, pictures: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="pictures need calls"):
        PeerConfig(path=str(pictures))
    with pytest.raises(ValueError, match="neither steps nor guidance_scale"):
        PeerConfig(path=str(pictures), calls=1, steps=2)
    with pytest.raises(ValueError, match="are counted: leave them out"):
        PeerConfig(path=str(pipeline), calls=1)
    with pytest.raises(ValueError, match="must not be negative; given -1 and 0"):
        PeerConfig(path=str(pictures), calls=-1)
    stable_diffusion(tmp_path)
    with pytest.raises(ValueError, match="reads text, and the recipe's data have none"):
        PeerConfig(path=str(tmp_path), steps=2).load("cpu")(range(1), [0], None, 0)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be loaded"):
        PeerConfig(path=str(tmp_path)).load("cpu")


def test_names_of_peers_are_plain():
    for name in ("teacher", "../up"):
        result = tiny.hdistill(
            "run", "digits", "--dry-run", "--set", f"evaluate.peers={{{name}: {{path: a, calls: 1}}}}"
        )
        assert result.exit_code == 2 and "names are letters, digits" in result.stderr
