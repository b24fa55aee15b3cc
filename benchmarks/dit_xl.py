"""How fast DiT-XL/2 is distilled on a GPU, as a share of what the card's own matrix products reach.

    python -m benchmarks.dit_xl [--size xl|tiny] [--batch 32] [--quick]

The teacher is DiT-XL/2 for 256x256 images with random weights and the autoencoder beside it, saved as a pipeline of
diffusers and read by `pipelines.teachers.load_teacher`. What is timed is what a run calls, with the settings of the
recipes imagenet256_hd and imagenet256_sfd but for the batch:

    precompute   `pipelines.precompute.solve` of one batch: whole trajectories, of 60 intervals (tiny: 5)
    a stage      iterations of `hd_core.step.train_step` on networks from `pipelines.cast.build`, on random latents; as
                 many as lie between two moves of the generator (dmd); SFD-v always in 5 steps, its most
    one step     a student's samples in one step, decoded

Stages run in bfloat16 autocast, as their recipes say; precompute and sampling in float32, as a run has them, and in
autocast too. Rows of a stage are those of its iterations. Multiply-adds are those of `hdistill flops`, to the nearest
whole pass; what checkpointing computes again does not count. Each is two operations, as in the card's rate, of an
8192^3 product in bfloat16 (256^3 on a CPU). Seconds are medians after a warm-up; the peak is that of torch's tensors,
the estimate that of `pipelines.memory` (float32 only for the first and last). What does not fit has an estimate alone.
"""

import argparse
import gc
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hd_core.objectives.turns import Batch
from hd_core.random import Draws, sample_labels
from hd_core.step import train_step
from hd_core.times import custom
from hd_core.walk import walk
from pipelines import recipe as recipes
from pipelines.architectures import architecture, architecture_folder
from pipelines.cast import build, new_student
from pipelines.diffusers_library import diffusers
from pipelines.flops import count, multiply_adds
from pipelines.memory import Estimate, memory
from pipelines.model_files import read_object
from pipelines.precompute import noise_seed, solve
from pipelines.process import default_device, prepare_process
from pipelines.recipe import Recipe
from pipelines.stages import StageJob, step_seed
from pipelines.teachers import Teacher, load_teacher

BATCHES = {"xl": 32, "tiny": 2}
BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
TINY = {  # what differs from the configs of DiT-XL/2
    "transformer": {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "sample_size": 8},
    "vae": {"block_out_channels": [32, 32], "layers_per_block": 1, "sample_size": 16, **BLOCKS},
}
TINY_SETTINGS = {"hd": "stages.refine.discriminator.layers=[0, 1]", "sfd": "precompute.intervals=5"}
WARM_UP = 2
NO_FILES: dict[str, Any] = {"folder": "", "start_weights": "", "trajectories": None, "images": None, "inputs": {}}
COLUMNS = ("rows_per_second", "tflops", "share", "peak_gib", "estimated_gib")
Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Case:
    """``prepare`` loads networks and returns what is timed, ``rows`` of ``macs`` each; ``estimate`` is in bytes."""

    name: str
    prepare: Callable[[], Call]
    rows: int
    macs: int
    estimate: int | None = None


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is asked for, and the folder of the teacher's pipeline."""

    folder: Path
    size: str
    batch: int
    device: str
    repeats: int

    def recipe(self, name: str, *settings: str) -> Recipe:
        """A recipe for one process, this teacher and this batch."""
        stages = [f"stages.{stage}.batch_size" for stage in recipes.load(f"imagenet256_{name}").stages]
        keys = ("precompute.num_samples", "precompute.shard_rows", "precompute.batch_size", "evaluate.batch_size")
        rows = [f"{key}={self.batch}" for key in (*keys, *stages)]
        here = [f"teacher.path={self.folder}", "train.num_workers=0", "evaluate.guidance_scales=[1]"]
        small = [TINY_SETTINGS[name]] if self.size == "tiny" else []
        return recipes.load(f"imagenet256_{name}", [*here, *rows, *settings, *small])


def save_pipeline(folder: Path, size: str, device: str) -> None:
    """Write a pipeline with random weights."""
    shutil.copytree(architecture_folder("facebook/DiT-XL-2-256"), folder)
    for part, changes in TINY.items() if size == "tiny" else ():
        config = folder / part / "config.json"
        config.write_text(json.dumps(read_object(config) | changes))
    library, built = diffusers(), architecture(str(folder), device)
    scheduler = library.DDIMScheduler.from_pretrained(folder / "scheduler")
    library.DiTPipeline(built.network, built.autoencoder, scheduler).save_pretrained(folder)


def cases(bench: Bench) -> Iterator[Case]:
    """All of them; each loads its networks when its turn comes."""
    arithmetic, built = count(str(bench.folder)), architecture(str(bench.folder))
    hd, sfd = bench.recipe("hd"), bench.recipe("sfd", "stages.sfd_v.objective.step_counts=[5]")
    macs = {phase: row for recipe in (hd, sfd) for phase, (_, row) in multiply_adds(recipe, arithmetic).items()}
    found = memory(sfd, built) | memory(hd, built)  # of sampling, that of a student without embedded steps
    yield from in_both(bench, "precompute", partial(solving, bench, sfd), macs["precompute"], found["precompute"].peak)
    for recipe in (hd, sfd):
        for name in recipe.stages:
            yield from stage(bench, recipe, name, macs[name], found[name])
    macs["evaluate"] = arithmetic.student_macs + arithmetic.decoder_macs
    yield from in_both(bench, "one step", partial(sampling, bench, hd), macs["evaluate"], found["evaluate"].peak)


def in_both(bench: Bench, name: str, prepare: Callable[[], Call], macs: int, estimate: int) -> Iterator[Case]:
    """A case in float32 and in bfloat16 autocast."""
    case, reduced = partial(Case, rows=bench.batch, macs=macs), torch.autocast(bench.device, torch.bfloat16)
    yield case(name=f"{name}, float32", prepare=prepare, estimate=estimate)
    yield case(name=f"{name}, bfloat16", prepare=lambda: reduced(prepare()))


def stage(bench: Bench, recipe: Recipe, name: str, macs: int, estimate: Estimate) -> Iterator[Case]:
    """A stage without and with gradient checkpointing."""
    iterations = getattr(recipe.stages[name].objective, "update_ratio", 1)
    case = partial(Case, rows=bench.batch * iterations, macs=macs)
    for title, peak in ((name, estimate.peak), (f"{name}, checkpointing", estimate.checkpointed_peak)):
        changed = recipes.override(recipe, {"train.gradient_checkpointing": title != name})
        yield case(name=title, prepare=partial(training, bench, changed, name, iterations), estimate=peak)


def solving(bench: Bench, recipe: Recipe) -> Call:
    """One batch of the teacher's trajectories."""
    teacher, ids = load_teacher(recipe.teacher).to(bench.device), range(bench.batch)
    labels = sample_labels(noise_seed(recipe.seed), ids, teacher.num_classes)
    return lambda: solve(teacher, recipe.precompute, recipe.teacher.guidance_scale, recipe.seed, ids, labels)


def training(bench: Bench, recipe: Recipe, name: str, iterations: int) -> Call:
    """Some iterations of a stage whose student starts as the teacher."""
    asked, teacher = recipe.stages[name], load_teacher(recipe.teacher).to(bench.device)
    knows = asked.start != recipes.TEACHER and recipe.knows_steps(asked.start)
    about = {"train": recipe.train, "teacher": recipe.teacher, "seed": recipe.seed, "start_knows_steps": knows}
    job = StageJob(name=name, stage=asked, **about, **NO_FILES)
    state, cast = build(job, teacher)
    batch, rows = batch_of(bench, recipe, teacher), slice(0, bench.batch)

    def step() -> None:
        draws = Draws(seed=step_seed(job, state.step), rows=rows, total=bench.batch, device=bench.device)
        train_step(state, asked.objective, cast, batch, draws, progress=0.0)

    return lambda: [step() for _ in range(iterations)]


def batch_of(bench: Bench, recipe: Recipe, teacher: Teacher) -> Batch:
    """Random latents: a step costs the same whatever they show."""
    grid = recipe.precompute.grid.times(recipe.precompute.intervals)
    condition = teacher.condition(torch.randint(teacher.num_classes, (bench.batch,)))
    noise, images = torch.randn(2, bench.batch, *teacher.shape)
    states = torch.randn(bench.batch, len(grid), *teacher.shape) if recipe.needs_trajectories else None
    batch = Batch(noise=noise, condition=condition, states=states, grid=grid, images=images, images_condition=condition)
    return batch.to(bench.device)


def sampling(bench: Bench, recipe: Recipe) -> Call:
    """One step of a student, and its decoding."""
    teacher = load_teacher(recipe.teacher).to(bench.device)
    student = new_student(teacher).to(bench.device).eval().requires_grad_(False)
    batch, grid = batch_of(bench, recipe, teacher), custom([1.0, 0.0])
    return torch.no_grad()(lambda: teacher.decoded(walk(student, grid, batch.noise, batch.condition)))


def seconds(call: Call, device: str, repeats: int) -> float:
    """Median of a call's seconds; torch's peak of memory is that of the calls after the warm-up."""
    wait, taken = torch.cuda.synchronize if device == "cuda" else lambda: None, list[float]()
    for index in range(WARM_UP + repeats):
        if device == "cuda" and index == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        call()
        wait()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[WARM_UP:])


def matmul_rate(device: str) -> float:
    """Floating-point operations a second of a product of two square matrices in bfloat16."""
    size = 8192 if device == "cuda" else 256
    one, other = torch.randn(2, size, size, device=device).bfloat16()
    return 2 * size**3 / seconds(lambda: one @ other, device, 20)


def figures(case: Case, bench: Bench, rate: float) -> dict[str, float | None]:
    """What is printed of a case; the estimate alone where the card's memory does not suffice."""
    gc.collect()  # the networks of the case before
    torch.cuda.empty_cache()
    found: dict[str, float | None] = dict.fromkeys(COLUMNS)
    found["estimated_gib"] = case.estimate and case.estimate / 2**30
    with suppress(torch.OutOfMemoryError):
        rows = case.rows / seconds(case.prepare(), bench.device, bench.repeats)
        peak = torch.cuda.max_memory_allocated() / 2**30 if bench.device == "cuda" else None
        speed = 2 * case.macs * rows
        found |= {"rows_per_second": rows, "tflops": speed / 1e12, "share": speed / rate, "peak_gib": peak}
    return {name: None if value is None else float(f"{value:.4g}") for name, value in found.items()}


def report(bench: Bench) -> dict[str, Any]:
    """Time every case and print its line of the table."""
    rate, measured = matmul_rate(bench.device), dict[str, dict[str, float | None]]()
    device, products = torch.cuda.get_device_name() if bench.device == "cuda" else "CPU", float(f"{rate / 1e12:.4g}")
    print(f"{device}, size {bench.size}, batch {bench.batch}; bfloat16 products: {products} TFLOP/s\n")
    print("| | rows/s | TFLOP/s | share of products | peak, GiB | estimated, GiB |\n|---|---|---|---|---|---|")
    for case in cases(bench):
        found = measured[case.name] = figures(case, bench, rate)
        cells = ["-" if value is None else f"{value:g}" for value in found.values()]
        print(f"| {case.name} | {' | '.join(cells)} |", flush=True)
    return {"device": device, "size": bench.size, "batch": bench.batch, "matmul_tflops": products, "cases": measured}


def main() -> None:
    """Make the teacher and time everything."""
    device = default_device()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(BATCHES), default="xl" if device == "cuda" else "tiny")
    parser.add_argument("--batch", type=int, help=f"rows; where it is not given {BATCHES}")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    prepare_process(None if device == "cuda" else 1)
    torch.manual_seed(0)
    batch, repeats = options.batch or BATCHES[options.size], 3 if options.quick else 10
    with tempfile.TemporaryDirectory() as made:
        teacher = Path(made) / "teacher"
        save_pipeline(teacher, options.size, device)
        found = report(Bench(folder=teacher, size=options.size, batch=batch, device=device, repeats=repeats))
    if device == "cpu":
        print("\nNo claim is made on a CPU: these lines show that the benchmark runs. Shares may be above 1 there.")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
