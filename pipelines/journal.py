"""The journal of a tracked run: calls that wait for the store, and are sent from there in order.

What opens runs in the store, and what a call then does there, is `pipelines.tracking`'s business, as is MLflow.
"""

import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.artifacts import as_text, flatten
from pipelines.storage import is_remote, located
from pipelines.stores import redact

if TYPE_CHECKING:
    from pipelines.tracking import MlflowTracker, Store

Status = Literal["FINISHED", "FAILED", "KILLED"]

_CALLS = ("params", "summary", "figure", "artifact", "folder", "tags", "register")
_REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS")

_SEND_SECONDS = 1.0  # one log_batch to sqlite costs 15 ms: too dear for every training step, cheap once a second
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5.0, 300.0
_PAUSE_PER_FAILED_SECOND = 20.0  # a server that swallows requests may cost training at most 5 % of its time
_JOURNAL_BYTES = 16 * 2**20

_logger = logging.getLogger(__name__)


class MissingFile(FileNotFoundError):
    """An artifact that was gone before it could be sent."""


class Journal:
    """Entries that wait for the store: JSON lines, oldest first. A kill loses at most a torn last line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not (text := path.read_bytes()).endswith(b"\n"):
            os.truncate(path, text.rfind(b"\n") + 1)

    def append(self, entries: Iterable[Mapping[str, object]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)

    def entries(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text("utf-8").splitlines()]

    def drop(self, count: int) -> None:
        """Forget the oldest entries."""
        if not count:
            return
        new = self.path.with_suffix(".new")
        new.write_bytes(b"".join(self.path.read_bytes().splitlines(keepends=True)[count:]))
        os.replace(new, self.path)

    def is_full(self) -> bool:
        return self.path.exists() and self.path.stat().st_size > _JOURNAL_BYTES


class Sender:
    """Sends a journal in order, and after a failure tries again ever more seldom."""

    def __init__(self, store: "Store", journal: Journal, base: Path) -> None:
        self._store, self._journal, self._base = store, journal, base
        self._open: dict[str, MlflowTracker] = {}
        self._warned: set[str] = set()
        self._failures = 0
        self._due = 0.0

    @property
    def answers(self) -> bool:
        """Whether the last attempt reached the store."""
        return not self._failures

    def add(self, key: str, call: str, *, soon: bool = False, now: bool = False, **arguments: object) -> None:
        """Append one call; send what waits if it is time, or `now`, or `soon` unless the store was away last time."""
        if call == "metrics" and self._failures and self._journal.is_full():
            return self._warn("full", f"{self._journal.path} is full: metrics are dropped until the store is back")
        self._journal.append([{"run": key, "call": call, "at": now_milliseconds(), "arguments": arguments}])
        if now or (soon and self.answers) or time.monotonic() >= self._due:
            self.flush()

    def stored(self, path: Path) -> str:
        """As an entry holds a path: relative inside the run directory, which may be moved before the store is back."""
        whole = path.resolve()
        inside = is_remote(whole) == is_remote(self._base) and whole.is_relative_to(self._base)
        return str(whole.relative_to(self._base) if inside else whole)

    def _found(self, text: str) -> Path:
        """The path of an entry."""
        path = located(text)
        return path if is_remote(path) or path.is_absolute() else self._base / text

    def run_id(self, key: str) -> str:
        """The store's id of a run; its key until the store was reached."""
        return self._open[key].run_id if key in self._open else key

    def flush(self) -> bool:
        start, sent = time.monotonic(), 0
        try:
            for group in _groups(self._journal.entries()):
                self._send(group)
                sent += len(group)
            self._failures, self._due = 0, time.monotonic() + _SEND_SECONDS
        except Exception as error:  # whatever the cause, tracking does not end a training run
            self._hold(error, time.monotonic() - start)
        finally:
            self._journal.drop(sent)
        return self.answers

    def _send(self, group: Sequence[dict[str, Any]]) -> None:
        key, call, at, arguments = (group[0][name] for name in ("run", "call", "at", "arguments"))
        if call == "open":
            self._open[key] = self._opened(key, at, **arguments)
            return
        tracker = self._run(key, at)
        try:
            self._perform(tracker, group)
        except Exception as error:
            if not isinstance(error, MissingFile) and getattr(error, "error_code", "") not in _REFUSALS:
                raise
            self._refuse(group, error)

    def _opened(
        self, key: str, at: int, parent: str, name: str, tags: Mapping[str, object], reopen: bool = True
    ) -> "MlflowTracker":
        if not parent:
            return self._store.open(key, tags, at)
        return self._run(parent, at).child(name, tags, at, reopen=reopen)

    def _run(self, key: str, at: int) -> "MlflowTracker":
        if key not in self._open:
            self._open[key] = self._store.find(key, at)
        return self._open[key]

    def _perform(self, tracker: "MlflowTracker", group: Sequence[dict[str, Any]]) -> None:
        call, at, arguments = (group[0][name] for name in ("call", "at", "arguments"))
        if call == "metrics":
            rows = ((entry["arguments"], entry["at"]) for entry in group)
            tracker.points((given["values"], given["step"], logged_at) for given, logged_at in rows)
        elif call == "finish":
            tracker.finish(arguments["status"], at)
        else:
            assert call in _CALLS, call
            paths = {"path": self._found(arguments["path"])} if "path" in arguments else {}
            getattr(tracker, call)(**(arguments | paths))

    def _refuse(self, group: Sequence[dict[str, Any]], error: Exception) -> None:
        refused = Journal(self._journal.path.with_name("refused.jsonl"))
        if not refused.is_full():
            refused.append(group)
        self._warn(
            "refused", f"Tracking: the store refused an entry ({_first_line(error)}); it is kept in {refused.path}"
        )

    def _hold(self, error: Exception, seconds: float) -> None:
        pause = min(_FIRST_PAUSE_SECONDS * 2 ** min(self._failures, 10), _LONGEST_PAUSE_SECONDS)
        self._due = time.monotonic() + max(pause, _PAUSE_PER_FAILED_SECOND * seconds)
        self._failures += 1
        away = f"Tracking: {redact(self._store.uri)} does not take entries ({_first_line(error)})."
        self._warn("away", f"{away} The run goes on; what is missed waits in {self._journal.path} and is sent later.")

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            _logger.warning("%s", text)
        self._warned.add(kind)


class BufferedTracker:
    """A run whose calls go through the journal, so that they neither wait for the store nor get lost."""

    def __init__(self, sender: Sender, key: str) -> None:
        self._sender, self._key = sender, key

    @property
    def run_id(self) -> str:
        return self._sender.run_id(self._key)

    def params(self, values: Mapping[str, object]) -> None:
        self._sender.add(self._key, "params", values=texts(flatten(values)))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        numbers = {key: float(value) for key, value in values.items()}
        self._sender.add(self._key, "metrics", values=numbers, step=int(step))

    def summary(self, values: Mapping[str, float], step: int) -> None:
        numbers = {key: float(value) for key, value in values.items()}
        self._sender.add(self._key, "summary", values=numbers, step=int(step))

    def figure(self, name: str, path: Path) -> None:
        self._sender.add(self._key, "figure", name=name, path=self._sender.stored(path))

    def artifact(self, path: Path, folder: str = "") -> None:
        self._sender.add(self._key, "artifact", path=self._sender.stored(path), folder=folder)

    def folder(self, path: Path, name: str) -> None:
        self._sender.add(self._key, "folder", path=self._sender.stored(path), name=name)

    def tags(self, values: Mapping[str, object]) -> None:
        self._sender.add(self._key, "tags", values=texts(values))

    def register(self, name: str, path: Path, tags: Mapping[str, object]) -> None:
        self._sender.add(self._key, "register", name=name, path=self._sender.stored(path), tags=texts(tags))

    def child(self, name: str, tags: Mapping[str, object], *, reopen: bool = True) -> "BufferedTracker":
        key = child_key(self._key, name)
        self._sender.add(key, "open", parent=self._key, name=name, tags=texts(tags), reopen=reopen, soon=True)
        return BufferedTracker(self._sender, key)

    def flush(self) -> bool:
        return self._sender.flush()

    def finish(self, status: Status = "FINISHED") -> None:
        last_chance = "/" not in self._key
        self._sender.add(self._key, "finish", status=status, soon=True, now=last_chance)


def child_key(parent: str, name: str) -> str:
    """The key of the run called ``name`` inside another."""
    return parent + "/" + re.sub(r"[^\w.: -]", "_", name)


def texts(values: Mapping[str, object]) -> dict[str, str]:
    """Values as text, as YAML has it, without passwords."""
    return {key: redact(as_text(value)) for key, value in values.items()}


def shortened(text: str, limit: int) -> str:
    """The text, cut to a length."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def now_milliseconds() -> int:
    """The time as MLflow counts it."""
    return time.time_ns() // 1_000_000


def _groups(entries: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Neighbouring metrics of one run together, everything else alone."""
    numbered = enumerate(entries)
    same = groupby(numbered, lambda pair: pair[1]["run"] if pair[1]["call"] == "metrics" else pair[0])
    return ([entry for _, entry in group] for _, group in same)


def _first_line(error: Exception) -> str:
    lines = redact(str(error)).splitlines() or [""]
    return f"{type(error).__name__}: {shortened(lines[0], 200)}"
