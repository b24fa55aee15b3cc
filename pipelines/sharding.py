"""Networks split among workers by FSDP2, and their tensors as a single worker would hold them."""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def split(network: nn.Module, workers: int, *, tapped: bool = False) -> None:
    """Split a network among all workers, in place: its blocks one by one, then the rest.

    Every worker must call this, and from then on the network itself, at the same moments. Which parameters move is
    settled here: what is frozen later on only seems so.

    ``tapped``: it is also seen through its blocks' outputs, from which FSDP would not know that a backward pass needs
    the rest of it; so the rest stays whole.
    """
    parts = [*_blocks(network), *([] if tapped else [network])]
    mesh = _mesh(next(network.parameters()).device.type, workers)
    for part in parts:
        # The root too: after a call without gradients it would otherwise keep weights that an optimiser then moves.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    for part in network.modules():
        if isinstance(part, FSDPModule):
            part.unshard()
            part.reshard()


@cache
def _mesh(device: str, workers: int) -> DeviceMesh:
    return init_device_mesh(device, (workers,))


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The entries of the outermost lists of modules, which in a backbone are its blocks."""
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from _blocks(child)


def is_split(network: nn.Module) -> bool:
    """Whether a network's parameters are split among workers."""
    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, detached; of a split one every worker must ask at the same moment."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def as_held(full: Tensor, by: Tensor) -> Tensor:
    """The part of a whole tensor that this worker holds, where ``by`` is split; the tensor itself where it is not."""
    if not isinstance(by, DTensor):
        return full
    return distribute_tensor(full.to(by.device), by.device_mesh, by.placements, src_data_rank=None)


@torch.no_grad()
def load(network: nn.Module, tensors: dict[str, Tensor]) -> set[str]:
    """Copy whole tensors into a network's state; returns the names that it has besides."""
    state = network.state_dict()
    assert tensors.keys() <= state.keys(), tensors.keys() - state.keys()
    for name, value in tensors.items():
        state[name].copy_(as_held(value, state[name]))
    return set(state) - set(tensors)
