"""Bytes of the tensors that are alive while a network runs, counted on any device, the meta device included."""

import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from pipelines.architectures import Architecture


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of one training pass, parameters and their gradients left out."""

    kept: int
    """Between the forward and the backward pass: what the graph has saved, and the output."""
    peak: int
    """The most at any moment of the two."""


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make while it is entered, each until it is freed; views are free."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """``known``: tensors that are not counted, and whose views are not."""
        super().__init__()
        self.now, self.peak = 0, 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, result)
        self.peak = max(self.peak, self.now)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._known:
            return
        self._alive[key] = storage.nbytes()
        self.now += self._alive[key]
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._alive.pop(key)


class LikeGPU(TorchFunctionMode):
    """Runs operators as a GPU would: attention is fused, and in reduced precision products are as autocast has them."""

    def __init__(self, *, autocast: bool = False) -> None:
        super().__init__()
        self.autocast = autocast

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.autocast and func in _TO_BFLOAT16:
            args, kwargs = _cast((args, kwargs), torch.bfloat16)
        elif self.autocast and func in _TO_FLOAT32:
            args, kwargs = _cast((args, kwargs), torch.float32)
        if func is F.scaled_dot_product_attention and _fusible(*args, **kwargs):
            return _fused(*args, **kwargs)
        return func(*args, **kwargs)


_TO_BFLOAT16 = {
    *(F.linear, F.conv2d, F.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.baddbmm),
    *(Tensor.matmul, Tensor.__matmul__),
}
_TO_FLOAT32 = {
    *(F.layer_norm, F.group_norm, F.rms_norm, F.softmax, Tensor.softmax, torch.softmax),
    *(torch.rsqrt, Tensor.pow),
}
"""Of autocast's lists what the networks here call."""


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, values)


def _fusible(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **_more: Any) -> bool:
    return query.is_meta and query.dim() == 4 and attn_mask is None


def _fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float | None = None, **_more: Any) -> Tensor:
    needs_gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(query, key, value, None, needs_gradient, scale=scale)[0]


@torch.no_grad()
def inference_bytes(built: Architecture, rows: int) -> int:
    """The most bytes of one call without gradients, in float32, parameters left out."""
    with LikeGPU(), LiveBytes(_tensors(built.network)) as live:
        built.call(_images(built, rows))
    return live.peak


@torch.no_grad()
def decoding_bytes(built: Architecture, rows: int) -> int:
    """The same of decoding; 0 where there is no autoencoder."""
    if built.autoencoder is None:
        return 0
    with LikeGPU(), LiveBytes(_tensors(built.autoencoder)) as live:
        built.decode(_images(built, rows))
    return live.peak


def training_bytes(
    built: Architecture, rows: int, *, autocast: bool = False, checkpointing: bool = False, frozen: bool = False
) -> Activations:
    """Bytes of one forward and backward pass.

    Args:
        checkpointing: activations inside blocks are recomputed; the network must be able to.
        frozen: the gradient is the input's, as where a discriminator looks through a frozen teacher.
    """
    network: Any = built.network
    network.requires_grad_(not frozen)
    if checkpointing:
        network.enable_gradient_checkpointing(partial(_recomputed, autocast))
    hooks = [parameter.register_post_accumulate_grad_hook(_forget) for parameter in network.parameters() if not frozen]
    try:
        return _trained(built, rows, autocast, frozen)
    finally:
        for hook in hooks:
            hook.remove()
        if checkpointing:
            network.disable_gradient_checkpointing()


def _trained(built: Architecture, rows: int, autocast: bool, frozen: bool) -> Activations:
    with LikeGPU(autocast=autocast), LiveBytes(_tensors(built.network)) as live:
        output = built.call(_images(built, rows).requires_grad_(frozen)).float()
        kept = live.now
        output.backward(torch.ones_like(output))
    return Activations(kept=kept, peak=live.peak)


def _recomputed(autocast: bool, block: nn.Module, *inputs: Any) -> Any:
    # The backward pass runs outside of LikeGPU, and so would what is recomputed in it.
    return checkpoint(
        block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), LikeGPU(autocast=autocast))
    )


def _forget(parameter: Tensor) -> None:
    parameter.grad = None  # gradients are counted with the weights


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _images(built: Architecture, rows: int) -> Tensor:
    return torch.zeros(rows, *built.shape, device=next(built.network.parameters()).device)
