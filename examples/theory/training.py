"""The two stages of HD on the toy, played by `hd_core.step.train_step` with the objectives of `hd_core`."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from examples.theory.networks import Members
from examples.theory.target import SHAPE, RingOfRings, no_condition
from hd_core.objectives.dmd import DMD
from hd_core.objectives.mean_velocity import MeanVelocity
from hd_core.objectives.turns import Batch, Cast, PlayerName
from hd_core.paths import interpolate, velocity
from hd_core.random import Draws, fold_in, generator
from hd_core.step import OptimizerConfig, Player, TrainState, train_step
from hd_core.times import custom
from hd_core.walk import walk

Watch = Callable[[int, Members], None]
"""Called with the step and the averaged student."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The exact flow's two ends."""

    noise: Tensor
    """``(rows, 2, 1, 1)``."""
    ends: Tensor
    """Where each noise goes."""


def sketch(student: Members, pairs: Pairs, *, steps: int, rows: int, rate: float, seed: int) -> Members:
    """Stage 1: regression to the mean velocity from noise to data. Returns the average of the weights."""
    state = _state(student, None, OptimizerConfig(learning_rate=rate, decay="cosine"))
    cast, objective = Cast(teacher=_no_teacher, student=student), MeanVelocity(full_share=1.0)
    states, grid, total = torch.stack([pairs.noise, pairs.ends], dim=1), custom([1.0, 0.0]), rows * student.members
    for step in range(steps):
        picks = torch.randint(len(states), (total,), generator=generator(seed, "pairs", step))
        batch = Batch(noise=pairs.noise[picks], condition=no_condition(total), states=states[picks], grid=grid)
        train_step(state, objective, cast, batch, _draws(seed, step, total), progress=step / steps)
    return _averaged(state)


def velocity_network(network: Members, target: RingOfRings, *, steps: int, rows: int, rate: float, seed: int) -> None:
    """Flow matching on the target's data, in place: what a teacher of this size learns."""
    optimizer_config = OptimizerConfig(learning_rate=rate, decay="cosine")
    player, total = Player(network=network, config=optimizer_config), rows * network.members
    for step in range(steps):
        draws = _draws(seed, step, total)
        x_0, eps, t = target.sample(total, draws.seed), draws.normal("noise", SHAPE), draws.uniform("time")
        times = (t, t) if network.times == 2 else (t,)
        v = network(interpolate(x_0, eps, t), *times, no_condition(total))
        (v - velocity(x_0, eps)).square().mean().backward()
        player.optimizer.param_groups[0]["lr"] = optimizer_config.rate(step, step / steps)
        player.optimizer.step()
        player.optimizer.zero_grad()


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """Settings of stage 2, the same for every start."""

    steps: int = 5000
    """Iterations; the fake score moves in each."""
    rows: int = 256
    """Rows of each member."""
    objective: DMD
    """Without a discriminator."""
    student: OptimizerConfig
    """How the student moves."""
    fake_score: OptimizerConfig
    """How the fake score moves."""


def refine(
    student: Members, fake: nn.Module, target: RingOfRings, settings: Refinement, *, seed: int, watch: Watch, every: int
) -> Members:
    """Stage 2: distribution matching, from whatever the student is. Returns the average of the weights."""
    state = _state(student, fake, settings.student, settings.fake_score)
    cast, total = Cast(teacher=target, student=student, fake_score=fake), settings.rows * student.members
    for step in range(settings.steps):
        if step % every == 0:
            watch(step, state.average)  # pyright: ignore[reportArgumentType]
        draws = _draws(seed, step, total)
        batch = Batch(noise=draws.normal("batch", SHAPE), condition=no_condition(total))
        train_step(state, settings.objective, cast, batch, draws, progress=step / settings.steps)
    watch(settings.steps, state.average)  # pyright: ignore[reportArgumentType]
    return _averaged(state)


@torch.no_grad()
def draw(student: Members, noise: Tensor) -> list[Tensor]:
    """One step of every member from the same noise."""
    repeated = noise.repeat(student.members, 1, 1, 1)
    return list(walk(student, custom([1.0, 0.0]), repeated, no_condition(len(repeated))).chunk(student.members))


def _state(
    student: Members, fake: nn.Module | None, config: OptimizerConfig, others: OptimizerConfig | None = None
) -> TrainState:
    players: dict[PlayerName, Player] = {"student": Player(network=student, config=config)}
    if fake is not None and others is not None:
        players["fake_score"] = Player(network=fake, config=others)
    average = copy.deepcopy(student).requires_grad_(False)
    return TrainState(players=players, average=average, ema_decay=0.995)


def _averaged(state: TrainState) -> Members:
    assert isinstance(state.average, Members)
    return state.average


def _draws(seed: int, step: int, total: int) -> Draws:
    return Draws(seed=fold_in(seed, "step", step), rows=slice(0, total), total=total)


def _no_teacher(x_t: Tensor, t: Tensor, condition: object) -> Tensor:
    """Regression to stored ends asks no teacher."""
    raise AssertionError("mean velocity calls no teacher")
