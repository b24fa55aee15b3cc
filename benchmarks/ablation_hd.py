"""What each ingredient of HD brings at one budget of network passes: sketch, matching, each discriminator.

    python -m benchmarks.ablation_hd [--data digits|fashion] [--seeds 0 1 2] [--out runs/ablation] [--quick]

Every arm is a stage of one recipe, so the arms of a seed share teacher, trajectories, sketch and evaluation noises, and
a run that is killed goes on where it was. Each discriminator's weight and noise level are chosen on a seed of their own
by the FID against *training* images, from the same trials for every arm. Iterations are set so that every refinement
costs the same floating-point operations, and matching without a sketch gets the sketch's as well. For fashion, `--npz`
names Fashion-MNIST's archive; its teacher and the feature nets are those in benchmarks/assets, or are trained again
where that folder is missing.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines import recipe as recipes  # before torch: `pipelines` sets how its threads wait

# isort: split
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hd_core.random import Draws
from hd_core.step import train_step
from pipelines.artifacts import RunDir, read_json, write_json
from pipelines.feed import Feed
from pipelines.group import Group
from pipelines.process import prepare_process, process_started
from pipelines.run import Run
from pipelines.stages import step_seed
from pipelines.trainer import StageTrainer, Watch

Recipe = dict[str, Any]
ASSETS = Path(__file__).parent / "assets"
"""Teacher and feature nets as `prepare` made them, kept so that everyone starts from the same."""
TUNING_SEEDS = {"digits": (100, 101, 102), "fashion": (100,)}
TRIALS: tuple[Recipe, ...] = (
    {"weight": 0.3, "time_mean": -2.2},
    {"weight": 0.3, "time_mean": -2.2, "warmup_steps": 50},
    {"weight": 1.0, "time_mean": -2.2, "warmup_steps": 50},
)
"""Weight of the adversarial gradient against the matching one, logit of the time at which D looks, its head start."""
ARMS = {
    "digits": ("pooled", "token_logits", "convolution", "uniform", "random", "adaptive"),
    "fashion": ("pooled", "adaptive"),
}
BUDGET_ITERATIONS = {"digits": 150, "fashion": 160}
"""Iterations of a refinement with the adaptive arm, which set the budget of all."""
SKETCH_STEPS = {"digits": 500, "fashion": 700}
REMEDIES: dict[str, Recipe] = {
    "as first tried": {},
    "noise level 0.02": {"objective": {"adversarial": {"time_mean": -4.0}}},
    "noise level 0.35": {"objective": {"adversarial": {"time_mean": -0.6}}},
    "last layer only": {"discriminator": {"layers": [3]}},
    "temperature 0.1": {"discriminator": {"temperature": 0.1}},
    "warm-up of a third": {"objective": {"adversarial": {"warmup_steps": 50}}},
    "discriminator 5 times faster": {"optimizers": {"discriminator": {"learning_rate": 5e-3}}},
    "warm-up, 5 times faster, temperature 0.1": {
        "objective": {"adversarial": {"warmup_steps": 50}},
        "optimizers": {"discriminator": {"learning_rate": 5e-3}},
        "discriminator": {"temperature": 0.1},
    },
}
"""Changes of the adaptive arm, where it does not beat pooling, and of the pooled one to be fair."""


def base(data: str, npz: str) -> Recipe:
    """A recipe without stages."""
    nets = ASSETS / data
    evaluate: Recipe = {"num_samples": 5000, "solvers": {"euler": [1], "dpmpp_3m": [32]}}
    if data == "digits":
        precompute: Recipe = {"num_samples": 8192, "intervals": 12, "num_actors": 2}
        return {
            "precompute": precompute,
            "evaluate": {**evaluate, "second_features": str(nets / "denoise")},
            "track": {"enabled": False},
        }
    return {
        "teacher": {"path": str(nets / "teacher")},
        "data": {"kind": "npz", "path": npz, "image_size": 32, "fit": "pad"},
        "precompute": {"num_samples": 4096, "intervals": 12, "num_actors": 2, "batch_size": 256},
        "evaluate": {
            "num_samples": 3000,
            "solvers": {"euler": [1], "dpmpp_3m": [16]},
            "features": str(nets / "classes"),
            "second_features": str(nets / "denoise"),
        },
        "track": {"enabled": False},
    }


def prepare(data: str, npz: str) -> None:
    """Feature nets, and for fashion the teacher, by the project's own commands; nothing where they are there."""
    changes = ["--set", f"data.path={npz}", "--set", f"teacher.path={ASSETS / data / 'teacher'}"]
    name, changes = ("digits", []) if data == "digits" else ("fashion_hd", changes)
    for task in ("denoise",) if data == "digits" else ("classes", "denoise"):
        if not (ASSETS / data / task).exists():
            _hdistill("features", name, "--task", task, "--out", str(ASSETS / data / task), *changes)
    if data == "fashion" and not (ASSETS / data / "teacher" / "training.json").exists():
        _hdistill("teacher", name, *changes)


def _hdistill(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pipelines.cli", *arguments], check=True)


# Stages


def sketch(data: str) -> Recipe:
    """Stage 1 from stored trajectories."""
    return {
        "objective": {"name": "mean_velocity", "full_share": 0.5},
        "num_steps": SKETCH_STEPS[data],
        "batch_size": _batch(data),
        "optimizers": {"student": {"learning_rate": 1e-3, "warmup_moves": 50, "decay": "cosine"}},
    }


def _batch(data: str) -> int:
    return 128 if data == "digits" else 64


def refine(data: str, start: str, arm: str = "none", adversarial: Recipe | None = None) -> Recipe:
    """Stage 2 with one arm; ``num_steps`` is set later, by the budget."""
    objective = {"name": "dmd", "update_ratio": 2}
    objective["adversarial"] = {"weight": 0.0} if arm == "none" else {"weighting": "matched", **(adversarial or {})}
    return {
        "start": start,
        "objective": objective,
        "num_steps": BUDGET_ITERATIONS[data],
        "batch_size": _batch(data),
        "optimizers": {
            "student": {"learning_rate": 1e-4, "betas": [0.5, 0.99], "decay": "cosine"},
            "fake_score": {"learning_rate": 5e-4, "decay": "cosine"},
            "discriminator": {"learning_rate": 1e-3, "betas": [0.5, 0.99]},
        },
        "discriminator": {"layers": [1, 3], **({} if arm == "none" else {"arm": arm})},
    }


def ablation_stages(data: str, chosen: dict[str, Recipe]) -> dict[str, Recipe]:
    """The rows of the table."""
    stages = {"sketch": sketch(data), "dmd_only": refine(data, "teacher"), "sketch_dmd": refine(data, "sketch")}
    return stages | {f"sketch_dmd_{arm}": refine(data, "sketch", arm, chosen[arm]) for arm in ARMS[data]}


def tuning_stages(data: str) -> dict[str, Recipe]:
    """Every arm at every trial."""
    trials = {
        f"{arm}_{number}": refine(data, "sketch", arm, trial)
        for arm in ARMS[data]
        for number, trial in enumerate(TRIALS)
    }
    return {"sketch": sketch(data), **_probed(trials)}


def remedy_stages(data: str) -> dict[str, Recipe]:
    """Matching alone, and each remedy of the adaptive and of the pooled arm, from the first trial's settings."""
    stages = {"none": refine(data, "sketch")}
    for arm in ("adaptive", "pooled"):
        plain = refine(data, "sketch", arm, TRIALS[0])
        stages |= {f"{arm}_{number}": merged(plain, change) for number, change in enumerate(REMEDIES.values())}
    return {"sketch": sketch(data), **_probed(stages)}


def merged(recipe: Recipe, change: Recipe) -> Recipe:
    """A recipe with some of its leaves changed."""
    inner = {key: merged(recipe.get(key, {}), value) for key, value in change.items() if isinstance(value, dict)}
    return {**recipe, **change, **inner}


def _probed(stages: dict[str, Recipe]) -> dict[str, Recipe]:
    """With one look at the end, against training images, by which a trial is judged."""
    return {name: {**stage, "probe": {"every": 10**6, "num_samples": 3000}} for name, stage in stages.items()}


# Budget


def operations(run: Run, name: str) -> float:
    """Floating-point operations of one iteration of a stage, averaged over the iterations of a generator's move."""
    job = run.job(name)
    trainer = StageTrainer(job, Group(), Watch())
    count = getattr(job.stage.objective, "update_ratio", 1)
    batches = Feed(job, trainer.teacher, trainer.rows, 0).batches(count)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for step, batch in enumerate(batches):
            draws = Draws(seed=step_seed(job, step), rows=trainer.rows, total=job.stage.batch_size)
            train_step(trainer.state, job.stage.objective, trainer.cast, batch, draws, progress=0.0)
    return counter.get_total_flops() / count


def costs(data: str, out: Path, npz: str, console: Console) -> dict[str, float]:
    """Operations of one iteration of every kind of stage, kept in a file."""
    path = out / f"costs-{data}.json"
    known: dict[str, float] = read_json(path) or {}
    stages = {**ablation_stages(data, dict.fromkeys(ARMS[data], TRIALS[0])), **remedy_stages(data)}
    if known.keys() >= {cost_key(stage) for stage in stages.values()}:
        return known
    small = base(data, npz)
    small["precompute"] = {**small["precompute"], "num_samples": 256}
    untrained = {name: {**stage, "start": "teacher"} for name, stage in stages.items()}
    run = open_run({**small, "stages": untrained}, out / f"costs-{data}", console)
    run.partial(lambda job: job.prepare_shards())
    for name, stage in stages.items():
        if cost_key(stage) not in known:
            known[cost_key(stage)] = operations(run, name)
    write_json(path, known)
    return known


def cost_key(stage: Recipe) -> str:
    """What the cost of an iteration depends on."""
    adversarial, discriminator = stage["objective"].get("adversarial", {}), stage.get("discriminator", {})
    parts = [stage["objective"]["name"], adversarial.get("weight", 0) > 0, adversarial.get("r1_weight", 0) > 0]
    return json.dumps([*parts, discriminator.get("arm", "adaptive"), discriminator.get("layers", [])])


def budgeted(data: str, stages: dict[str, Recipe], known: dict[str, float]) -> dict[str, Recipe]:
    """The stages, each refinement's iterations set to the budget; one from the teacher has the sketch's as well."""
    budget = BUDGET_ITERATIONS[data] * known[cost_key(refine(data, "sketch", "adaptive", TRIALS[0]))]
    spent = SKETCH_STEPS[data] * known[cost_key(sketch(data))]
    for stage in stages.values():
        if stage["objective"]["name"] == "dmd":
            whole = budget + (spent if stage["start"] == "teacher" else 0)
            stage["num_steps"] = round(whole / known[cost_key(stage)])
    return stages


# Runs


def open_run(recipe: Recipe, folder: Path, console: Console) -> Run:
    """A recipe in its directory."""
    return Run(recipes.from_dict({"name": folder.name, **recipe}), RunDir.create(folder), console)


def execute(recipe: Recipe, folder: Path, console: Console) -> dict[str, Any]:
    """Do what is not done of a recipe; its report, without the pictures of a page."""
    report = read_json(folder / "report.json")
    if report is None:
        open_run(recipe, folder, console).execute(process_started())
        report = read_json(folder / "report.json")
    return report


def probe_fid(folder: Path, stage: str) -> float:
    """The FID against training images at a stage's end."""
    return read_json(folder / "stages" / stage / "stage.json")["best_probe_fid"]


def tune(data: str, out: Path, npz: str, known: dict[str, float], console: Console) -> dict[str, Recipe]:
    """The best trial of each arm."""
    folders = train_only(data, out, "tuning", npz, budgeted(data, tuning_stages(data), known), console)
    found = {arm: [probe_fids(folders, f"{arm}_{number}") for number in range(len(TRIALS))] for arm in ARMS[data]}
    print_trials(found)
    means = {arm: [statistics.mean(trial) for trial in trials] for arm, trials in found.items()}
    return {arm: TRIALS[fids.index(min(fids))] for arm, fids in means.items()}


def train_only(data: str, out: Path, kind: str, npz: str, stages: dict[str, Recipe], console: Console) -> list[Path]:
    """Train the stages on every tuning seed, without a report; the run directories."""
    folders = []
    for seed in TUNING_SEEDS[data]:
        folders.append(out / f"{data}-{kind}-{seed}")
        run = open_run({**base(data, npz), "seed": seed, "stages": stages}, folders[-1], console)
        run.partial(lambda job: job.train_stages(()))
    return folders


def probe_fids(folders: list[Path], stage: str) -> list[float]:
    """The FID against training images at a stage's end, of every seed."""
    return [read_json(folder / "stages" / stage / "stage.json")["best_probe_fid"] for folder in folders]


def print_trials(found: dict[str, list[list[float]]]) -> None:
    """FID against training images of every trial."""
    print("| arm | " + " | ".join(json.dumps(trial) for trial in TRIALS) + " |")
    print("|---" * (1 + len(TRIALS)) + "|")
    for arm, trials in found.items():
        print(f"| {arm} | " + " | ".join(mean_and_error(fids) for fids in trials) + " |")


def remedies(data: str, out: Path, npz: str, known: dict[str, float], console: Console) -> None:
    """Print what each remedy does to two arms, on the tuning seeds, against training images."""
    folders = train_only(data, out, "remedies", npz, budgeted(data, remedy_stages(data), known), console)
    print(f"\nmatching alone: FID to training images {mean_and_error(probe_fids(folders, 'none'))}\n")
    print("| change | adaptive: FID | real - fake logit | accuracy | entropy | pooled: FID |")
    print("|---" * 6 + "|")
    for number, name in enumerate(REMEDIES):
        adaptive, pooled = (mean_and_error(probe_fids(folders, f"{arm}_{number}")) for arm in ("adaptive", "pooled"))
        signs = zip(*(last_signs(folder / "stages" / f"adaptive_{number}") for folder in folders), strict=True)
        cells = " | ".join(f"{statistics.mean(values):.3f}" for values in signs)
        print(f"| {name} | {adaptive} | {cells} | {pooled} |")


def last_signs(stage: Path, points: int = 5) -> list[float]:
    """Logit gap, accuracy and token entropy over the last points of a stage's curve."""
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()][-points:]
    gap = statistics.mean(line["real_logit"] - line["fake_logit"] for line in lines)
    accuracy = statistics.mean((line["accuracy_real"] + line["accuracy_fake"]) / 2 for line in lines)
    return [gap, accuracy, statistics.mean(line["token_entropy"] for line in lines)]


# Table


COLUMNS = ("fid", "second_fid", "precision", "recall")


def mean_and_error(values: list[float]) -> str:
    """Mean and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


def rows_by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A report's rows, students by stage and the teacher by solver and calls."""
    return {row["stage"] or f"teacher {row['solver']} {row['nfe']}": row for row in report["rows"]}


def print_table(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard error of every generator; its figures by name."""
    by_seed = [rows_by_name(report) for report in reports]
    steps = {name: stage["num_steps"] for name, stage in reports[0]["recipe"]["stages"].items()}
    print(f"\n| generator | iterations | {' | '.join(COLUMNS)} |")
    print("|---" * (2 + len(COLUMNS)) + "|")
    figures: dict[str, Any] = {}
    for name in by_seed[0]:
        values = {column: [rows[name][column] for rows in by_seed] for column in COLUMNS}
        cells = " | ".join(mean_and_error(values[column]) for column in COLUMNS)
        print(f"| {name} | {steps.get(name, '-')} | {cells} |")
        figures[name] = {column: round(statistics.mean(values[column]), 4) for column in COLUMNS}
    return figures


def paired(reports: list[dict[str, Any]], first: str, second: str) -> str:
    """Difference in FID of two generators, seed by seed."""
    rows = [rows_by_name(report) for report in reports]
    return mean_and_error([row[first]["fid"] - row[second]["fid"] for row in rows])


def answers(reports: list[dict[str, Any]]) -> Iterator[str]:
    """The two questions, and HD against the teacher's many steps."""
    yield f"adaptive - pooled: FID {paired(reports, 'sketch_dmd_adaptive', 'sketch_dmd_pooled')}"
    yield f"adaptive - no discriminator: FID {paired(reports, 'sketch_dmd_adaptive', 'sketch_dmd')}"
    yield f"sketch, then matching - matching alone: FID {paired(reports, 'sketch_dmd', 'dmd_only')}"


def ablation(options: argparse.Namespace, out: Path, known: dict[str, float], console: Console) -> None:
    """Tune, run the seeds one after another, print the table."""
    chosen = tune(options.data, out, options.npz, known, console)
    reports = []
    for seed in options.seeds:
        stages = budgeted(options.data, ablation_stages(options.data, chosen), known)
        recipe = {**base(options.data, options.npz), "seed": seed, "stages": stages}
        reports.append(execute(recipe, out / f"{options.data}-seed-{seed}", console))
    figures = print_table(reports)
    for answer in answers(reports):
        print(answer)
    print(json.dumps({"data": options.data, "seeds": options.seeds, "chosen": chosen, "rows": figures}))


def confirm(options: argparse.Namespace, out: Path, known: dict[str, float], console: Console) -> None:
    """One remedy, found on the tuning seeds, on the seeds of the table: what it does to two arms, held out."""
    reports = []
    for seed in options.seeds:
        arms = {arm: refine(options.data, "sketch", arm, TRIALS[0]) for arm in ("pooled", "adaptive")}
        stages = {"sketch": sketch(options.data), "sketch_dmd": refine(options.data, "sketch")}
        stages |= {f"sketch_dmd_{arm}": merged(stage, REMEDIES[options.confirm]) for arm, stage in arms.items()}
        stages = budgeted(options.data, stages, known)
        recipe = {**base(options.data, options.npz), "seed": seed, "stages": stages}
        place = list(REMEDIES).index(options.confirm)
        reports.append(execute(recipe, out / f"{options.data}-confirmed-{place}-seed-{seed}", console))
    figures = print_table(reports)
    for first, second in (("adaptive", "pooled"), ("adaptive", ""), ("pooled", "")):
        names = [f"sketch_dmd_{arm}".rstrip("_") for arm in (first, second)]
        print(f"{first} - {second or 'no discriminator'}: FID {paired(reports, *names)}")
    print(json.dumps({"data": options.data, "remedy": options.confirm, "rows": figures}))


def main() -> None:
    """The ablation, or the remedies."""
    options = parse()
    prepare_process()
    console, out = Console(), options.out.resolve()
    if options.quick:
        shorten()
    prepare(options.data, options.npz)
    known = costs(options.data, out, options.npz, console)
    if options.confirm:
        confirm(options, out, known, console)
    elif options.remedies:
        remedies(options.data, out, options.npz, known, console)
    else:
        ablation(options, out, known, console)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(ARMS), default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--npz", default="fashion_mnist.npz", help="Fashion-MNIST's archive")
    parser.add_argument("--remedies", action="store_true", help="try changes of the discriminator instead")
    parser.add_argument("--confirm", choices=list(REMEDIES), help="one such change on the seeds, instead")
    parser.add_argument("--quick", action="store_true", help="a few iterations of everything, which mean nothing")
    options = parser.parse_args()
    if options.quick:
        options.out, options.seeds = options.out.with_name(f"{options.out.name}-quick"), options.seeds[:1]
    return options


def shorten() -> None:
    """Make everything tiny."""
    global TRIALS
    TRIALS = TRIALS[:1]
    for data in ARMS:
        ARMS[data] = ("pooled", "adaptive")
        BUDGET_ITERATIONS[data], SKETCH_STEPS[data], TUNING_SEEDS[data] = 4, 10, TUNING_SEEDS[data][:1]


if __name__ == "__main__":
    main()
