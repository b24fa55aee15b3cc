"""How the driver sees a stage that trains in other processes: the curve on disk, and a tracker at the first worker."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipelines.curve import Curve
from pipelines.stores import TrackConfig
from pipelines.tracking import Tracker, attach
from pipelines.trainer import Watch


@dataclass(frozen=True)
class RemoteWatch:
    """Makes the `Watch` of a first worker in another process: it logs to the tracker's run by itself."""

    config: TrackConfig
    run_id: str
    run_dir: Path
    store: Path

    def __call__(self) -> Watch:
        tracker = attach(self.config, run_id=self.run_id, run_dir=self.run_dir, default_store=self.store)
        return Watch(logged=partial(log_point, tracker), done=tracker.flush)


def log_point(tracker: Tracker, step: int, values: dict[str, float]) -> None:
    tracker.metrics(values, step)


def follow(curve: Path, show: Callable[[int], None], done: threading.Event) -> None:
    """Show a remote worker's progress from the curve that it writes."""
    while not done.wait(1.0):
        lines = Curve.read(curve)
        if lines:
            show(int(lines[-1]["step"]))
