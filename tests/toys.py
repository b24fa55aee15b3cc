"""Tiny float64 networks and batches on which objectives are played."""

import copy
import threading
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hd_core.networks.awd import AdaptiveWeightedDiscriminator, AWDConfig
from hd_core.objectives.turns import Batch, Cast, Objective, PlayerName, Terms, first_step_is_analytical
from hd_core.random import Draws, sample_noise
from hd_core.step import OptimizerConfig, Player, TrainState, only
from hd_core.times import GridConfig
from hd_core.types import Condition
from hd_core.walk import walk
from tests.oracles import GAUSSIAN, GaussianFlow, no_condition, points

SHAPE, CLASSES, POINTS = (1, 2, 2), 3, 7
GRID = GridConfig().times(POINTS - 1)

Gradients = dict[str, Tensor]
Made = dict[PlayerName, nn.Module]


class Perceptron(nn.Module):
    """A velocity ``(x_t, t, condition)`` or a flow map ``(x_t, t, r, condition)``, by the number of its times."""

    def __init__(self, times: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(4 + times + CLASSES, 24), nn.Tanh(), nn.Linear(24, 4)).double()
        with torch.no_grad():
            for parameter in self.layers.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x_t: Tensor, *rest: Tensor | Condition) -> Tensor:
        condition = rest[-1]
        assert isinstance(condition, Condition)
        assert condition.labels is not None
        times = [time.to(x_t)[:, None] for time in rest[:-1] if isinstance(time, Tensor)]
        hot = F.one_hot(condition.labels, CLASSES).to(x_t)
        return self.layers(torch.cat([x_t.flatten(1), *times, hot], dim=1)).reshape(x_t.shape)


def features(x_t: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
    """Two layers of four tokens: each pixel with its time, and its square."""
    tokens = torch.stack([x_t.flatten(1), t.to(x_t)[:, None].expand(-1, 4)], dim=2)
    return [tokens, tokens.square()]


def networks(players: tuple[PlayerName, ...]) -> Made:
    """Fresh networks, the same at every call."""
    torch.manual_seed(11)
    made: Made = {"student": Perceptron(2, seed=1)}
    if "fake_score" in players:
        made["fake_score"] = Perceptron(1, seed=2)
    if "discriminator" in players:
        config = AWDConfig(layers=(0, 1), width=8, heads=2)
        made["discriminator"] = AdaptiveWeightedDiscriminator([2, 2], config).double()
    return made


def cast_of(made: Made, teacher: GaussianFlow = GAUSSIAN, **others: object) -> Cast:
    return Cast(
        teacher=teacher,
        student=made["student"],  # pyright: ignore[reportArgumentType]
        fake_score=made.get("fake_score"),  # pyright: ignore[reportArgumentType]
        discriminator=made.get("discriminator"),  # pyright: ignore[reportArgumentType]
        features=features,
        **others,  # pyright: ignore[reportArgumentType]
    )


def batch_of(rows: int, *, first: int = 0, flow: GaussianFlow = GAUSSIAN) -> Batch:
    """Exact trajectories, and data of the same distribution, by sample id."""
    ids = range(first, first + rows)
    noise, data = sample_noise(0, ids, SHAPE).double(), sample_noise(1, ids, SHAPE).double()
    condition = Condition(labels=torch.tensor([i % CLASSES for i in ids]))
    states = torch.stack([flow.flow_map(noise, 1.0, t) for t in GRID], dim=1)
    images = flow.mean + flow.std * data
    return Batch(noise=noise, condition=condition, states=states, grid=GRID, images=images, images_condition=condition)


def rows_of(batch: Batch, rows: slice) -> Batch:
    assert batch.states is not None
    assert batch.images is not None
    condition = batch.condition.rows(rows)
    return Batch(
        noise=batch.noise[rows],
        condition=condition,
        states=batch.states[rows],
        grid=batch.grid,
        images=batch.images[rows],
        images_condition=condition,
    )


def state_of(made: Made, config: OptimizerConfig, others: OptimizerConfig | None = None) -> TrainState:
    """A start of training: the student's optimiser, and the other players' where it differs."""
    players: dict[PlayerName, Player] = {
        name: Player(network=network, config=config if name == "student" or others is None else others)
        for name, network in made.items()
    }
    return TrainState(players=players, average=copy.deepcopy(made["student"]), ema_decay=0.9)


@torch.no_grad()
def sample(student: nn.Module, objective: Objective, noise: Tensor, condition: Condition) -> Tensor:
    """Walk the objective's own grid with its student."""
    grid, afs = objective.sampling_grid(), first_step_is_analytical(objective)
    return walk(student, grid, noise, condition, afs=afs)  # pyright: ignore[reportArgumentType]


def means_among(workers: int) -> list[Callable[[Tensor], Tensor]]:
    """`Cast.mean` of workers that run in a thread each."""
    values: list[Tensor] = [torch.zeros(())] * workers
    barrier = threading.Barrier(workers, timeout=30)

    def mean(rank: int, value: Tensor) -> Tensor:
        values[rank] = value
        barrier.wait()
        together = torch.stack(values).mean(0)
        barrier.wait()  # nobody overwrites a value before all have read it
        return together

    return [partial(mean, rank) for rank in range(workers)]


def play(
    objective: Objective, made: Made, batch: Batch, draws: Draws, step: int = 0, **others: object
) -> list[tuple[PlayerName, Terms, Gradients]]:
    """Every turn of one iteration with nobody moving: who, what it costs, and all gradients by player and name."""
    turns, played, carry = objective.turns(cast_of(made, GAUSSIAN, **others), batch, draws, step), [], None
    while True:
        try:
            turn = turns.send(carry)
        except StopIteration:
            return played
        with only(made[turn.player], made.values()):
            terms = turn.terms()
            terms.total.backward()
        gradients: Gradients = {}
        for name, network in made.items():
            for path, parameter in network.named_parameters():
                if parameter.grad is not None:
                    gradients[f"{name}:{path}"] = parameter.grad.clone()
                parameter.grad = None
        played.append((turn.player, terms, gradients))
        carry = terms.carry


def draws_of(rows: slice, total: int, seed: int = 5) -> Draws:
    return Draws(seed=seed, rows=rows, total=total)


def exact_student(flow: GaussianFlow, error: float = 0.0) -> Callable[..., Tensor]:
    def student(x_t: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        return flow.mean_velocity(x_t, t, r) + error

    return student


def cast_with(student: Callable[..., Tensor], teacher: GaussianFlow = GAUSSIAN, **others: object) -> Cast:
    return Cast(teacher=teacher, student=student, **others)  # pyright: ignore[reportArgumentType]


def only_turn(objective: Objective, cast: Cast, batch: Batch, draws: Draws) -> Terms:
    (turn,) = objective.turns(cast, batch, draws, 0)
    return turn.terms()


class Generator(nn.Module):
    """A one-step generator whose samples are ``mean + std * noise``."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.tensor(std, dtype=torch.float64).log())

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        assert bool((t == 1).all())
        assert bool((r == 0).all())
        return x_t - (self.mean + self.log_std.exp() * x_t)


class Follower(nn.Module):
    """The velocity of a Gaussian flow with a mean and a spread to learn."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.tensor(std, dtype=torch.float64).log())

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        t_ = t.to(x_t).reshape(-1, 1, 1, 1)
        spread = (2 * self.log_std).exp()
        z = (x_t - (1 - t_) * self.mean) / ((1 - t_) ** 2 * spread + t_**2)
        return t_ * z - self.mean - (1 - t_) * spread * z


def noise_batch(rows: int, *shape: int, seed: int = 0) -> Batch:
    return Batch(noise=points(rows, *shape, seed=seed), condition=no_condition(rows))


class Linear(nn.Module):
    """``u = W (x, t, r) + b``: a student that can be moved by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * points(4, 6, seed=8))
        self.bias = nn.Parameter(0.1 * points(4, seed=9))

    def forward(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        inputs = torch.cat([x.flatten(1), t[:, None].to(x), r[:, None].to(x)], dim=1)
        return (inputs @ self.weight.T + self.bias).reshape(x.shape)


class Samples(nn.Module):
    """A one-step generator whose samples are its parameters, one a row."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x.clone())

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        return x_t - self.x
