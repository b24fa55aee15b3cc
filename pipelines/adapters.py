"""Low-rank adapters: injected where a network shall move little, folded into its weights where others read them."""

import copy
from typing import Any, TypeVar

from torch import nn

from pipelines.torchvision_ops import declare_missing_operators

N = TypeVar("N", bound=nn.Module)


def adapted(backbone: nn.Module, rank: int, alpha: float) -> nn.Module:
    """The network, frozen but for new adapters at every linear layer; their output starts at zero."""
    declare_missing_operators()  # peft imports transformers, and that torchvision
    from peft import LoraConfig, inject_adapter_in_model

    linears = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    adapters = LoraConfig(r=rank, lora_alpha=alpha, target_modules=linears)  # pyright: ignore[reportArgumentType]
    return inject_adapter_in_model(adapters, backbone.requires_grad_(False))


def merged(network: N) -> N:
    """A copy with its adapters folded into the weights, under the names they had before; or the network itself."""
    if not _layers(network):
        return network
    folded = copy.deepcopy(network)
    for name, layer in _layers(folded):
        layer.merge()
        folded.set_submodule(name, layer.get_base_layer())
    return folded


def _layers(network: nn.Module) -> list[tuple[str, Any]]:
    """Layers with adapters, by name; a network without any needs no peft."""
    return [(name, module) for name, module in network.named_modules() if hasattr(module, "get_base_layer")]
