"""Quality and cost of the main job on digits: every generator's FID over seeds, and where the minutes go.

    python -m benchmarks.digits_seeds [--quick] [--seeds 0 1 2]

Each seed is one `hdistill run digits` in a process and a directory of its own, start-up of Ray included. The teacher
is the same; trajectories, students and evaluation noises are new. `--quick` runs one seed of a much shorter recipe,
whose figures mean nothing but that it works.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

QUICK = (
    "precompute.num_samples=512",
    "precompute.shard_rows=256",
    "evaluate.num_samples=500",
    *(f"stages.{stage}.num_steps=20" for stage in ("sketch", "refine", "sfd_2", "sfd_3", "sfd_4")),
)


def run(seed: int, settings: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """One run's report, with the seconds of the whole process."""
    command = [sys.executable, "-m", "pipelines.cli", "run", "digits", "--run-dir", str(folder / f"seed-{seed}")]
    for setting in (f"seed={seed}", *settings):
        command += ["--set", setting]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    report = json.loads((folder / f"seed-{seed}" / "report.json").read_text())
    return {**report, "process_seconds": time.perf_counter() - started}


def spread(values: list[float]) -> str:
    """Mean, and least to greatest."""
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def key(row: dict[str, Any]) -> str:
    """What a row is called in the tables."""
    solver = "" if row["stage"] else f" {row['solver']}"
    return f"{row['generator']}{solver} {row['nfe']}"


def print_rows(reports: list[dict[str, Any]]) -> None:
    """FID, precision and recall of each generator."""
    print(f"| {'generator':20} | {'FID':22} | {'precision':22} | {'recall':22} |")
    print("|---|---|---|---|")
    for rows in zip(*(report["rows"] for report in reports), strict=True):
        cells = [spread([row[name] for row in rows]) for name in ("fid", "precision", "recall")]
        print(f"| {key(rows[0]):20} | {cells[0]:22} | {cells[1]:22} | {cells[2]:22} |")


def print_phases(reports: list[dict[str, Any]]) -> None:
    """Seconds of each phase."""
    print(f"\n| {'phase':12} | {'seconds':26} |\n|---|---|")
    for phases in zip(*(report["phases"] for report in reports), strict=True):
        print(f"| {phases[0]['name']:12} | {spread([phase['wall_seconds'] for phase in phases]):26} |")
    print(f"| {'process':12} | {spread([report['process_seconds'] for report in reports]):26} |")


def targets(reports: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The ratios that the project promises, one value a seed."""
    figures: dict[str, list[float]] = {}
    for report in reports:
        fid = {key(row): row["fid"] for row in report["rows"]}
        recall = {key(row): row["recall"] for row in report["rows"]}
        many = "teacher euler 32"
        for name, value in {
            "hd_over_sketch": fid["hd 1"] / fid["sketch 1"],
            "teacher_1_over_hd": fid["teacher euler 1"] / fid["hd 1"],
            "hd_over_teacher_many": fid["hd 1"] / fid[many],
            "hd_over_teacher_many_dpmpp_3m": fid["hd 1"] / fid["teacher dpmpp_3m 32"],
            "recall_lost": recall[many] - recall["hd 1"],
            "sfd_3_over_dpmpp_3m_5": fid["sfd 3"] / fid["teacher dpmpp_3m 5"],
            "process_seconds": report["process_seconds"],
        }.items():
            figures.setdefault(name, []).append(round(value, 4))
    return figures


def main() -> None:
    """Run the seeds one after another and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seeds = options.seeds[:1] if options.quick else options.seeds
        reports = [run(seed, QUICK if options.quick else (), Path(folder)) for seed in seeds]
    print_rows(reports)
    print_phases(reports)
    print(json.dumps({"real_fid": reports[0]["reference"]["real_fid"], **targets(reports)}))


if __name__ == "__main__":
    main()
