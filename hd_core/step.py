"""Training state and one iteration: which player moves, who is frozen meanwhile, and what is clipped and averaged."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hd_core.ema import update_ema, warmed_decay
from hd_core.objectives.turns import Batch, Cast, Objective, PlayerName, Turn, Turns
from hd_core.random import Draws, shares

Synchronise = Callable[[list[Tensor]], None]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How one player moves (AdamW)."""

    learning_rate: float = 5e-4
    """Greatest learning rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the first and second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_moves: int = 0
    """Moves over which the rate rises linearly from 0."""
    decay: Literal["constant", "cosine", "halfway"] = "constant"
    """constant; cosine down to 0 at the end; or halfway: a tenth of the rate from half of the training on (SFD)."""
    max_grad_norm: float = 0.0
    """Clip the gradient to this norm; 0 leaves it."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive; given {self.learning_rate}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1); given {self.betas}")
        if self.weight_decay < 0 or self.warmup_moves < 0 or self.max_grad_norm < 0:
            raise ValueError("weight_decay, warmup_moves and max_grad_norm must not be negative")

    def rate(self, move: int, progress: float) -> float:
        """The learning rate at a player's move, ``progress`` of the training (0 to 1) being done."""
        warm = min(1.0, (move + 1) / self.warmup_moves) if self.warmup_moves else 1.0
        if self.decay == "cosine":
            return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        late = self.decay == "halfway" and progress >= 0.5
        return self.learning_rate * warm * (0.1 if late else 1.0)

    def settings(self, move: int, progress: float) -> dict[str, object]:
        """What AdamW goes by at a player's move: its configuration may change between two moves."""
        rate = self.rate(move, progress)
        return {"lr": rate, "betas": self.betas, "weight_decay": self.weight_decay}

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
        """AdamW over some parameters."""
        return torch.optim.AdamW(parameters, self.learning_rate, self.betas, weight_decay=self.weight_decay, fused=True)


@dataclass(kw_only=True)
class Player:
    """A network that moves, and its optimiser."""

    network: nn.Module
    config: OptimizerConfig
    moves: int = 0
    parameters: list[nn.Parameter] = field(init=False)
    """Those that move: the ones that are not frozen when the player is made."""
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = _trainable(self.network)
        assert self.parameters, "a player whose parameters are all frozen cannot move"
        self.optimizer = self.config.optimizer(self.parameters)


@dataclass(kw_only=True)
class TrainState:
    """Everything that training changes."""

    players: dict[PlayerName, Player]
    average: nn.Module
    """Exponential moving average of the student, which is what gets sampled."""
    ema_decay: float
    step: int = 0

    def state_dict(self) -> dict[str, object]:
        """Networks, optimisers, average and counters, as plain containers of tensors and numbers."""
        players = {
            name: {
                "network": player.network.state_dict(),
                "optimizer": player.optimizer.state_dict(),
                "moves": player.moves,
            }
            for name, player in self.players.items()
        }
        return {"players": players, "average": self.average.state_dict(), "step": self.step}


def train_step(
    state: TrainState,
    objective: Objective,
    cast: Cast,
    batch: Batch,
    draws: Draws,
    *,
    progress: float,
    synchronise: Synchronise = lambda _: None,
    workers: int = 1,
    passes: int = 1,
) -> dict[str, Tensor]:
    """One iteration: every turn of the objective, then the average.

    Args:
        progress: share of the training that is done, which sets the learning rates.
        synchronise: averages a list of tensors over workers, in place; nothing where there is one worker.
        workers: among how many the global batch of ``draws.total`` rows is shared out by `hd_core.random.shares`.
        passes: forward and backward passes whose gradients are added up to one move, each on a share of the rows.

    Returns:
        Detached scalars by name: loss terms, metrics and gradient norms. Their mean over workers is that of the batch.
    """
    logged: dict[str, Tensor] = {}
    parts = _parts(objective, cast, batch, draws, state.step, workers, passes)
    while turns := [turn for turn in [part.next() for part in parts] if turn is not None]:
        _move(state.players, parts, turns, progress, synchronise, logged)
    update_ema(state.average, state.players["student"].network, warmed_decay(state.ema_decay, state.step))
    state.step += 1
    return logged


@dataclass(kw_only=True)
class _Part:
    """Rows that are computed at once, and how far their turns have come."""

    turns: Turns
    weight: float
    """Their share of the global batch, times the workers: what their means count in a mean over workers."""
    carry: Tensor | None = None

    def next(self) -> Turn | None:
        try:
            return self.turns.send(self.carry)
        except StopIteration:
            return None

    def pay(self, turn: Turn) -> dict[str, Tensor]:
        """Evaluate a turn and add its gradients to those that are there; its share of what is logged."""
        terms = turn.terms()
        (terms.total * self.weight).backward()  # pyright: ignore[reportUnknownMemberType]
        self.carry = terms.carry
        losses = {f"loss/{name}": loss.detach().mean() for name, loss in terms.losses.items()}
        return {name: value * self.weight for name, value in {**losses, **terms.metrics}.items()}


def _parts(
    objective: Objective, cast: Cast, batch: Batch, draws: Draws, step: int, workers: int, passes: int
) -> list[_Part]:
    """This worker's rows in passes; all workers make as many, since they average within one."""
    everyone = [shares(part.stop - part.start, passes) for part in shares(draws.total, workers)]
    frugal, parts = passes > 1, list[_Part]()
    for number, rows in enumerate(shares(len(batch.noise), passes)):
        together = sum(theirs[number].stop - theirs[number].start for theirs in everyone)
        share = (rows.stop - rows.start) * workers
        seen = replace(cast, frugal=frugal, mean=_weighted(cast.mean, share / together))
        turns = objective.turns(seen, batch.part(rows), draws.part(rows), step)
        parts.append(_Part(turns=turns, weight=share / draws.total))
    return parts


def _weighted(mean: Callable[[Tensor], Tensor], weight: float) -> Callable[[Tensor], Tensor]:
    return mean if weight == 1 else lambda value: mean(value * weight)


def _move(
    players: Mapping[PlayerName, Player],
    parts: Sequence[_Part],
    turns: Sequence[Turn],
    progress: float,
    synchronise: Synchronise,
    logged: dict[str, Tensor],
) -> None:
    player = players[turns[0].player]
    player.optimizer.zero_grad(set_to_none=True)
    before = [(buffer, buffer.clone()) for buffer in player.network.buffers()] if len(turns) > 1 else []
    seen: list[dict[str, Tensor]] = []
    with only(player.network, [other.network for other in players.values()]):
        for part, turn in zip(parts, turns, strict=True):
            for buffer, value in before:  # what a pass moves, such as spectral norm's estimate, moves once a turn
                buffer.copy_(value)
            seen.append(part.pay(turn))
    gradients = [p.grad for p in player.parameters if p.grad is not None]
    synchronise(gradients)
    logged[f"gradient_norm/{turns[0].player}"] = _clip(gradients, player.config.max_grad_norm)
    for group in player.optimizer.param_groups:
        group |= player.config.settings(player.moves, progress)
    player.optimizer.step()  # pyright: ignore[reportUnknownMemberType]
    player.moves += 1
    logged |= {name: torch.stack([values[name] for values in seen]).sum(0) for name in seen[0]}


def _clip(gradients: list[Tensor], max_norm: float) -> Tensor:
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if max_norm:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    return norm


@contextmanager
def only(moving: nn.Module, everyone: Iterable[nn.Module]):
    """Freeze all networks but one: no gradients into them, and no spectral-norm iteration.

    Afterwards all are as they were, so that what an objective does between turns is the same at every step.
    """
    before = [(network, network.training, _trainable(network)) for network in everyone]
    for network, _, trainable in before:
        network.train(network is moving)
        _set_trainable(trainable, network is moving)
    try:
        yield
    finally:
        for network, training, trainable in before:
            network.train(training)
            _set_trainable(trainable, True)


def _trainable(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _set_trainable(parameters: Iterable[nn.Parameter], trainable: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(trainable)
