"""Inception as clean-fid has it: its weights from a file, from where clean-fid keeps them, or fetched once."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.artifacts import file_hash
from pipelines.cache import fetched
from pipelines.extractor import INCEPTION_SIZE, Extractor

WEIGHTS = "inception-2015-12-05.pt"


def load_inception(given: str, device: str) -> Extractor:
    """Inception from a file of its weights, or, where none is given, from clean-fid's place for them.

    The file is TorchScript, as NVIDIA publishes it with StyleGAN: code that runs when it is loaded. Take it from there.

    Raises:
        ValueError: there is no such file, it is damaged, or the weights are not there and cannot be fetched.
    """
    from cleanfid.inception_torchscript import InceptionV3W

    path = Path(given).expanduser() if given else _fetched(Path(tempfile.gettempdir()))
    if path.name != WEIGHTS or not path.is_file():
        raise ValueError(f"Inception's weights are a file called {WEIGHTS}; there is none at {path}")
    try:
        net = InceptionV3W(str(path.parent), download=False).eval().to(device)
    except RuntimeError as error:
        raise ValueError(
            f"{path} is damaged: {str(error).splitlines()[0]}. Delete it, and it is fetched anew"
        ) from None
    fingerprint, logits = file_hash(path), _logits(net.base)
    model = partial(_channels_last, net) if device == "cpu" else net
    return Extractor(
        name="inception", size=INCEPTION_SIZE, model=model, fingerprint=fingerprint, device=device, logits=logits
    )


def _channels_last(net: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """A CPU's convolutions take this layout in two thirds of the time; features differ by rounding alone."""
    return net(images.contiguous(memory_format=torch.channels_last))


def _logits(base: Any) -> Callable[[Tensor], Tensor]:
    """The classifier's last layer without its bias, as inception scores have had it since 2016."""
    weight = base.output.weight.detach().cpu()
    return lambda features: features @ weight.T


def _fetched(folder: Path) -> Path:
    """Where clean-fid keeps the weights."""
    from cleanfid.downloads_helper import check_download_inception, inception_url

    path = folder / WEIGHTS
    remedy = f"Put {inception_url} at {path}, or set evaluate.features to that file or to another net"
    return fetched(path, check_download_inception, "clean-fid's Inception weights", remedy)
