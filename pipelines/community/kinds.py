"""What each class of network becomes when it is exported: folder, pipelines, and how they are asked for pictures."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines.generators import texts_of
from pipelines.teachers import Teacher


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Where a network stands in a pipeline's folder, and which pipelines can sample it."""

    name: str
    """Name of the template of its own few-step pipeline."""
    pipeline: str
    """Class of that pipeline."""
    part: str
    """Folder of the network."""
    stock: str = ""
    """The pipeline of diffusers that may do for one step; empty: there is none."""
    codec: str = ""
    """The autoencoder that the stock pipeline decodes with; empty: none."""
    scheduler: str = ""
    """The scheduler of the stock pipeline."""
    ends: tuple[str, str] = ("", "")
    """First and last layer of a network whose stock pipeline begins at the noise itself (`stock.absorb_start`)."""


_DIT = Kind(
    name="dit",
    pipeline="FewStepDiTPipeline",
    part="transformer",
    stock="DiTPipeline",
    codec="AutoencoderKL",
    scheduler="DDIMScheduler",
    ends=("pos_embed.proj", "proj_out_2"),
)
KINDS = {
    "DiT": Kind(name="native", pipeline="FewStepNativePipeline", part="transformer"),
    "DiTTransformer2DModel": _DIT,
    "Transformer2DModel": _DIT,
    "UNet2DModel": Kind(
        name="unet",
        pipeline="FewStepUNetPipeline",
        part="unet",
        stock="DDIMPipeline",
        scheduler="DDIMScheduler",
        ends=("conv_in", "conv_out"),
    ),
    "UNet2DConditionModel": Kind(
        name="stable_diffusion",
        pipeline="FewStepStableDiffusionPipeline",
        part="unet",
        stock="StableDiffusionPipeline",
        codec="AutoencoderKL",
        scheduler="EulerDiscreteScheduler",
    ),
    "SanaTransformer2DModel": Kind(
        name="sana",
        pipeline="FewStepSanaPipeline",
        part="transformer",
        stock="SanaPipeline",
        codec="AutoencoderDC",
        scheduler="FlowMatchEulerDiscreteScheduler",
    ),
}
"""By the class that a teacher's config.json names."""


def settings(kind: Kind, teacher: Teacher, *, stock: bool) -> dict[str, Any]:
    """Arguments that every call of a pipeline takes, whatever the picture."""
    if not stock:
        return {} if kind.name == "unet" else {"guidance_scale": 1.0}
    given: dict[str, Any] = {"num_inference_steps": 1}
    if kind.name != "unet":
        given["guidance_scale"] = 1.0
    if kind.name == "sana":
        given |= {"height": teacher.image_shape[1], "width": teacher.image_shape[2], "use_resolution_binning": False}
    return given


def request(kind: Kind, teacher: Teacher, labels: Tensor) -> dict[str, Any]:
    """Arguments that ask for pictures of labels; prompts as their embeddings."""
    if teacher.text_width:
        condition = teacher.condition(labels)
        masked = {"prompt_attention_mask": condition.mask} if kind.name == "sana" else {}
        return {"prompt_embeds": condition.embeddings, **masked}
    return readable_request(kind, teacher, labels)


def readable_request(kind: Kind, teacher: Teacher, labels: Tensor) -> dict[str, Any]:
    """The same as a person writes it."""
    if (texts := texts_of(teacher, labels.tolist())) is not None:
        return {"prompt": texts}
    if kind.name == "unet" and not teacher.num_classes:
        return {"batch_size": len(labels)}
    return {"class_labels": labels.tolist()}


def seeded(seed: int) -> torch.Generator:
    """A generator on the CPU, whose numbers are the same on every machine."""
    return torch.Generator().manual_seed(seed)
