"""Averages scored beside training: the figures of a probe that stops for them, each made once, whatever is killed."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts import file_hash, read_json
from pipelines.checkpoints import weights_of
from pipelines.curve import Curve
from pipelines.probing import BestWeights, Probe
from pipelines.scoring import leave, score, scores, waiting
from pipelines.stages import StageJob, TrainConfig
from pipelines.train import train_stage
from pipelines.trainer import Watch
from tests.pipelines import tiny
from tests.pipelines.probed import Home, make_home, trained


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return make_home(tmp_path_factory.mktemp("scoring"))


@pytest.fixture(scope="module")
def stopping(home: Home) -> StageJob:
    """Scored in this process, between iterations."""
    return trained(home.job("sketch", "stopping", keep="best"))


def beside(home: Home, name: str, **train: Any) -> StageJob:
    job = home.job("sketch", name, keep="best", beside=True)
    return replace(job, train=TrainConfig(num_workers=1, **train))


def assert_same(here: StageJob, there: StageJob) -> None:
    """One worker's curve, scores, best step and weights, bit for bit."""
    ours, theirs = (
        [{k: v for k, v in line.items() if k != "seconds"} for line in Curve.read(job.curve)] for job in (here, there)
    )
    assert ours == theirs
    assert sum("probe/fid" in line for line in ours) == 3
    kept = ("best_step", "best_probe_fid", "kept", "sha256")
    assert [read_json(here.manifest)[key] for key in kept] == [read_json(there.manifest)[key] for key in kept]
    assert file_hash(here.other_weights) == file_hash(there.other_weights)
    assert not here.scores.exists()


@pytest.mark.ray
def test_scores_beside_training_are_those_that_stop_it(ray_cluster: None, home: Home, stopping: StageJob) -> None:
    job, told = beside(home, "beside"), Path(home.folder / "told")

    def watch() -> Watch:
        def tell(step: int, values: dict[str, float]) -> None:
            with told.open("a") as file:
                file.writelines(f"{step} {values[name]:.9g}\n" for name in values if name == "probe/fid")

        return Watch(logged=tell)

    train_stage(job, watch)
    assert_same(job, stopping)
    fids = {line["step"]: line["probe/fid"] for line in Curve.read(job.curve) if "probe/fid" in line}
    assert told.read_text().splitlines() == [f"{step} {fid:.9g}" for step, fid in fids.items()]


@pytest.mark.ray
def test_a_killed_worker_changes_no_score(ray_cluster: None, home: Home, stopping: StageJob) -> None:
    """It dies after step 5, when the averages of steps 2 and 4 may or may not have their scores."""
    job = beside(home, "killed", max_failures=1)
    grave = Path(job.folder) / "killed"

    def watch() -> Watch:
        def die(step: int, _values: dict[str, float]) -> None:
            if step == 5 and not grave.exists():
                grave.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        return Watch(logged=die)

    train_stage(job, watch)
    assert grave.exists()
    assert_same(job, stopping)


def test_a_score_is_made_once_and_the_best_average_stays(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    job = home.job("sketch", "once", beside=True)
    trainer = tiny.trainer_of(home.job("sketch", "once-trainer"))
    leave(job, 2, weights_of(trainer.state.average))
    leave(job, 4, weights_of(trainer.state.average))
    assert waiting(job, 3) == [2]
    first = score(job, 2)
    assert first == Probe(job, trainer.teacher).values(trainer.state.average)
    assert (waiting(job, 4), scores(job)) == ([4], {2: first})
    best = BestWeights(job)
    assert (best.step, best.fid) == (2, first["probe/fid"])
    monkeypatch.setattr(Probe, "values", lambda *_: pytest.fail("measured again"))
    leave(job, 2, weights_of(trainer.state.average))
    assert score(job, 2) == first
    assert waiting(job, 4) == [4]


def test_scores_of_another_training_are_not_taken(home: Home) -> None:
    job = home.job("sketch", "other", beside=True)
    trainer = tiny.trainer_of(home.job("sketch", "other-trainer"))
    leave(job, 2, weights_of(trainer.state.average))
    score(job, 2)
    other = replace(job, inputs={**job.inputs, "seed": 77})
    leave(other, 2, weights_of(trainer.state.average))
    assert (scores(other), waiting(other, 2)) == ({}, [2])
