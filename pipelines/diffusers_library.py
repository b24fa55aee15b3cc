"""The one place that imports diffusers: everything else asks here for it, when it is used."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError

from pipelines.torchvision_ops import declare_missing_operators


def diffusers() -> ModuleType:
    """The library, imported at the first call: it takes seconds."""
    declare_missing_operators()
    import diffusers
    from transformers.utils import logging as transformers_logging

    diffusers.utils.logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    return diffusers


def from_pretrained(kind: Any, folder: str, what: str, **options: Any) -> Any:
    """A model or pipeline of a local folder, in float32 and from safetensors only.

    Raises:
        ValueError: it cannot be loaded; the message names ``what``.
    """
    options = {"use_safetensors": True, "local_files_only": True, "dtype": torch.float32, **options}
    with loading(what):
        return kind.from_pretrained(folder, **options)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Raises ValueError, which names ``what``, where the library cannot load it."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, NotImplementedError, SafetensorError) as error:
        raise ValueError(f"{what} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
