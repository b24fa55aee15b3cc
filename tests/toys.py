"""Tiny float64 networks and batches on which objectives are played."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hd_core.networks.awd import AdaptiveWeightedDiscriminator, AWDConfig
from hd_core.objectives.sfd import SFD, afs_velocity
from hd_core.objectives.turns import Batch, Cast, Objective, PlayerName
from hd_core.paths import jump
from hd_core.random import sample_noise
from hd_core.step import OptimizerConfig, Player, TrainState
from hd_core.times import GridConfig
from hd_core.types import Condition
from tests.oracles import GAUSSIAN, GaussianFlow

SHAPE, CLASSES, POINTS = (1, 2, 2), 3, 7
GRID = GridConfig().times(POINTS - 1)


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


def networks(players: tuple[PlayerName, ...]) -> dict[PlayerName, nn.Module]:
    """Fresh networks, the same at every call."""
    torch.manual_seed(11)
    made: dict[PlayerName, nn.Module] = {"student": Perceptron(2, seed=1)}
    if "fake_score" in players:
        made["fake_score"] = Perceptron(1, seed=2)
    if "discriminator" in players:
        config = AWDConfig(layers=(0, 1), width=8, heads=2)
        made["discriminator"] = AdaptiveWeightedDiscriminator(2, config).double()
    return made


def cast_of(made: dict[PlayerName, nn.Module], teacher: GaussianFlow = GAUSSIAN) -> Cast:
    return Cast(
        teacher=teacher,
        student=made["student"],  # pyright: ignore[reportArgumentType]
        fake_score=made.get("fake_score"),  # pyright: ignore[reportArgumentType]
        discriminator=made.get("discriminator"),  # pyright: ignore[reportArgumentType]
        features=features,
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


def state_of(
    made: dict[PlayerName, nn.Module], config: OptimizerConfig, others: OptimizerConfig | None = None
) -> TrainState:
    """A start of training: the student's optimiser, and the other players' where it differs."""
    players = {
        name: Player(network=network, config=config if name == "student" or others is None else others)
        for name, network in made.items()
    }
    return TrainState(players=players, average=copy.deepcopy(made["student"]), ema_decay=0.9)


@torch.no_grad()
def sample(student: nn.Module, objective: Objective, noise: Tensor, condition: Condition) -> Tensor:
    """Walk the objective's own grid with its student."""
    x, grid = noise, objective.sampling_grid()
    for n, (t, r) in enumerate(zip(grid, grid[1:], strict=False)):
        t_, r_ = t.expand(len(x)), r.expand(len(x))
        analytical = isinstance(objective, SFD) and objective.afs and n == 0
        x = jump(x, afs_velocity(x, t_) if analytical else student(x, t_, r_, condition), t_, r_)
    return x
