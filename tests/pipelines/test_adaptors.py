"""Whole pipelines of diffusers against ours: the same noise and the same request give the same pictures."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hd_core.solvers import euler, last
from pipelines.encoding import PromptMaker, prompt_spec
from pipelines.precompute import PrecomputeConfig
from pipelines.production import produce
from pipelines.prompts_table import PromptTable, Vocabulary
from pipelines.shards import ShardSet
from pipelines.teachers import Teacher, TeacherConfig, load_teacher, text_files
from tests.pipelines import diffusers_folders as folders

STEPS = 4
PROMPTS = ("a cat", "two dogs", "a cat")
CONFIG = PrecomputeConfig(num_actors=0, dtype="float32", shard_rows=2, batch_size=2)


def noise(shape: tuple[int, ...], rows: int = len(PROMPTS)) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(3))


def as_unit(images: Tensor) -> np.ndarray:
    """What a pipeline's output_type="np" gives: channels last, in [0, 1]."""
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def prompts_of(folder: Path, out: Path, vocabulary: Vocabulary) -> ShardSet:
    config = TeacherConfig(path=str(folder))
    teacher, files = load_teacher(config), text_files(config)
    shards = ShardSet.open(out, prompt_spec(CONFIG, teacher, files, vocabulary))
    maker = partial(PromptMaker, shards=shards, config=CONFIG, teacher=config, vocabulary=vocabulary)
    produce(shards, maker, CONFIG.actors, lambda _: None)
    return shards


def reader(folder: Path, out: Path) -> tuple[Teacher, Tensor]:
    """The teacher with its prompts, and the labels of `PROMPTS`."""
    vocabulary = Vocabulary.of(PROMPTS, ("a bird",))
    assert vocabulary.texts == ("a cat", "two dogs", "", "a bird") and vocabulary.evaluation == (3,)
    teacher = load_teacher(TeacherConfig(path=str(folder)), prompts_of(folder, out, vocabulary))
    return teacher, torch.from_numpy(vocabulary.labels_of(PROMPTS))


@torch.no_grad()
def drawn(teacher: Teacher, labels: Tensor, start: Tensor, grid: Tensor, scale: float) -> Tensor:
    return last(euler(teacher.velocity(scale), start, grid, teacher.condition(labels)))


def ddim_grid(scheduler: Any) -> tuple[Tensor, Tensor]:
    """Times of DDIM's timesteps, and what brings its states to ours."""
    scheduler.set_timesteps(STEPS)
    alphas = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod[None]]).double()
    scales = alphas.sqrt() + (1 - alphas).sqrt()
    return (1 - alphas).sqrt() / scales, scales


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_stable_diffusion(prediction: str, scale: float, tmp_path: Path) -> None:
    pipeline: Any = folders.stable_diffusion(tmp_path / "teacher", prediction)
    teacher, labels = reader(tmp_path / "teacher", tmp_path / "prompts")
    start = noise(teacher.shape)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(list(PROMPTS), num_inference_steps=STEPS, guidance_scale=scale, latents=start, output_type="np")
    grid, scales = ddim_grid(pipeline.scheduler)
    ours = drawn(teacher, labels, start / scales[0].float(), grid, scale) * scales[-1].float()
    assert np.abs(as_unit(teacher.decoded(ours)) - theirs.images).max() < 1e-4
    assert theirs.images.std() > 0.01


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_sana(scale: float, tmp_path: Path) -> None:
    pipeline: Any = folders.sana(tmp_path / "teacher")
    teacher, labels = reader(tmp_path / "teacher", tmp_path / "prompts")
    start = noise(teacher.shape)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        list(PROMPTS),
        height=32,  # not looked at where latents are given, but it must divide by 32
        width=32,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        latents=start,
        use_resolution_binning=False,
        output_type="np",
    )
    grid = pipeline.scheduler.sigmas.double()
    pictures = teacher.decoded(drawn(teacher, labels, start, grid, scale))
    assert np.abs(as_unit(pictures) - theirs.images).max() < 1e-4
    assert theirs.images.std() > 0.01


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_dit(scale: float, tmp_path: Path) -> None:
    pipeline: Any = folders.dit(tmp_path / "teacher")
    teacher = load_teacher(TeacherConfig(path=str(tmp_path / "teacher")))
    labels, seed = torch.tensor([1, 3, 4]), 5
    start = torch.randn(3, *teacher.shape, generator=torch.Generator().manual_seed(seed))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        labels.tolist(),
        num_inference_steps=STEPS,
        guidance_scale=scale,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    )
    grid, scales = ddim_grid(pipeline.scheduler)
    ours = drawn(teacher, labels, start / scales[0].float(), grid, scale) * scales[-1].float()
    assert np.abs(as_unit(teacher.decoded(ours)) - theirs.images).max() < 1e-4
    assert theirs.images.std() > 0.01


def test_prompts_are_stored_without_padding_and_come_back_padded(tmp_path: Path) -> None:
    folders.sana(tmp_path / "teacher")
    vocabulary = Vocabulary.of(PROMPTS, ("a bird",))
    table = PromptTable.read(prompts_of(tmp_path / "teacher", tmp_path / "prompts", vocabulary))
    assert table.texts == ["a cat", "two dogs", "", "a bird"] and len(table) == 2 and table.length == 300
    sizes = [len(embedding) for embedding in table.embeddings]
    assert sizes[0] < sizes[1] < 300 and sizes[2] < sizes[0]
    condition = table.condition(torch.tensor([1, 2]))
    assert condition.embeddings is not None and condition.mask is not None
    assert condition.embeddings.shape == (2, 300, 8) and condition.mask.sum(1).tolist() == [sizes[1], sizes[2]]
    assert torch.equal(condition.embeddings[0, : sizes[1]], torch.from_numpy(table.embeddings[1].copy()))
    assert not condition.embeddings[0, sizes[1] :].any()
