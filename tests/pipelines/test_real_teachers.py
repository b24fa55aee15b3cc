"""Folders as diffusers writes them, through the whole of `hdistill run`: every class of teacher, pixels or latents."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from pipelines.latents import LatentCodec
from pipelines.model_files import read_object
from tests.pipelines.diffusers_folders import PIPELINES, DiffusionPipeline
from tests.pipelines.tiny import UNTRACKED, hdistill

RECIPE = """\
# A few iterations of every kind of stage.
seed: 3
teacher: {{path: {teacher}, guidance_scale: {guidance}}}
data: {{kind: folder, path: {data}, image_size: {size}, held_out: 12}}
precompute: {{num_samples: 16, shard_rows: 8, intervals: 2, batch_size: 8, num_actors: 0, solver: euler, flip: true}}
stages:
  sketch:
    objective: {{name: {sketch}}}
    num_steps: 2
    batch_size: 4
    probe: {{every: 2, num_samples: 8}}
  refine:
    start: sketch
    objective: {{name: dmd, update_ratio: 1, adversarial: {{weight: 0.3}}}}
    discriminator: {{layers: [1], width: 8, heads: 2}}
    num_steps: 2
    batch_size: 4
  sfd:
    objective: {{name: sfd, intervals: 2}}
    num_steps: 2
    batch_size: 4
evaluate: {{num_samples: 20, neighbours: 2, pictures: 12, features: {features}, solvers: {{euler: [2]}}}}
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    size: int = 16
    guidance: float = 1.0
    sketch: str = "mean_velocity"


CASES = {
    "dit": Case(guidance=1.5),
    "ddpm": Case(size=8, sketch="meanflow"),
    "stable_diffusion": Case(guidance=2.0, sketch="meanflow"),
    "sana": Case(guidance=2.0),
}


def pictures(folder: Path, captions: bool) -> None:
    """Forty pictures of two classes, some with the same caption."""
    generator = np.random.default_rng(0)
    for index in range(40):
        kind = folder / f"class_{index % 2}"
        kind.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(kind / f"{index:02d}.png")
        if captions:
            (kind / f"{index:02d}.txt").write_text(f"{'cat' if index % 2 else 'dog'} {'abcdefgh'[index % 8]}\n")


def write_recipe(folder: Path, case: Case, features: Path) -> None:
    """tiny.yaml, beside the folders of the teacher and of the pictures."""
    text = RECIPE.format(teacher=folder / "teacher", data=folder / "pictures", features=features, **vars(case))
    (folder / "tiny.yaml").write_text(text)


@pytest.fixture(scope="module")
def feature_net(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A hardly trained feature net for images of a size."""
    root = tmp_path_factory.mktemp("features")
    pictures(root / "pictures", captions=False)

    def make(size: int) -> Path:
        out = root / f"net_{size}"
        if not out.exists():
            (root / "r.yaml").write_text(
                f"data: {{kind: folder, path: {root / 'pictures'}, image_size: {size}, held_out: 12}}\n"
                "stages: {one: {objective: {name: mean_velocity}}}\n"
            )
            result = hdistill("features", root / "r.yaml", "--out", out, "--steps", 2, "--task", "denoise")
            assert result.exit_code == 0, result.output
        return out

    return make


@pytest.mark.parametrize("name", CASES)
def test_from_a_folder_to_a_report(name: str, tmp_path: Path, feature_net: Callable[[int], Path]) -> None:
    case = CASES[name]
    PIPELINES[name](tmp_path / "teacher")
    pictures(tmp_path / "pictures", captions=name in ("stable_diffusion", "sana"))
    write_recipe(tmp_path, case, feature_net(case.size))
    result = hdistill("run", tmp_path / "tiny.yaml", "--run-dir", tmp_path / "run", *UNTRACKED)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    rows = [(row["stage"], row["nfe"]) for row in report["rows"]]
    guided = 1 if case.guidance == 1 else 2
    assert rows == [("", 2 * guided), ("sketch", 1), ("refine", 1), ("sfd", 2)]
    assert all(np.isfinite(row["fid"]) for row in report["rows"])
    if name == "sana":
        page = (tmp_path / "run" / "report.html").read_text()
        assert "0: dog" in page or "0: cat" in page  # the prompt of the first column
        again = hdistill("run", tmp_path / "tiny.yaml", "--run-dir", tmp_path / "run", *UNTRACKED)
        assert again.exit_code == 0, again.output
        assert "Reused: prompts, latents, precompute, sketch, refine, sfd, evaluate" in " ".join(again.output.split())
    sampled = hdistill(
        "sample", tmp_path / "tiny.yaml", "--run-dir", tmp_path / "run", "--stage", "refine", "--num", 2,
        "--out", tmp_path / "samples", *(("--prompt", "a red cat") if case.guidance == 2 else ()),
    )  # fmt: skip
    assert sampled.exit_code == 0, sampled.output
    assert np.asarray(Image.open(tmp_path / "samples" / "00001.png")).shape == (case.size, case.size, 3)
    exported = hdistill(
        "export", tmp_path / "tiny.yaml", "--run-dir", tmp_path / "run", "--stage", "refine", "--out", tmp_path / "out"
    )
    assert exported.exit_code == 0, exported.output
    # Stock SANA takes sizes that divide by 32 only, so this one comes with code of its own.
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=name == "sana")
    assert name == "sana" or type(pipeline).__module__.startswith("diffusers.pipelines.")
    if name != "ddpm":
        latents = read_object(tmp_path / "run" / "latents" / "manifest.json")
        assert latents["rows"] == 56 and latents["autoencoder"] == latents_made_by(tmp_path / "teacher")


def latents_made_by(folder: Path) -> str:
    return LatentCodec.of(folder / "vae").fingerprint


def test_latents_of_another_autoencoder_are_refused(tmp_path: Path, feature_net: Callable[[int], Path]) -> None:
    """The mistake that nobody sees: the pictures would only be a little worse."""
    PIPELINES["dit"](tmp_path / "teacher")
    pictures(tmp_path / "pictures", captions=False)
    write_recipe(tmp_path, Case(sketch="meanflow"), feature_net(16))
    asked = (tmp_path / "tiny.yaml", "--run-dir", tmp_path / "run", *UNTRACKED)
    assert hdistill("precompute", *asked).exit_code == 0
    weights = tmp_path / "teacher" / "vae" / "diffusion_pytorch_model.safetensors"
    other = {name: value + 0.001 for name, value in load_file(weights).items()}
    save_file(other, weights)
    result = hdistill("train", *asked)
    assert result.exit_code == 2
    assert "latents holds other latents: autoencoder" in " ".join(result.output.split())


@pytest.mark.ray
def test_actors_make_the_same_prompts_and_latents(
    ray_cluster: None, tmp_path: Path, feature_net: Callable[[int], Path]
) -> None:
    PIPELINES["stable_diffusion"](tmp_path / "teacher")
    pictures(tmp_path / "pictures", captions=True)
    write_recipe(tmp_path, Case(sketch="meanflow"), feature_net(16))
    for actors in (0, 1):
        asked = (tmp_path / "tiny.yaml", "--run-dir", tmp_path / f"run_{actors}", *UNTRACKED)
        result = hdistill("precompute", *asked, "--set", f"precompute.num_actors={actors}")
        assert result.exit_code == 0, result.output
    for kind in ("prompts", "latents", "trajectories"):
        here, there = (sorted((tmp_path / f"run_{actors}" / kind).glob("*.parquet")) for actors in (0, 1))
        assert len(here) == len(there) > 1
        for one, other in zip(here, there, strict=True):
            assert_same_rows(pq.read_table(one), pq.read_table(other))


def assert_same_rows(one: pa.Table, other: pa.Table) -> None:
    """Values up to what another number of threads changes in a float16."""
    assert one.drop_columns("values").equals(other.drop_columns("values"))
    for a, b in zip(one.column("values"), other.column("values"), strict=True):
        left, right = (np.frombuffer(value.as_py(), np.float16).astype(float) for value in (a, b))
        np.testing.assert_allclose(left, right, rtol=2e-3, atol=1e-4)
