"""What HD on ImageNet 256x256 asks of 8, 64 and 512 GPUs, phase by phase, and what holds it up first.

    python -m benchmarks.scaling

Nothing is run: multiply-adds, parameters and bytes are counted from the recipes imagenet256_hd and, for trajectories,
imagenet256_sfd; rates of machines are assumptions, which stand in `ASSUMED` and head the output. The tables of
docs/scaling.md are this output. The last line is JSON.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipelines import flops
from pipelines import recipe as recipes
from pipelines.architectures import architecture
from pipelines.flops import multiply_adds, student_calls, teacher_calls
from pipelines.recipe import Recipe
from pipelines.stages import StageConfig

HD = recipes.load("imagenet256_hd")
SFD = recipes.load("imagenet256_sfd")
SIZES = (8, 64, 512)
IMAGES = 1_281_167
"""Training images of ImageNet-1k."""
FLOAT16, FLOAT32 = 2, 4
LATENT_STORED = 2
"""Tensors of a latent that are stored: mean and spread."""


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """Rates of a machine with eight H100 or H200 cards, and of what is around it. None of them was measured here."""

    bfloat16_flops: float = 989e12
    """Peak of a card for dense bfloat16, in which stages are trained."""
    float32_flops: float = 67e12
    """Peak for float32, in which encoding, trajectories and sampling are computed."""
    training_share: float = 0.35
    """Of the peak that counted training reaches with many rows; what checkpointing computes again is in it."""
    inference_share: float = 0.6
    """Of the peak that inference reaches."""
    half_rows: float = 2.0
    """Rows on a card at which it reaches half of that."""
    inside_bytes: float = 300e9
    """Bytes a second that a card averages gradients with, among the eight of a machine."""
    between_bytes: float = 40e9
    """The same across machines: an eighth of a 3.2 Tbit/s adapter, less a fifth."""
    store_bytes: float = 1e9
    """Bytes a second that one process reads from, or writes to, an object store."""
    bucket_bytes: float = 50e9
    """Bytes a second of a whole bucket, to all."""
    picture_bytes: float = 110e3
    """Of one JPEG."""
    decode_seconds: float = 0.01
    """Of one CPU core for one JPEG, cropped and resized."""
    cores: int = 12
    """CPU cores beside each GPU."""
    start_seconds: float = 90.0
    """Of a group of workers: processes, weights from the store, first step."""
    judge_seconds: float = 120.0
    """Of the driver for one generator: Frechet distance of 2048 features, precision and recall of 50,000 samples."""


ASSUMED = Assumed()


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase on so many GPUs."""

    name: str
    gpus: int
    hours: float
    """On the wall."""
    busy: float
    """Share of the GPU-hours that are paid for in which counted work is done at its best rate."""
    losses: dict[str, float]
    """Hours on the wall that go to anything but counted work at its best rate, by cause."""

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.gpus

    @property
    def bottleneck(self) -> str:
        """What costs most beside the work itself; the work, where that is more."""
        worst = max(self.losses, key=lambda cause: self.losses[cause])
        return worst if self.losses[worst] > self.hours * self.busy else "the work itself"


# What is counted

count = cache(flops.count)


@cache
def encoder_macs() -> int:
    """Multiply-adds of encoding one image."""
    built = architecture(HD.teacher.path)
    assert built.autoencoder is not None
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        built.autoencoder.encode(torch.zeros(1, 3, HD.data.image_size, HD.data.image_size, device="meta"))
    return counter.get_total_flops() // 2


@cache
def adapter_parameters(rank: int) -> int:
    """Parameters of low-rank adapters at the linear layers of the teacher's network."""
    network = architecture(HD.teacher.path).network
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def gradient_bytes(stage: StageConfig) -> float:
    """Bytes of gradients that a step averages, in the mean over steps; those of a discriminator are left out."""
    student = FLOAT32 * count(HD.teacher.path).teacher_parameters
    ratio = getattr(stage.objective, "update_ratio", None)
    if ratio is None:
        return float(student)
    return student / ratio + FLOAT32 * adapter_parameters(stage.fake_score.rank)


def checkpoint_bytes(stage: StageConfig) -> float:
    """Student, its average and two moments; and the adapters of a fake score with theirs."""
    student = 4 * FLOAT32 * count(HD.teacher.path).teacher_parameters
    followed = hasattr(stage.objective, "update_ratio")
    return float(student + (3 * FLOAT32 * adapter_parameters(stage.fake_score.rank) if followed else 0))


def latent_bytes() -> int:
    """Of one row of latents."""
    return LATENT_STORED * math.prod(count(HD.teacher.path).shape) * FLOAT16


def latent_rows() -> int:
    """Rows of latents: the training images, and their mirrored selves."""
    return (IMAGES - int(HD.data.held_out)) * (2 if HD.precompute.flip else 1)


def trajectory_bytes(recipe: Recipe) -> int:
    """Of one trajectory: a state at each point of its grid."""
    return (recipe.precompute.intervals + 1) * math.prod(count(recipe.teacher.path).shape) * FLOAT16


# What is made of it


def making(
    name: str, gpus: int, macs: float, rows: int, shard_rows: int, *, written: float, pictures: float = 0.0
) -> Phase:
    """A set of shards by one actor a GPU; a shard is one actor's. ``pictures``: those that are decoded for a row."""
    seconds = 2 * macs / (ASSUMED.float32_flops * ASSUMED.inference_share)  # of one GPU for one row
    shards = math.ceil(rows / shard_rows)
    waves = math.ceil(shards / gpus) * shard_rows * seconds
    ideal = rows * seconds / gpus
    moved = (pictures * ASSUMED.picture_bytes + written) * rows
    transfer = moved / min(gpus * ASSUMED.store_bytes, ASSUMED.bucket_bytes)
    decoding = pictures * rows * ASSUMED.decode_seconds / (gpus * ASSUMED.cores)
    losses = {
        "shards that do not divide among the actors": waves - ideal,
        "the store": max(0.0, transfer - waves),
        "decoding pictures": max(0.0, decoding - waves),
        "starting": ASSUMED.start_seconds,
    }
    return _phase(name, gpus, ideal, losses)


def training(recipe: Recipe, name: str, gpus: int) -> Phase:
    """A stage by as many workers as there are GPUs and rows."""
    stage = recipe.stages[name]
    _, macs = multiply_adds(recipe, count(recipe.teacher.path))[name]
    workers = min(gpus, stage.batch_size)
    rows = math.ceil(stage.batch_size / workers)
    best = ASSUMED.bfloat16_flops * ASSUMED.training_share
    ideal = stage.batch_size * 2 * macs / best / gpus
    spread = rows * 2 * macs / best
    compute = spread * (rows + ASSUMED.half_rows) / rows
    reading = stage.batch_size * latent_bytes() * workers / min(ASSUMED.bucket_bytes, workers * ASSUMED.store_bytes)
    average = averaging_seconds(gradient_bytes(stage), workers)
    checkpoints = stage.num_steps / stage.checkpoint_every
    between = stage.checkpoint_every * (compute + average)
    late = max(0.0, checkpoint_bytes(stage) / ASSUMED.store_bytes - between)
    losses = {
        "GPUs without a row": (spread - ideal) * stage.num_steps,
        "few rows on a GPU": (compute - spread) * stage.num_steps,
        "averaging gradients": average * stage.num_steps,
        "reading latents": max(0.0, reading - compute - average) * stage.num_steps,
        "checkpoints": late * checkpoints,
        "starting": ASSUMED.start_seconds,
    }
    return _phase(name, gpus, ideal * stage.num_steps, losses)


def averaging_seconds(size: float, workers: int) -> float:
    """Of a ring: each worker sends and receives nearly twice the size. It begins when the backward pass is over."""
    rate = ASSUMED.inside_bytes if workers <= 8 else ASSUMED.between_bytes
    return 2 * (workers - 1) / workers * size / rate


def evaluation(recipe: Recipe, gpus: int) -> Phase:
    """Every generator, by one actor a GPU, and what the driver does alone."""
    rows, macs = multiply_adds(recipe, count(recipe.teacher.path))["evaluate"]
    ideal = rows * 2 * macs / (ASSUMED.float32_flops * ASSUMED.inference_share) / gpus
    generators = len(teacher_calls(recipe)) + sum(len(student_calls(recipe, name)) for name in recipe.stages)
    blocks = math.ceil(rows / recipe.evaluate.batch_size)
    uneven = ideal * (math.ceil(blocks / gpus) * gpus / blocks - 1)
    losses = {
        "blocks that do not divide among the actors": uneven,
        "the driver alone": generators * ASSUMED.judge_seconds,
        "starting": generators * ASSUMED.start_seconds,
    }
    return _phase("evaluate", gpus, ideal, losses)


def _phase(name: str, gpus: int, ideal: float, losses: dict[str, float]) -> Phase:
    total = ideal + sum(losses.values())
    return Phase(
        name=name,
        gpus=gpus,
        hours=total / 3600,
        busy=ideal / total,
        losses={cause: seconds / 3600 for cause, seconds in losses.items()},
    )


def phases(gpus: int) -> list[Phase]:
    """HD's phases in order, and last what SFD's trajectories would take."""
    made, pictures = SFD.precompute, 1 / (2 if HD.precompute.flip else 1)
    _, macs = multiply_adds(SFD, count(SFD.teacher.path))["precompute"]
    return [
        making(
            "latents",
            gpus,
            encoder_macs(),
            latent_rows(),
            HD.precompute.shard_rows,
            written=latent_bytes(),
            pictures=pictures,
        ),
        *(training(HD, name, gpus) for name in HD.stages),
        evaluation(HD, gpus),
        making("(trajectories)", gpus, macs, made.num_samples, made.shard_rows, written=trajectory_bytes(SFD)),
    ]


# Tables


def scaled(value: float) -> str:
    """Bytes with a decimal prefix."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}B"
    return f"{value:.0f} B"


def units() -> Iterator[str]:
    """What does not depend on the number of GPUs."""
    arithmetic = count(HD.teacher.path)
    yield "| what | counted |"
    yield "|---|---|"
    yield f"| a call of DiT-XL/2 | {arithmetic.teacher_macs / 1e9:.2f} G multiply-adds |"
    yield f"| encoding, decoding an image | {encoder_macs() / 1e9:.0f} G, {arithmetic.decoder_macs / 1e9:.0f} G |"
    yield f"| a latent, all {latent_rows():,} | {scaled(latent_bytes())}, {scaled(latent_rows() * latent_bytes())} |"
    stored = SFD.precompute.num_samples
    yield (
        f"| a trajectory of {SFD.precompute.intervals} intervals, all {stored:,} | {scaled(trajectory_bytes(SFD))},"
        f" {scaled(stored * trajectory_bytes(SFD))} |"
    )
    for name, stage in HD.stages.items():
        yield f"| {name}: gradients averaged, a step | {scaled(gradient_bytes(stage))} |"
        yield f"| {name}: a checkpoint, every {stage.checkpoint_every:,} steps | {scaled(checkpoint_bytes(stage))} |"


def hours_table(found: dict[int, list[Phase]]) -> Iterator[str]:
    """Hours, GPU-hours, the share that is work, and the bottleneck."""
    heads = " | ".join(f"{gpus}: hours, GPU-hours, busy" for gpus in found)
    yield f"| phase | {heads} |"
    yield f"|---{'|---' * len(found)}|"
    for place, first in enumerate(found[SIZES[0]]):
        cells = [f"{p.hours:,.2f}, {p.gpu_hours:,.0f}, {p.busy:.0%}" for p in (found[gpus][place] for gpus in found)]
        yield f"| {first.name} | {' | '.join(cells)} |"
    sums = [found[gpus][:-1] for gpus in found]
    totals = [f"**{sum(p.hours for p in some):,.1f}, {sum(p.gpu_hours for p in some):,.0f}**" for some in sums]
    yield f"| **HD in all** | {' | '.join(totals)} |"


def bottleneck_table(found: dict[int, list[Phase]]) -> Iterator[str]:
    """What costs most in each phase."""
    yield f"| phase | {' | '.join(map(str, found))} |"
    yield f"|---{'|---' * len(found)}|"
    for place, first in enumerate(found[SIZES[0]]):
        yield f"| {first.name} | {' | '.join(found[gpus][place].bottleneck for gpus in found)} |"
    yield f"| **in all** | {' | '.join(f'**{first_bottleneck(found[gpus])}**' for gpus in found)} |"


def first_bottleneck(some: list[Phase]) -> str:
    """What costs HD most beside the work itself; the work, where that is more."""
    work = sum(phase.hours * phase.busy for phase in some[:-1])
    losses: dict[str, float] = {}
    for phase in some[:-1]:
        for cause, hours in phase.losses.items():
            losses[cause] = losses.get(cause, 0.0) + hours
    worst = max(losses, key=lambda cause: losses[cause])
    name = worst if losses[worst] > work else f"the work itself, then {worst}"
    return f"{name} ({losses[worst]:.1f} of {sum(phase.hours for phase in some[:-1]):.1f} hours)"


def traffic_table() -> Iterator[str]:
    """Bytes that move in a step and in a stage."""
    yield f"| traffic | {' | '.join(map(str, SIZES))} |"
    yield f"|---{'|---' * len(SIZES)}|"
    for name, stage in HD.stages.items():
        workers = [min(gpus, stage.batch_size) for gpus in SIZES]
        sent = [2 * (some - 1) / some * gradient_bytes(stage) for some in workers]
        read = [stage.num_steps * stage.batch_size * latent_bytes() * some for some in workers]
        yield f"| {name}: workers | {' | '.join(map(str, workers))} |"
        yield f"| {name}: sent by a worker, a step | {' | '.join(map(scaled, sent))} |"
        yield f"| {name}: seconds of that | {' | '.join(_seconds(stage, some) for some in workers)} |"
        yield f"| {name}: latents read, in all | {' | '.join(map(scaled, read))} |"


def _seconds(stage: StageConfig, workers: int) -> str:
    return f"{averaging_seconds(gradient_bytes(stage), workers):.3f}"


def assumptions() -> Iterator[str]:
    """What heads the output."""
    yield "| assumed | |"
    yield "|---|---|"
    for name, value in asdict(ASSUMED).items():
        yield f"| `{name}` | {value:g} |"


def document() -> str:
    """The tables of docs/scaling.md."""
    found = {gpus: phases(gpus) for gpus in SIZES}
    parts = (assumptions(), units(), hours_table(found), bottleneck_table(found), traffic_table())
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def main() -> None:
    """The tables, then the figures."""
    print(document())
    found = {gpus: phases(gpus) for gpus in SIZES}
    figures = {gpus: round(sum(phase.gpu_hours for phase in found[gpus][:-1]), 1) for gpus in SIZES}
    print(json.dumps({"gpu_hours": figures, "bottleneck": {gpus: first_bottleneck(found[gpus]) for gpus in SIZES}}))


if __name__ == "__main__":
    main()
