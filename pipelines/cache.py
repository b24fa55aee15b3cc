"""Where files are kept that any run may need again."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder(name: str) -> Path:
    """A folder of this project's cache: under XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hdistill" / name


def fetched(path: Path, fetch: Callable[[str], str], what: str, remedy: str) -> Path:
    """A file, fetched where it is not there; it appears whole or not at all.

    Args:
        fetch: puts it into a folder, and says where it is.
        what: what a person calls it.
        remedy: what a person can do where it cannot be fetched.

    Raises:
        ValueError: it could not be fetched.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as beside:
            try:
                os.replace(fetch(beside), path)
            except OSError as error:
                reason = str(error).splitlines()[0]
                raise ValueError(
                    f"{what} are not on this machine and could not be fetched ({reason}). {remedy}"
                ) from None
    return path
