"""The Adaptive Weighted Discriminator of HD: per tapped layer, learned queries decide which tokens weigh how much.

The paper states token weights, spectral norm, layer norm and frozen features; the module below is our reading of it
(see docs/decisions). For the tokens F of one layer, with h heads of width e:

    H = act(SN(LN(F))),  K = SN(LN(F)),  w = softmax_tokens(q K / (T sqrt(e))),
    z = concat_heads sum_tokens(w H),    logit = SN(act(SN(LN(z)))).

The queries start at zero, so the weights start uniform: the head begins as global average pooling. The other arms of
`AWDConfig.arm` are what its claim is measured against; all have the same number of weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hd_core.networks.heads import (
    SLOPE,
    ConvolutionHead,
    PooledHead,
    StandardHead,
    TokenLogitHead,
    freeze,
    grid_side,
    linear,
    norm,
)
from hd_core.types import Judgement

Arm = Literal["adaptive", "pooled", "token_logits", "convolution", "uniform", "random"]
STANDARD: dict[Arm, type[StandardHead]] = {
    "pooled": PooledHead,
    "token_logits": TokenLogitHead,
    "convolution": ConvolutionHead,
}


@dataclass(frozen=True, kw_only=True)
class AWDConfig:
    """Shape of the discriminator's heads."""

    arm: Arm = "adaptive"
    """adaptive; pooled, token_logits or convolution: a standard head of the same size; uniform or random: the adaptive
    head with its weights frozen at 1/n, or its queries at random numbers. For no discriminator at all set the
    objective's ``adversarial.weight`` to 0."""
    layers: tuple[int, ...] = (1, 3)
    """Blocks of the teacher that are tapped, counted from 0."""
    width: int = 64
    """Features of a head's value and key; a multiple of ``heads``. A standard head gets as many weights as follow."""
    heads: int = 4
    """Queries per layer, each with its own share of the width."""
    temperature: float = 1.0
    """Divides the attention logits; larger keeps the weights nearer to uniform."""
    tail: Literal["mlp", "token_logits"] = "mlp"
    """mlp: the weighted sum of values goes through a perceptron; token_logits: every value does, and the logits that
    come out are what is weighted, by the mean over heads."""
    spectral_norm: bool = True
    """Spectral norm on every linear layer and convolution."""
    layer_norm: bool = True
    """Layer norm on the tokens and on the pooled vector."""

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}, or not positive")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive; given {self.temperature}")
        if not self.layers:
            raise ValueError("layers must name at least one block of the teacher")
        if self.tail != "mlp" and self.arm in STANDARD:
            raise ValueError(f"tail {self.tail} is for the arms adaptive, uniform and random; given arm {self.arm}")


class TokenWeightedHead(nn.Module):
    """One layer's verdict: a logit, and the weight that each head gave to each token."""

    query: Tensor

    def __init__(self, features: int, config: AWDConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = norm(features, config.layer_norm)
        self.value = linear(features, config.width, config.spectral_norm)
        self.key = linear(features, config.width, config.spectral_norm)
        self.query = nn.Parameter(torch.zeros(config.heads, config.width // config.heads))
        self.pooled_norm = norm(config.width, config.layer_norm)
        self.hidden = linear(config.width, config.width, config.spectral_norm)
        self.logit = linear(config.width, 1, config.spectral_norm)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> tuple[Float[Tensor, "b 1"], Float[Tensor, "b heads n"]]:
        tokens = self.norm(tokens)
        weights = self._weights(self.key(tokens))
        values = F.leaky_relu(self.value(tokens), SLOPE)
        if self.config.tail == "token_logits":
            return torch.einsum("bhn,bno->bo", weights, self._verdict(values)) / self.config.heads, weights
        pooled = torch.einsum("bhn,bnhe->bhe", weights, self._split(values)).flatten(1)
        return self._verdict(pooled), weights

    def _verdict(self, values: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows 1"]:
        return self.logit(F.leaky_relu(self.hidden(self.pooled_norm(values)), SLOPE))

    def _weights(self, keys: Float[Tensor, "b n d"]) -> Float[Tensor, "b heads n"]:
        scale = self.config.temperature * self.query.shape[1] ** 0.5
        return torch.softmax(torch.einsum("he,bnhe->bhn", self.query, self._split(keys)) / scale, dim=-1)

    def _split(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n heads e"]:
        return tokens.reshape(*tokens.shape[:2], self.config.heads, -1)

    def settle(self) -> None:
        """Freeze what the arm does not train; a random query is drawn now."""
        if self.config.arm == "random":
            nn.init.normal_(self.query)
        if self.config.arm != "adaptive":
            freeze(self)
        if self.config.arm == "uniform":
            for part in self.key.modules():
                freeze(part)


class AdaptiveWeightedDiscriminator(nn.Module):
    """One head per tapped layer; satisfies `hd_core.types.Judge`.

    Args:
        features: width of the tokens of each layer.
    """

    def __init__(self, features: Sequence[int], config: AWDConfig) -> None:
        super().__init__()
        if len(features) != len(config.layers):
            raise ValueError(f"needed: one width for each of {len(config.layers)} layers; given {list(features)}")
        self.heads = nn.ModuleList(_head(width, config) for width in features)
        for head in self.heads:  # when all else is drawn: adaptive, uniform and random start from the same weights
            if isinstance(head, TokenWeightedHead):
                head.settle()

    def forward(self, features: Sequence[Float[Tensor, "b _ _"]]) -> Judgement:
        verdicts = [head(tokens) for head, tokens in zip(self.heads, features, strict=True)]
        weights = _on_the_finest_grid([weights for _, weights in verdicts])
        return Judgement(logits=torch.cat([logits for logits, _ in verdicts], dim=1), weights=torch.stack(weights, 1))

    @property
    def size(self) -> int:
        """Number of weights, trained and frozen."""
        iterated = ("._u", "._v")  # singular vectors that spectral norm keeps
        return sum(value.numel() for name, value in self.state_dict().items() if not name.endswith(iterated))


def _head(features: int, config: AWDConfig) -> nn.Module:
    if config.arm not in STANDARD:
        return TokenWeightedHead(features, config)
    return STANDARD[config.arm](
        features,
        _adaptive_size(features, config),
        heads=config.heads,
        spectral_norm=config.spectral_norm,
        layer_norm=config.layer_norm,
    )


def _adaptive_size(features: int, config: AWDConfig) -> int:
    with torch.device("meta"):  # shapes without numbers: nothing is drawn
        head = TokenWeightedHead(features, replace(config, arm="adaptive", spectral_norm=False))
    return sum(parameter.numel() for parameter in head.parameters())


def _on_the_finest_grid(weights: list[Tensor]) -> list[Tensor]:
    """Weights of layers with different numbers of tokens, as shares of the same tokens: those of the finest layer.

    A token's weight is spread evenly over the tokens in its place, so uniform weights stay uniform.
    """
    most = max(layer.shape[2] for layer in weights)
    return [layer if layer.shape[2] == most else _spread(layer, grid_side(most)) for layer in weights]


def _spread(weights: Float[Tensor, "b heads n"], side: int) -> Float[Tensor, "b heads m"]:
    rows, heads, n = weights.shape
    maps = weights.reshape(rows, heads, grid_side(n), -1)
    finer = F.interpolate(maps, size=(side, side), mode="nearest").flatten(2)
    return finer / finer.sum(2, keepdim=True)
