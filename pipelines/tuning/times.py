"""How long a sweep has worked."""

import time
from pathlib import Path

from pipelines.artifacts import read_json, write_json


class Times:
    """Seconds of performing trials, over all sessions of a sweep; it measures where it is entered."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "times.json"
        self.seconds: dict[str, float] = {"trials": 0.0, "sessions": 0, **(read_json(self._path) or {})}
        self.seconds["sessions"] += 1
        self._since: float | None = None
        self.save()

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.save()
        self._since = None

    def save(self) -> None:
        """Kept at every ended trial, so that a kill loses little."""
        if self._since is not None:
            now = time.perf_counter()
            self.seconds["trials"] += now - self._since
            self._since = now
        write_json(self._path, self.seconds)
