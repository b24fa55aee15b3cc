"""What each form of SFD gives at one to five network calls, and what its settings do.

    python -m benchmarks.sfd_tables [--data digits|fashion] [--part main|ablations] [--seeds 0 1 2] [--quick]

main: the teacher by three solvers, Algorithm 1, SFD, SFD-v (also at step counts that it never trained), the second
stage to one call with and without the perceptual term, and DMD after SFD of two calls and of one; every student of a
seed has the same trajectories, of a fine grid that holds all their times, and the same evaluation noises. SFD-v has as
many optimiser steps as the five students of SFD together. ablations: SFD of three steps on the polynomial grid of the
paper, one setting changed at a time: t_min, K, the teacher's solver, AFS, the loss, its teacher's grid. Every run is
resumable; figures are drawn beside the tables. For fashion, `--npz` names Fashion-MNIST's archive (teacher and feature
nets: see ablation_hd).
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from pipelines import recipe as recipes  # before torch: `pipelines` sets how its threads wait

# isort: split
from rich.console import Console

from benchmarks.ablation_hd import ASSETS, Recipe, execute, mean_and_error, merged, prepare
from benchmarks.sfd_figures import draw_extrapolation, draw_planes, draw_seconds, draw_t_min
from pipelines.process import prepare_process

COUNTS = {"digits": (1, 2, 3, 4, 5), "fashion": (1, 2, 3)}
"""Steps of the students, each a network call."""
STEPS = {"digits": 240, "fashion": 300}
"""Iterations of a student of SFD."""
EXTRAPOLATED = (6, 8, 10)
SIGMA_MAX = 80.0
POLYNOMIAL = {"kind": "polynomial", "t_max": SIGMA_MAX / (1 + SIGMA_MAX), "t_min": 0.006 / 1.006}
K = 4
"""The teacher's steps within one of a student's, in the ablations."""


def base(data: str, npz: str) -> Recipe:
    """A recipe without stages."""
    evaluate: Recipe = {"num_samples": 5000, "solvers": {name: [1, 2, 3, 4, 5, 10] for name in SOLVERS}}
    if data == "digits":
        return {"evaluate": evaluate, "track": {"enabled": False}}
    nets = ASSETS / data
    evaluate |= {"num_samples": 3000, "features": str(nets / "classes"), "second_features": str(nets / "denoise")}
    return {
        "teacher": {"path": str(nets / "teacher")},
        "data": {"kind": "npz", "path": npz, "image_size": 32, "fit": "pad"},
        "evaluate": evaluate,
        "track": {"enabled": False},
    }


SOLVERS = ("euler", "dpmpp_3m", "ipndm_4")


# The main table


def main_recipe(data: str, npz: str) -> Recipe:
    """Every form of SFD as a stage."""
    counts = COUNTS[data]
    intervals = 60 if data == "digits" else 12
    samples = {"num_samples": 8192} if data == "digits" else {"num_samples": 4096, "batch_size": 256}
    stages = {f"sfd_{n}": student(data, f"sfd_{n}", {"intervals": n}) for n in counts}
    stages |= {
        f"algorithm_1_{n}": student(data, f"algorithm 1, {n}", {"intervals": n, "states": "teacher"})
        for n in counts[1:]
    }
    stages["sfd_v"] = student(data, "sfd_v", {"intervals": counts[-1], "step_counts": list(counts)})
    stages["sfd_v"]["num_steps"] = STEPS[data] * len(counts)
    stages |= second_stages(data, counts[-1]) | refinements(data)
    recipe = merged(base(data, npz), {"evaluate": {"step_counts": list(EXTRAPOLATED)}})
    return {**recipe, "precompute": {**samples, "intervals": intervals, "num_actors": 2}, "stages": stages}


def student(data: str, label: str, objective: Recipe) -> Recipe:
    """A student of SFD."""
    return {
        "label": label,
        "objective": {"name": "sfd", **objective},
        "num_steps": STEPS[data],
        "batch_size": 128 if data == "digits" else 64,
        "optimizers": {"student": {"learning_rate": 5e-4, "warmup_moves": 50, "decay": "cosine"}},
    }


def second_stages(data: str, most: int) -> Recipe:
    """One call from the student of most steps, with and without the perceptual term."""
    objective: Recipe = {"intervals": 1, "taught_by": "start", "start_intervals": most}
    plain = {**student(data, "one step", objective), "start": f"sfd_{most}"}
    objective = {**objective, "perceptual_weight": 8.0}
    net = str(ASSETS / data / "denoise")
    seen = {**student(data, "one step, perceptual", objective), "start": f"sfd_{most}", "perceptual": net}
    return {"one_step": plain, "one_step_perceptual": seen}


def refinements(data: str) -> Recipe:
    """DMD from the student of two steps, and from that of one."""
    return {f"sfd_{n}_dmd": refinement(data, n) for n in (1, 2)}


def refinement(data: str, intervals: int) -> Recipe:
    """Stage 2 of HD on a student of SFD."""
    return {
        "start": f"sfd_{intervals}",
        "label": f"sfd_{intervals} + dmd",
        "objective": {"name": "dmd", "intervals": intervals, "update_ratio": 2, "adversarial": {"weight": 0.0}},
        "num_steps": STEPS[data],
        "batch_size": 128 if data == "digits" else 64,
        "optimizers": {
            "student": {"learning_rate": 1e-4, "betas": [0.5, 0.99], "decay": "cosine"},
            "fake_score": {"learning_rate": 5e-4, "decay": "cosine"},
        },
    }


# The ablations


def ablations() -> dict[str, dict[str, Recipe]]:
    """Settings by ablation and by value: what each changes of `ablation_recipe`."""
    grid = "precompute", "stages.sfd.objective"
    t_mins = {
        f"{sigma:g}": {f"{at}.grid.t_min": sigma / (1 + sigma) for at in grid}
        for sigma in (0, 0.002, 0.006, 0.02, 0.05)
    }
    ks = {str(k): {"precompute.intervals": 3 * k} for k in (1, 2, 4, 8)}
    solvers = ("euler", "heun", "dpm_solver_2", "dpmpp_2m", "dpmpp_3m", "ipndm_4")
    uniform = {
        f"{at}.grid.{name}": value
        for at in grid
        for name, value in (("kind", "uniform"), ("t_max", 1.0), ("t_min", 0.0))
    }
    return {
        "t_min (sigma)": t_mins,
        "K": ks,
        "solver of the teacher": {solver: {"precompute.solver": solver} for solver in solvers},
        "first step": {"network": {}, "analytical": {"stages.sfd.objective.afs": True}},
        "analytical, one call": {"sfd at 2": {"stages.sfd.objective.afs": True, "stages.sfd.objective.intervals": 2}},
        "loss": {kind: {"stages.sfd.objective.distance": kind} for kind in ("l1", "l2", "pseudo_huber")},
        "grid": {"polynomial": {}, "uniform": uniform},
        "teacher's grid": {"own, K = 4": {}, "fixed, 48": {"precompute.intervals": 48}},
    }


def ablation_recipe(data: str, npz: str) -> Recipe:
    """SFD of three steps on the paper's grid."""
    recipe = merged(base(data, npz), {"evaluate": {"solvers": {"euler": [3], "dpmpp_3m": [3]}, "grid": POLYNOMIAL}})
    sfd = student(data, "sfd", {"intervals": 3, "grid": POLYNOMIAL})
    precompute = {"num_samples": 4096, "intervals": 3 * K, "grid": POLYNOMIAL, "num_actors": 2}
    return {**recipe, "precompute": precompute, "stages": {"sfd": sfd}}


# Runs


def main_table(options: argparse.Namespace, out: Path, console: Console) -> Recipe:
    """Run the seeds, print the rows, draw the figures."""
    recipe = shortened(main_recipe(options.data, options.npz), options.quick)
    folders = [out / f"{options.data}-seed-{seed}" for seed in options.seeds]
    reports = [
        execute({**recipe, "seed": seed}, folder, console) for seed, folder in zip(options.seeds, folders, strict=True)
    ]
    figures = print_rows(reports)
    draw_seconds(figures, out / f"{options.data}-seconds.png")
    draw_extrapolation(figures, COUNTS[options.data], out / f"{options.data}-extrapolation.png")
    draw_planes(
        folders[0], recipe, f"sfd_{3 if 3 in COUNTS[options.data] else 2}", out / f"{options.data}-plane.png", console
    )
    return figures


def print_rows(reports: list[dict[str, Any]]) -> Recipe:
    """FID of every generator at every number of calls; its figures by name."""
    print("| generator | calls | FID | precision | recall | training, s |")
    print("|---" * 6 + "|")
    figures: Recipe = {}
    for rows in zip(*(report["rows"] for report in reports), strict=True):
        name = f"{rows[0]['generator']}" if rows[0]["stage"] else f"teacher, {rows[0]['solver']}"
        cells = " | ".join(mean_and_error([row[column] for row in rows]) for column in ("fid", "precision", "recall"))
        seconds = statistics.mean(row["train_seconds"] for row in rows)
        print(f"| {name} | {rows[0]['nfe']} | {cells} | {seconds:.0f} |")
        fid = round(statistics.mean(row["fid"] for row in rows), 4)
        figures[f"{name} @ {rows[0]['nfe']}"] = {"fid": fid, "seconds": round(seconds, 1)}
    return figures


def ablation_table(options: argparse.Namespace, out: Path, console: Console) -> Recipe:
    """Run each value of each setting on each seed; runs with the same settings are one."""
    base_recipe = shortened(ablation_recipe(options.data, options.npz), options.quick)
    figures: Recipe = {}
    print("| setting | value | FID at 3 steps |")
    print("|---|---|---|")
    for setting, values in ablations().items():
        for value, changes in values.items():
            fids = [fid_with(base_recipe, changes, seed, out, options.data, console) for seed in options.seeds]
            print(f"| {setting} | {value} | {mean_and_error(fids)} |", flush=True)
            figures[f"{setting}: {value}"] = round(statistics.mean(fids), 4)
    draw_t_min({key: fid for key, fid in figures.items() if key.startswith("t_min")}, out / f"{options.data}-t_min.png")
    return figures


def fid_with(base_recipe: Recipe, changes: Recipe, seed: int, out: Path, data: str, console: Console) -> float:
    """FID of the student with some settings changed."""
    recipe = recipes.override(recipes.from_dict({"name": "ablation", **base_recipe, "seed": seed}), changes)
    folder = out / f"{data}-ablations" / recipe.fingerprint[:16]
    report = execute(recipe.to_dict(), folder, console)
    return next(row["fid"] for row in report["rows"] if row["stage"])


def shortened(recipe: Recipe, quick: bool) -> Recipe:
    """The same with a few iterations of everything, where that is asked."""
    if not quick:
        return recipe
    stages = {name: {**stage, "num_steps": 4} for name, stage in recipe["stages"].items()}
    small = {"precompute": {"num_samples": 256, "shard_rows": 128}, "evaluate": {"num_samples": 300}}
    return {**merged(recipe, small), "stages": stages}


def main() -> None:
    """One part, and its figures."""
    options = parse()
    prepare_process()
    console, out = Console(), options.out.resolve()
    prepare(options.data, options.npz)
    part = main_table if options.part == "main" else ablation_table
    print(json.dumps({"data": options.data, "seeds": options.seeds, "rows": part(options, out, console)}))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(COUNTS), default="digits")
    parser.add_argument("--part", choices=["main", "ablations"], default="main")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/sfd"))
    parser.add_argument("--npz", default="fashion_mnist.npz", help="Fashion-MNIST's archive")
    parser.add_argument("--quick", action="store_true", help="a few iterations of everything, which mean nothing")
    options = parser.parse_args()
    if options.quick:
        options.out, options.seeds = options.out.with_name(f"{options.out.name}-quick"), options.seeds[:1]
    return options


if __name__ == "__main__":
    main()
