"""What bfloat16 autocast gains and costs on this CPU: seconds of each stage and FID of its student, paired.

    python -m benchmarks.bfloat16 [--quick] [--rounds 3]

The sketch and the refinement of the digits recipe are trained in full with and without autocast, alternately, on the
same trajectories; sampling is float32 in both.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from rich.console import Console

from pipelines import recipe as recipes
from pipelines.artifacts import RunDir
from pipelines.process import prepare_process
from pipelines.run import Run
from pipelines.shards import write_shard

STAGES = ("sketch", "refine")
QUICK = (
    "precompute.num_samples=256",
    "evaluate.num_samples=500",
    "stages.sketch.num_steps=30",
    "stages.refine.num_steps=20",
)


def prepare(settings: tuple[str, ...], autocast: str, folder: Path) -> Run:
    """A run whose trajectories are there."""
    from hd_core.random import sample_labels
    from pipelines.precompute import noise_seed, solve

    recipe = recipes.load("digits", ["track.enabled=false", f"train.autocast={autocast}", *settings])
    run = Run(recipe, RunDir.create(folder), Console(quiet=True))
    shards = run.trajectories
    for index in shards.missing:
        ids = shards.spec.ids(index)
        labels = sample_labels(noise_seed(recipe.seed), ids, run.teacher.num_classes)
        states = solve(run.teacher, recipe.precompute, 1.0, recipe.seed, ids, labels)
        shards.commit(write_shard(shards.folder, shards.spec, index, labels.numpy(), states))
    return run


def measure(run: Run) -> dict[str, float]:
    """Seconds and FID of each stage."""
    figures: dict[str, float] = {}
    run.train_stages(STAGES)
    for name in STAGES:
        generator = run.student(name)
        figures[f"{name}_fid"] = run.evaluator().measure([generator])[0].fid
    figures["sketch_seconds"] = run.student("sketch").train_seconds
    figures["refine_seconds"] = run.student("refine").train_seconds - figures["sketch_seconds"]
    return figures


def main() -> None:
    """Alternate the two precisions and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    prepare_process()
    measured: dict[str, list[dict[str, float]]] = {"none": [], "bfloat16": []}
    for round_ in range(1 if options.quick else options.rounds):
        for autocast, rows in measured.items():
            settings = (f"seed={round_}", *(QUICK if options.quick else ()))
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(prepare(settings, autocast, Path(folder))))
    medians = {
        autocast: {name: round(statistics.median(row[name] for row in rows), 3) for name in rows[0]}
        for autocast, rows in measured.items()
    }
    print("| | float32 | bfloat16 autocast |\n|---|---|---|")
    for name, value in medians["none"].items():
        print(f"| {name} | {value} | {medians['bfloat16'][name]} |")
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
