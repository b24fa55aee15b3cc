"""Runs everything in two processes, draws the figures and gathers the numbers."""

import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from examples.theory import figures
from examples.theory.experiment import Exam, Refined, Setting, Sketched, exam_of, pairs_of, refined, sketched
from examples.theory.measures import Measures
from examples.theory.pgd import BROAD, convergence, euler_gap, orders
from examples.theory.target import RingOfRings

PROCESSES = 2


def run(setting: Setting, folder: Path, *, quick: bool) -> dict[str, Any]:
    """Everything, in two processes of one thread each; returns what `theory.json` holds."""
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    exam, pairs = exam_of(setting), pairs_of(setting)
    with ProcessPoolExecutor(PROCESSES, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        refining = pool.submit(refined, setting, exam, pairs)
        widths = sorted(setting.widths, reverse=True)  # the longest first
        sketching = [pool.submit(sketched, setting, exam, pairs, width) for width in widths]
        converging = pool.submit(tables, 7 if quick else 10)
        result, sketches = refining.result(), [one.result() for one in reversed(sketching)]
        errors = converging.result()
    figures.capacity(sketches, exam.exact, folder / "theory-capacity.png")
    figures.starts(exam, sketches, result, setting.small, folder / "theory-starts.png")
    figures.start_curves(result, folder / "theory-starts-curves.png")
    figures.pgd(errors, folder / "theory-pgd.png")
    numbers = report(setting, exam, sketches, result, errors) | {"seconds": time.perf_counter() - started}
    (folder / "theory.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return numbers


def tables(most: int) -> dict[str, dict[str, list[float]]]:
    """Convergence on a target of two broad modes and on the toy's own."""
    toy = RingOfRings(dtype=torch.float64)
    return {
        "two broad modes": convergence(BROAD, rows=256, most=most, fine=2048),
        "56 narrow modes": convergence(toy, rows=256, most=most, fine=2048),
    }


def report(
    setting: Setting,
    exam: Exam,
    sketches: Sequence[Sketched],
    result: Refined,
    errors: dict[str, dict[str, list[float]]],
) -> dict[str, Any]:
    """Every number behind the figures."""
    return {
        "setting": {key: value for key, value in asdict(setting).items() if key != "target"},
        "exact": exam.exact.as_dict(),
        "capacity": [capacity_row(one) for one in sketches],
        "starts": {
            "steps": result.steps,
            **{start: [mean(look) for look in looks] for start, looks in result.curves.items()},
            "final_seeds": {start: listed(looks[-1]) for start, looks in result.curves.items()},
        },
        "convergence": errors,
        "orders": {title: {name: orders(e) for name, e in table.items()} for title, table in errors.items()},
        "composed_halvings_minus_euler_chord": euler_gap(BROAD),
    }


def capacity_row(one: Sketched) -> dict[str, Any]:
    """A width's numbers."""
    sizes = {"width": one.width, "parameters": one.parameters}
    return {**sizes, "mean": mean(one.measures), "seeds": listed(one.measures)}


def listed(measures: Sequence[Measures]) -> list[dict[str, float]]:
    """One dictionary a seed."""
    return [one.as_dict() for one in measures]


def mean(measures: Sequence[Measures]) -> dict[str, float]:
    """Mean over seeds of each measure."""
    every = listed(measures)
    return {key: statistics.fmean(one[key] for one in every) for key in every[0]}
