"""The training curve of a stage: one JSON line a logged step."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.artifacts import write_text
from pipelines.storage import is_remote, read_bytes

_SECONDS_BETWEEN_WRITES = 5.0


class Curve:
    """The training curve, cut back to the checkpoint on a restart.

    An object cannot be appended to: in a store the whole curve is written again, at most every few seconds.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [line for line in self.read(path) if line["step"] <= step]
        self.seconds: float = kept[-1]["seconds"] if kept else 0.0
        self.kept = kept
        self._lines = [json.dumps(line) + "\n" for line in kept] if is_remote(path) else []
        self.write(path, kept)
        self._written, self._waits = time.monotonic(), False

    @staticmethod
    def write(path: Path, lines: Sequence[Mapping[str, float]]) -> None:
        """Write a whole curve."""
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))

    @staticmethod
    def read(path: Path) -> list[dict[str, float]]:
        """All whole lines of a curve."""
        try:
            lines = read_bytes(path).decode().splitlines()
        except FileNotFoundError:
            return []
        whole = [line for line in lines if line.endswith("}")]
        return [json.loads(line) for line in whole]

    def add(self, step: int, values: dict[str, float]) -> None:
        """Append one point; in a store it may wait for `flush`."""
        line = json.dumps({"step": step, **values}) + "\n"
        if not is_remote(self.path):
            with self.path.open("a") as file:
                file.write(line)
            return
        self._lines.append(line)
        self._waits = True
        if time.monotonic() - self._written >= _SECONDS_BETWEEN_WRITES:
            self.flush()

    def add_to(self, values: Mapping[int, dict[str, float]]) -> None:
        """Put more figures into points that are there, by step."""
        self.flush()
        lines = [{**line, **values.get(int(line["step"]), {})} for line in self.read(self.path)]
        self._lines = [json.dumps(line) + "\n" for line in lines]
        write_text(self.path, "".join(self._lines))

    def flush(self) -> None:
        """Write what waits."""
        if self._waits:
            write_text(self.path, "".join(self._lines))
            self._written, self._waits = time.monotonic(), False
