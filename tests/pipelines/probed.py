"""A training of each kind that is looked at while it runs, and what tests on it share."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.curve import Curve
from pipelines.run import Run
from pipelines.stages import StageJob
from tests.pipelines import tiny

RECIPE = """\
seed: 5
data: {held_out: 1697}
precompute: {num_samples: 32, shard_rows: 32, intervals: 4, batch_size: 32}
stages:
  sketch:
    objective: {name: mean_velocity}
    num_steps: 6
    batch_size: 8
    log_every: 1
    checkpoint_every: 3
    probe: {every: 2, num_samples: 40}
    optimizers: {student: {learning_rate: 1e-3}}
  refine:
    start: sketch
    objective: {name: dmd, update_ratio: 2}
    num_steps: 5
    batch_size: 8
    log_every: 1
    checkpoint_every: 2
    probe: {every: 2, num_samples: 20, fake_score_moves: 2}
    discriminator: {layers: [1, 3], width: 16, heads: 2}
"""


@dataclass(frozen=True)
class Home:
    """Data that every test trains from, and a folder for each result."""

    run: Run
    folder: Path

    def job(self, stage: str, name: str, **probe: Any) -> StageJob:
        """A stage with other probes, in a folder of its own."""
        job = self.run.job(stage)
        changed = replace(job.stage, probe=replace(job.stage.probe, **probe))
        return replace(job, stage=changed, folder=str(self.folder / name), start_weights="")


def make_home(folder: Path, recipe: str = RECIPE) -> Home:
    """Trajectories and images, without Ray."""
    return Home(tiny.prepared_run(folder, recipe), folder)


def trained(job: StageJob) -> StageJob:
    tiny.trained(job)
    return job


def points(job: StageJob) -> list[dict[str, float]]:
    """The curve without its clock and its probes."""
    kept = [{k: v for k, v in line.items() if k != "seconds" and "probe/" not in k} for line in Curve.read(job.curve)]
    assert kept
    return kept
