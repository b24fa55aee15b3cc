"""Training with 0, 1 and 2 Ray Train workers: one curve, one result, and mistakes that arrive as what they are."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.artifacts import file_hash
from pipelines.batches import BatchPlan, resident, streamed
from pipelines.cast import build
from pipelines.curve import Curve
from pipelines.run import Run
from pipelines.shards import Rows
from pipelines.stages import StageJob, TrainConfig
from pipelines.train import _fit, train_stage
from pipelines.trainer import Watch
from tests.pipelines import tiny

SMALL = """\
seed: 5
data: {held_out: 1597}
precompute: {num_samples: 72, shard_rows: 16, intervals: 4, batch_size: 72}
stages:
  sketch:
    objective: {name: mean_velocity}
    num_steps: 8
    batch_size: 32
    log_every: 1
    checkpoint_every: 3
    optimizers: {student: {learning_rate: 1e-3}}
  refine:
    objective: {name: dmd, update_ratio: 2, adversarial: {weight: 0.1}}
    num_steps: 6
    batch_size: 16
    log_every: 1
    discriminator: {layers: [1, 3], width: 16, heads: 2}
"""


@dataclass(frozen=True)
class Home:
    """Shards that every test trains from, and a folder for each result."""

    run: Run
    folder: Path

    def job(self, stage: str, name: str, **train: Any) -> StageJob:
        """A stage as the recipe has it, spread as asked, in a folder of its own."""
        config = TrainConfig(num_workers=0, **train) if "num_workers" not in train else TrainConfig(**train)
        return replace(self.run.job(stage), train=config, folder=str(self.folder / name))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("train")
    return Home(tiny.prepared_run(folder, SMALL), folder)


def curve(job: StageJob) -> list[dict[str, float]]:
    """Every figure of every step, but the seconds."""
    lines = Curve.read(job.curve)
    assert [line["step"] for line in lines] == list(range(1, job.stage.num_steps + 1))
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_same_curve(one: StageJob, other: StageJob) -> None:
    """To 1e-5, relative plus absolute.

    Measured: bit-equal in one worker; in two, 1.5e-7 apart for one player and 5.5e-6 (a logit) for three.
    """
    for here, there in zip(curve(one), curve(other), strict=True):
        assert len(here) > 2
        assert here.keys() == there.keys()
        assert all(abs(here[name] - value) <= 1e-5 + 1e-5 * abs(value) for name, value in there.items())


def trained(job: StageJob, watch: Callable[[], Watch] = Watch) -> StageJob:
    train_stage(job, watch)
    assert job.finished()
    assert not job.checkpoints.exists()
    assert not (Path(job.folder) / "ray").exists(), "Ray's own record is cleaned away"
    return job


@pytest.fixture(scope="module")
def alone(home: Home) -> StageJob:
    return trained(home.job("sketch", "alone"))


@pytest.fixture(scope="module")
def pair(ray_cluster: None, home: Home) -> StageJob:
    return trained(home.job("sketch", "pair", num_workers=2))


# Batches


@pytest.mark.ray
@pytest.mark.parametrize("first_step", [0, 5])
def test_streamed_batches_are_the_resident_ones(ray_cluster: None, home: Home, first_step: int) -> None:
    """Both workers' halves, from the start and from the middle of a window, over four epochs of four windows."""
    shards = home.run.trajectories
    plan = BatchPlan(shard_sizes=tuple(shard.rows for shard in shards.shards), batch_size=4, seed=7, window_shards=2)
    last_step = 70
    whole = _take(resident(shards, plan, first_step, slice(0, 4)), last_step - first_step)
    assert len({tuple(rows.sample_ids) for rows in whole}) == len(whole)
    for rows in (slice(0, 2), slice(2, 4)):
        here = streamed(shards, plan, first_step, last_step, rows)
        there = _take(here, last_step - first_step)
        for ours, all_ in zip(there, whole, strict=True):
            assert np.array_equal(ours.sample_ids, all_.sample_ids[rows])
            assert np.array_equal(ours.labels, all_.labels[rows])
            assert np.array_equal(ours.values, all_.values[rows])


def _take(batches: Iterator[Rows], count: int) -> list[Rows]:
    return [next(batches) for _ in range(count)]


@pytest.mark.ray
def test_streaming_orders_only_its_own_dataset(ray_cluster: None, home: Home) -> None:
    import ray.data

    shards = home.run.trajectories
    plan = BatchPlan(shard_sizes=tuple(shard.rows for shard in shards.shards), batch_size=4, seed=7)
    next(streamed(shards, plan, 0, 1, slice(0, 4)))
    assert not ray.data.DataContext.get_current().execution_options.preserve_order


# One curve


@pytest.mark.ray
def test_a_streamed_stage_is_a_resident_one(ray_cluster: None, home: Home, alone: StageJob) -> None:
    job = trained(home.job("sketch", "streamed", resident_bytes=0))
    assert curve(job) == curve(alone)
    assert file_hash(job.weights) == file_hash(alone.weights)


@pytest.mark.ray
def test_any_number_of_workers_gives_the_curve_of_none(
    ray_cluster: None, home: Home, alone: StageJob, pair: StageJob
) -> None:
    one = trained(home.job("sketch", "one", num_workers=1))
    four = trained(home.job("sketch", "four", num_workers=4, cpus_per_worker=0.5))
    as_many_as_fit = trained(home.job("sketch", "elastic", num_workers=(1, 2)))
    for job in (one, pair, four, as_many_as_fit):
        assert_same_curve(job, alone)


@pytest.mark.ray
def test_three_players_give_the_same_curve_in_two_workers(ray_cluster: None, home: Home) -> None:
    alone, pair = (trained(home.job("refine", f"refine-{n}", num_workers=n)) for n in (0, 2))
    assert {"loss/matching", "loss/fake_score", "loss/discriminator"} <= {
        name for line in curve(alone) for name in line
    }
    assert_same_curve(alone, pair)


def test_new_weights_come_from_the_seed_alone(home: Home) -> None:
    """The student's interval embedding and the discriminator are the same in every worker and after every restart."""
    job = home.job("refine", "weights")
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state, _ = build(job, home.run.teacher)
        made.append(
            {
                f"{name}/{key}": value
                for name, player in state.players.items()
                for key, value in player.network.state_dict().items()
            }
        )
        assert torch.initial_seed() == seed
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])


# Faults


@pytest.mark.ray
def test_a_killed_worker_changes_nothing(ray_cluster: None, home: Home, pair: StageJob) -> None:
    """The first of two workers, which stream, dies after step 5; all goes on from the checkpoint of step 3."""
    job = home.job("sketch", "killed", num_workers=2, resident_bytes=0, max_failures=1)
    grave = Path(job.folder) / "killed"

    def watch() -> Watch:
        def die(step: int, _values: dict[str, float]) -> None:
            if step == 5 and not grave.exists():
                grave.write_text(json.dumps(Curve.read(job.curve)))
                os.kill(os.getpid(), signal.SIGKILL)

        return Watch(logged=die)

    trained(job, watch)
    assert len(json.loads(grave.read_text())) == 5
    assert curve(job) == curve(pair)
    assert file_hash(job.weights) == file_hash(pair.weights)


@pytest.mark.ray
def test_divergence_in_a_worker_is_one_line_and_not_tried_again(ray_cluster: None, home: Home) -> None:
    job = home.job("sketch", "diverged", num_workers=2, max_failures=3)
    student = replace(job.stage.optimizers.student, learning_rate=1e30)
    job = replace(job, stage=replace(job.stage, optimizers=replace(job.stage.optimizers, student=student)))
    starts = Path(job.folder) / "starts"

    def watch() -> Watch:
        starts.parent.mkdir(parents=True, exist_ok=True)
        starts.open("a").write("start\n")
        return Watch()

    with pytest.raises(FloatingPointError, match=r"^stage sketch diverged: .* is not finite at step \d+\.") as caught:
        train_stage(job, watch)
    assert "\n" not in str(caught.value)
    assert starts.read_text() == "start\n"
    assert len(Curve.read(job.curve)) >= 1


def test_a_mistake_that_only_a_worker_can_find_is_one_line(home: Home) -> None:
    """A worker returns it, as it returns a divergence: what it raises, Ray would try again."""
    job = replace(home.job("sketch", "no-start"), start_weights=str(home.folder / "absent.safetensors"))
    with pytest.raises(ValueError, match=r"absent\.safetensors") as caught:
        train_stage(job)
    assert "\n" not in str(caught.value)


class Failing:
    """A trainer whose workers failed, in place of Ray's."""

    def __init__(self, *failures: Exception) -> None:
        self._failures = failures

    def fit(self) -> None:
        from ray.train import WorkerGroupError

        text = "".join(f"worker {rank}: in a_line_of_ours, {failure!r}" for rank, failure in enumerate(self._failures))
        raise WorkerGroupError(text, dict(enumerate(self._failures)))


def test_a_mistake_in_one_worker_is_found_among_those_it_caused_in_others() -> None:
    ours = ValueError("part-00003.parquet is damaged")
    with pytest.raises(ValueError) as caught:
        _fit(Failing(RuntimeError("connection closed by peer"), ours))
    assert caught.value is ours


def test_a_programming_error_shows_the_workers_own_traceback() -> None:
    from ray.train import WorkerGroupError

    with pytest.raises(WorkerGroupError, match=r"in a_line_of_ours, ZeroDivisionError"):
        _fit(Failing(ZeroDivisionError()))


class Interrupted:
    """What Ray does at Ctrl-C: its own handler, which it never takes back, ends the process with success."""

    def fit(self) -> None:
        signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def test_ctrl_c_stays_ctrl_c() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        _fit(Interrupted())
    assert signal.getsignal(signal.SIGINT) is before


def test_a_batch_of_fewer_rows_than_workers_is_refused_before_any_starts(home: Home, without_ray: None) -> None:
    with pytest.raises(ValueError, match=r"^stage sketch: a batch_size of 32 leaves some of 33 workers without a row$"):
        train_stage(home.job("sketch", "thin", num_workers=33))


def test_a_batch_of_fewer_rows_than_workers_is_one_line_at_the_command(home: Home, without_ray: None) -> None:
    small, run_dir = home.folder / "small.yaml", home.run.dir.path
    result = tiny.hdistill(
        "train", small, "--run-dir", run_dir, "--set", "train.num_workers=[1, 33]", *tiny.UNTRACKED, "--stage", "sketch"
    )
    assert result.exit_code == 2
    assert [line for line in result.stderr.splitlines() if line] == [
        "error: recipe: stages.sketch.batch_size: 32 rows are fewer than 33 workers",
    ]


def test_a_batch_larger_than_the_data_is_refused_before_any_worker_starts(home: Home, without_ray: None) -> None:
    job = home.job("sketch", "large", num_workers=2)
    with pytest.raises(ValueError, match=r"^stage sketch: a batch of 100 rows does not fit"):
        train_stage(replace(job, stage=replace(job.stage, batch_size=100)))


def test_divergence_in_this_process_is_the_same_error(home: Home) -> None:
    job = home.job("sketch", "diverged-here")
    student = replace(job.stage.optimizers.student, learning_rate=1e30)
    job = replace(job, stage=replace(job.stage, optimizers=replace(job.stage.optimizers, student=student)))
    with pytest.raises(FloatingPointError, match=r"^stage sketch diverged"):
        train_stage(job)


def test_the_first_worker_says_when_it_is_done(home: Home) -> None:
    told: list[str] = []
    train_stage(home.job("refine", "told"), lambda: Watch(done=lambda: told.append("done")))
    assert told == ["done"]
