"""One trial of a sweep: a recipe with some fields changed, and what is known of it, in a directory of its own."""

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pipelines.artifacts import fingerprint, read_json, write_json
from pipelines.storage import remove_tree

Kind = Literal["baseline", "search", "random", "final"]
State = Literal["running", "paused", "done", "stopped", "failed"]
"""paused: it waits at a rung."""
ALONE = "own"
"""In a trial's directory: what comes before its stage, where no other trial shares that. Removed at its end."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is known of one trial; a file in its directory."""

    kind: Kind
    """Who asked for it first. final: it is scored on held-out images, at a seed of its own."""
    name: str = ""
    """What a baseline is called."""
    values: dict[str, Any]
    """The draw of the space's parameters."""
    changes: dict[str, Any]
    """The fields of the recipe that it changes."""
    seed: int
    """The recipe's seed."""
    state: State = "running"
    points: list[list[float]] = field(default_factory=list)
    """Step and score, as they came."""
    seconds: float = 0.0
    """That it has worked, over all its lives."""
    lives: int = 0
    """How often it was begun."""
    ended: float = 0.0
    """When, in seconds since 1970."""
    mistake: str = ""
    """Why it failed."""
    row: dict[str, Any] | None = None
    """What a final one measured on held-out images."""
    parent: str = ""
    """The trial, by its key, that it is a copy of."""
    since: int = 0
    """The iteration from which it differs from that one."""

    @property
    def key(self) -> str:
        """Its directory's name: the same changes with the same seed are the same trial."""
        return fingerprint({"changes": self.changes, "seed": self.seed, "final": self.kind == "final"})[:12]

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""
        return self.state in ("done", "stopped", "failed")

    @property
    def score(self) -> float | None:
        """The last score; ``None`` where there is none, or where it failed."""
        return self.points[-1][1] if self.points and self.state != "failed" else None


def trial_folder(sweep: Path, trial: Trial) -> Path:
    """Where a trial is trained."""
    return sweep / "trials" / trial.key


class TrialFile:
    """A trial on disk."""

    def __init__(self, sweep: Path, trial: Trial) -> None:
        self.folder = trial_folder(sweep, trial)
        there = stored(self.folder)
        self.exists, self.trial = there is not None, there or trial

    def write(self, **changes: Any) -> Trial:
        """Change what is known of it."""
        self.trial = replace(self.trial, **changes)
        if "state" in changes and self.trial.is_over:
            self.trial = replace(self.trial, ended=time.time())
        write_json(self.folder / "trial.json", asdict(self.trial))
        if self.trial.is_over:
            remove_tree(self.folder / ALONE)
        return self.trial


def stored(folder: Path) -> Trial | None:
    """The trial in a directory; ``None`` where there is none. ValueError where its file is damaged."""
    values = read_json(folder / "trial.json")
    return None if values is None else Trial(**values)


def stored_trials(sweep: Path) -> list[Trial]:
    """All trials of a sweep, by key."""
    folder = sweep / "trials"
    found = [stored(one) for one in sorted(folder.iterdir())] if folder.is_dir() else []
    return [trial for trial in found if trial is not None]
