"""One finished tiny run for all tests of the pipelines, made through the command line, with tracking, without Ray."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines import recipe as recipes
from pipelines.recipe import Recipe
from tests.pipelines import tiny


@dataclass(frozen=True)
class Finished:
    """A run directory that holds everything; tests read it, or work on a copy."""

    recipe_file: Path
    run_dir: Path
    output: str
    """What the command printed."""

    @property
    def recipe(self) -> Recipe:
        return recipes.load(str(self.recipe_file))

    @property
    def arguments(self) -> tuple[Path, str, Path]:
        return self.recipe_file, "--run-dir", self.run_dir


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr("pipelines.process.available_cpus", lambda: 1)
        recipe_file, run_dir = tiny.write_recipe(folder), folder / "runs" / "tiny"
        tiny.make_trajectories(recipes.load(str(recipe_file)), run_dir)
        result = tiny.hdistill("run", recipe_file, "--run-dir", run_dir)
    assert result.exit_code == 0, result.output
    return Finished(recipe_file=recipe_file, run_dir=run_dir, output=result.output)


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Finished:
    """The finished run in a directory of its own, to change or to spoil."""
    run_dir = tmp_path / "tiny"
    shutil.copytree(finished.run_dir, run_dir)
    return Finished(recipe_file=finished.recipe_file, run_dir=run_dir, output="")


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting Ray fails the test."""

    def refuse(**_: object) -> None:
        raise AssertionError("this test must not start Ray")

    monkeypatch.setattr("pipelines.cluster.ensure_ray", refuse)
