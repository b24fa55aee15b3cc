"""The only source of randomness: everything random is a function of a seed and of what it is for.

A sample's noise depends on its id and on nothing else, so it is the same in every batch, worker and run. A training
step draws for its whole global batch and keeps this worker's rows, so it is the same at any number of workers.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hd_core.types import PerSample

ROWS_DRAWN_AT_ONCE = 256
"""Rows of a step that share one generator. A worker draws the blocks that hold rows of its own, whatever the batch."""


def fold_in(seed: int, *tags: int | str) -> int:
    """A new 63-bit seed from a seed and what it is for. Equal arguments give equal seeds, on every machine."""
    text = "/".join([str(seed), *(f"str:{tag}" if isinstance(tag, str) else f"int:{int(tag)}" for tag in tags)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *tags: int | str) -> torch.Generator:
    """A fresh CPU generator for one purpose."""
    return torch.Generator().manual_seed(fold_in(seed, *tags))


def sample_noise(seed: int, sample_ids: Sequence[int], shape: Sequence[int]) -> Float[Tensor, "b *shape"]:
    """Standard normal noise of each sample, ``(len(sample_ids), *shape)`` float32, from its id alone."""
    source = torch.Generator()
    noise = torch.empty(len(sample_ids), *shape)
    for row, sample_id in zip(noise, sample_ids, strict=True):
        row.normal_(generator=source.manual_seed(fold_in(seed, "noise", int(sample_id))))
    return noise


def sample_labels(seed: int, sample_ids: Sequence[int], num_classes: int) -> Int[Tensor, " b"]:
    """The class asked of each sample, uniform over classes, from its id alone."""
    classes = [fold_in(seed, "label", int(sample_id)) % num_classes for sample_id in sample_ids]
    return torch.tensor(classes, dtype=torch.int64)


def permutation(seed: int, length: int, *tags: int | str) -> Int[Tensor, " length"]:
    """A shuffled order of ``range(length)``."""
    return torch.randperm(length, generator=generator(seed, *tags))


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random numbers of one training step, for the rows of the global batch that this worker holds."""

    seed: int
    """Seed of the step: fold the stage and the step number in."""
    rows: slice
    """This worker's rows of the global batch."""
    total: int
    """Rows of the global batch."""
    device: torch.device | str = "cpu"
    """Where the numbers are wanted; they are always drawn on the CPU."""

    def normal(self, tag: str, shape: Sequence[int]) -> Float[Tensor, "b *shape"]:
        """Standard normal rows of the given shape."""
        return self._drawn(tag, lambda rows, source: torch.randn(rows, *shape, generator=source))

    def uniform(self, tag: str, low: float = 0.0, high: float = 1.0) -> PerSample:
        """One uniform number per row in ``[low, high)``."""
        drawn = self._drawn(tag, lambda rows, source: torch.rand(rows, generator=source))
        return low + (high - low) * drawn

    def integers(self, tag: str, high: int) -> Int[Tensor, " b"]:
        """One integer per row in ``[0, high)``."""
        return self._drawn(tag, lambda rows, source: torch.randint(high, (rows,), generator=source))

    def part(self, rows: slice) -> "Draws":
        """The draws of some of this worker's rows."""
        mine = range(*self.rows.indices(self.total))[rows]
        return replace(self, rows=slice(mine.start, mine.stop))

    def _drawn(self, tag: str, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        """This worker's rows, out of the blocks that hold them."""
        first, last, _ = self.rows.indices(self.total)
        blocks = range(first // ROWS_DRAWN_AT_ONCE, max(last - 1, first) // ROWS_DRAWN_AT_ONCE + 1)
        start = blocks.start * ROWS_DRAWN_AT_ONCE
        drawn = torch.cat([self._block(tag, block, draw) for block in blocks])
        return drawn[first - start : last - start].to(self.device)

    def _block(self, tag: str, block: int, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        source = generator(self.seed, tag, block) if block else generator(self.seed, tag)
        return draw(min(ROWS_DRAWN_AT_ONCE, self.total - block * ROWS_DRAWN_AT_ONCE), source)


def shares(rows: int, parts: int) -> list[slice]:
    """Rows in order, in parts that differ by at most one row; the larger ones come first.

    Raises:
        ValueError: there are fewer rows than parts.
    """
    if parts > rows:
        raise ValueError(f"{rows} rows do not make {parts} parts of at least one row")
    least, more = divmod(rows, parts)
    ends = [least * part + min(part, more) for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(ends)]
