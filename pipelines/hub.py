"""Models by their name on the Hugging Face hub: fetched once into its cache, then local folders like any other."""

import re
from pathlib import Path

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model")
"""Configs, weights and tokenizers; never a pickle, nor code."""
_UNWANTED = ("*.fp16.*", "*.non_ema.*", "safety_checker/*", "*_flax_*", "*/openvino_*")
"""Second copies of weights, and parts that nothing here uses."""


def is_hub_name(path: str) -> bool:
    """Whether a path reads as ``owner/name`` and no such folder is here."""
    return _NAME.fullmatch(path) is not None and not Path(path).expanduser().exists()


def is_fetched(name: str, revision: str = "") -> bool:
    """Whether a repository is in the hub's cache already; the network is not asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot_download(name, revision=revision or None, local_files_only=True)
    except LocalEntryNotFoundError:
        return False
    return True


def fetched(name: str, revision: str = "", field: str = "teacher.path") -> Path:
    """The folder of a repository's files in the hub's cache; fetched where it is not there yet.

    Args:
        field: what gave the name, for the message.

    Raises:
        ValueError: there is no such repository, it needs a permission, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            name, revision=revision or None, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED)
        )
    except LocalEntryNotFoundError:
        raise ValueError(
            f"there is no folder {name}, it is not in the hub's cache, and the hub cannot be reached. Fetch it where"
            f" there is a network (hf download {name}), then give its folder as {field}"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"there is no folder {name}, and it cannot be fetched from the hub: {why}") from None
    return Path(folder)
