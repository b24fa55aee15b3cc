"""A small class-conditional diffusion transformer (DiT; Peebles & Xie 2023, section 3) over pixels or latents.

It predicts the velocity of the straight path. It is the embedded teacher's architecture and the one for teachers
that are trained here; its time embedding uses slow frequencies only, so that derivatives in time stay tame.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import checkpoint

from hd_core.types import Condition, Images, Times

_again: Callable[..., Tensor] = checkpoint.checkpoint  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Size of a DiT."""

    image_size: int = 8
    """Height and width of the input in pixels or latent cells; a multiple of ``patch_size``."""
    channels: int = 1
    """Channels of the input and the output."""
    patch_size: int = 2
    """Side of the square that becomes one token."""
    width: int = 96
    """Features per token; a multiple of ``heads``."""
    depth: int = 4
    """Transformer blocks."""
    heads: int = 4
    """Attention heads per block."""
    num_classes: int = 10
    """Classes of the condition; one more embedding stands for "no class"."""

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    @property
    def tokens(self) -> int:
        """Tokens per image."""
        return (self.image_size // self.patch_size) ** 2


class ScalarEmbedding(nn.Module):
    """Sinusoids of a scalar, then a two-layer perceptron: ``(b,)`` to ``(b, width)``.

    The frequencies run geometrically from 1 to ``max_frequency`` radians per unit.
    """

    frequencies: Tensor

    def __init__(self, width: int, *, num_frequencies: int = 32, max_frequency: float = 128.0) -> None:
        super().__init__()
        # Named, since transformers replaces `linspace` while it loads, which torch's own device contexts then miss.
        device = torch.get_default_device()
        powers = torch.linspace(0.0, math.log(max_frequency), num_frequencies, device=device)
        self.register_buffer("frequencies", powers.exp(), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, value: Times) -> Float[Tensor, "b d"]:
        angles = value[:, None] * self.frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))

    def zero_output(self) -> None:
        """Make the embedding zero for every input, so that adding it changes nothing."""
        last = self.mlp[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)


def modulate(
    x: Float[Tensor, "b n d"], shift: Float[Tensor, "b d"], scale: Float[Tensor, "b d"]
) -> Float[Tensor, "b n d"]:
    """Adaptive layer norm's affine part, one shift and scale per image."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class Block(nn.Module):
    """Attention and perceptron, each behind an adaptive layer norm with a gate that starts at zero (adaLN-Zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Float[Tensor, "b n d"], embedding: Float[Tensor, "b d"]) -> Float[Tensor, "b n d"]:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(embedding).chunk(6, dim=1)
        attended = self._attend(modulate(F.layer_norm(x, x.shape[-1:]), shift_1, scale_1))
        x = torch.addcmul(x, gate_1[:, None], attended)
        expanded = self.mlp(modulate(F.layer_norm(x, x.shape[-1:]), shift_2, scale_2))
        return torch.addcmul(x, gate_2[:, None], expanded)

    def _attend(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class DiT(nn.Module):
    """Velocity ``v(x_t, t, class)``; satisfies `hd_core.types.Backbone`."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, area = config.width, config.patch_size**2
        self.patches = nn.Linear(config.channels * area, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, config.tokens, width))
        self.time = ScalarEmbedding(width)
        self.classes = nn.Embedding(config.num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, config.channels * area)
        nn.init.normal_(self.classes.weight, std=0.02)
        for layer in (self.modulation, self.output):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self._checkpointed = False

    def checkpoint_blocks(self) -> None:
        """Keep no activations within blocks from now on: the backward pass computes them again."""
        self._checkpointed = True

    @property
    def embedding_width(self) -> int:
        """Width of the time embedding, to which a student adds its own."""
        return self.config.width

    def null_condition(self, condition: Condition) -> Condition:
        """The condition "no class" for as many rows."""
        assert condition.labels is not None
        return Condition(labels=torch.full_like(condition.labels, self.config.num_classes))

    def forward(self, x_t: Images, t: Times, condition: Condition, extra: Float[Tensor, "b d"] | None = None) -> Images:
        assert condition.labels is not None
        embedding = self.time(t)
        if extra is not None:
            embedding = embedding + extra
        embedding = F.silu(embedding + self.classes(condition.labels))
        tokens = self.patches(self._to_tokens(x_t)) + self.position
        for block in self.blocks:
            tokens = self._through(block, tokens, embedding)
        shift, scale = self.modulation(embedding).chunk(2, dim=1)
        return self._to_images(self.output(modulate(F.layer_norm(tokens, tokens.shape[-1:]), shift, scale)))

    def _through(self, block: nn.Module, tokens: Tensor, embedding: Tensor) -> Tensor:
        if not (self._checkpointed and torch.is_grad_enabled()):
            return block(tokens, embedding)
        return _again(block, tokens, embedding, use_reentrant=False)

    def _to_tokens(self, x: Images) -> Float[Tensor, "b n d"]:
        p = self.config.patch_size
        b, c, h, w = x.shape
        return x.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * p * p)

    def _to_images(self, tokens: Float[Tensor, "b n d"]) -> Images:
        p, c, side = self.config.patch_size, self.config.channels, self.config.image_size
        grid = tokens.view(len(tokens), side // p, side // p, c, p, p)
        return grid.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), c, side, side)
