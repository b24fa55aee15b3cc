"""Two real workers, a process each: every objective trains to the same weights on both, and to those of one worker.

The workers live once for the whole file. They train everything, leave behind what they have, and the tests compare.
"""

from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from hd_core.objectives.adversarial import Adversarial
from hd_core.objectives.dmd import DMD
from hd_core.objectives.mean_velocity import MeanVelocity
from hd_core.objectives.turns import Objective
from hd_core.random import Draws
from hd_core.step import OptimizerConfig, TrainState, train_step
from pipelines.group import Group
from tests.oracles import GAUSSIAN
from tests.toys import Perceptron, batch_of, cast_of, networks, rows_of, state_of

WORKERS, ROWS, UNEVEN_ROWS, STEPS = 2, 6, 5, 3
OPTIMIZER = OptimizerConfig(learning_rate=5e-3, weight_decay=0.01)
CLIPPED = OptimizerConfig(learning_rate=5e-3, max_grad_norm=0.1)
MATCHED = DMD(update_ratio=1, adversarial=Adversarial(weight=0.5, weighting="matched"))
Record = dict[str, Tensor]
Found = dict[str, list[Record]]


def registry() -> dict[str, Objective]:
    """Every objective that is known to conform."""
    from tests.hd_core.test_objectives import OBJECTIVES

    return OBJECTIVES


def whole_at_any_time() -> dict[str, Objective]:
    """Those that never need to know of the whole batch at once."""
    return {name: objective for name, objective in registry().items() if "matched" not in name}


def train(
    objective: Objective,
    group: Group,
    *,
    total: int = ROWS,
    passes: int = 1,
    averaged: bool = True,
    shared_mean: bool = True,
) -> list[Record]:
    """Weights and gradients after each step on this worker's rows."""
    made, rows, records = networks(objective.players), group.rows(total), list[Record]()
    state = state_of(made, OPTIMIZER, CLIPPED)
    cast = cast_of(made, mean=group.mean) if shared_mean else cast_of(made)
    for step in range(STEPS):
        train_step(
            state,
            objective,
            cast,
            rows_of(batch_of(total, first=total * step), rows),
            Draws(seed=step, rows=rows, total=total),
            progress=step / STEPS,
            synchronise=group.average if averaged else lambda _: None,
            workers=group.size,
            passes=passes,
        )
        records.append(record(state))
    return records


def record(state: TrainState) -> Record:
    found = {f"average:{path}": value.clone() for path, value in state.average.state_dict().items()}
    for name, player in state.players.items():
        found |= {f"{name}:{path}": value.clone() for path, value in player.network.state_dict().items()}
        found |= gradients(player.network, f"gradient of {name}")
    return found


def gradients(network: nn.Module, name: str = "gradient") -> Record:
    return {f"{name}:{path}": p.grad.clone() for path, p in network.named_parameters() if p.grad is not None}


def tangent_loss(student: Callable[..., Tensor], rows: slice) -> Tensor:
    """MeanFlow's loss in short: the student against ``v - (t - r) du/dt``, with the derivative from one JVP."""
    batch = rows_of(batch_of(ROWS), rows)
    x, t, r = batch.noise, torch.full((len(batch.noise),), 0.8).double(), torch.full((len(batch.noise),), 0.2).double()
    v = GAUSSIAN.velocity(x, t)
    u, change, *_ = torch.func.jvp(lambda x, t: student(x, t, r, batch.condition), (x, t), (v, torch.ones_like(t)))
    return (u - (v - 0.6 * change).detach()).square().mean()


def tangent_gradients(group: Group) -> dict[str, Record]:
    """Gradients of `tangent_loss`, past a wrapper that is meant to average them, and averaged by hand."""
    rows, found, bare = group.rows(ROWS), dict[str, Record](), Perceptron(2, seed=1)
    tangent_loss(bare, rows).backward()
    group.average([parameter.grad for parameter in bare.parameters() if parameter.grad is not None])
    found["by hand"] = gradients(bare)
    if group.size > 1:
        wrapped = DistributedDataParallel(Perceptron(2, seed=1))
        tangent_loss(wrapped.module, rows).backward()
        found["past the wrapper"] = gradients(wrapped.module)
        wrapped.zero_grad()
        batch, t = rows_of(batch_of(ROWS), rows), torch.full((rows.stop - rows.start,), 0.8).double()
        wrapped(batch.noise, t, 0.2 * t, batch.condition).square().mean().backward()
        found["through the wrapper"] = gradients(wrapped.module)
    return found


def everything(group: Group) -> Found:
    found = {name: train(objective, group) for name, objective in registry().items()}
    for name, objective in {**registry(), "matched": MATCHED}.items():
        found[f"{name}, uneven"] = train(objective, group, total=UNEVEN_ROWS)
    for name, objective in whole_at_any_time().items():
        found[f"{name}, in passes"] = train(objective, group, total=UNEVEN_ROWS, passes=2)
    found["not averaged"] = train(MeanVelocity(), group, averaged=False)
    found["matched"] = train(MATCHED, group)
    found["matched, own mean"] = train(MATCHED, group, shared_mean=False)
    return found | {name: [gradient] for name, gradient in tangent_gradients(group).items()}


def work(rank: int, folder: str) -> None:
    """The body of a worker."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    distributed.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=WORKERS, timeout=timedelta(seconds=120)
    )
    torch.save(everything(Group(rank=rank, size=WORKERS)), f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each of two workers has."""
    folder = tmp_path_factory.mktemp("workers")
    multiprocessing.spawn(work, (str(folder),), nprocs=WORKERS)  # pyright: ignore[reportPrivateImportUsage]
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORKERS)]


@pytest.fixture(scope="module")
def alone() -> Found:
    """What one worker has that does it all."""
    return everything(Group())


def same(a: Record, b: Record) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("step", [1, STEPS])
@pytest.mark.parametrize("name", [*registry(), "matched"])
def test_two_workers_train_as_one(name: str, step: int, workers: list[Found], alone: Found):
    left, right = (worker[name][step - 1] for worker in workers)
    whole = alone[name][step - 1]
    assert same(left, right)
    assert left.keys() == whole.keys()
    assert any(key.startswith("gradient of student:") for key in whole)
    for key, value in whole.items():
        torch.testing.assert_close(left[key], value, rtol=1e-10, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", [*registry(), "matched"])
def test_workers_whose_shares_differ_train_as_one(name: str, workers: list[Found], alone: Found):
    """Three rows and two: a mean over workers of their own means would be another one."""
    assert_as_one([worker[f"{name}, uneven"] for worker in workers], alone[f"{name}, uneven"])


@pytest.mark.parametrize("name", whole_at_any_time())
def test_passes_add_up_to_the_whole_batch(name: str, workers: list[Found], alone: Found):
    """In one worker (three rows and two), and in two of them (two and one, one and one)."""
    assert_as_one([alone[f"{name}, in passes"]], alone[f"{name}, uneven"])
    assert_as_one([worker[f"{name}, in passes"] for worker in workers], alone[f"{name}, uneven"])


def assert_as_one(workers: list[list[Record]], alone: list[Record]) -> None:
    for here, whole in zip(workers[0], alone, strict=True):
        assert here.keys() == whole.keys()
        for key, value in whole.items():
            torch.testing.assert_close(
                here[key], value, rtol=1e-9, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
            )
    assert all(same(other[-1], workers[0][-1]) for other in workers)


def test_weights_moved(alone: Found):
    """What is compared above is not where it started."""
    for name, objective in registry().items():
        for player, network in networks(objective.players).items():
            start, moved = network.state_dict(), alone[name][-1]
            distances = [(moved[f"{player}:{path}"] - value).abs().max() for path, value in start.items()]
            assert max(distances) > 1e-3


def test_without_averaging_workers_part(workers: list[Found]):
    left, right = (worker["not averaged"][0] for worker in workers)
    assert not same(left, right)


def test_without_a_shared_mean_workers_agree_on_something_else(workers: list[Found], alone: Found):
    """A weight that is matched on each worker's own rows is another one than the whole batch's."""
    left, right = (worker["matched, own mean"][0] for worker in workers)
    assert same(left, right)
    name = "gradient of student:layers.0.weight"
    assert (left[name] - alone["matched"][0][name]).abs().max() > 1e-6


class TestTangents:
    """Why gradients are averaged by hand, and not by DistributedDataParallel."""

    def test_a_jvp_past_the_wrapper_is_not_averaged(self, workers: list[Found]):
        left, right = (worker["past the wrapper"][0] for worker in workers)
        assert left.keys() == right.keys()
        assert max((left[name] - right[name]).abs().max() for name in left) > 1e-3

    def test_an_ordinary_call_through_it_is(self, workers: list[Found]):
        left, right = (worker["through the wrapper"][0] for worker in workers)
        assert left
        assert same(left, right)

    def test_by_hand_workers_agree_with_one_another_and_with_one_alone(self, workers: list[Found], alone: Found):
        left, right = (worker["by hand"][0] for worker in workers)
        assert left
        assert same(left, right)
        for name, value in alone["by hand"][0].items():
            torch.testing.assert_close(left[name], value, rtol=1e-10, atol=1e-12)
