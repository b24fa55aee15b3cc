"""A trained stage as a folder that diffusers loads and samples without this package."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hd_core.networks.student import FlowMapStudent
from hd_core.random import fold_in, sample_noise
from pipelines.artifacts import atomic_folder
from pipelines.community.card import Exported, write_card
from pipelines.community.folder import Parts, write_few_steps, write_stock
from pipelines.community.kinds import KINDS, request, seeded, settings
from pipelines.community.stock import why_not
from pipelines.community.table import steps_of
from pipelines.data import to_uint8
from pipelines.diffusers_library import diffusers, from_pretrained
from pipelines.evaluate import Generator, load_student, make_sampler
from pipelines.figures import sample_grid
from pipelines.model_files import ModelFiles
from pipelines.run import Run
from pipelines.teachers import teacher_folder
from pipelines.text import PARTS

TOLERANCE = 1e-3
"""The most by which pictures of an exported folder may differ from our sampler's, of values in [0, 1]."""
_COMPARED = 2
_PICTURES = 20


def export(job: Run, stage: str, out: Path, steps: int | None = None) -> None:
    """Write a trained stage as a pipeline's folder: weights, the parts around them, model card, samples.

    One step from noise to data becomes a stock pipeline, where diffusers has one for the network; all else brings the
    code of its own pipeline. Either is loaded again and compared with our sampler before the folder appears.

    Args:
        steps: how many, for a student that is told; None: as many as the stage was trained for.

    Raises:
        ValueError: there is no such stage, it is not trained or does not walk so many steps, or ``out`` is not empty.
    """
    job.recipe.require_stage(stage)
    job.require_trained(stage)
    generator = job.student(stage, steps)
    with atomic_folder(out) as made:
        parts = _parts(job)
        exported = _write(made, job, parts, generator)
        (made / "samples.png").write_bytes(_samples(job, generator))
        write_card(made, out.resolve().name, job, parts, generator, exported)
    code = "a stock pipeline" if exported.stock else "a pipeline with its own code"
    job.say(f"{stage} is in {out}: {code}, within {exported.difference:.1e} of our sampler; see its README.md")


def _parts(job: Run) -> Parts:
    source = ModelFiles.of(teacher_folder(job.recipe.teacher))
    candidates = [source.folder, source.folder.parent]
    root = next((folder for folder in candidates if (folder / "model_index.json").is_file()), source.folder)
    return Parts(kind=KINDS[source.class_name], teacher=job.reader, root=root)


def _write(folder: Path, job: Run, parts: Parts, generator: Generator) -> Exported:
    """Write a stock pipeline where that makes our pictures, else one with its own code."""
    student = _student(job, generator)
    steps = steps_of(student, generator)
    whole = steps_of(student, replace(generator, grid=(1.0, 0.0), afs=False))[0]
    why = why_not(parts.kind, parts.teacher, steps, generator.grid[0], whole)
    if not why:
        try:
            write_stock(folder, parts, student, steps[0], whole)
            difference = _difference(folder, job, parts, generator, stock=True)
            if difference <= TOLERANCE:
                return Exported(stock=True, why="", difference=difference)
            why = f"the pictures of a {parts.kind.stock} would differ by {difference:.1e} of their range"
        except ValueError as error:
            why = f"a {parts.kind.stock} cannot make its pictures ({error})"
        _empty(folder)
    write_few_steps(folder, parts, _student(job, generator), steps, generator.grid)
    difference = _difference(folder, job, parts, generator, stock=False)
    if difference > TOLERANCE:
        raise ValueError(
            f"the exported pipeline's pictures differ from hdistill's by {difference:.1e} of their range, above"
            f" {TOLERANCE:g}: nothing was written"
        )
    return Exported(stock=False, why=why, difference=difference)


def _student(job: Run, generator: Generator) -> FlowMapStudent:
    """A copy of the student, free to be changed."""
    student = load_student(generator, job.reader)
    assert isinstance(student, FlowMapStudent)
    return student


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@torch.no_grad()
def _difference(folder: Path, job: Run, parts: Parts, generator: Generator, *, stock: bool) -> float:
    """The largest difference of a folder's pictures from our sampler's, from the same noises."""
    teacher, labels = parts.teacher, job.evaluation_labels(range(_COMPARED))
    seed = fold_in(job.recipe.seed, "export")
    pipeline = _loaded(folder, parts, stock=stock).to(teacher.device)
    pipeline.set_progress_bar_config(disable=True)
    asked = {**request(parts.kind, teacher, labels), **settings(parts.kind, teacher, stock=stock)}
    theirs = pipeline(**asked, generator=seeded(seed), output_type="np").images
    ours = _decoded(job, generator, torch.randn(_COMPARED, *teacher.shape, generator=seeded(seed)), labels)
    return float(np.abs((ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy() - theirs).max())


def _loaded(folder: Path, parts: Parts, *, stock: bool) -> Any:
    """A folder's pipeline; its text encoder, a plain copy, stays on the disk."""
    absent = {part: None for part in PARTS} if parts.teacher.text_width else {}
    library = diffusers()
    before = library.logging.get_verbosity()
    library.logging.set_verbosity_error()  # else it warns of the code that was just written
    try:
        what = f"the exported folder {folder.name}"
        return from_pretrained(library.DiffusionPipeline, str(folder), what, trust_remote_code=not stock, **absent)
    finally:
        library.logging.set_verbosity(before)


def _decoded(job: Run, generator: Generator, noise: Tensor, labels: Tensor) -> Tensor:
    """Our sampler's images in [-1, 1]."""
    teacher = job.reader
    condition = teacher.condition(labels).to(teacher.device)
    sampler = make_sampler(generator, teacher)
    return teacher.decoded(sampler(generator.grid[0] * noise.to(teacher.device), condition))


@torch.no_grad()
def _samples(job: Run, generator: Generator) -> bytes:
    """A grid of pictures, as a PNG."""
    seed, labels = fold_in(job.recipe.seed, "export", "samples"), job.evaluation_labels(range(_PICTURES))
    noise = sample_noise(seed, range(_PICTURES), job.reader.shape)
    size = min(_PICTURES, job.recipe.evaluate.batch_size)
    parts = zip(noise.split(size), labels.split(size), strict=True)
    pictures = [to_uint8(_decoded(job, generator, part, its_labels)) for part, its_labels in parts]
    return sample_grid(np.concatenate(pictures), labels.numpy())
