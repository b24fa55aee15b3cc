"""What a recipe costs in multiply-adds and in memory, counted from architectures alone: no weights, no network.

A multiply-add is half of what PyTorch's counter calls two operations. Counted are matrix products, convolutions and the
two products of attention; norms, activations and additions are not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hd_core.guidance import branches
from hd_core.objectives.turns import first_step_is_analytical
from hd_core.solvers import SOLVERS
from pipelines.architectures import Architecture, architecture
from pipelines.calls import calls_of_training
from pipelines.memory import Estimate, interval_embedding, memory, parameters
from pipelines.recipe import Recipe
from pipelines.stages import measured_steps, sampling_grid


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """What one row costs."""

    teacher_macs: int
    """Multiply-adds of one call of the teacher, without guidance."""
    student_macs: int
    """Of one call of its student, which also embeds the interval."""
    decoder_macs: int
    """Of decoding one latent; 0 where the teacher works on pixels."""
    teacher_parameters: int
    """Parameters of the teacher's network."""
    decoder_parameters: int
    """Parameters of the whole autoencoder that decodes; 0 where the teacher works on pixels."""
    shape: tuple[int, int, int]
    """Channels, height and width of one image or latent."""


@dataclass(frozen=True, kw_only=True)
class PhaseCost:
    """What one phase of a recipe costs."""

    phase: str
    """precompute, a stage's name, or evaluate."""
    macs: int
    """Multiply-adds in all; a backward pass counts as two forward ones."""
    macs_per_row: int
    """Of one trajectory, of one row in one iteration, or of one sample of every generator that is measured."""
    memory: Estimate
    """Estimated bytes on one GPU."""


def count(path: str) -> Arithmetic:
    """Count an architecture; `architecture_folder` says what a path may be. ValueError where there is none."""
    return _counted(architecture(path))


def _counted(built: Architecture) -> Arithmetic:
    x = torch.zeros(1, *built.shape, device="meta")
    embedding, time = interval_embedding(built.embedding_width), torch.zeros(1, device="meta")
    teacher = _macs(lambda: built.call(x))
    return Arithmetic(
        teacher_macs=teacher,
        student_macs=teacher + _macs(lambda: embedding(time)),
        decoder_macs=_macs(lambda: built.decode(x)) if built.autoencoder is not None else 0,
        teacher_parameters=parameters(built.network),
        decoder_parameters=parameters(built.autoencoder),
        shape=built.shape,
    )


@torch.no_grad()
def _macs(call: Callable[[], Tensor]) -> int:
    # As in the evaluation: the plain attention is counted everywhere.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2


def speedup(teacher_calls: int, student_calls: int, arithmetic: Arithmetic) -> float:
    """How many times fewer multiply-adds an image of the student takes, decoding included on both sides."""
    decoder = arithmetic.decoder_macs
    teacher = teacher_calls * arithmetic.teacher_macs + decoder
    return teacher / (student_calls * arithmetic.student_macs + decoder)


def phases(recipe: Recipe) -> list[PhaseCost]:
    """The costs of a whole recipe, nothing of it done yet, in the order of its phases.

    Raises:
        ValueError: the teacher's architecture is not at hand, or cannot be built.
    """
    built = architecture(recipe.teacher.path)
    return _phases(recipe, built, _counted(built))


def _phases(recipe: Recipe, built: Architecture, arithmetic: Arithmetic) -> list[PhaseCost]:
    estimates = memory(recipe, built)
    return [
        PhaseCost(phase=phase, macs=rows * macs, macs_per_row=macs, memory=estimates[phase])
        for phase, (rows, macs) in multiply_adds(recipe, arithmetic).items()
    ]


def multiply_adds(recipe: Recipe, arithmetic: Arithmetic) -> dict[str, tuple[int, int]]:
    """Rows of each phase, and multiply-adds of one row: see `PhaseCost`."""
    precompute, found = recipe.precompute, {}
    if recipe.needs_trajectories:
        calls = precompute.calls_per_sample * branches(recipe.teacher.guidance_scale)
        found["precompute"] = precompute.num_samples, calls * arithmetic.teacher_macs
    for name, stage in recipe.stages.items():
        found[name] = (
            stage.num_steps * stage.batch_size,
            round(calls_of_training(stage, stage.guided(recipe.teacher)) / stage.num_steps) * arithmetic.student_macs,
        )
    return {**found, "evaluate": (recipe.evaluate.num_samples, _sample_of_all(recipe, arithmetic))}


def _sample_of_all(recipe: Recipe, arithmetic: Arithmetic) -> int:
    """Multiply-adds of one decoded sample of every generator that is measured."""
    teachers = teacher_calls(recipe)
    students = [calls for name in recipe.stages for calls in student_calls(recipe, name)]
    decoded = (len(teachers) + len(students)) * arithmetic.decoder_macs
    return sum(teachers) * arithmetic.teacher_macs + sum(students) * arithmetic.student_macs + decoded


def teacher_calls(recipe: Recipe) -> list[int]:
    """Network calls an image of the teacher, at each solver and number of steps that is measured."""
    guided = branches(recipe.teacher.guidance_scale)
    solvers = recipe.evaluate.solvers.items()
    return [steps * SOLVERS[solver].calls_per_step * guided for solver, counts in solvers for steps in counts]


def student_calls(recipe: Recipe, name: str) -> list[int]:
    """Network calls an image of a stage's student, at each guidance and number of steps that is measured."""
    stage, asked = recipe.stages[name], recipe.evaluate
    steps = [len(sampling_grid(name, stage, given)) - 1 for given in measured_steps(stage, asked.step_counts)]
    afs = first_step_is_analytical(stage.objective)
    return [(some - afs) * branches(scale) for scale, some in product(asked.guidance_scales, steps)]


def _own_calls(recipe: Recipe, name: str) -> int:
    """Network calls an image at a stage's own number of steps, guided only where it is measured in no other way."""
    objective = recipe.stages[name].objective
    steps = len(objective.sampling_grid()) - 1 - first_step_is_analytical(objective)
    return steps * min(map(branches, recipe.evaluate.guidance_scales))


def print_costs(recipe: Recipe, console: Console) -> None:
    """Print the table of phases, then each stage's student against the teacher's most calls.

    Raises:
        ValueError: as `phases`.
    """
    built = architecture(recipe.teacher.path)
    arithmetic = _counted(built)
    columns = ("Phase", "Multiply-adds", "a row", "Memory per GPU", "with checkpointing")
    table = Table(*columns, title=f"{recipe.name}: counted and estimated, nothing run")
    for item in _phases(recipe, built, arithmetic):
        saved = item.memory.checkpointed_peak
        memories = gibibytes(item.memory.peak), "-" if saved is None else gibibytes(saved)
        table.add_row(item.phase, scaled(item.macs), scaled(item.macs_per_row), *memories)
    console.print(table)
    for line in _lines(recipe, arithmetic):
        console.print(line, markup=False, highlight=False)


def _lines(recipe: Recipe, arithmetic: Arithmetic) -> list[str]:
    lines = [
        f"teacher {recipe.teacher.path}: {scaled(arithmetic.teacher_parameters)} parameters,"
        f" {scaled(arithmetic.teacher_macs)} multiply-adds a call; student {scaled(arithmetic.student_macs)}"
    ]
    if arithmetic.decoder_macs:
        decoder, weights = scaled(arithmetic.decoder_macs), scaled(arithmetic.decoder_parameters)
        lines.append(f"decoder: {decoder} multiply-adds an image (autoencoder of {weights} parameters)")
    most = max(teacher_calls(recipe), default=0)
    for name in recipe.stages if most else ():
        calls = _own_calls(recipe, name)
        gain = speedup(most, calls, arithmetic)
        lines.append(f"{name}: {calls} {'call' if calls == 1 else 'calls'} an image, the teacher {most}: {gain:.1f}x")
    return lines


def scaled(value: int) -> str:
    """A count with a decimal prefix, as in 118.67 G."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.2f} {prefix}"
    return str(value)


def gibibytes(value: int) -> str:
    """Bytes as GiB, or as MiB below one."""
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
