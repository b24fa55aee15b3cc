"""What stored trajectories save: an SFD epoch that reads them, against one that makes each anew with the teacher.

    python -m benchmarks.sfd_epoch [--quick]

Both students, optimisers and batches are those of the digits recipe, and both go through `pipelines.feed.Feed` and
`hd_core.step.train_step`. One reads shards that are held in memory, as training does; the other draws noise and runs
the teacher's solver over the whole dense grid, without gradients, before each iteration's turns, as SFD's authors do.
Every student step spans four of the teacher's. They take turns in one process, iteration by iteration; seconds are of
one core's own time, so that other work on the machine does not count, and figures are medians over rounds.

Making the shards is measured without Ray. It has paid for itself after making / (inline - stored) epochs, or after
that share of training runs as long as the digits recipe's, each of which reads the shards once (from the system's
file cache here).
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipelines import recipe as recipes  # before torch: `pipelines` sets how its threads wait

# isort: split
import torch
from rich.console import Console

from hd_core.guidance import branches
from hd_core.objectives.sfd import SFD
from hd_core.objectives.turns import Batch, Cast, Need
from hd_core.random import Draws
from hd_core.solvers import SOLVERS
from hd_core.step import train_step
from hd_core.times import positions
from hd_core.types import Grid, Images
from pipelines.artifacts import RunDir
from pipelines.feed import Feed
from pipelines.group import Group
from pipelines.precompute import PrecomputeConfig, solve, trajectory_labels
from pipelines.process import prepare_process
from pipelines.run import Run
from pipelines.shards import ShardSet, write_shard
from pipelines.stages import StageJob, step_seed
from pipelines.trainer import StageTrainer, Watch

DIGITS = recipes.load("digits")
LIKE = DIGITS.stages["sfd_3"]
RUN_EPOCHS = LIKE.num_steps * LIKE.batch_size / DIGITS.precompute.num_samples
"""Epochs of one training run."""
SUBSTEPS = 4
"""Teacher steps within one of the student's (K)."""
DEFAULT = "3 steps, AFS"
"""SFD's own recipe for two calls: three steps, the first of them analytical, and K = 4."""
ROWS: dict[str, dict[str, Any]] = {
    DEFAULT: {"afs": True},
    "3 steps": {},
    "3 steps, guidance 2": {"guidance": 2.0},
    "3 steps, Heun": {"solver": "heun"},
    "1 step": {"steps": 1},
    "2 steps": {"steps": 2},
    "5 steps": {"steps": 5},
}
QUICK_ROWS = (DEFAULT, "3 steps", "1 step")
WARM_UP = 2
"""Iterations before the first round; reading the shards falls into them."""
SECONDS = ("inline", "stored", "reading", "making")


@dataclass(frozen=True, kw_only=True)
class InlineSFD(SFD):
    """SFD that makes the teacher's trajectory in every iteration, where the student wants it."""

    made: PrecomputeConfig = field(default_factory=PrecomputeConfig)
    """What would be stored."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    @torch.no_grad()
    def _targets(self, cast: Cast, batch: Batch, grid: Grid) -> list[Images]:
        dense = self.made.grid.times(self.made.intervals)
        states = list(SOLVERS[self.made.solver].states(cast.teacher, batch.noise, dense, batch.condition))
        return [states[place] for place in positions(dense, grid)]


def recipe(
    samples: int, iterations: int, *, steps: int = 3, guidance: float = 1.0, afs: bool = False, solver: str = "dpmpp_3m"
) -> recipes.Recipe:
    """The digits recipe with one stage, of SFD in so many steps, and the trajectories that it needs."""
    made = replace(DIGITS.precompute, num_samples=samples, intervals=SUBSTEPS * steps, solver=solver)
    stage = replace(LIKE, num_steps=iterations, objective=SFD(intervals=steps, afs=afs))
    teacher = replace(DIGITS.teacher, guidance_scale=guidance)
    return replace(DIGITS, teacher=teacher, precompute=made, stages={"sfd": stage})


def inline(job: StageJob, made: PrecomputeConfig) -> StageJob:
    """The same stage without stored trajectories."""
    assert isinstance(job.stage.objective, SFD)
    objective = InlineSFD(**vars(job.stage.objective), made=made)
    return replace(job, stage=replace(job.stage, objective=objective), trajectories=None)


class Side:
    """One of the two ways to train, with a student of its own."""

    def __init__(self, job: StageJob) -> None:
        self.job, self.trainer = job, StageTrainer(job, Group(), Watch())
        self.batches = Feed(job, self.trainer.teacher, self.trainer.rows, 0).batches(job.stage.num_steps)

    def iterate(self) -> float:
        """Seconds of one iteration, its batch included."""
        started, state, stage = time.process_time(), self.trainer.state, self.job.stage
        draws = Draws(seed=step_seed(self.job, state.step), rows=self.trainer.rows, total=stage.batch_size)
        progress = state.step / stage.num_steps
        train_step(state, stage.objective, self.trainer.cast, next(self.batches), draws, progress=progress)
        return time.process_time() - started


def make(run: Run, shards: ShardSet) -> float:
    """Solve and write every shard in this process; the seconds."""
    settings = run.recipe
    started = time.process_time()
    for index in shards.missing:
        ids = shards.spec.ids(index)
        labels = trajectory_labels(shards.spec, settings.seed, ids)
        states = solve(run.teacher, settings.precompute, settings.teacher.guidance_scale, settings.seed, ids, labels)
        shards.commit(write_shard(shards.folder, shards.spec, index, labels.numpy(), states))
    return time.process_time() - started


def read(shards: ShardSet) -> float:
    """Seconds of bringing all shards into memory."""
    started = time.process_time()
    shards.read(range(shards.spec.num_shards))
    return time.process_time() - started


def measure(samples: int, rounds: int, **row: Any) -> list[dict[str, float]]:
    """Seconds of each round: an epoch of both sides, and the shards made and read in a folder of their own."""
    iterations = samples // LIKE.batch_size
    settings = recipe(samples, WARM_UP + rounds * iterations, **row)
    with TemporaryDirectory() as folder:
        run = Run(settings, RunDir.create(Path(folder)), Console(quiet=True))
        make(run, run.trajectories)
        job = run.job("sfd")
        sides = {"inline": Side(inline(job, run.recipe.precompute)), "stored": Side(job)}
        epochs(sides, WARM_UP)
        again = [ShardSet.open(run.dir.path / f"again_{number}", job.data[0].spec) for number in range(rounds)]
        return [{**epochs(sides, iterations), "making": make(run, one), "reading": read(one)} for one in again]


def epochs(sides: Mapping[str, Side], iterations: int) -> dict[str, float]:
    """Seconds of so many iterations of each side; they take turns, and each comes first in half of them."""
    taken = dict.fromkeys(sides, 0.0)
    for number in range(iterations):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            taken[name] += sides[name].iterate()
    return taken


def figures(measured: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over rounds, and what follows from them."""
    median = {name: statistics.median(one[name] for one in measured) for name in SECONDS}
    ratios = [one["inline"] / one["stored"] for one in measured]
    saved = median["inline"] - median["stored"]
    return {
        **{f"{name}_seconds": round(seconds, 4) for name, seconds in median.items()},
        "stored_over_inline": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "epochs_to_pay": round(median["making"] / saved, 2),
        "runs_to_pay": round(median["making"] / (RUN_EPOCHS * saved - median["reading"]), 2),
    }


def calls(**row: Any) -> str:
    """Network calls of one iteration: the teacher's and the student's."""
    made = recipe(LIKE.batch_size, 1, **row)
    objective = made.stages["sfd"].objective
    assert isinstance(objective, SFD)
    teacher = made.precompute.calls_per_sample * branches(made.teacher.guidance_scale)
    return f"{teacher} + {objective.intervals - objective.afs}"


def line(name: str, found: Mapping[str, Any]) -> str:
    """One row of the table."""
    seconds = {key: found[f"{key}_seconds"] for key in SECONDS}
    first = seconds["stored"] + seconds["reading"]
    timed = (seconds["inline"], first, seconds["stored"])
    ratio = f"{found['stored_over_inline']:.2f} ({found['range'][0]:.2f} to {found['range'][1]:.2f})"
    cells = [calls(**ROWS[name]), *(f"{one:.2f}" for one in timed), f"{1000 * seconds['reading']:.1f}", ratio]
    cells += [f"{seconds['making']:.2f}", f"{found['epochs_to_pay']:.2f}", f"{found['runs_to_pay']:.2f}"]
    return f"| {' | '.join([name, *cells])} |"


def main() -> None:
    """Every row, then the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    prepare_process(1)
    samples, rounds, names = (256, 2, QUICK_ROWS) if quick else (1024, 5, tuple(ROWS))
    print(
        "| student | calls, teacher + student | inline, s | stored, first epoch, s | stored, later, s | reading, ms",
        end="",
    )
    print(f" | inline / stored | making, s | paid after epochs | after runs of {RUN_EPOCHS:g} epochs |\n{'|---' * 10}|")
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        found[name] = figures(measure(samples, rounds, **ROWS[name]))
        print(line(name, found[name]), flush=True)
    about = {"samples": samples, "rounds": rounds, "run_epochs": RUN_EPOCHS}
    print(json.dumps({"stored_over_inline": found[DEFAULT]["stored_over_inline"], **about, "rows": found}))


if __name__ == "__main__":
    main()
