"""What a run costs, phase by phase, summed over all of its lives.

A run may be killed and started again any number of times. Every process keeps what it spends in a small file of its
own, `RUN_DIR/costs/LIFE.json`, rewritten whole every few seconds, so that a kill loses no more than those; each
training worker keeps one in `STAGE/costs/`, by `keep_worker_costs`. The bill is the sum of all files. Nothing else of a
run reads them, and a file that cannot be written or read is left out: they are accounts, not results.
"""

import math
import os
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.artifacts import read_json, write_json

if TYPE_CHECKING:
    from pipelines.report import Phase
    from pipelines.shards import ShardSet

_UNFINISHED = "unfinished"
"""Key of a life's file beside the fields of `Cost`: how often a phase began in it and did not end."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a phase cost, in all lives of a run."""

    wall_seconds: float = 0.0
    """Seconds that it took, as a clock on the wall has them."""
    worker_seconds: float = 0.0
    """Seconds of all its workers together: actors, training workers, or the one process."""
    waiting_seconds: float = 0.0
    """Of these, seconds in which training workers waited for data."""
    network_calls: float = 0.0
    """Passes of a network over one row; a backward pass counts as two forward ones."""
    bytes_written: float = 0.0
    """Bytes of the files it left."""
    bytes_read: float = 0.0
    """Bytes of the shards it read."""
    restarts: float = 0.0
    """Times that it began anew because a process, or one of a group of workers, had ended before it."""

    @property
    def idle_share(self) -> float:
        """Share of the workers' time spent waiting for data, 0 to 1."""
        return min(1.0, self.waiting_seconds / self.worker_seconds) if self.worker_seconds else 0.0

    def __add__(self, other: "Cost") -> "Cost":
        mine, its = asdict(self), asdict(other)
        return Cost(**{name: mine[name] + its[name] for name in mine})


def _new_life() -> str:
    """A name unlike that of any other life of the run, on any machine; names sort by time."""
    return f"{time.time_ns()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


_WORKER_LIFE = _new_life()
_AMOUNTS = tuple(field.name for field in fields(Cost))


class Bill:
    """What this process spends on a run, in the file of its life.

    ``folder`` is the run's `costs`; no file is made before a phase that takes time runs. ``every`` is the number of
    seconds between two writings while one does.
    """

    def __init__(self, folder: Path, every: float = 5.0) -> None:
        self._file, self._every = folder / f"{_new_life()}.json", every
        self._spent: dict[str, dict[str, float]] = {}
        self._running: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Bill the time of a phase, and keep what is spent while it runs; one that raises did not finish."""
        self._running[name], stop = time.perf_counter(), threading.Event()
        keeper = threading.Thread(target=self._keep_on, args=(stop,), daemon=True)
        keeper.start()
        finished = False
        try:
            yield
            finished = True
        finally:
            stop.set()
            keeper.join()
            self._end(name, finished)
            self._keep()

    def add(self, name: str, **amounts: float) -> None:
        """Add to what a phase cost: fields of `Cost` by name."""
        assert amounts.keys() <= set(_AMOUNTS), amounts
        with self._lock:
            _add(self._spent, name, amounts)

    def forget(self, name: str) -> None:
        """Take a running phase off the bill: it was found finished."""
        with self._lock:
            self._running.pop(name, None)

    def _end(self, name: str, finished: bool) -> None:
        with self._lock:
            if (started := self._running.pop(name, None)) is not None:
                _add(self._spent, name, _ran(started, finished))

    def _keep_on(self, stop: threading.Event) -> None:
        while not stop.wait(self._every):
            self._keep()

    def _keep(self) -> None:
        record = self._record()
        with suppress(Exception):  # an account that cannot be kept must not end what it is of
            if record:
                write_json(self._file, record)
            else:
                self._file.unlink(missing_ok=True)

    def _record(self) -> dict[str, dict[str, float]]:
        """By phase: the fields of `Cost` that were added to, and how often it has begun and not ended."""
        with self._lock:
            record = {name: dict(spent) for name, spent in self._spent.items()}
            for name, started in self._running.items():
                _add(record, name, _ran(started, finished=False))
        return record


def _ran(started: float, finished: bool) -> dict[str, float]:
    return {"wall_seconds": time.perf_counter() - started} | ({} if finished else {_UNFINISHED: 1.0})


def _add(spent: dict[str, dict[str, float]], name: str, amounts: Mapping[str, float]) -> None:
    before = spent.setdefault(name, {})
    before |= {amount: before.get(amount, 0.0) + value for amount, value in amounts.items()}


class ShardBill:
    """Bills the shards of a set as they are committed, by what each says of itself."""

    def __init__(self, bill: Bill, name: str, shards: "ShardSet", calls_per_row: int) -> None:
        self._bill, self._name, self._shards, self._calls = bill, name, shards, calls_per_row
        self._seen = {shard.index for shard in shards.shards}

    def see(self) -> None:
        """Add what was committed since the last look."""
        new = [shard for shard in self._shards.shards if shard.index not in self._seen]
        self._seen |= {shard.index for shard in new}
        for shard in new:
            amounts = {"worker_seconds": shard.seconds, "bytes_written": float(shard.bytes)}
            self._bill.add(self._name, **amounts, network_calls=float(shard.rows * self._calls))


def keep_worker_costs(stage_folder: Path, rank: int, **amounts: float) -> None:
    """Keep what one training worker has spent in its life so far: fields of `Cost` by name.

    A worker calls it when it begins, at every checkpoint and at its end; each call takes the place of the one before.
    """
    assert amounts.keys() <= set(_AMOUNTS), amounts
    with suppress(Exception):  # as above
        write_json(stage_folder / "costs" / f"{_WORKER_LIFE}-{rank}.json", amounts)


def costs_of(run_dir: Path, stages: Iterable[str]) -> dict[str, Cost]:
    """What each phase of a run cost, in the lives that are over and in this one's finished phases.

    ``stages`` are those whose workers are asked for.
    """
    found = defaultdict(Cost)
    for _, record in _records(run_dir / "costs"):
        for name, spent in record.items() if all(isinstance(part, dict) for part in record.values()) else ():
            found[name] += _cost(spent)
    for name in stages:
        found[name] = _with_workers(found[name], run_dir / "stages" / name / "costs")
    return dict(found)


def with_costs(phases: Iterable["Phase"], costs: Mapping[str, Cost]) -> list["Phase"]:
    """The phases of a report with what `costs_of` says of each."""
    return [replace(phase, **_in_report(costs.get(phase.name, Cost()))) for phase in phases]


def _in_report(cost: Cost) -> dict[str, Any]:
    whole = ("network_calls", "bytes_written", "bytes_read", "restarts")
    counts = {name: round(getattr(cost, name)) for name in whole}
    seconds = {"total_seconds": cost.wall_seconds, "worker_seconds": cost.worker_seconds}
    return {**seconds, **counts, "idle_share": cost.idle_share}


def metrics_of(phase: "Phase") -> dict[str, float]:
    """What a phase cost, as tracked metrics: `cost/PHASE/...`; none of a phase that is not billed."""
    named = [name for name in _in_report(Cost()) if phase.total_seconds]
    return {f"cost/{phase.name}/{name}": float(getattr(phase, name)) for name in named}


def _with_workers(own: Cost, folder: Path) -> Cost:
    """A stage's cost and that of its workers, whose group begins anew when one of them or the driver ends."""
    records = _records(folder)
    lives = sum(path.stem.endswith("-0") for path, _ in records)
    restarts = max(own.restarts, lives - 1.0)
    return replace(sum((_cost(record) for _, record in records), own), restarts=restarts)


def _cost(spent: Mapping[str, Any]) -> Cost:
    numbers = {name: float(value) for name, value in spent.items() if _is_number(value)}
    known = {name: numbers[name] for name in _AMOUNTS if name in numbers}
    return Cost(**{**known, "restarts": known.get("restarts", 0.0) + numbers.get(_UNFINISHED, 0.0)})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _records(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The files of a folder of accounts that can be read."""
    found: list[tuple[Path, dict[str, Any]]] = []
    with suppress(Exception):  # as above
        for path in sorted(folder.glob("*.json")):
            with suppress(OSError, ValueError):
                if isinstance(record := read_json(path), dict):
                    found.append((path, record))
    return found
