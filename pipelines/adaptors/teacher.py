"""What the rest of the project sees of a teacher, whatever its class."""

from dataclasses import dataclass, replace
from typing import Self, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hd_core.guidance import guided
from hd_core.types import Condition, Images, Velocity
from pipelines.latents import LatentCodec
from pipelines.prompts_table import PromptTable


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """A frozen velocity network and what others must know of it."""

    backbone: nn.Module
    """Frozen, in eval mode; satisfies `hd_core.types.Backbone`. Unfreeze a deepcopy of it before training that."""
    shape: tuple[int, int, int]
    """Channels, height and width of one image or latent."""
    num_classes: int
    """Classes that a condition may name; 0 for an unconditional teacher, and for one of text without its prompts."""
    blocks: list[nn.Module]
    """Modules whose outputs are tokens (b, n, d), first to last: what `FeatureTaps` taps."""
    feature_widths: list[int]
    """Features per token of each block."""
    null_condition: Condition | None
    """One row of "no class", or of no text; None where the teacher was trained without one, or has no prompts yet."""
    fingerprint: str
    """sha256 over the bytes of config and weights (and of the scheduler's config, where that decides the path)."""
    text_width: int = 0
    """Features per token of the text that it reads; 0 where it reads none."""
    codec: LatentCodec | None = None
    """Its autoencoder; None where it works on pixels."""
    prompts: PromptTable | None = None
    """Text embeddings by label, for a teacher of text."""

    def velocity(self, scale: float = 1.0) -> Velocity:
        """The velocity guided at ``scale``; ValueError where that needs a null condition and there is none."""
        return guided(cast(Velocity, self.backbone), self.null_condition, scale)

    def condition(self, labels: Int[Tensor, " b"]) -> Condition:
        """What labels stand for: classes, or prompts."""
        return Condition(labels=labels) if self.prompts is None else self.prompts.condition(labels)

    def reading(self, prompts: PromptTable) -> Self:
        """The same teacher with prompts as its classes."""
        null = prompts.condition(torch.tensor([len(prompts)]))
        return replace(self, prompts=prompts, num_classes=len(prompts), null_condition=null)

    def decoded(self, x: Images) -> Float[Tensor, "b channels height width"]:
        """Images in [-1, 1] of what its flow ends in."""
        return x if self.codec is None else self.codec.decode(x)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one decoded image."""
        return self.shape if self.codec is None else self.codec.image_shape(self.shape)

    @property
    def knows_null(self) -> bool:
        """Whether it can be guided."""
        return self.null_condition is not None or self.text_width > 0

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.backbone.parameters()).device

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, in place."""
        self.backbone.to(device)
        if self.codec is not None:
            self.codec.to(device)
        return self
