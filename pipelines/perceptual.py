"""Nets of the perceptual distance: LPIPS, or the activations of a feature net of this project.

Do not take the net that FID is measured by: a student that is pulled towards a net's features is flattered by it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hd_core.perceptual import perceptual_distance
from hd_core.types import Images, PerSample
from pipelines.artifacts import fingerprint
from pipelines.features import load_extractor

LPIPS = "lpips"
_LPIPS_SIDE = 224


@dataclass(frozen=True, kw_only=True)
class Perceptual:
    """A distance of two images in [-1, 1], grey or in colour, through which gradients flow."""

    distance: Callable[[Images, Images], PerSample]
    fingerprint: str
    """Identity of the net."""


def load_perceptual(name: str, device: torch.device | str = "cpu") -> Perceptual:
    """The distance of a name, or of a folder that `hdistill features` made.

    Raises:
        ValueError: there is no such net, or LPIPS is not installed or its weights cannot be had.
    """
    if name == LPIPS:
        return Perceptual(distance=_Lpips(device), fingerprint=fingerprint("lpips 0.1 vgg at 224"))
    extractor = load_extractor(name)
    net = extractor.model
    if not isinstance(net, nn.Module) or not hasattr(net, "convolutions"):
        raise ValueError(f"perceptual takes lpips, digits, or a folder of `hdistill features`; given {name!r}")
    return Perceptual(distance=_OfFeatureNet(net.to(device)), fingerprint=extractor.fingerprint)


class _OfFeatureNet:
    """By the activations after every convolution of a feature net."""

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._caught: list[Tensor] = []
        for layer in net.convolutions:  # pyright: ignore[reportGeneralTypeIssues, reportUnknownVariableType]
            if isinstance(layer, nn.SiLU):
                layer.register_forward_hook(self._catch)

    def __call__(self, images: Images, others: Images) -> PerSample:
        return perceptual_distance(self._activations(images), self._activations(others))

    def _catch(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._caught.append(output)

    def _activations(self, images: Images) -> list[Tensor]:
        self._caught = []
        self._net((_in_colour(images) + 1) * 127.5)
        return self._caught


class _Lpips:
    """Zhang et al. (2018) with VGG, as SFD's second stage has it: on images resized to 224."""

    def __init__(self, device: torch.device | str) -> None:
        try:
            import lpips
        except ImportError:
            raise ValueError("perceptual lpips needs the package lpips: `pip install hdistill[lpips]`") from None
        try:
            net = lpips.LPIPS(net="vgg", verbose=False)
        except OSError as error:
            raise ValueError(
                f"the VGG weights of LPIPS are not on this machine and could not be fetched ({error}): put"
                f" vgg16-397923af.pth into {Path(torch.hub.get_dir()) / 'checkpoints'}, or name a folder of"
                " `hdistill features`"
            ) from None
        self._net = net.to(device).eval().requires_grad_(False)

    def __call__(self, images: Images, others: Images) -> PerSample:
        return self._net(_enlarged(images), _enlarged(others)).flatten()


def _in_colour(images: Images) -> Images:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def _enlarged(images: Images) -> Images:
    size = (_LPIPS_SIDE, _LPIPS_SIDE)
    return F.interpolate(_in_colour(images), size, mode="bilinear", align_corners=False)
