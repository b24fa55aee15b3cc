"""A run of the digits recipe that takes seconds, and what tests on it share."""

import hashlib
from pathlib import Path

import torch
from click.testing import CliRunner, Result
from rich.console import Console

from pipelines import recipe as recipes
from pipelines.artifacts import RunDir
from pipelines.cli import main
from pipelines.group import Group
from pipelines.precompute import solve, trajectory_labels
from pipelines.recipe import Recipe
from pipelines.run import Run
from pipelines.shards import ShardSet, write_shard
from pipelines.stages import StageJob
from pipelines.trainer import StageTrainer, Watch

RECIPE = """\
# Digits in seconds, for tests.
seed: 3
data: {held_out: 1597}
precompute: {num_samples: 64, shard_rows: 32, intervals: 4, batch_size: 16}
stages:
  sketch:
    objective: {name: mean_velocity}
    num_steps: 5
    batch_size: 16
    log_every: 2
    checkpoint_every: 2
    optimizers: {student: {learning_rate: 1e-3}}
  refine:
    start: sketch
    label: hd
    objective: {name: dmd, update_ratio: 2}
    num_steps: 4
    batch_size: 16
    checkpoint_every: 3
  sfd_2:
    label: sfd
    objective: {name: sfd, intervals: 2}
    num_steps: 4
    batch_size: 16
  sfd_4:
    label: sfd
    objective: {name: sfd, intervals: 4, afs: true}
    num_steps: 4
    batch_size: 16
evaluate: {num_samples: 200, batch_size: 100, pictures: 16, solvers: {euler: [1, 2], dpmpp_3m: [2]}}
"""
STAGES = ("sketch", "refine", "sfd_2", "sfd_4")
UNTRACKED = ("--set", "track.enabled=false")


def write_recipe(folder: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def open_run(recipe: Recipe, run_dir: Path) -> Run:
    return Run(recipe, RunDir(run_dir), Console(quiet=True))


def tiny_recipe(folder: Path, *settings: str) -> Recipe:
    return recipes.load(str(write_recipe(folder)), settings)


def make_trajectories(recipe: Recipe, run_dir: Path, shards: ShardSet | None = None) -> ShardSet:
    """What the precompute phase makes, without Ray."""
    job = open_run(recipe, run_dir)
    shards, scale = shards or job.trajectories, recipe.teacher.guidance_scale
    for index in shards.missing:
        ids = shards.spec.ids(index)
        labels = trajectory_labels(shards.spec, recipe.seed, ids)
        states = solve(job.teacher, recipe.precompute, scale, recipe.seed, ids, labels)
        shards.commit(write_shard(shards.folder, shards.spec, index, labels.numpy(), states))
    return shards


def prepared_run(folder: Path, text: str) -> Run:
    """A run of a recipe's text with its trajectories and images, made without Ray."""
    (folder / "small.yaml").write_text(text)
    recipe = recipes.load(str(folder / "small.yaml"))
    make_trajectories(recipe, folder / "run")
    run = open_run(recipe, folder / "run")
    run.write_images()
    return run


def trainer_of(job: StageJob, watch: Watch | None = None) -> StageTrainer:
    trainer = StageTrainer(job, Group(), watch or Watch())
    trainer.restore()
    return trainer


def trained(job: StageJob) -> StageTrainer:
    trainer = trainer_of(job)
    trainer.run()
    assert job.finished()
    return trainer


def hdistill(*arguments: object) -> Result:
    """The command line, in this process; a traceback that a person would see is raised."""
    threads = torch.get_num_threads()
    try:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)
    return result


def tree(folder: Path) -> dict[str, str]:
    """The hash of each file below a folder, by its path."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
