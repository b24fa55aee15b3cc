"""The Adaptive Weighted Discriminator of HD: per tapped layer, learned queries decide which tokens weigh how much.

The paper states token weights, spectral norm, layer norm and frozen features; the module below is our reading of it
(see docs/decisions). For the tokens F of one layer, with h heads of width e:

    H = act(SN(LN(F))),  K = SN(LN(F)),  w = softmax_tokens(q K / (T sqrt(e))),
    z = concat_heads sum_tokens(w H),    logit = SN(act(SN(LN(z)))).

The queries start at zero, so the weights start uniform: the head begins as global average pooling.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from hd_core.types import Judgement


@dataclass(frozen=True, kw_only=True)
class AWDConfig:
    """Shape of the discriminator's heads."""

    layers: tuple[int, ...] = (1, 3)
    """Blocks of the teacher that are tapped, counted from 0."""
    width: int = 64
    """Features of a head's value and key; a multiple of ``heads``."""
    heads: int = 4
    """Queries per layer, each with its own share of the width."""
    temperature: float = 1.0
    """Divides the attention logits; larger keeps the weights nearer to uniform."""
    spectral_norm: bool = True
    """Spectral norm on every linear layer."""
    layer_norm: bool = True
    """Layer norm on the tokens and on the pooled vector."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive; given {self.temperature}")
        if not self.layers:
            raise ValueError("layers must name at least one block of the teacher")


class TokenWeightedHead(nn.Module):
    """One layer's verdict: a logit, and the weight that each head gave to each token."""

    def __init__(self, features: int, config: AWDConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(features) if config.layer_norm else nn.Identity()
        self.value = _linear(features, config.width, config)
        self.key = _linear(features, config.width, config)
        self.query = nn.Parameter(torch.zeros(config.heads, config.width // config.heads))
        self.pooled_norm = nn.LayerNorm(config.width) if config.layer_norm else nn.Identity()
        self.hidden = _linear(config.width, config.width, config)
        self.logit = _linear(config.width, 1, config)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> tuple[Float[Tensor, " b"], Float[Tensor, "b heads n"]]:
        tokens = self.norm(tokens)
        weights = self._weights(self.key(tokens))
        values = self._split(F.leaky_relu(self.value(tokens), 0.2))
        pooled = torch.einsum("bhn,bnhe->bhe", weights, values).flatten(1)
        hidden = F.leaky_relu(self.hidden(self.pooled_norm(pooled)), 0.2)
        return self.logit(hidden).squeeze(1), weights

    def _weights(self, keys: Float[Tensor, "b n d"]) -> Float[Tensor, "b heads n"]:
        scale = self.config.temperature * self.query.shape[1] ** 0.5
        return torch.softmax(torch.einsum("he,bnhe->bhn", self.query, self._split(keys)) / scale, dim=-1)

    def _split(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n heads e"]:
        return tokens.reshape(*tokens.shape[:2], self.config.heads, -1)


class AdaptiveWeightedDiscriminator(nn.Module):
    """One `TokenWeightedHead` per tapped layer; satisfies `hd_core.objectives.turns.Judge`."""

    def __init__(self, features: int, config: AWDConfig) -> None:
        super().__init__()
        self.heads = nn.ModuleList(TokenWeightedHead(features, config) for _ in config.layers)

    def forward(self, features: Sequence[Float[Tensor, "b n d"]]) -> Judgement:
        verdicts = [head(tokens) for head, tokens in zip(self.heads, features, strict=True)]
        return Judgement(
            logits=torch.stack([logit for logit, _ in verdicts], dim=1),
            weights=torch.stack([weights for _, weights in verdicts], dim=1),
        )


def _linear(inputs: int, outputs: int, config: AWDConfig) -> nn.Module:
    layer = nn.Linear(inputs, outputs)
    return spectral_norm(layer) if config.spectral_norm else layer
