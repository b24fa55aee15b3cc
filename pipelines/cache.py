"""Where files are kept that any run may need again."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """A folder of this project's cache: under XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hdistill" / name
