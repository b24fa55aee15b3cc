"""The plan's numbers, written out by hand."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from hd_core.objectives.adversarial import Adversarial
from hd_core.objectives.dmd import DMD
from hd_core.objectives.mean_velocity import MeanVelocity
from hd_core.objectives.sfd import SFD
from pipelines.calls import calls_per_row
from pipelines.plan import Item, plan, print_plan
from pipelines.recipe import load
from pipelines.stages import StageConfig
from tests.pipelines.conftest import Finished
from tests.pipelines.tiny import STAGES, make_trajectories, tiny_recipe, tree


def items(recipe_file: Path, run_dir: Path, *settings: str) -> dict[str, Item]:
    return {item.phase: item for item in plan(load(str(recipe_file), settings), run_dir)}


def calls(found: dict[str, Item]) -> dict[str, int]:
    return {phase: item.calls for phase, item in found.items()}


TEACHER_CALLS = 200 * (1 + 2 + 2)
STUDENT_CALLS = 200 * (1 + 1 + 2 + 3)


def test_calls_of_a_fresh_run(finished: Finished, tmp_path: Path):
    found = items(finished.recipe_file, tmp_path)
    assert list(found) == ["precompute", *STAGES, "evaluate"]
    assert calls(found) == {
        "precompute": 64 * 4,
        "sketch": 5 * 16 * 3,  # forward, and a backward pass that counts as two
        # Sample 1, fake score 3, judge of two sets 2; every second time a generator: back 2, two scores 2, judge 3.
        "refine": 4 * 16 * round(1 + 3 + 2 + (2 + 2 + 3) / 2),
        "sfd_2": 4 * 16 * 2 * 3,
        "sfd_4": 4 * 16 * 3 * 3,  # one of four steps is analytical
        "evaluate": TEACHER_CALLS + STUDENT_CALLS,
    }
    assert {item.reused for item in found.values()} == {"-"}
    assert list(tmp_path.iterdir()) == []


def test_bytes_are_those_that_a_run_keeps(finished: Finished, tmp_path: Path):
    found = items(finished.recipe_file, tmp_path)
    assert found["precompute"].bytes == 64 * 5 * 64 * 2
    weights = (finished.run_dir / "stages" / "sketch" / "student.safetensors").stat().st_size
    assert found["sketch"].bytes <= weights < found["sketch"].bytes + 16384  # safetensors' header is beside them
    assert found["evaluate"].bytes == 7 * 16 * 3 * 64


def test_guidance_doubles_the_teachers_calls(finished: Finished, tmp_path: Path):
    found = items(finished.recipe_file, tmp_path, "teacher.guidance_scale=2", "precompute.solver=heun")
    assert found["precompute"].calls == 64 * 4 * 2 * 2
    assert found["evaluate"].calls == 2 * TEACHER_CALLS + STUDENT_CALLS


def test_a_finished_run_costs_nothing(finished: Finished):
    found = items(finished.recipe_file, finished.run_dir)
    assert set(calls(found).values()) == {0}
    assert {item.reused for item in found.values()} == {"all"}


def test_a_part_that_is_there_is_counted(finished: Finished, copied: Finished):
    (copied.run_dir / "stages" / "refine" / "student.safetensors").unlink()
    for path in list((copied.run_dir / "evaluate").glob("teacher-euler-*.json")):
        path.unlink()
    found = items(finished.recipe_file, copied.run_dir)
    assert found["refine"].reused == "-" and found["sfd_2"].reused == "all"
    assert found["evaluate"].reused == "5 of 7" and found["evaluate"].calls == 200 * 3


def test_shards_that_are_there_are_counted(tmp_path: Path):
    recipe = tiny_recipe(tmp_path)
    shards = make_trajectories(recipe, tmp_path / "run")
    (tmp_path / "run" / "trajectories" / "manifest.json").unlink()
    (tmp_path / "run" / "trajectories" / "part-00000.parquet").unlink()  # a whole file counts, listed or not
    shards = type(shards)(shards.folder, shards.spec, {})
    shards.commit(make_trajectories(recipe, tmp_path / "other").shards[1])
    found = items(tmp_path / "tiny.yaml", tmp_path / "run")["precompute"]
    assert found.reused == "32 of 64" and found.calls == 32 * 4


@pytest.mark.parametrize(
    ("objective", "passes"),
    [
        (MeanVelocity(), 3),
        (SFD(intervals=3), 9),
        (SFD(intervals=3, afs=True), 6),
        (DMD(update_ratio=1, adversarial=Adversarial(weight=0.0)), 1 + 3 + 2 + 2),
        (DMD(update_ratio=1, adversarial=Adversarial(weight=0.1)), 1 + 3 + 2 + 2 + 2 + 3),
        (DMD(update_ratio=1, adversarial=Adversarial(loss="relativistic", r1_weight=1.0)), 1 + 3 + 3 + 2 + 2 + 4),
        (DMD(update_ratio=1, intervals=3, afs=True, adversarial=Adversarial(weight=0.0)), 2 + 3 + 4 + 2),
        (DMD(update_ratio=1, intervals=3, gradient_steps=1, adversarial=Adversarial(weight=0.0)), 3 + 3 + 2 + 2),
        (DMD(update_ratio=8, adversarial=Adversarial(weight=0.1)), 1 + 3 + 2 + 1),
    ],
)
def test_calls_per_row(objective: MeanVelocity | SFD | DMD, passes: int):
    assert calls_per_row(StageConfig(objective=objective)) == passes


def test_another_recipes_directory_is_refused(finished: Finished):
    with pytest.raises(ValueError, match="seed: 3 there, 4 here"):
        items(finished.recipe_file, finished.run_dir, "seed=4")


def test_the_printed_plan_adds_up(finished: Finished, tmp_path: Path):
    out = io.StringIO()
    print_plan(load(str(finished.recipe_file)), tmp_path / "run", Console(file=out, width=200))
    total = sum(calls(items(finished.recipe_file, tmp_path)).values())
    assert f"in all: {total:,} network calls" in out.getvalue()
    assert "name: tiny" in out.getvalue() and "num_samples: 200" in out.getvalue()
    assert tree(tmp_path) == {}
