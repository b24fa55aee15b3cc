"""One iteration of training: rates, who moves, what is frozen, clipped, averaged and logged."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from hd_core.ema import warmed_decay
from hd_core.objectives.dmd import DMD
from hd_core.objectives.mean_velocity import MeanVelocity
from hd_core.objectives.sfd import SFD
from hd_core.objectives.turns import Batch, Cast, Need, Objective, PlayerName, Terms, Turn, Turns
from hd_core.random import Draws
from hd_core.step import OptimizerConfig, TrainState, only, train_step
from hd_core.times import custom
from hd_core.types import Grid
from tests.oracles import points
from tests.toys import batch_of, cast_of, networks, rows_of, state_of

ALL: tuple[PlayerName, ...] = ("student", "fake_score", "discriminator")


class TestRates:
    def test_warm_up_rises_linearly_to_the_full_rate(self):
        config = OptimizerConfig(learning_rate=0.4, warmup_moves=4)
        rates = [config.rate(move, 0.0) for move in range(6)]
        assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4], rel=1e-12)
        assert OptimizerConfig(learning_rate=0.4).rate(0, 0.9) == 0.4

    def test_cosine(self):
        config = OptimizerConfig(learning_rate=2.0, decay="cosine")
        rates = [config.rate(9, progress) for progress in (0.0, 1 / 3, 0.5, 1.0, 1.2)]
        assert rates == pytest.approx([2.0, 1.5, 1.0, 0.0, 0.0], abs=1e-12)

    def test_halfway(self):
        config = OptimizerConfig(learning_rate=2.0, decay="halfway")
        rates = [config.rate(9, progress) for progress in (0.0, 0.499, 0.5, 1.0)]
        assert rates == pytest.approx([2.0, 2.0, 0.2, 0.2], rel=1e-12)

    @pytest.mark.parametrize("decay", ["cosine", "halfway"])
    def test_warm_up_multiplies_the_decay(self, decay: Literal["cosine", "halfway"]):
        with_, without = (OptimizerConfig(decay=decay, warmup_moves=moves) for moves in (10, 0))
        assert with_.rate(4, 0.6) == pytest.approx(0.5 * without.rate(4, 0.6), rel=1e-12)

    @pytest.mark.parametrize(
        "fields",
        [
            {"learning_rate": 0.0},
            {"betas": (0.9, 1.0)},
            {"weight_decay": -1.0},
            {"warmup_moves": -1},
            {"max_grad_norm": -1.0},
        ],
    )
    def test_mistakes_are_named(self, fields: dict[str, object]):
        with pytest.raises(ValueError, match=next(iter(fields))):
            OptimizerConfig(**fields)  # pyright: ignore[reportArgumentType]

    def test_the_optimizer_is_as_configured(self):
        network = nn.Linear(2, 2)
        config = OptimizerConfig(learning_rate=0.3, betas=(0.1, 0.2), weight_decay=0.4)
        optimizer = config.optimizer([*network.parameters()])
        group = optimizer.param_groups[0]
        assert (group["lr"], group["betas"], group["weight_decay"]) == (0.3, (0.1, 0.2), 0.4)
        assert [id(p) for p in group["params"]] == [id(p) for p in network.parameters()]


def test_only_one_network_may_learn():
    networks_ = [nn.Sequential(nn.Linear(2, 2), nn.Dropout()) for _ in range(3)]
    for moving in networks_:
        with only(moving, networks_):
            for network in networks_:
                assert all(p.requires_grad == (network is moving) for p in network.parameters())
                assert all(module.training == (network is moving) for module in network.modules())


@pytest.mark.parametrize("training", [True, False])
def test_afterwards_every_network_is_as_it_was(training: bool):
    networks_ = [nn.Linear(2, 2).train(training) for _ in range(2)]
    with pytest.raises(RuntimeError), only(networks_[0], networks_):
        raise RuntimeError
    for network in networks_:
        assert network.training == training
        assert all(p.requires_grad for p in network.parameters())


Play = Callable[[Cast, Batch], Terms]


@dataclass(frozen=True, kw_only=True)
class Scripted:
    """An objective that plays the given turns and keeps what was sent to it."""

    script: list[tuple[PlayerName, Play]]
    received: list[Tensor | None] = field(default_factory=list[Tensor | None])

    @property
    def players(self) -> tuple[PlayerName, ...]:
        return ALL

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    def sampling_grid(self) -> Grid:
        return custom([1.0, 0.0])

    def turns(self, cast: Cast, batch: Batch, draws: Draws, step: int) -> Turns:
        for player, play in self.script:
            self.received.append((yield Turn(player=player, terms=lambda play=play: play(cast, batch))))


class Scalar(nn.Module):
    """A network of one number, which it returns."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, *_: object) -> Tensor:
        return self.value


def scalars(config: OptimizerConfig) -> tuple[dict[PlayerName, nn.Module], TrainState]:
    made: dict[PlayerName, nn.Module] = {name: Scalar(float(i + 1)) for i, name in enumerate(ALL)}
    return made, state_of(made, config)


def cost(name: PlayerName, slope: float, rows: int = 2, **terms: object) -> Play:
    """A loss of the given slope in the player's number."""

    def play(cast: Cast, batch: Batch) -> Terms:
        network = {"student": cast.student, "fake_score": cast.fake_score, "discriminator": cast.discriminator}[name]
        assert isinstance(network, Scalar)
        loss = slope * network() * torch.ones(rows, dtype=torch.float64)
        return Terms(losses={name: loss}, **terms)  # pyright: ignore[reportArgumentType]

    return play


def run(
    state: TrainState, made: dict[PlayerName, nn.Module], objective: Objective, **options: object
) -> dict[str, Tensor]:
    draws = Draws(seed=state.step, rows=slice(0, 6), total=6)
    batch, options = batch_of(6, first=6 * state.step), {"progress": 0.0} | options
    return train_step(state, objective, cast_of(made), batch, draws, **options)  # pyright: ignore[reportArgumentType]


def test_players_move_in_the_order_of_their_turns_against_their_slope():
    made, state = scalars(OptimizerConfig(learning_rate=0.1))
    objective = Scripted(script=[("fake_score", cost("fake_score", 3.0)), ("student", cost("student", -2.0))])
    logged = run(state, made, objective)
    # The first step of Adam is the rate against the gradient's sign (eps is 1e-8 of a gradient of 2).
    values = {name: network.value.item() for name, network in made.items() if isinstance(network, Scalar)}
    assert values == pytest.approx({"student": 1.1, "fake_score": 1.9, "discriminator": 3.0}, rel=1e-8)
    assert {name: player.moves for name, player in state.players.items()} == {
        "student": 1,
        "fake_score": 1,
        "discriminator": 0,
    }
    assert state.step == 1
    assert logged["loss/fake_score"].item() == pytest.approx(6.0)
    assert logged["gradient_norm/student"].item() == pytest.approx(2.0)
    assert not any(value.requires_grad for value in logged.values())


def test_everyone_but_the_player_is_frozen_while_terms_are_evaluated():
    made, state = scalars(OptimizerConfig())
    seen: list[dict[str, tuple[bool, bool]]] = []

    def look(name: PlayerName) -> Play:
        def play(cast: Cast, batch: Batch) -> Terms:
            seen.append({k: (n.training, next(n.parameters()).requires_grad) for k, n in made.items()})
            return cost(name, 1.0)(cast, batch)

        return play

    run(state, made, Scripted(script=[(name, look(name)) for name in ALL]))
    assert seen == [{other: (other == name, other == name) for other in ALL} for name in ALL]


def test_a_gradient_of_an_earlier_turn_is_not_kept():
    made, state = scalars(OptimizerConfig(learning_rate=0.1, betas=(0.0, 0.0)))
    script = [("student", cost("student", 1.0)), ("student", cost("student", -1.0))]
    run(state, made, Scripted(script=script))  # pyright: ignore[reportArgumentType]
    # Without memory each move is a rate against its own sign; a sum of gradients would be 0 and undo nothing.
    assert made["student"]().item() == pytest.approx(1.0, rel=1e-7)
    assert state.players["student"].moves == 2


def test_carry_is_sent_back_into_the_objective():
    made, state = scalars(OptimizerConfig())
    first, second = torch.ones(2), 2 * torch.ones(2)
    script: list[tuple[PlayerName, Play]] = [
        ("student", cost("student", 1.0, carry=first)),
        ("fake_score", cost("fake_score", 1.0, carry=second)),
        ("student", cost("student", 1.0)),
    ]
    objective = Scripted(script=script)
    run(state, made, objective)
    assert objective.received[0] is first
    assert objective.received[1] is second
    assert objective.received[2] is None


@pytest.mark.parametrize(("limit", "expected"), [(0.0, 1.0), (10.0, 1.0), (0.5, 0.1)])
def test_clipping(limit: float, expected: float):
    """The gradient is (3, 4): its norm 5 is logged before clipping, and 0.5 leaves a tenth."""
    made: dict[PlayerName, nn.Module] = {"student": nn.Linear(2, 1, bias=False).double()}
    state = state_of(made, OptimizerConfig(max_grad_norm=limit))
    seen: list[Tensor] = []
    state.players["student"].optimizer.register_step_pre_hook(
        lambda optimizer, _a, _k: seen.append(optimizer.param_groups[0]["params"][0].grad.clone())
    )

    def play(cast: Cast, batch: Batch) -> Terms:
        linear = cast.student
        assert isinstance(linear, nn.Linear)
        inputs = torch.tensor([[3.0, 4.0]] * 2, dtype=torch.float64)
        return Terms(losses={"linear": linear(inputs).squeeze(1)})

    logged = run(state, made, Scripted(script=[("student", play)]))
    assert logged["gradient_norm/student"].item() == pytest.approx(5.0, rel=1e-12)
    # The divisor is the norm plus 1e-6.
    torch.testing.assert_close(seen[0], expected * torch.tensor([[3.0, 4.0]]).double(), rtol=1e-6, atol=0)


def test_gradients_are_synchronised_before_the_optimiser_sees_them():
    made, state = scalars(OptimizerConfig(learning_rate=0.1, max_grad_norm=100.0))
    seen: list[list[float]] = []

    def reverse(gradients: list[Tensor]) -> None:
        seen.append([gradient.item() for gradient in gradients])
        for gradient in gradients:
            gradient.neg_()

    objective = Scripted(script=[("student", cost("student", 2.0)), ("discriminator", cost("discriminator", -5.0))])
    run(state, made, objective, synchronise=reverse)
    assert seen == [[2.0], [-5.0]]
    assert made["student"]().item() == pytest.approx(1.1, rel=1e-8)
    assert made["discriminator"]().item() == pytest.approx(2.9, rel=1e-8)


def test_rates_follow_the_moves_of_the_player_and_the_progress():
    made, state = scalars(OptimizerConfig(learning_rate=0.1, warmup_moves=4, decay="halfway"))
    script = [("student", cost("student", 1.0)), ("student", cost("student", 1.0))]
    for progress, expected in ((0.0, 0.05), (0.6, 0.01)):
        run(state, made, Scripted(script=script), progress=progress)  # pyright: ignore[reportArgumentType]
        assert state.players["student"].optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12)


def test_the_average_follows_the_student_at_the_warmed_decay():
    made, state = scalars(OptimizerConfig(learning_rate=0.1))
    expected = 1.0
    for step in range(3):
        run(state, made, Scripted(script=[("student", cost("student", -1.0))]))
        decay = warmed_decay(0.9, step)
        expected = decay * expected + (1 - decay) * made["student"]().item()
        assert state.average().item() == pytest.approx(expected, rel=1e-12)
    assert state.average().item() < made["student"]().item()


def test_several_losses_are_paid_together_and_logged_apart():
    made, state = scalars(OptimizerConfig())

    def play(cast: Cast, batch: Batch) -> Terms:
        value = made["student"]() * torch.tensor([1.0, 3.0], dtype=torch.float64)
        return Terms(losses={"a": value, "b": -3 * value}, metrics={"watched": torch.tensor(7.0)})

    logged = run(state, made, Scripted(script=[("student", play)]))
    assert logged["loss/a"].item() == pytest.approx(2.0)
    assert logged["loss/b"].item() == pytest.approx(-6.0)
    assert logged["gradient_norm/student"].item() == pytest.approx(4.0)
    assert logged["watched"].item() == 7.0


OBJECTIVES: list[Objective] = [MeanVelocity(), SFD(intervals=3, afs=True), DMD(update_ratio=2)]


def trained(objective: Objective, steps: int) -> tuple[TrainState, list[dict[str, Tensor]]]:
    made = networks(objective.players)
    state = state_of(made, OptimizerConfig(max_grad_norm=1.0, warmup_moves=2))
    return state, [run(state, made, objective, progress=i / steps) for i in range(steps)]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)  # pyright: ignore
def test_training_is_deterministic(objective: Objective):
    (first, logged), (second, again) = trained(objective, 5), trained(objective, 5)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(logged, again, strict=True) for name in a)
    for a, b in zip(first.average.parameters(), second.average.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_generator_of_dmd_moves_every_kth_step():
    state, logged = trained(DMD(update_ratio=2), 5)
    assert [("loss/matching" in entry) for entry in logged] == [True, False, True, False, True]
    assert {name: player.moves for name, player in state.players.items()} == {
        "student": 3,
        "fake_score": 5,
        "discriminator": 5,
    }


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)  # pyright: ignore
def test_two_synchronised_workers_are_one(objective: Objective):
    """Lock step: each turn's gradients are averaged over two halves of the batch before either moves."""
    batch, total = batch_of(6), 6
    made = networks(objective.players)
    whole = state_of(made, OptimizerConfig(max_grad_norm=1.0))
    averaged: list[list[Tensor]] = []

    def keep(gradients: list[Tensor]) -> None:
        averaged.append([gradient.clone() for gradient in gradients])

    draws = Draws(seed=3, rows=slice(0, 6), total=total)
    train_step(whole, objective, cast_of(made), batch, draws, progress=0.0, synchronise=keep)

    for rows in (slice(0, 3), slice(3, 6)):
        mine, turn = networks(objective.players), iter(averaged)
        worker, local = state_of(mine, OptimizerConfig(max_grad_norm=1.0)), list[list[Tensor]]()

        def receive(gradients: list[Tensor], turn=turn, local=local) -> None:
            local.append([gradient.clone() for gradient in gradients])
            for gradient, mean in zip(gradients, next(turn), strict=True):
                gradient.copy_(mean)

        draws = Draws(seed=3, rows=rows, total=total)
        part = rows_of(batch, rows)
        train_step(worker, objective, cast_of(mine), part, draws, progress=0.0, synchronise=receive, workers=2)
        for name, player in worker.players.items():
            for a, b in zip(player.parameters, whole.players[name].parameters, strict=True):
                assert torch.equal(a, b)
        assert len(local) == len(averaged)


def test_state_dict_holds_what_training_changes():
    state, _ = trained(DMD(update_ratio=2), 3)
    saved = copy.deepcopy(state.state_dict())
    assert saved["step"] == 3
    players = saved["players"]
    assert isinstance(players, dict)
    assert set(players) == set(ALL)
    assert players["student"]["moves"] == 2
    fresh = networks(DMD().players)["student"]
    fresh.load_state_dict(players["student"]["network"])
    x, t = points(2, 1, 2, 2), torch.ones(2).double()
    condition = batch_of(2).condition
    assert torch.equal(fresh(x, t, 0 * t, condition), state.players["student"].network(x, t, 0 * t, condition))
    assert not math.isnan(sum(p.sum().item() for p in state.average.parameters()))
