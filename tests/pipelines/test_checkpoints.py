"""Checkpoints: a stage continued from one is bit for bit the stage that never stopped."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hd_core.networks.student import FlowMapStudent
from hd_core.objectives.turns import Cast
from hd_core.random import Draws
from hd_core.step import TrainState, train_step
from pipelines.cast import build
from pipelines.checkpoints import (
    load_latest,
    load_weights,
    remove_checkpoints,
    save_checkpoint,
    save_weights,
)
from pipelines.feed import Feed
from pipelines.stages import StageJob, step_seed
from pipelines.teachers import Teacher
from tests.pipelines.conftest import Finished
from tests.pipelines.tiny import open_run

INPUTS = {"seed": 3, "objective": {"name": "dmd"}}


@pytest.fixture(scope="module", params=["refine", "sketch"])
def job(request: pytest.FixtureRequest, finished: Finished) -> StageJob:
    """A stage with three players (with spectral norm), and one with one."""
    return open_run(finished.recipe, finished.run_dir).job(request.param)


@pytest.fixture(scope="module")
def teacher(finished: Finished) -> Teacher:
    return open_run(finished.recipe, finished.run_dir).teacher


def fresh(job: StageJob, teacher: Teacher, noise: int = 0) -> tuple[TrainState, Cast]:
    """A state as a stage begins it; ``noise`` makes another that must be overwritten in every part."""
    torch.manual_seed(noise)
    state, cast = build(job, teacher)
    if noise:
        for tensor in everything(state).values():
            tensor.data.add_(noise)
    return state, cast


def advance(job: StageJob, teacher: Teacher, state: TrainState, cast: Cast, to: int) -> list[dict[str, float]]:
    rows, logged = slice(0, job.stage.batch_size), []
    for batch in Feed(job, teacher, rows, state.step).batches(to):
        draws = Draws(seed=step_seed(job, state.step), rows=rows, total=job.stage.batch_size)
        values = train_step(state, job.stage.objective, cast, batch, draws, progress=state.step / 6)
        logged.append({name: value.item() for name, value in values.items()})
    return logged


def everything(state: TrainState) -> dict[str, Tensor]:
    """All tensors of a state by a name."""
    found = {f"average/{key}": value for key, value in state.average.state_dict().items()}
    for name, player in state.players.items():
        found |= {f"{name}/{key}": value for key, value in player.network.state_dict().items()}
        for index, slot in player.optimizer.state_dict()["state"].items():
            found |= {f"{name}/{index}/{key}": value for key, value in slot.items()}
    return found


def assert_same(one: TrainState, other: TrainState) -> None:
    a, b = everything(one), everything(other)
    assert a.keys() == b.keys()
    assert [key for key in a if a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key])] == []
    assert {name: player.moves for name, player in one.players.items()} == {
        name: player.moves for name, player in other.players.items()
    }
    assert one.step == other.step


def test_a_state_comes_back_bit_for_bit(job: StageJob, teacher: Teacher, tmp_path: Path):
    state, cast = fresh(job, teacher)
    advance(job, teacher, state, cast, 3)
    save_checkpoint(tmp_path, state, INPUTS)
    restored, _ = fresh(job, teacher, noise=1)
    assert load_latest(tmp_path, restored, INPUTS) == []
    assert_same(restored, state)


def test_training_goes_on_as_if_it_had_not_stopped(job: StageJob, teacher: Teacher, tmp_path: Path):
    state, cast = fresh(job, teacher)
    curve = advance(job, teacher, state, cast, 3)
    save_checkpoint(tmp_path, state, INPUTS)
    curve += advance(job, teacher, state, cast, 6)

    resumed, its_cast = fresh(job, teacher, noise=1)
    load_latest(tmp_path, resumed, INPUTS)
    assert advance(job, teacher, resumed, its_cast, 6) == curve[3:]
    assert_same(resumed, state)


def test_loading_shares_no_memory_with_the_file(job: StageJob, teacher: Teacher, tmp_path: Path):
    state, cast = fresh(job, teacher)
    advance(job, teacher, state, cast, 1)
    save_checkpoint(tmp_path, state, INPUTS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    resumed, its_cast = fresh(job, teacher)
    load_latest(tmp_path, resumed, INPUTS)
    advance(job, teacher, resumed, its_cast, 2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# One small state for all that does not need a stage


@pytest.fixture
def state(finished: Finished, teacher: Teacher) -> TrainState:
    job = open_run(finished.recipe, finished.run_dir).job("sfd_2")
    state, cast = fresh(job, teacher)
    advance(job, teacher, state, cast, 1)
    return state


def saved(folder: Path, state: TrainState, *steps: int) -> None:
    for step in steps:
        state.step = step
        for parameter in state.average.parameters():
            parameter.data.fill_(step)
        save_checkpoint(folder, state, INPUTS)


def average_of(state: TrainState) -> float:
    return next(state.average.parameters()).flatten()[0].item()


def test_the_newest_two_are_kept(state: TrainState, tmp_path: Path):
    saved(tmp_path, state, 1, 2, 3, 10)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == [f"step-{step:08d}.{kind}" for step in (3, 10) for kind in ("json", "safetensors")]
    load_latest(tmp_path, state, INPUTS)
    assert state.step == 10


def test_without_a_checkpoint_the_state_stays(state: TrainState, tmp_path: Path):
    assert load_latest(tmp_path / "none", state, INPUTS) == []
    assert state.step == 1


SPOILT = {
    "truncated": ("safetensors", lambda path: path.write_bytes(path.read_bytes()[:-8])),
    "flipped": ("safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\xff")),
    "missing": ("safetensors", Path.unlink),
    "garbage": ("json", lambda path: path.write_text("{")),
    "other": ("json", lambda path: path.write_text("[1]")),
    "lacking": ("json", lambda path: path.write_text("{}")),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_damaged_checkpoint_is_named_and_the_older_one_taken(state: TrainState, tmp_path: Path, how: str):
    saved(tmp_path, state, 4, 5)
    suffix, spoil = SPOILT[how]
    spoil(tmp_path / f"step-00000005.{suffix}")
    assert load_latest(tmp_path, state, INPUTS) == ["step-00000005.safetensors"]
    assert state.step == 4 and average_of(state) == 4


def test_when_all_are_damaged_the_stage_begins_again(state: TrainState, tmp_path: Path):
    saved(tmp_path, state, 4, 5)
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"")
    state.step = 0
    assert load_latest(tmp_path, state, INPUTS) == ["step-00000005.safetensors", "step-00000004.safetensors"]
    assert state.step == 0 and average_of(state) == 5


def test_a_checkpoint_without_its_json_was_never_finished(state: TrainState, tmp_path: Path):
    saved(tmp_path, state, 4, 5)
    (tmp_path / "step-00000005.json").unlink()
    assert load_latest(tmp_path, state, INPUTS) == []
    assert state.step == 4


def test_a_checkpoint_of_other_inputs_is_refused_by_name(state: TrainState, tmp_path: Path):
    saved(tmp_path, state, 4)
    with pytest.raises(ValueError, match=r"checkpoint .* was made from other inputs: objective\.name: dmd there, sfd"):
        load_latest(tmp_path, state, {"seed": 3, "objective": {"name": "sfd"}})


def test_remove_checkpoints(state: TrainState, tmp_path: Path):
    saved(tmp_path / "checkpoints", state, 4)
    remove_checkpoints(tmp_path / "checkpoints")
    remove_checkpoints(tmp_path / "checkpoints")
    assert list(tmp_path.iterdir()) == []


def test_files_are_safetensors_and_json_only(state: TrainState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle")

    for module, name in ((torch, "save"), (torch, "load"), (pickle, "dump"), (pickle, "load"), (pickle, "loads")):
        monkeypatch.setattr(module, name, refuse)
    saved(tmp_path, state, 4)
    load_latest(tmp_path, state, INPUTS)
    about = json.loads((tmp_path / "step-00000004.json").read_text())
    assert about["step"] == 4 and about["moves"] == {"student": 2} and about["inputs"] == INPUTS
    assert "student/optimizer/0/exp_avg" in load_file(tmp_path / "step-00000004.safetensors")


# Weights


def test_weights_round_trip(teacher: Teacher, tmp_path: Path):
    one, other = (FlowMapStudent(copy.deepcopy(teacher.backbone)) for _ in range(2))
    for parameter in one.parameters():
        nn.init.normal_(parameter)
    save_weights(tmp_path / "w.safetensors", one)
    load_weights(tmp_path / "w.safetensors", other)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("spoil", [lambda p: p.write_bytes(p.read_bytes()[:-5]), Path.unlink])
def test_damaged_or_missing_weights_are_named(tmp_path: Path, spoil: object):
    path = tmp_path / "w.safetensors"
    save_weights(path, nn.Linear(2, 2))
    assert callable(spoil)
    spoil(path)
    with pytest.raises(ValueError, match=r"w\.safetensors does not hold this network's weights") as raised:
        load_weights(path, nn.Linear(2, 2))
    assert len(str(raised.value).splitlines()) == 1


def test_weights_of_another_network_are_refused(tmp_path: Path):
    save_weights(tmp_path / "w.safetensors", nn.Linear(2, 3))
    with pytest.raises(ValueError, match="does not hold this network's weights"):
        load_weights(tmp_path / "w.safetensors", nn.Linear(2, 2))
