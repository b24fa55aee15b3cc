"""Shapes and protocols that every room shares.

Letters in shapes: ``b`` batch rows, ``c h w`` channels, height and width, ``n`` tokens, ``d`` features.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Images = Float[Tensor, "b c h w"]
Times = Float[Tensor, " b"]
Grid = Float[Tensor, " points"]
PerSample = Float[Tensor, " b"]


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What a sample is asked to be: a class label, or text embeddings with their mask."""

    labels: Int[Tensor, " b"] | None = None
    """Class of each row; the number of classes itself stands for "no class"."""
    embeddings: Float[Tensor, "b n d"] | None = None
    """Text embeddings of each row, padded to one length."""
    mask: Bool[Tensor, "b n"] | None = None
    """True where an embedding is text and not padding."""
    steps: Int[Tensor, " b"] | None = None
    """Steps of the walk that a row is on, for a student that is told them; a teacher does not look."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Condition":
        """Apply ``function`` to every tensor that is present."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Condition(**{k: None if v is None else function(v) for k, v in values.items()})

    def rows(self, index: slice | Int[Tensor, " k"]) -> "Condition":
        """The condition of some of the rows."""
        return self.map(lambda value: value[index])

    def to(self, device: torch.device | str) -> "Condition":
        """The same condition on another device."""
        return self.map(lambda value: value.to(device))

    def replaced(self, rows: Bool[Tensor, " b"], other: "Condition") -> "Condition":
        """The condition with some rows replaced by the single row of another, such as "no class"."""
        pairs = {field.name: (getattr(self, field.name), getattr(other, field.name)) for field in fields(self)}
        chosen = {k: a if a is None or b is None else a.where(~_wide(rows, a), b) for k, (a, b) in pairs.items()}
        return Condition(**chosen)

    def on_walk(self, x: Images, steps: int) -> "Condition":
        """The condition of rows ``x`` that are on a walk of so many steps."""
        return replace(self, steps=torch.full((len(x),), steps, device=x.device))

    def joined(self, other: "Condition") -> "Condition":
        """Rows of this condition followed by the rows of another."""
        pairs = {field.name: (getattr(self, field.name), getattr(other, field.name)) for field in fields(self)}
        return Condition(**{k: None if a is None else torch.cat([a, b]) for k, (a, b) in pairs.items()})


def _wide(rows: Tensor, like: Tensor) -> Tensor:
    return rows.reshape(-1, *[1] * (like.ndim - 1))


@runtime_checkable
class Velocity(Protocol):
    """The instantaneous velocity ``v(x_t, t, condition)`` of a flow, in this project's time (1 is noise)."""

    def __call__(self, x_t: Images, t: Times, condition: Condition, /) -> Images: ...


@runtime_checkable
class FlowMap(Protocol):
    """The mean velocity ``u(x_t, t, r, condition)`` from time ``t`` down to ``r``: ``x_r = x_t - (t - r) u``."""

    def __call__(self, x_t: Images, t: Times, r: Times, condition: Condition, /) -> Images: ...


@runtime_checkable
class Backbone(Protocol):
    """A velocity network whose time embedding can be added to; students are built on it.

    ``extra`` of shape ``(b, embedding_width)`` is added to the embedding of ``t``; ``None`` adds nothing.
    """

    @property
    def embedding_width(self) -> int: ...

    def __call__(
        self, x_t: Images, t: Times, condition: Condition, extra: Float[Tensor, "b d"] | None = None, /
    ) -> Images: ...


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the discriminator says of each row at each tapped layer."""

    logits: Float[Tensor, "b outputs"]
    """Large for real: one a layer, or one a token where the heads judge every token for itself."""
    weights: Float[Tensor, "b layers heads n"]
    """Share of each token in each head's verdict; sums to one over tokens."""


@runtime_checkable
class Judge(Protocol):
    """A discriminator's heads: features of a frozen teacher, one tensor a layer, to a `Judgement`."""

    def __call__(self, features: list[Float[Tensor, "b n d"]], /) -> Judgement: ...


FeatureMap = Callable[[Images, Times, Condition], list[Float[Tensor, "b n d"]]]
