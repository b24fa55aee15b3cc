"""How the work in a directory is recorded: one run in the tracking store, the same one again after a resume."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from pipelines.artifacts import RunDir, read_json, write_json
from pipelines.process import commit
from pipelines.recipe import Recipe
from pipelines.storage import local_stand_in
from pipelines.tracking import Tracker, open_tracker


def tracker_of(recipe: Recipe, run_dir: RunDir, tags: Mapping[str, object]) -> Tracker:
    """The tracker of a directory, opened under the recipe's name; its run's id is kept in the directory."""
    state = read_json(run_dir.state) or {}
    tracker = open_tracker(
        recipe.track,
        recipe_name=recipe.name,
        run_name=run_dir.path.name,
        run_dir=run_dir.path,
        default_store=default_store(run_dir),
        resume_run_id=state.get("run_id"),
        tags={**tags, "fingerprint": recipe.fingerprint, "hdistill": version("hdistill"), **_commit()},
    )
    write_json(run_dir.state, {**state, "run_id": tracker.run_id})
    return tracker


def _commit() -> dict[str, str]:
    """The commit of the code, where it is known; MLflow shows the second as the run's version."""
    return {"commit": commit(), "mlflow.source.git.commit": commit().rstrip("+")} if commit() else {}


@contextmanager
def recorded(tracker: Tracker) -> Iterator[Tracker]:
    """Close a run with how its work ended."""
    try:
        yield tracker
        tracker.finish("FINISHED")
    except BaseException as error:
        tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise


def default_store(run_dir: RunDir) -> Path:
    """The sqlite file for tracking, shared by the run directories beside this one; `runs/mlflow.db` for remote ones."""
    return local_stand_in(run_dir.path).resolve().parent / "mlflow.db"
