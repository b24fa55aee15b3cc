"""Pictures from a trained stage."""

from pathlib import Path

import torch
from PIL import Image

from hd_core.random import sample_labels, sample_noise
from hd_core.types import Condition
from pipelines.data import to_uint8
from pipelines.evaluate import make_sampler
from pipelines.figures import sample_grid
from pipelines.run import Run


def draw(
    job: Run,
    stage: str,
    *,
    num: int,
    label: int | None,
    seed: int,
    out: Path,
    steps: int | None = None,
    guidance_scale: float = 1.0,
) -> None:
    """Write ``num`` PNGs of a stage and one sheet of them to a directory.

    Raises:
        ValueError: there is no such stage, it is not trained, or the class or a number is out of range.
    """
    job.recipe.require_stage(stage)
    classes = job.teacher.num_classes
    if num < 1 or (label is not None and not 0 <= label < classes):
        raise ValueError(f"--num must be at least 1 and --label from 0 to {classes - 1}; given {num} and {label}")
    job.require_trained(stage)
    generator = job.student(stage, steps, guidance_scale)
    labels = torch.full((num,), label) if label is not None else sample_labels(seed, range(num), max(1, classes))
    noise = generator.grid[0] * sample_noise(seed, range(num), job.teacher.shape)
    sampler = make_sampler(generator, job.teacher)
    pictures = to_uint8(sampler(noise.to(job.teacher.device), Condition(labels=labels).to(job.teacher.device)))
    out.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(out / f"{index:05d}.png")
    (out / "sheet.png").write_bytes(sample_grid(pictures, labels.numpy()))
    job.say(f"{num} pictures of {stage} and sheet.png are in {out}")
