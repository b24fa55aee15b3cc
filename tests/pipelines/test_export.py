"""Exported folders, sampled by diffusers alone in a process of its own, against our sampler."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from pipelines import recipe as recipes
from pipelines import torchvision_ops
from pipelines.artifacts import write_json
from pipelines.cast import new_student
from pipelines.checkpoints import save_weights
from pipelines.community.folder import pipeline_source
from pipelines.community.kinds import KINDS, Kind
from pipelines.evaluate import make_sampler
from pipelines.export import TOLERANCE, export
from pipelines.model_files import WEIGHTS, read_object
from pipelines.report import Report, Row, to_json
from pipelines.run import Run
from tests.pipelines import diffusers_folders as folders
from tests.pipelines.tiny import open_run

RECIPE = """\
seed: 3
{sources}
precompute: {{num_samples: 8, shard_rows: 8, intervals: 2, batch_size: 8, num_actors: 0, solver: euler, dtype: float32}}
stages:
  one: {{objective: {{name: mean_velocity}}, batch_size: 4}}
  two: {{objective: {{name: sfd, intervals: 2}}, batch_size: 4}}
  afs: {{objective: {{name: sfd, intervals: 2, afs: true}}, batch_size: 4}}
  late: {{objective: {{name: dmd, grid: {{t_min: 0.1}}}}, batch_size: 4}}
  early: {{objective: {{name: dmd, grid: {{t_max: 0.9}}}}, batch_size: 4}}
  untrained: {{objective: {{name: mean_velocity}}, batch_size: 4}}
  told: {{objective: {{name: sfd, intervals: 2, step_counts: [1, 2]}}, batch_size: 4}}
evaluate: {{num_samples: 20, batch_size: 10, neighbours: 2, pictures: 12}}
"""
SAMPLE = """\
import json, sys
import numpy as np
exec(open({operators!r}).read())
declare_missing_operators()  # torchvision of this environment may lack them; the file is read, and not imported
for name, code in json.load(open("codes.json")).items():
    space = {{}}
    exec(code, space)
    np.save(name, space["images"])
    print(type(space["pipeline"]).__name__)
assert not {{"pipelines", "hd_core", "jaxtyping"}} & {{name.split(".")[0] for name in sys.modules}}, "our code is used"
"""
TEXT = ("stable_diffusion", "sana")
STOCK = {
    "dit": "DiTPipeline",
    "ddpm": "DDIMPipeline",
    "stable_diffusion": "StableDiffusionPipeline",
    "sana": "SanaPipeline",
}
OWN = {
    "dit": "FewStepDiTPipeline",
    "ddpm": "FewStepUNetPipeline",
    "stable_diffusion": "FewStepStableDiffusionPipeline",
    "sana": "FewStepSanaPipeline",
    "digits": "FewStepNativePipeline",
}


def write_pictures(folder: Path, *, captions: bool) -> None:
    """Sixteen pictures of two classes."""
    generator = np.random.default_rng(0)
    for index in range(16):
        kind = folder / f"class_{index % 2}"
        kind.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(kind / f"{index:02d}.png")
        if captions:
            (kind / f"{index:02d}.txt").write_text(f"a {'cat' if index % 2 else 'dog'} {'abcd'[index % 4]}\n")


def randomise(network: nn.Module, seed: int) -> None:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.15)


def pretend_trained(job: Run, stage: str, seed: int) -> None:
    """What a finished stage leaves behind, with weights that are random throughout."""
    student = new_student(job.teacher, knows_steps=job.recipe.knows_steps(stage))
    randomise(student, seed)
    work = job.job(stage)
    digest = save_weights(work.weights, student)
    about = {"inputs": work.inputs, "sha256": digest, "start_sha256": work.start_hash(), "train_seconds": 1.0}
    write_json(work.manifest, about)


def write_teacher(name: str, folder: Path) -> None:
    """A tiny pipeline, and what this file needs otherwise of some of them."""
    folders.PIPELINES[name.partition("-")[0]](folder)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if name == "sana":  # its pipeline makes pictures of multiples of 32 only
        edit(folder / "transformer" / "config.json", sample_size=16)
    if name[:3] in ("dit", "ddp"):  # DDPM's own magnifies an untrained network's noise beyond what pictures can hold
        edit(scheduler, beta_end=0.003)
    if name == "dit-v":
        edit(scheduler, prediction_type="v_prediction")
    if name == "ddpm-classes":
        weights = folder / "unet" / WEIGHTS
        table = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
        save_file({**load_file(weights), "class_embedding.weight": table}, weights, metadata={"format": "pt"})
        edit(folder / "unet" / "config.json", num_class_embeds=2)


def edit(config: Path, **values: object) -> None:
    write_json(config, {**read_object(config), **values})


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """A run whose stages pass for trained, by the class of its teacher."""
    made: dict[str, Run] = {}

    def make(name: str) -> Run:
        if name not in made:
            made[name] = _make(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


def _make(name: str, root: Path) -> Run:
    sources = "data: {held_out: 1597}"
    if name != "digits":
        write_teacher(name, root / "teacher")
        write_pictures(root / "pictures", captions=name in TEXT)
        size = {"ddpm": 8, "ddpm-classes": 8, "sana": 32}.get(name, 16)
        sources = f"teacher: {{path: {root / 'teacher'}}}\ndata: {{kind: folder, path: {root / 'pictures'}"
        sources += f", image_size: {size}, held_out: 8}}"
    (root / "tiny.yaml").write_text(RECIPE.format(sources=sources))
    job = open_run(recipes.load(str(root / "tiny.yaml")), root / "run")
    job.prepare_shards()
    for seed, stage in enumerate(job.recipe.stages):
        if stage != "untrained":
            pretend_trained(job, stage, seed)
    return job


def card_code(folder: Path) -> str:
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert found
    return found[1]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A stage that is exported, and how it is sampled."""

    name: str
    stage: str
    pipeline: str
    steps: int | None = None
    guidance_scale: float = 1.0

    @property
    def folder(self) -> str:
        return f"{self.name}_{self.stage}_{self.steps or ''}"

    def __str__(self) -> str:
        return f"{self.folder}{self.guidance_scale:g}"


ONE_STEP = [
    *(Case(name=name, stage="one", pipeline=pipeline) for name, pipeline in STOCK.items()),
    Case(name="digits", stage="one", pipeline=OWN["digits"]),
]
TWO_STEPS = [Case(name=name, stage="two", pipeline=pipeline) for name, pipeline in OWN.items()]
GUIDED = [replace(case, guidance_scale=3.0) for case in TWO_STEPS if case.name != "ddpm"]
OTHERS = [
    Case(name="dit", stage="afs", pipeline=OWN["dit"]),
    Case(name="dit", stage="late", pipeline=OWN["dit"]),
    Case(name="sana", stage="early", pipeline=OWN["sana"]),
    Case(name="stable_diffusion", stage="told", steps=1, pipeline=STOCK["stable_diffusion"]),
    Case(name="stable_diffusion", stage="told", steps=3, pipeline=OWN["stable_diffusion"]),
    Case(name="dit-v", stage="one", pipeline=STOCK["dit"]),
    Case(name="ddpm-classes", stage="one", pipeline=OWN["ddpm"]),
]
CASES = [*ONE_STEP, *TWO_STEPS, *GUIDED, *OTHERS]


Sampled = dict[str, tuple[np.ndarray, str]]
"""Pictures and class of the pipeline, by case."""


@pytest.fixture(scope="module")
def sampled(run_of: Callable[[str], Run], tmp_path_factory: pytest.TempPathFactory) -> Sampled:
    """What the cards' code makes in one process that does not know this project, and the class of each pipeline."""
    root = tmp_path_factory.mktemp("exports")
    codes: dict[str, str] = {}
    for case in CASES:
        folder = root / case.folder
        if not folder.exists():
            export(run_of(case.name), case.stage, folder, case.steps)
        code = card_code(folder).replace("torch.manual_seed(0),", 'torch.manual_seed(0), output_type="np",')
        code = code.replace('images[0].save("sample.png")', "").replace("=1.0,", f"={case.guidance_scale},")
        codes[f"{case}.npy"] = code
    (root / "codes.json").write_text(json.dumps(codes))
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SAMPLE.format(operators=torchvision_ops.__file__)],
        cwd=root,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-1500:]
    names = done.stdout.split()
    return {str(case): (np.load(root / f"{case}.npy"), name) for case, name in zip(CASES, names, strict=True)}


def ours(job: Run, case: Case) -> np.ndarray:
    """Our sampler's pictures from the noise and of the labels that a model card asks for, in [0, 1]."""
    teacher, generator = job.reader, job.student(case.stage, case.steps, case.guidance_scale)
    noise = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(0))
    condition = teacher.condition(job.evaluation_labels(range(2)))
    images = teacher.decoded(make_sampler(generator, teacher)(generator.grid[0] * noise, condition))
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_diffusers_alone_makes_our_pictures(case: Case, run_of: Callable[[str], Run], sampled: Sampled) -> None:
    pictures, pipeline = sampled[str(case)]
    expected = ours(run_of(case.name), case)
    assert pipeline == case.pipeline
    assert ((expected > 0) & (expected < 1)).mean() > 0.2 and expected.std() > 0.02
    assert np.abs(pictures - expected).max() < 1e-4


def front_matter(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---")[1])


def test_the_folder_holds_what_colleagues_need(run_of: Callable[[str], Run], tmp_path: Path) -> None:
    job = run_of("dit")
    teacher = Path(job.recipe.teacher.path)
    (teacher / "README.md").write_text("---\nlicense: cc-by-nc-4.0\ntags: [a]\n---\nlicense: no\n")
    edit(teacher / "model_index.json", id2label={"0": "cat", "1": "dog, hound"})
    export(job, "one", tmp_path / "out")
    index = read_object(tmp_path / "out" / "model_index.json")
    assert index["id2label"] == {"0": "cat", "1": "dog, hound"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "model_index.json", "samples.png", "scheduler", "transformer", "vae",
    ]  # fmt: skip
    assert not any("_name_or_path" in path.read_text() for path in (tmp_path / "out").rglob("*.json"))
    card = (tmp_path / "out" / "README.md").read_text()
    about = front_matter(card)
    assert about["license"] == "cc-by-nc-4.0" and about["library_name"] == "diffusers" and "base_model" not in about
    assert "`one` (mean_velocity)" in card and "Not measured" in card and recipes.to_yaml(job.recipe) in card
    assert Image.open(tmp_path / "out" / "samples.png").size[0] > 100


def test_the_card_says_what_was_measured(run_of: Callable[[str], Run], tmp_path: Path) -> None:
    job = run_of("digits")
    row = Row(
        generator="teacher", stage="", solver="euler", nfe=8, num_samples=5000, fid=2.5, fid_features="digits",
        precision=0.75, recall=0.5, images_per_second=1.0, gflops_per_image=1.0, train_seconds=0.0, samples="",
    )  # fmt: skip
    rows = [row, replace(row, generator="two", stage="two", nfe=2, fid=3.125), replace(row, stage="afs", fid=77.0)]
    rows.append(replace(rows[1], guidance_scale=2.0, nfe=4, fid=88.0))
    reference = {"real_fid": 0.1, "halves_fid": 0.2, "num_reference": 100, "fid_features": "digits"}
    report = Report(
        recipe=job.recipe.to_dict(), fingerprint=job.recipe.fingerprint, rows=rows, phases=[], reference=reference,
        environment={}, created="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    (job.dir.path / "report.json").write_text(to_json(report))
    export(job, "two", tmp_path / "out")
    (job.dir.path / "report.json").unlink()
    table = [line for line in (tmp_path / "out" / "README.md").read_text().splitlines() if line.startswith("| ")]
    assert table[1:] == [
        "| Two, 2 calls | 2 | 3.125 | 0.750 | 0.500 | 5,000 |",
        "| Teacher, Euler, 8 calls | 8 | 2.5 | 0.750 | 0.500 | 5,000 |",
    ]


def test_a_stock_pipeline_that_differs_is_not_shipped(
    run_of: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: object, stock: bool) -> float:
        return 2 * TOLERANCE if stock else 0.0

    monkeypatch.setattr("pipelines.export._difference", measured)
    export(run_of("ddpm"), "one", tmp_path / "out")
    index = read_object(tmp_path / "out" / "model_index.json")
    assert index["_class_name"] == ["few_steps_unet", "FewStepUNetPipeline"] and "scheduler" not in index
    assert not (tmp_path / "out" / "scheduler").exists()
    assert "the pictures of a DDIMPipeline would differ by 2.0e-03" in (tmp_path / "out" / "README.md").read_text()


def test_nothing_is_shipped_that_differs(
    run_of: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.export._difference", lambda *_, stock: 1.0)
    with pytest.raises(ValueError, match=r"differ from hdistill's by 1\.0e\+00"):
        export(run_of("ddpm"), "one", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stage", "steps", "message"),
    [
        ("none", None, "no stage 'none'"),
        ("one", 2, "in its own number of steps only"),
        ("untrained", None, "not trained"),
    ],
)
def test_what_cannot_be_exported(
    stage: str, steps: int | None, message: str, run_of: Callable[[str], Run], tmp_path: Path
) -> None:
    job = run_of("digits")
    with pytest.raises(ValueError, match=message):
        export(job, stage, tmp_path / "out", steps)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_left_alone(run_of: Callable[[str], Run], tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    with pytest.raises(ValueError, match="exists already"):
        export(run_of("digits"), "one", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
@pytest.mark.parametrize("decodes", [False, True])
def test_the_code_that_is_shipped_is_python(kind: Kind, decodes: bool) -> None:
    source = pipeline_source(kind, decodes=decodes)
    tree = ast.parse(source)
    assert [node.name for node in tree.body if isinstance(node, ast.ClassDef)] == [kind.pipeline]
    assert ("self.vae.decode" in source) is decodes
