"""Scores a folder of pictures against another, or against published statistics, as papers do."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table

from hd_core.metrics.clip_score import clip_score
from hd_core.metrics.statistics import Moments
from pipelines.captions import assigned, by_name, load_captions, own_captions
from pipelines.clip import Clip
from pipelines.extractor import Extractor
from pipelines.features import load_extractor
from pipelines.measures import Estimates, caution, fid_infinity, measured, told
from pipelines.picture_cosines import picture_cosines
from pipelines.picture_files import PictureFiles, picture_features
from pipelines.process import default_device
from pipelines.production import Actors
from pipelines.progress import bar
from pipelines.published import load_statistics
from pipelines.report_columns import MEASURES
from pipelines.tables import needed_width

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to score, and how."""

    pictures: str
    """A folder."""
    reference: str
    """A folder, an npz file of statistics, or a set that clean-fid publishes, as NAME/SPLIT/SIZE."""
    features: str
    """Feature net, as in `evaluate.features`."""
    by_category: bool
    """Whether each first folder below is scored by itself, too, against the reference's folder of the same name."""
    neighbours: int
    pairs: int
    actors: Actors
    cache: Path
    """Where features are kept."""
    clip: str = ""
    """CLIP model of the CLIP score, as in `evaluate.clip`; empty: none."""
    captions: Path | None = None
    """A file that maps pictures to captions; ``None``: they stand beside the pictures, or beside the reference's."""

    def __post_init__(self) -> None:
        if self.captions and not self.clip:
            raise ValueError(f"--captions {self.captions} are for the CLIP score: give --clip a CLIP model, too")


@dataclass(frozen=True, kw_only=True)
class _Side:
    """Features of a folder; of published statistics only the moments."""

    moments: Moments
    features: np.ndarray | None = None
    categories: dict[str, np.ndarray] | None = None
    cosines: np.ndarray | None = None
    """``(n,)`` with their captions under CLIP, where that is asked for."""

    def of(self, category: str) -> "_Side":
        """A category alone."""
        assert self.features is not None and self.categories is not None
        rows = self.categories[category]
        features, cosines = self.features[rows], None if self.cosines is None else self.cosines[rows]
        return replace(self, features=features, moments=Moments.of(features), cosines=cosines)


def score(asked: Asked, console: Console) -> dict[str, Any]:
    """Every metric of all pictures, and of each category where that is asked for, as plain values.

    Raises:
        ValueError: there are no pictures or no such reference, a picture is damaged or lacks a caption, or categories
            do not match.
    """
    clip = Clip.of(asked.clip, default_device(), "--clip") if asked.clip else None
    pictures = _files(asked.pictures)
    reference = _files(asked.reference) if Path(asked.reference).expanduser().is_dir() else None
    captions = _captions(asked, pictures, reference) if clip else []
    extractor = load_extractor(asked.features, default_device())
    ours = _side(pictures, asked, extractor, console)
    if reference is not None:
        theirs = _side(reference, asked, extractor, console)
    else:
        theirs = _Side(moments=load_statistics(asked.reference, extractor.name))
    if clip:
        ours = replace(ours, cosines=_cosines(pictures, captions, clip, asked, console))
    return {
        "pictures": asked.pictures,
        "reference": asked.reference,
        "features": extractor.name,
        "features_sha256": extractor.fingerprint,
        "resize": f"clean-fid PIL bicubic to {extractor.size}",
        **(clip.provenance if clip else {}),
        "neighbours": asked.neighbours,
        "pairs": asked.pairs,
        "caution": caution(ours.moments.count, ours.moments.width),
        "rows": [
            _row(name, one, other, asked, extractor) for name, one, other in _compared(ours, theirs, asked.by_category)
        ],
    }


def _side(files: PictureFiles, asked: Asked, extractor: Extractor, console: Console) -> _Side:
    with bar(console, f"{extractor.name} features of {Path(files.folder).name}", len(files)) as show:
        features = picture_features(files, asked.features, extractor, asked.cache, asked.actors, show)
    return _Side(moments=Moments.of(features), features=features, categories=files.categories)


def _files(folder: str) -> PictureFiles:
    return PictureFiles(str(Path(folder).expanduser().resolve()))


def _cosines(pictures: PictureFiles, captions: list[str], clip: Clip, asked: Asked, console: Console) -> np.ndarray:
    with bar(console, f"CLIP score of {Path(pictures.folder).name}", len(captions)) as show:
        return picture_cosines(pictures, captions, clip, asked.cache, asked.actors, show)


def _captions(asked: Asked, pictures: PictureFiles, reference: PictureFiles | None) -> list[str]:
    """Of each picture: from the file that is given, from beside the picture, or from the reference's by its name."""
    names = pictures.source.names
    if asked.captions:
        return assigned(names, load_captions(asked.captions), str(asked.captions))
    if own := own_captions(pictures.source):
        return own
    theirs = {} if reference is None else by_name(reference.source)
    if not theirs:
        raise ValueError(
            f"--clip compares pictures with their captions, and there are none beside {asked.pictures} nor in"
            f" {asked.reference}: give --captions FILE"
        )
    return assigned(names, theirs, asked.reference)


def _compared(ours: _Side, theirs: _Side, by_category: bool) -> Iterator[tuple[str, _Side, _Side]]:
    """What is compared with what: all with all, then each category with its own."""
    yield ALL, ours, theirs
    if by_category:
        here, there = ours.categories or {}, theirs.categories or {}
        if not here or here.keys() - there.keys():
            raise ValueError(
                "by category, both sides are folders of one folder for each category; of the pictures they are"
                f" {', '.join(sorted(here)) or 'none'}, of the reference {', '.join(sorted(there)) or 'none'}"
            )
        for name in sorted(here):
            yield name, ours.of(name), theirs.of(name)


def _row(name: str, ours: _Side, theirs: _Side, asked: Asked, extractor: Extractor) -> dict[str, Any]:
    assert ours.features is not None
    rows = min(len(ours.features), asked.pairs, *([len(theirs.features)] if theirs.features is not None else []))
    if rows <= asked.neighbours:
        raise ValueError(f"{name} has {rows} pictures to compare: more than neighbours, {asked.neighbours}, are needed")
    known = {"neighbours": asked.neighbours, "pairs": asked.pairs}
    found: Estimates = measured(ours.features, extractor, theirs.moments, theirs.features, **known)
    if ours.cosines is not None:
        found["clip_score"] = clip_score(ours.cosines)
    return {
        "category": name,
        "count": len(ours.features),
        **told(found),
        "fid_infinity": fid_infinity(ours.features, theirs.moments, found["fid"].value),
    }


def print_score(result: dict[str, Any], console: Console) -> None:
    """A table of the rows, in parts where the terminal is too narrow for all metrics; then what to mind."""
    rows = result["rows"]
    left = [name for name, key in MEASURES.items() if any(row.get(key) is not None for row in rows)]
    while left:
        tables = {count: _table(rows, left[:count]) for count in range(len(left), 0, -1)}
        count = next((count for count, table in tables.items() if needed_width(table, console) <= console.width), 1)
        console.print(tables[count])
        left = left[count:]
    judged = f" CLIP: {result['clip']}." if "clip" in result else ""
    for line in (f"Features: {result['features']}.{judged} In brackets: 95% intervals.", result["caution"]):
        if line:
            console.print(line, highlight=False, soft_wrap=True)


def _table(rows: list[dict[str, Any]], names: Sequence[str]) -> Table:
    table = Table(box=HORIZONTALS, padding=(0, 1, 0, 0), header_style="bold")
    for heading in ("pictures", "count", *names):
        table.add_column(heading, justify="left" if heading == "pictures" else "right", no_wrap=True)
    for row in rows:
        table.add_row(row["category"], f"{row['count']:,}", *(_cell(row, MEASURES[name]) for name in names))
    return table


def _cell(row: dict[str, Any], key: str) -> str:
    """A metric and its interval, on two lines."""
    value, interval = row.get(key), row["intervals"].get(key)
    if value is None:
        return "-"
    return f"{value:.4g}" + (f"\n[{interval[0]:.3g}, {interval[1]:.3g}]" if interval else "")


def to_json(result: dict[str, Any]) -> str:
    """The result as a file's text."""
    return json.dumps(result, indent=2, allow_nan=False) + "\n"
