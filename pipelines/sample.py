"""Pictures from a trained stage."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hd_core.random import sample_labels, sample_noise
from hd_core.types import Condition
from pipelines.data import to_uint8
from pipelines.evaluate import Generator, make_sampler
from pipelines.figures import sample_grid
from pipelines.prompts_table import PromptTable
from pipelines.run import Run
from pipelines.teachers import text_files


def draw(
    job: Run,
    stage: str,
    *,
    num: int,
    label: int | None,
    seed: int,
    out: Path,
    prompts: Sequence[str] = (),
    steps: int | None = None,
    guidance_scale: float = 1.0,
) -> None:
    """Write ``num`` PNGs of a stage and one sheet of them to a directory; of each prompt, where some are given.

    Raises:
        ValueError: there is no such stage, it is not trained, or the class, a prompt or a number cannot be served.
    """
    job.recipe.require_stage(stage)
    _check(job, num, label, prompts)
    job.require_trained(stage)
    generator = job.student(stage, steps, guidance_scale)
    labels, condition = _asked(job, num * max(1, len(prompts)), label, prompts, seed)
    pictures = _pictures(job, generator, seed, condition)
    out.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(out / f"{index:05d}.png")
    (out / "sheet.png").write_bytes(sample_grid(pictures, labels.numpy()))
    job.say(f"{len(pictures)} pictures of {stage} and sheet.png are in {out}")


def _check(job: Run, num: int, label: int | None, prompts: Sequence[str]) -> None:
    classes, reads = job.teacher.num_classes, job.teacher.text_width > 0
    if num < 1 or (label is not None and not reads and not 0 <= label < classes):
        raise ValueError(f"--num must be at least 1 and --label from 0 to {classes - 1}; given {num} and {label}")
    if reads and label is not None:
        raise ValueError("--label is for classes, and this teacher reads text: use --prompt")
    if prompts and not reads:
        raise ValueError("--prompt is for a teacher that reads text, and this one does not: use --label")


def _asked(job: Run, num: int, label: int | None, prompts: Sequence[str], seed: int) -> tuple[torch.Tensor, Condition]:
    """What each picture is of: labels to sort a sheet by, and the condition."""
    if prompts:
        files = text_files(job.recipe.teacher)
        table = PromptTable(
            embeddings=files.load().to(job.teacher.device).encode(prompts),
            texts=tuple(prompts),
            num_training=len(prompts),
            length=files.length,
        )
        labels = torch.arange(len(prompts)).repeat_interleave(num // len(prompts))
        return labels, table.condition(labels)
    if job.teacher.text_width:
        labels = job.evaluation_labels(range(num))
    elif label is not None:
        labels = torch.full((num,), label)
    else:
        labels = sample_labels(seed, range(num), max(1, job.teacher.num_classes))
    return labels, job.reader.condition(labels)


def _pictures(job: Run, generator: Generator, seed: int, condition: Condition) -> np.ndarray:
    teacher = job.reader
    assert condition.labels is not None
    noise = generator.grid[0] * sample_noise(seed, range(len(condition.labels)), teacher.shape)
    with torch.no_grad():
        drawn = make_sampler(generator, teacher)(noise.to(teacher.device), condition.to(teacher.device))
    return to_uint8(teacher.decoded(drawn))
