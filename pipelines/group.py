"""The workers that train together: whose rows are whose, and what they tell one another."""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hd_core.random import shares

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Group:
    """One worker's place among those that train together."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "Group":
        """This worker's place, as Ray Train tells it."""
        from ray.train import get_context

        context = get_context()
        return cls(rank=context.get_world_rank(), size=context.get_world_size())

    @property
    def leads(self) -> bool:
        """Whether this worker writes and speaks for all."""
        return self.rank == 0

    def rows(self, batch_size: int) -> slice:
        """This worker's rows of a global batch; shares differ by at most one row.

        Raises:
            ValueError: the batch has fewer rows than there are workers.
        """
        if batch_size < self.size:
            raise ValueError(f"a batch_size of {batch_size} leaves some of {self.size} workers without a row")
        return shares(batch_size, self.size)[self.rank]

    def passes(self, batch_size: int, most: int) -> int:
        """Passes that bring the largest worker's share down to ``most`` rows each (0: no limit), as on every worker."""
        largest, least = -(-batch_size // self.size), batch_size // self.size
        return min(-(-largest // most), least) if most else 1

    def average(self, tensors: list[Tensor]) -> None:
        """Average tensors over the workers, in place, as one message; sharded ones were averaged as they were made."""
        mine = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
        if self.size == 1 or not mine:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in mine])
        torch.distributed.all_reduce(flat)
        flat /= self.size
        for tensor, part in zip(mine, flat.split([tensor.numel() for tensor in mine]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over the workers."""
        found = value.detach().clone()
        self.average([found])
        return found

    def first(self, found: Exception | None) -> Exception | None:
        """What the first worker that found something found; the same on every worker."""
        if self.size == 1:
            return found
        everyone: list[Exception | None] = [None] * self.size
        torch.distributed.all_gather_object(everyone, found)
        return next(filter(None, everyone), None)

    def tell(self, value: T) -> T:
        """What the first worker says."""
        told = [value]
        if self.size > 1:
            torch.distributed.broadcast_object_list(told)
        return told[0]

    def wait(self) -> None:
        """Return when every worker has come here."""
        if self.size > 1:
            torch.distributed.barrier()


ALONE = Group()
