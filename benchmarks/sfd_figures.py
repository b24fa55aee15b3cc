"""Figures like those of SFD's paper, drawn from what `benchmarks.sfd_tables` has measured."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from hd_core.random import sample_labels, sample_noise
from hd_core.solvers import SOLVERS, trajectory
from hd_core.times import GridConfig
from hd_core.types import Condition
from hd_core.walk import walk_states
from pipelines import recipe as recipes
from pipelines.artifacts import RunDir
from pipelines.evaluate import evaluation_seed, load_student
from pipelines.figures import LIGHT
from pipelines.run import Run

Figures = dict[str, Any]
PLANES = 6
"""Noises whose trajectories are drawn."""


def _axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(color=LIGHT.rule)
    return figure, axes


def _lines(figures: Figures) -> dict[str, dict[int, dict[str, float]]]:
    """Figures by name and calls."""
    lines: dict[str, dict[int, dict[str, float]]] = {}
    for key, values in figures.items():
        name, calls = key.rsplit(" @ ", 1)
        lines.setdefault(name, {})[int(calls)] = values
    return lines


def draw_seconds(figures: Figures, path: Path) -> None:
    """FID against the seconds of training, each point with its number of calls."""
    figure, axes = _axes("FID against training time", "seconds of training, the chain of stages together", "FID")
    families: dict[str, list[tuple[int, float, float]]] = {}
    for name, points in _lines(figures).items():
        if not name.startswith("teacher"):
            family = families.setdefault(re.sub(r"[_,]? ?\d(?= \+ |$)", "", name), [])
            family += [(calls, p["seconds"], p["fid"]) for calls, p in points.items()]
    for place, (name, found) in enumerate(families.items()):
        calls, seconds, fids = zip(*found, strict=True)
        axes.plot(seconds, fids, "osD^vP"[place % 6] + "--", color=LIGHT.students[place % 6], lw=0.8, label=name)
        for count, second, fid in zip(calls, seconds, fids, strict=True):
            axes.annotate(str(count), (second, fid), textcoords="offset points", xytext=(5, 3), fontsize=8)
    _logarithmic(axes)
    figure.savefig(path, dpi=110)


def _logarithmic(axes: Any) -> None:
    from matplotlib.ticker import ScalarFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.legend(fontsize=8)


def draw_extrapolation(figures: Figures, trained: tuple[int, ...], path: Path) -> None:
    """FID of SFD-v at every number of calls, beyond those of its training, with SFD and the teacher."""
    figure, axes = _axes("SFD-v at numbers of steps that it never trained", "network calls", "FID")
    axes.axvspan(trained[0], trained[-1], color=LIGHT.rule, label="trained")
    lines = _lines(figures)
    students: dict[int, float] = {n: lines[f"sfd_{n}"][n]["fid"] for n in trained if f"sfd_{n}" in lines}
    axes.plot(list(students), list(students.values()), "s--", color=LIGHT.students[1], label="SFD, one student each")
    for place, name in enumerate(("sfd_v", "teacher, euler", "teacher, dpmpp_3m")):
        points = lines[name]
        style = {"color": LIGHT.students[0] if name == "sfd_v" else LIGHT.muted, "marker": "oxv"[place]}
        axes.plot(list(points), [p["fid"] for p in points.values()], label=name, **style)
    _logarithmic(axes)
    figure.savefig(path, dpi=110)


def draw_t_min(figures: Figures, path: Path) -> None:
    """FID by the noise level at which the walk ends."""
    figure, axes = _axes("SFD of three steps, by where its grid ends", "t_min, as a sigma", "FID")
    names = [key.split(": ")[1] for key in figures]
    axes.plot(names, list(figures.values()), "o-", color=LIGHT.students[0])
    figure.savefig(path, dpi=110)


def draw_planes(folder: Path, recipe: dict[str, Any], stage: str, path: Path, console: Console) -> None:
    """Walks of the teacher and of a student from the same noises, on the plane of the teacher's greatest spread."""
    from matplotlib.figure import Figure

    run = Run(recipes.from_dict({"name": "figures", **recipe}), RunDir(folder), console)
    fine, own, plain = _walks(run, stage)
    figure = Figure(figsize=(9, 6), layout="constrained")
    for row, axes in enumerate(figure.subplots(2, PLANES // 2).flat):
        centre = fine[row].mean(0)
        _, _, directions = np.linalg.svd(fine[row] - centre, full_matrices=False)
        for states, style, name in (
            (fine, {"color": LIGHT.ink}, "teacher, 60 steps"),
            (plain, {"color": LIGHT.students[1], "marker": "x", "ls": ":"}, "teacher, Euler"),
            (own, {"color": LIGHT.students[0], "marker": "o"}, stage.replace("_", " ").upper()),
        ):
            x, y = ((states[row] - centre) @ directions[:2].T).T
            axes.plot(x, y, lw=1.2, ms=4, label=name, **style)
        axes.set(xticks=[], yticks=[])
    figure.axes[0].legend(fontsize=7)
    figure.suptitle("From noise to data, each noise on the plane of its teacher's own trajectory")
    figure.savefig(path, dpi=110)


@torch.no_grad()
def _walks(run: Run, stage: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States of the teacher in 60 steps, of the student, and of the teacher in as many as the student."""
    teacher, generator = run.teacher, run.student(stage)
    seed, ids = evaluation_seed(run.recipe.seed), range(PLANES)
    noise = generator.grid[0] * sample_noise(seed, ids, teacher.shape)
    condition = Condition(labels=sample_labels(seed, ids, max(1, teacher.num_classes)))
    grid = torch.tensor(generator.grid, dtype=torch.float64)
    velocity = teacher.velocity(run.recipe.teacher.guidance_scale)
    fine = trajectory(SOLVERS["dpmpp_3m"].states(velocity, noise, GridConfig().times(60), condition))
    plain = trajectory(SOLVERS["euler"].states(velocity, noise, grid, condition))
    own = trajectory(walk_states(load_student(generator, teacher), grid, noise, condition, afs=generator.afs))
    return fine.flatten(2).numpy(), own.flatten(2).numpy(), plain.flatten(2).numpy()
