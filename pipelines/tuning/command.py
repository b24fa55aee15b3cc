"""`hdistill tune`: from what was asked for to a sweep, and what is said of it."""

from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines.recipe import Recipe
from pipelines.tuning.config import SearchConfig
from pipelines.tuning.spaces import find_space
from pipelines.tuning.sweep import Sweep, SweepConfig
from pipelines.tuning.sweep_report import SweepReport, print_sweep
from pipelines.tuning.work import Work


def tune(name: str, recipe: Recipe, folder: Path, console: Console, **asked: Any) -> SweepReport:
    """Search a space with a recipe.

    Args:
        folder: the directory of the sweep.
        asked: the options of the command line, by their names.

    Raises:
        ValueError: the space does not fit the recipe, or what is asked for cannot be done.
    """
    space = find_space(name, recipe, asked["stage"])
    search = SearchConfig(
        sampler=asked["sampler"],
        scheduler=asked["scheduler"],
        num_trials=asked["trials"],
        slots=asked["slots"],
        cpus=asked["cpus_per_trial"],
        gpus=asked["gpus_per_trial"],
        seed=recipe.seed,
    )
    config = SweepConfig(
        search=search,
        num_random=asked["num_random"],
        num_finalists=asked["finalists"],
        num_seeds=asked["seeds"],
    )
    work = Work(
        sweep=folder.resolve(),
        recipe=recipe,
        space=space,
        metric=asked["metric"],
        rungs=asked["rungs"],
        num_samples=asked["samples"],
        score_seeds=asked["score_seeds"],
        cpus=search.cpus,
        pauses=search.scheduler == "pbt",
    )
    title = Path(name).stem
    console.print(f"[bold]{title}[/] over {recipe.name}, stage {space.stage}, in {folder}", highlight=False)
    if work.is_flattered:
        console.print(
            f"[yellow]stage {space.stage} learns from the images that its trials are scored on, which flatters those"
            " that know them best: keep some for the scores alone (--set data.validation=0.25)[/]",
            highlight=False,
        )
    report = Sweep(work, title, config, console).execute()
    print_sweep(report, console, folder)
    return report
