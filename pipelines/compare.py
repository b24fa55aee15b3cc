"""Runs side by side: what of them may be compared, which generator is best at each number of calls, and what differs.

Numbers are ranked only within a group that was measured alike: same feature net, same reference, same number of
samples. Within it, generators whose intervals overlap are not told apart.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines.artifacts import differing, write_text
from pipelines.compare_columns import print_comparison
from pipelines.compare_page import render
from pipelines.comparison import COSTS, Compared, Comparison, Entry, Group, Measurement
from pipelines.recipe import determining, from_dict
from pipelines.report import Report, Row, parse_report, read_report
from pipelines.stores import TrackConfig, tracking_uri
from pipelines.tracked_runs import find_runs

SCHEMA_VERSION = 1
_BY_PAIRS = ("kid", "precision", "recall")
_ON_THE_MACHINE = ("images_per_second", "train_seconds", "worker_seconds")
_SHARED = ("start", "ray start", "ray stop", "evaluate", "report")
"""Phases that no generator needs, or that all do."""


def compare_runs(folders: Sequence[Path], query: str | None, store: Path, out: Path, console: Console) -> None:
    """Compare run directories and the runs that a query finds in the tracking store; print and write what is found.

    Raises:
        ValueError: there are fewer than two runs, or one has no report that can be read.
    """
    known = read_runs(folders)
    found = compare([*known, *(_tracked(query, store, known) if query else [])])
    print_comparison(found, console)
    write_text(out / "compare.json", json.dumps(to_dict(found), indent=2, allow_nan=False) + "\n")
    render(found, out)
    console.print(f"Page      {out / 'compare.html'}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Pictures  {out / 'figures'}", markup=False, highlight=False, soft_wrap=True)


def _tracked(query: str, store: Path, known: Sequence[Compared]) -> list[Compared]:
    """The runs that a query finds and that are not given as directories as well."""
    given = {(run.report.fingerprint, run.report.created) for run in known}
    tracked = find_runs(tracking_uri(TrackConfig(), store), query)
    reports = [(one, parse_report(one.report, f"report.json of run {one.run_id}")) for one in tracked]
    new = [(one, report) for one, report in reports if (report.fingerprint, report.created) not in given]
    longer = [f"{one.name} ({one.run_id[:8]})" for one, _ in new]
    names = named_apart(
        [*(run.name for run in known), *(one.name for one, _ in new)], [*(run.name for run in known), *longer]
    )
    return [
        Compared(name=name, source=f"run {one.run_id}", report=report)
        for name, (one, report) in zip(names[len(known) :], new, strict=True)
    ]


def compare(runs: Sequence[Compared]) -> Comparison:
    """Group what was measured alike, and find what differs.

    Raises:
        ValueError: there are fewer than two runs.
    """
    if len(runs) < 2:
        named = f"; given {runs[0].source}" if runs else ""
        raise ValueError(f"comparing needs at least two different runs{named}: name more run directories, or --query")
    groups = _groups(runs)
    recipes = [_without_lone_stages(run, runs) for run in runs]
    found, every = differing([determining(recipe) for recipe in recipes]), differing(recipes)
    free = _shortened(key for key in every if key not in found)
    return Comparison(
        runs=list(runs), groups=groups, differences=found, other_differences=free, notes=_notes(runs, groups)
    )


def read_runs(folders: Sequence[Path]) -> list[Compared]:
    """Run directories with their reports, each once, by names that are unlike each other.

    Raises:
        ValueError: a directory has no report that can be read.
    """
    unique = list({str(folder.resolve()): folder for folder in folders}.values())
    reports = [read_report(folder / "report.json") for folder in unique]
    names = named_apart([folder.resolve().name for folder in unique], [str(folder) for folder in unique])
    return [
        Compared(name=name, source=str(folder), report=report, folder=folder)
        for name, folder, report in zip(names, unique, reports, strict=True)
    ]


def named_apart(names: Sequence[str], longer: Sequence[str]) -> list[str]:
    """Each name, or its longer form where another run has the same."""
    return [long if names.count(name) > 1 else name for name, long in zip(names, longer, strict=True)]


# Groups


def _groups(runs: Sequence[Compared]) -> list[Group]:
    found: list[tuple[Measurement, list[Entry]]] = []
    for run in runs:
        costs = {row.stage: _cost(run.report, row.stage) for row in run.report.rows}
        for row in run.report.rows:
            measurement = _measurement(run.report, row)
            group = next((entries for other, entries in found if other.same(measurement)), None)
            if group is None:
                found.append((measurement, group := []))
            group.append(Entry(runs=(run.name,), row=row, **costs[row.stage]))
    made = [_group(measurement, entries, runs) for measurement, entries in found]
    return sorted(made, key=lambda group: (-len(group.runs), -len(group.entries)))


def _group(measurement: Measurement, entries: Sequence[Entry], runs: Sequence[Compared]) -> Group:
    ordered = sorted(_merged(entries), key=lambda entry: (entry.row.nfe, entry.row.fid))
    names = {name for entry in entries for name in entry.runs}
    there = [run for run in runs if run.name in names]
    reports = [run.report for run in there]
    unmarked = [] if _alike(_pairing(report) for report in reports) else _BY_PAIRS
    elsewhere = [] if _alike(report.environment for report in reports) else _ON_THE_MACHINE
    ranked_not = frozenset([*unmarked, *elsewhere])
    return Group(measurement=measurement, entries=ordered, runs=[run.name for run in there], unmarked=ranked_not)


def _merged(entries: Sequence[Entry]) -> list[Entry]:
    """One entry for a teacher that several runs measured to the same number."""
    merged: dict[object, list[Entry]] = {}
    for place, entry in enumerate(entries):
        row = entry.row
        same = (row.solver, row.nfe, row.guidance_scale, f"{row.fid:.6g}")
        merged.setdefault(place if row.stage else (row.generator, *same), []).append(entry)
    return [
        Entry(runs=tuple(dict.fromkeys(name for one in some for name in one.runs)), row=some[0].row)
        if len(some) > 1
        else some[0]
        for some in merged.values()
    ]


def _measurement(report: Report, row: Row) -> Measurement:
    reference = report.reference
    names = ("features_sha256", "resize", "source", "data_sha256")
    return Measurement(
        fid_features=row.fid_features,
        num_reference=reference["num_reference"],
        num_samples=row.num_samples,
        real_fid=reference["real_fid"],
        **{name: str(reference.get(name, "")) for name in names},
    )


def _pairing(report: Report) -> tuple[object, object]:
    asked = report.recipe.get("evaluate") or {}
    return asked.get("neighbours"), asked.get("pairs")


def _alike(values: Iterable[object]) -> bool:
    some = list(values)
    return all(value == some[0] for value in some)


# Costs


def _cost(report: Report, stage: str) -> dict[str, float | None]:
    """What all phases that a stage's generator needed cost; None where a report does not say, or it is no stage's."""
    needed = _needed(report, stage) if stage else set[str]()
    phases = [phase for phase in report.phases if phase.name in needed]
    if not any(phase.total_seconds for phase in phases):
        return dict.fromkeys(COSTS)
    return {name: float(sum(getattr(phase, name) for phase in phases)) for name in COSTS}


def _needed(report: Report, stage: str) -> set[str]:
    """Names of the phases that lead to a stage."""
    try:
        recipe = from_dict(report.recipe)
    except ValueError:  # of another version: then every phase before the stages counts
        return {phase.name for phase in report.phases if phase.name not in _SHARED}
    chain = recipe.chain(stage) if stage in recipe.stages else [stage]
    needs = {need for link in chain if link in recipe.stages for need in recipe.stages[link].objective.needs}
    made = {"trajectories": "precompute", "images": "latents"}
    return {*chain, "prompts", *(made[need] for need in needs if need in made)}


# What differs, and what to mind


def _without_lone_stages(run: Compared, runs: Sequence[Compared]) -> dict[str, Any]:
    """A recipe in which a stage that another run has not is one word, not a field for each of its settings."""
    recipe = _completed(run.report.recipe)
    stages = recipe.get("stages") or {}
    shared = set.intersection(*(set(other.report.recipe.get("stages") or {}) for other in runs))
    return {**recipe, "stages": {name: stage if name in shared else "trained" for name, stage in stages.items()}}


def _completed(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe with the defaults of fields that it is too old to have, where this version can read it."""
    try:
        return from_dict(recipe).to_dict()
    except ValueError:
        return recipe


def _shortened(keys: Iterable[str]) -> list[str]:
    """Two parts of each key, each once."""
    short = list(dict.fromkeys(".".join(key.split(".")[:2]) for key in keys))
    return [key for key in short if key.partition(".")[0] not in short or "." not in key]


def _notes(runs: Sequence[Compared], groups: Sequence[Group]) -> list[str]:
    rows = [row for run in runs for row in run.report.rows]
    notes = [_apart(groups)] if len(groups) > 1 else []
    if any(_BY_PAIRS[0] in group.unmarked for group in groups):
        notes.append(
            "KID, precision and recall of these runs were taken over different numbers of pairs or neighbours"
            " (evaluate.pairs, evaluate.neighbours): they are shown and not ranked."
        )
    if any(_ON_THE_MACHINE[0] in group.unmarked for group in groups):
        notes.append(
            "These runs were made on different machines or package versions: images a second and seconds are shown"
            " and not ranked."
        )
    if not all(row.intervals for row in rows):
        notes.append("Some reports have no intervals, so a small difference of theirs may be chance.")
    if any(row.intervals for row in rows):
        notes.append(
            "Intervals are over other noises through the same network, and not over other seeds of the training:"
            " compare several seeds before calling a recipe better."
        )
    return notes


def _apart(groups: Sequence[Group]) -> str:
    """Why there is more than one group."""
    names = [one.name for one in fields(Measurement) if one.name != "real_fid"]
    told = [{name: getattr(group.measurement, name) for name in names} for group in groups]
    what = {
        "fid_features": "feature net", "features_sha256": "weights of the feature net", "resize": "resize",
        "source": "reference", "data_sha256": "real images", "num_reference": "number of reference images",
        "num_samples": "number of samples",
    }  # fmt: skip
    found = [f"{what[name]} ({', '.join(dict.fromkeys(texts))})" for name, texts in differing(told).items()]
    why = "; ".join(found) or "the FID of the real training images, so the references are not the same"
    return (
        f"Not all of these numbers can be compared: the {why} differ. They are ranked in {len(groups)} groups, and"
        " never across them."
    )


# compare.json


def to_dict(found: Comparison) -> dict[str, Any]:
    """A comparison as JSON has it."""
    return {
        "schema_version": SCHEMA_VERSION,
        "runs": [_run_record(run) for run in found.runs],
        "groups": [_group_record(group) for group in found.groups],
        "differences": found.differences,
        "other_differences": found.other_differences,
        "notes": found.notes,
    }


def _run_record(run: Compared) -> dict[str, Any]:
    report = run.report
    return {
        "name": run.name, "source": run.source, "recipe": report.recipe.get("name", ""),
        "fingerprint": report.fingerprint, "created": report.created, "environment": report.environment,
        "phases": [asdict(phase) for phase in report.phases],
    }  # fmt: skip


def _group_record(group: Group) -> dict[str, Any]:
    best = [
        {"nfe": place.nfe, "first": _name_record(place.first), "tied": [_name_record(one) for one in place.tied]}
        for place in group.places()
    ]
    rows = [{**_name_record(entry), **asdict(entry.row), **_costs(entry)} for entry in group.entries]
    return {"measurement": asdict(group.measurement), "best": best, "rows": rows, "not_ranked": sorted(group.unmarked)}


def _costs(entry: Entry) -> Mapping[str, float | None]:
    return {name: getattr(entry, name) for name in COSTS}


def _name_record(entry: Entry) -> dict[str, Any]:
    row = entry.row
    names = {"generator": row.generator, "stage": row.stage, "solver": row.solver}
    return {"runs": list(entry.runs), **names, "fid": row.fid}
