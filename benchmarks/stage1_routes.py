"""The two ways to a sketch, by what they cost: stored trajectories against the MeanFlow identity, on digits.

    python -m benchmarks.stage1_routes [--quick] [--seeds 0 1 2] [--routes NAME ...]

Both students start from the teacher and are looked at every so many iterations: FID of 2,000 one-step samples against
the training images. Seconds are of one core's own time, so that other work on the machine does not count; those of the
trajectories are shown charged to one training run and to five. Sampling and metrics are left out.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipelines import recipe as recipes  # before torch: `pipelines` sets how its threads wait

# isort: split
import torch
from rich.console import Console

from hd_core.random import Draws
from hd_core.step import train_step
from pipelines.artifacts import RunDir
from pipelines.feed import Feed
from pipelines.group import Group
from pipelines.precompute import solve, trajectory_labels
from pipelines.probing import Probe
from pipelines.run import Run
from pipelines.shards import write_shard
from pipelines.stages import step_seed
from pipelines.trainer import StageTrainer, Watch

Point = tuple[int, float, float]
"""Iteration, seconds, FID."""
OPTIMIZERS = {"student": {"learning_rate": 5e-4, "warmup_moves": 50}}
ROUTES: dict[str, dict[str, Any]] = {
    "mean_velocity": {"objective": {"name": "mean_velocity", "full_share": 0.5}},
    "meanflow": {"objective": {"name": "meanflow", "power": 0.5, "equal_share": 0.5, "full_share": 0.25}},
    "meanflow, exact derivative": {"objective": {"name": "meanflow", "derivative": "exact"}},
}


def recipe(seed: int, steps: int, every: int, samples: int) -> recipes.Recipe:
    """Each route as a stage."""
    probe = {"every": every, "num_samples": min(2000, samples)}
    common: dict[str, Any] = {"num_steps": steps, "optimizers": OPTIMIZERS, "probe": probe, "ema_decay": 0.98}
    stages = {f"route_{number}": {**common, **route} for number, route in enumerate(ROUTES.values())}
    precompute = {"num_samples": samples, "intervals": 12}
    return recipes.from_dict({"name": "routes", "seed": seed, "precompute": precompute, "stages": stages})


def make_trajectories(run: Run) -> float:
    """The precompute phase in this process; its seconds."""
    shards, config = run.trajectories, run.recipe.precompute
    started = time.process_time()
    for index in shards.missing:
        ids = shards.spec.ids(index)
        labels = trajectory_labels(shards.spec, run.recipe.seed, ids)
        states = solve(run.teacher, config, 1.0, run.recipe.seed, ids, labels)
        shards.commit(write_shard(shards.folder, shards.spec, index, labels.numpy(), states))
    return time.process_time() - started


def train(run: Run, name: str) -> Iterator[Point]:
    """A point for every look at a stage's student."""
    job = run.job(name)
    trainer = StageTrainer(job, Group(), Watch())
    probe, seconds = Probe(job, trainer.teacher, trainer.cast), 0.0
    batches = Feed(job, trainer.teacher, trainer.rows, 0).batches(job.stage.num_steps)
    for step in range(job.stage.num_steps):
        started = time.process_time()
        draws = Draws(seed=step_seed(job, step), rows=trainer.rows, total=job.stage.batch_size)
        train_step(trainer.state, job.stage.objective, trainer.cast, next(batches), draws, progress=0.0)
        seconds += time.process_time() - started
        if (step + 1) % job.stage.probe.every == 0:
            yield step + 1, seconds, probe.look(trainer.state)["probe/fid"]


def measure(seed: int, quick: bool, routes: list[str]) -> tuple[float, dict[str, list[Point]]]:
    """Seconds of the trajectories, and every route's points."""
    steps, every, samples = (8, 4, 512) if quick else (1200, 100, 8192)
    with TemporaryDirectory() as folder:
        run = Run(recipe(seed, steps, every, samples), RunDir.create(Path(folder) / "run"), Console(quiet=True))
        run.partial(lambda job: job.write_images())
        precompute = make_trajectories(run)
        return precompute, {name: list(train(run, f"route_{list(ROUTES).index(name)}")) for name in routes}


def show(results: list[tuple[float, dict[str, list[Point]]]]) -> dict[str, Any]:
    """Print FID against seconds; the figures of the last line."""
    precompute = statistics.mean(seconds for seconds, _ in results)
    print("| route | iterations | training, s | + trajectories / 1 run | / 5 runs | FID to training images |")
    print("|---" * 6 + "|")
    figures: dict[str, Any] = {"precompute_seconds": round(precompute, 1)}
    for name in results[0][1]:
        for points in zip(*(routes[name] for _, routes in results), strict=True):
            step, fids = points[0][0], [fid for _, _, fid in points]
            seconds = statistics.mean(second for _, second, _ in points)
            made = precompute if name == "mean_velocity" else 0.0
            spread = f"{statistics.mean(fids):.2f} ({min(fids):.2f} to {max(fids):.2f})"
            print(f"| {name} | {step} | {seconds:.1f} | {seconds + made:.1f} | {seconds + made / 5:.1f} | {spread} |")
            figures[f"{name} {step}"] = {"seconds": round(seconds, 1), "fid": round(statistics.mean(fids), 3)}
    return figures


def main() -> None:
    """Every seed, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--routes", choices=list(ROUTES), nargs="+", default=list(ROUTES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = options.seeds[:1] if options.quick else options.seeds
    print(json.dumps(show([measure(seed, options.quick, options.routes) for seed in seeds])))


if __name__ == "__main__":
    main()
