"""What a run would do: the resolved recipe, what would be reused, and the cost in network calls and bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hd_core.guidance import branches
from pipelines.artifacts import RunDir
from pipelines.calls import calls_of_training
from pipelines.cast import new_student
from pipelines.flops import print_costs
from pipelines.hub import is_fetched, is_hub_name
from pipelines.recipe import Recipe, to_yaml
from pipelines.run import Run, check_recipe
from pipelines.teachers import Teacher


@dataclass(frozen=True, kw_only=True)
class Item:
    """One line of the plan."""

    phase: str
    reused: str
    """What is there already: all, a part, or nothing."""
    calls: int
    """Forward passes of a network over one row; a backward pass counts as two more."""
    bytes: int
    """Bytes that are written and kept."""
    what: str


def print_plan(recipe: Recipe, run_dir: Path, console: Console) -> None:
    """Print the resolved recipe and the plan; nothing is written.

    Raises:
        ValueError: the directory belongs to another recipe.
    """
    console.print(to_yaml(recipe), markup=False, highlight=False)
    teacher = recipe.teacher
    named = recipe.teacher_training is None and is_hub_name(teacher.path)
    if named and not is_fetched(teacher.path, teacher.revision):
        console.print(
            f"{teacher.path} is not fetched yet, and a dry run fetches nothing: its costs are counted from its"
        )
        console.print("architecture, and nothing is said of what is finished already")
        print_costs(recipe, console)
        return
    table = Table("Phase", "Reused", "Network calls", "Bytes kept", "What", title=f"{recipe.name} in {run_dir}")
    items = list(plan(recipe, run_dir))
    for item in items:
        table.add_row(item.phase, item.reused, f"{item.calls:,}", f"{item.bytes:,}", item.what)
    console.print(table)
    console.print(f"in all: {sum(i.calls for i in items):,} network calls, {sum(i.bytes for i in items):,} bytes kept")


def plan(recipe: Recipe, run_dir: Path) -> Iterator[Item]:
    """The phases of a run in order."""
    directory = RunDir(run_dir)
    check_recipe(directory, recipe)
    job = Run(recipe, directory, Console(quiet=True))
    if recipe.needs_trajectories:
        yield _precompute(job)
    for name in recipe.stages:
        yield _stage(job, name)
    yield _evaluation(job)


def _precompute(job: Run) -> Item:
    shards, config = job.trajectories, job.recipe.precompute
    left = sum(len(shards.spec.ids(index)) for index in shards.missing)
    return Item(
        phase="precompute",
        reused=_share(shards.spec.rows - left, shards.spec.rows),
        calls=left * config.calls_per_sample * branches(job.recipe.teacher.guidance_scale),
        bytes=shards.spec.bytes,
        what=f"{config.num_samples:,} trajectories of {config.intervals} steps, {config.solver}",
    )


def _stage(job: Run, name: str) -> Item:
    stage = job.recipe.stages[name]
    done = job.job(name).finished() is not None
    return Item(
        phase=name,
        reused="all" if done else "-",
        calls=0 if done else stage.batch_size * calls_of_training(stage, job.job(name).guidance_scale),
        bytes=4 * _student_parameters(job.teacher, knows_steps=job.recipe.knows_steps(name)),
        what=f"{stage.objective.name} from {stage.start}, {stage.num_steps} steps of {stage.batch_size}",
    )


def _student_parameters(teacher: Teacher, *, knows_steps: bool) -> int:
    return sum(parameter.numel() for parameter in new_student(teacher, knows_steps=knows_steps).parameters())


def _evaluation(job: Run) -> Item:
    recipe = job.recipe
    generators = job.generators()
    counts = [generator.calls_per_image for generator in generators]
    stored = [job.dir.evaluation / f"{generator.key}.json" for generator in generators]
    missing = [count for count, path in zip(counts, stored, strict=True) if not path.is_file()]
    return Item(
        phase="evaluate",
        reused=_share(len(counts) - len(missing), len(counts)),
        calls=sum(missing) * recipe.evaluate.num_samples,
        bytes=len(counts) * recipe.evaluate.pictures * 3 * job.teacher.shape[1] * job.teacher.shape[2],
        what=f"{len(counts)} generators, {recipe.evaluate.num_samples:,} samples each",
    )


def _share(done: int, total: int) -> str:
    return "all" if done == total else f"{done:,} of {total:,}" if done else "-"
