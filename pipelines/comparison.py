"""What a comparison of runs consists of: generators in groups that were measured alike, and who leads where."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path

from pipelines.report import Report, Row
from pipelines.report_columns import calls, with_interval

BETTER = {
    "fid": min, "second_fid": min, "kid": min, "precision": max, "recall": max,
    "images_per_second": max, "train_seconds": min, "worker_seconds": min, "network_calls": min,
}  # fmt: skip
"""What is marked, and which end of it is the better one."""
COSTS = ("worker_seconds", "network_calls")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One run that is compared."""

    name: str
    """What it is called beside the others."""
    source: str
    """Its directory, or its id in the tracking store."""
    report: Report
    """What it measured."""
    folder: Path | None = None
    """Its directory, which may hold pictures; None: only the report is known."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """How FID was measured: rows of one measurement can be compared."""

    fid_features: str
    """The feature net's name."""
    features_sha256: str
    """Hash of its weights; empty: an old report does not say, nor the next three."""
    resize: str
    """How pictures came to its size."""
    source: str
    """What FID is against."""
    data_sha256: str
    """Fingerprint of the real images and their split."""
    num_reference: int
    """Real images in the reference."""
    num_samples: int
    """Pictures of each generator."""
    real_fid: float
    """FID of the real training images, which tells references apart where nothing else does."""

    def same(self, other: "Measurement") -> bool:
        """Whether FIDs of both can be compared; what an old report does not say is told by the FID of real images."""
        mine, its = asdict(self), asdict(other)
        known = [name for name in mine if name != "real_fid" and mine[name] != "" and its[name] != ""]
        alike = all(mine[name] == its[name] for name in known)
        return alike and (len(known) == len(mine) - 1 or math.isclose(self.real_fid, other.real_fid, rel_tol=1e-3))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One generator of one run at one number of calls."""

    runs: tuple[str, ...]
    """Name of the run; of several, where they measured the same teacher to the same number."""
    row: Row
    """What was measured."""
    worker_seconds: float | None = None
    """Seconds of all workers in every phase that it needed; None: not known."""
    network_calls: float | None = None
    """Passes of a network over one row in these phases; None: not known."""

    @property
    def run(self) -> str:
        """The runs as text."""
        return ", ".join(self.runs)

    def value(self, key: str) -> float | None:
        """A metric or a cost by name; None where there is none, as of a teacher's training."""
        found = getattr(self, key) if key in COSTS else getattr(self.row, key)
        return None if key == "train_seconds" and not self.row.stage else found

    @property
    def label(self) -> str:
        """Generator and run: `HD of digits-1`."""
        solver = "" if self.row.stage else f" ({self.row.solver_name})"
        return f"{self.row.generator_name}{solver} of {self.run}"


@dataclass(frozen=True, kw_only=True)
class Place:
    """The lowest FID at one number of calls."""

    nfe: int
    """Network calls a picture."""
    first: Entry
    """Whose FID is lowest."""
    tied: list[Entry]
    """Others whose interval overlaps its own."""

    @property
    def text(self) -> str:
        """One sentence."""
        best = f"{calls(self.nfe)}: {self.first.label}, FID {with_interval(self.first.row, 'fid')}"
        others = ", ".join(f"{entry.label} ({with_interval(entry.row, 'fid')})" for entry in self.tied)
        return best + (f"; not told apart from {others}" if others else "")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Generators that were measured alike."""

    measurement: Measurement
    """How."""
    entries: list[Entry]
    """By number of calls, then by FID."""
    runs: list[str]
    """Names of its runs, in the order in which they were named."""
    unmarked: frozenset[str] = frozenset()
    """Metrics and costs that these runs measured in different ways, and that are therefore not ranked."""

    def run_text(self, entry: Entry) -> str:
        """The runs of an entry, or that they are all."""
        return "all" if len(entry.runs) > 1 and set(entry.runs) == set(self.runs) else entry.run

    def by_calls(self) -> Iterator[tuple[int, list[Entry]]]:
        """The generators of each number of calls."""
        return ((nfe, list(part)) for nfe, part in groupby(self.entries, key=lambda entry: entry.row.nfe))

    def shown(self) -> "Group":
        """Without most of the teacher: its best solver at calls that a student takes, and its best of all."""
        kept = _without_most_of_the_teacher(self.entries)
        return replace(self, entries=kept)

    def places(self) -> list[Place]:
        """The lowest FID at each number of calls at which there are two or more generators."""
        found = []
        for nfe, entries in self.by_calls():
            ahead = [entries[place] for place in leaders(entries, "fid")]
            found += [Place(nfe=nfe, first=ahead[0], tied=ahead[1:])] if ahead else []
        return found


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs beside each other."""

    runs: list[Compared]
    """In the order in which they were named."""
    groups: list[Group]
    """What can be compared with each other, the largest group first."""
    differences: dict[str, list[str]]
    """Fields of the recipes that are not the same in all runs and may change a result: a text for each run."""
    other_differences: list[str] = field(default_factory=list)
    """Names of fields that differ and change no result."""
    notes: list[str] = field(default_factory=list)
    """What to mind, each a sentence."""


def leaders(entries: Sequence[Entry], key: str) -> list[int]:
    """Places of the best value and of all that are not told apart from it, the best first.

    Those are of the same value, or their interval overlaps the best one's. Empty where fewer than two have the metric.
    """
    values = {place: value for place, entry in enumerate(entries) if (value := entry.value(key)) is not None}
    if len(values) < 2:
        return []
    best = BETTER[key](values, key=values.__getitem__)
    rest = [place for place in values if place != best]
    return [best, *(place for place in rest if _tied(entries[best], entries[place], key))]


def _tied(one: Entry, other: Entry, key: str) -> bool:
    mine, its = one.row.intervals.get(key), other.row.intervals.get(key)
    overlap = bool(mine and its and mine[0] <= its[1] and its[0] <= mine[1])
    return overlap or one.value(key) == other.value(key)


def _without_most_of_the_teacher(entries: Sequence[Entry]) -> list[Entry]:
    wanted = {entry.row.nfe for entry in entries if entry.row.stage}
    kept: set[int] = set()
    teachers = [(place, entry) for place, entry in enumerate(entries) if entry.row.generator == "teacher"]
    for run in dict.fromkeys(entry.run for _, entry in teachers):
        own = [(place, entry) for place, entry in teachers if entry.run == run]
        picked = [[one for one in own if one[1].row.nfe == nfe] for nfe in sorted(wanted)]
        kept |= {min(some, key=lambda one: one[1].row.fid)[0] for some in [*picked, own] if some}
    return [e for place, e in enumerate(entries) if place in kept or e.row.generator != "teacher"]
