"""What trials share: teacher trajectories, images, the stages before the one that is searched, features of real images.

It lies beside them and is made once, by whoever needs it first.
"""

import time
from pathlib import Path

from rich.console import Console

from pipelines.artifacts import RunDir, read_json, write_json
from pipelines.locks import awaited
from pipelines.recipe import Recipe
from pipelines.run import Run
from pipelines.tuning.trial import ALONE, Trial, trial_folder
from pipelines.tuning.work import Work


def shared_with(work: Work, trial: Trial, seed: int) -> Path:
    """Where what comes before a trial's searched stage is, at a seed: a folder that trials share, or the trial's own.

    Raises:
        ValueError: its changes make no recipe.
    """
    if work.space.alone(trial.values):
        return trial_folder(work.sweep, trial) / ALONE / str(seed)
    return work.shared_folder(work.trial_recipe(trial.changes, seed, final=trial.kind == "final"))


def prepare(work: Work, recipe: Recipe, console: Console, folder: Path, *, check: bool = False) -> Path:
    """Make, once for all trials that share a folder, all that comes before the searched stage; returns the folder.

    Whoever comes first makes it; the others wait. ``check`` sees by their hashes that files are as they were made.
    """
    if _is_ready(folder) and not check:
        return folder
    RunDir.create(folder)
    with awaited(folder, lambda _text: None, float("inf")):
        if check or not _is_ready(folder):
            run = Run(recipe, RunDir(folder, references=work.references), console)
            _make_shared(run, work.space.stage, folder)
    return folder


def _is_ready(folder: Path) -> bool:
    return read_json(folder / "ready.json") is not None


def _make_shared(run: Run, stage: str, folder: Path) -> None:
    before, started = read_json(folder / "seconds.json") or 0.0, time.perf_counter()
    try:
        run.prepare_shards()
        for name in run.recipe.chain(stage)[:-1]:
            run.train(name)
        if not run.recipe.stages[stage].probe.every:
            _ = run.reference, run.second_reference  # what final trials are compared with
    finally:
        seconds = before + time.perf_counter() - started
        write_json(folder / "seconds.json", seconds)
    write_json(folder / "ready.json", {"seconds": seconds})
