"""Exponential moving average of a network's parameters."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def update_ema(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move ``average`` towards ``network``: ``average = decay average + (1 - decay) network``; buffers are copied.

    Where both are sharded in the same way, each worker moves the part that it holds.
    """
    mine: list[Tensor] = [_held(parameter) for parameter in average.parameters()]
    theirs: list[Tensor] = [_held(parameter) for parameter in network.parameters()]
    torch._foreach_lerp_(mine, theirs, 1 - decay)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    for copied, buffer in zip(average.buffers(), network.buffers(), strict=True):
        copied.copy_(buffer)


def _held(parameter: nn.Parameter) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def warmed_decay(decay: float, step: int) -> float:
    """The decay at a step, smaller at first so that the start is forgotten: ``min(decay, (1 + step)/(10 + step))``."""
    return min(decay, (1 + step) / (10 + step))
