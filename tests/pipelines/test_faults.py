"""`hdistill run` killed in every phase of one run, again and again: it ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts import file_hash
from tests.pipelines import tiny
from tests.pipelines.conftest import Finished

ROOT = Path(__file__).parents[2]

KILLS = {
    "precompute": ("before", "tiny/trajectories/manifest.json", 1),
    "sketch": ("before", "tiny/stages/sketch/checkpoints/step-00000004.json", 1),
    "refine": ("before", "tiny/stages/refine/student.safetensors", 1),
    "sfd_2": ("before", "tiny/stages/sfd_2/stage.json", 1),
    "evaluate": ("after", "tiny/evaluate/*-[0-9].json", 3),
    "report": ("before", "tiny/report.json", 1),
}
"""When the run is killed: one shard made at least and none listed yet; the weights of a second checkpoint written and
not yet what it says of itself; all steps made and no result; a result without its manifest; three generators measured;
no report."""


def hdistill_run(folder: Path, *kill: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, in ``folder``; killed at a moment, or left to itself."""
    moment = [str(part) for part in kill or ("before", "nothing", 1)]
    command = [sys.executable, "-m", "tests.pipelines.mortal", *moment, "run", "tiny.yaml", "--run-dir", "tiny"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.run(
        [*command, *tiny.UNTRACKED], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def survivor(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A run directory that saw every kill before it was finished, and what each process printed."""
    folder = tmp_path_factory.mktemp("mortal")
    tiny.write_recipe(folder)
    printed: dict[str, str] = {}
    for phase, kill in KILLS.items():
        result = hdistill_run(folder, *kill)
        assert result.returncode == -signal.SIGKILL, f"{phase}: {result.stdout}{result.stderr}"
        assert not result.stderr
        printed[phase] = result.stdout
    result = hdistill_run(folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not result.stderr, "not a word from Ray either"
    printed["end"] = result.stdout
    return folder / "tiny", printed


def figures(run_dir: Path) -> list[dict[str, Any]]:
    report = json.loads((run_dir / "report.json").read_text())
    timed = {"images_per_second", "train_seconds"}
    return [{key: value for key, value in row.items() if key not in timed} for row in report["rows"]]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_in_every_phase_it_ends_as_if_nothing_had_happened(
    survivor: tuple[Path, dict[str, str]], finished: Finished
) -> None:
    run_dir, _ = survivor
    for stage in tiny.STAGES:
        there, here = (path / "stages" / stage for path in (finished.run_dir, run_dir))
        assert file_hash(here / "student.safetensors") == file_hash(there / "student.safetensors"), stage
        assert _curve(here) == _curve(there), stage
        assert not (here / "checkpoints").exists()
    assert figures(run_dir) == figures(finished.run_dir)
    assert len(figures(run_dir)) == 7


def _curve(stage: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_was_finished_before_a_kill_is_said_to_be_reused(survivor: tuple[Path, dict[str, str]]) -> None:
    _, printed = survivor
    # The shard that was made and not listed is found, and the other one too where its actor was as quick.
    some = "teacher trajectories: 32 of 64 are there; making the rest" in printed["sketch"]
    assert some or any(line.split()[:2] == ["precompute", "reused"] for line in printed["sketch"].splitlines())
    assert "damaged" not in "".join(printed.values())
    phases = list(KILLS)
    for number, phase in enumerate(phases[1:], start=1):
        reused = [line.split()[0] for line in printed[phases[number]].splitlines() if line.endswith("reused")]
        expected = [name for name in ("precompute", *tiny.STAGES) if name in phases[: max(0, number - 1)]]
        made_anyway = {"sfd_4", *(["precompute"] if number == 1 else [])}  # see above
        assert [name for name in reused if name not in made_anyway] == expected, phase
