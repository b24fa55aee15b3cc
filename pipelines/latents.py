"""Autoencoders of diffusers: images to latents and back, and what of them decides that latents fit a teacher."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipelines.diffusers_library import diffusers, from_pretrained
from pipelines.model_files import ModelFiles

AUTOENCODERS = ("AutoencoderKL", "AutoencoderDC")
DECODE_ROWS = 16
"""Latents that are decoded at once: a decoder's activations are many times a latent's size."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentCodec:
    """A frozen autoencoder. Latents ``z`` of a flow are ``(raw - shift) * scale`` of what its encoder puts out."""

    vae: nn.Module
    scale: float
    """Brings raw latents to about unit variance."""
    shift: float
    """Taken from raw latents first."""
    factor: int
    """Pixels per latent along each side."""
    channels: int
    """Channels of an image."""
    fingerprint: str
    """sha256 over the bytes of its config and weights."""

    @classmethod
    def of(cls, folder: Path) -> Self:
        """The autoencoder of a folder. ValueError where it is of a class that is not served, or cannot be loaded."""
        source = ModelFiles.of(folder)
        if source.class_name not in AUTOENCODERS:
            raise ValueError(f"{source.name} is no autoencoder that is served; there is {', '.join(AUTOENCODERS)}")
        vae = from_pretrained(getattr(diffusers(), source.class_name), str(source.folder), source.name)
        vae.requires_grad_(False).eval()
        config: Any = vae.config
        blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels")
        return cls(
            vae=vae,
            scale=float(config.get("scaling_factor") or 1),
            shift=float(config.get("shift_factor") or 0),
            factor=2 ** (len(blocks) - 1),
            channels=config.in_channels,
            fingerprint=source.fingerprint(),
        )

    @property
    def provenance(self) -> dict[str, Any]:
        """What latents are made by, for the manifest of those that are stored."""
        return {"autoencoder": self.fingerprint, "scale": self.scale, "shift": self.shift}

    def image_shape(self, latent: tuple[int, int, int]) -> tuple[int, int, int]:
        """Channels, height and width of the image of a latent."""
        return self.channels, latent[1] * self.factor, latent[2] * self.factor

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 2 c_latent h_latent w_latent"]:
        """Mean and standard deviation of each image's raw latent; the spread is 0 where the encoder has none."""
        encoded: Any = self._call("encode", images)
        if hasattr(encoded, "latent_dist"):
            return torch.stack([encoded.latent_dist.mean, encoded.latent_dist.std], dim=1)
        return torch.stack([encoded.latent, torch.zeros_like(encoded.latent)], dim=1)

    def drawn(self, stored: Float[Tensor, "b 2 c h w"], noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """A draw of each stored posterior, as the flow's latent."""
        mean, spread = stored.unbind(1)
        return (mean + spread * noise - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b channels height width"]:
        """Images in [-1, 1] of the flow's latents."""
        raw = z / self.scale + self.shift
        return torch.cat([self._call("decode", part).sample for part in raw.split(DECODE_ROWS)])

    def _call(self, name: str, x: Tensor) -> Any:
        method: Callable[[Tensor], Any] = getattr(self.vae, name)
        return method(x.to(next(self.vae.parameters()).device))

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, in place."""
        self.vae.to(device)
        return self


def pixels_hash(image: Any) -> str:
    """What identifies one image's pixels, uint8 (h, w, c)."""
    return hashlib.sha256(image.tobytes()).hexdigest()[:16]
