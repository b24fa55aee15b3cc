"""The U-Net of DDPM (Ho et al. 2020) and its like, with or without classes."""

from typing import Any

from torch import nn

from hd_core.types import Condition
from pipelines.adaptors.loading import discrete_path, image_shape, load_diffusers, refuse_settings
from pipelines.adaptors.teacher import Teacher
from pipelines.backbones import DiffusersBackbone, DiscreteTimeBackbone
from pipelines.model_files import ModelFiles


def unet(source: ModelFiles) -> Teacher:
    """A folder of ``UNet2DModel``; it has no "no class", so no guidance."""
    model, config = load_diffusers(source, "UNet2DModel")
    refuse_settings(source, config, time_embedding_type="positional", class_embed_type=None)
    path, scheduler = discrete_path(source)
    classes = config.num_class_embeds or 0

    def inputs(condition: Condition) -> dict[str, Any]:
        return {"class_labels": condition.labels if classes else None}

    width = model.time_embedding.linear_2.out_features
    backbone = DiscreteTimeBackbone(model, path, embedding_width=width, inputs=inputs)
    backbone.add_extra_to(model.time_embedding)
    return Teacher(
        backbone=backbone,
        shape=image_shape(source, config),
        num_classes=classes,
        blocks=stages(backbone, model),
        feature_widths=widths(model, config),
        null_condition=None,
        fingerprint=source.fingerprint(scheduler),
    )


def stages(backbone: DiffusersBackbone, model: Any) -> list[nn.Module]:
    """The outputs of a U-Net's resolutions as tokens: down, middle, up."""
    return [backbone.show_tokens_of(block) for block in [*model.down_blocks, *_middle(model), *model.up_blocks]]


def widths(model: Any, config: Any) -> list[int]:
    """Features per token of `stages`."""
    channels = list(config.block_out_channels)
    return channels + channels[-1:] * len(_middle(model)) + channels[::-1]


def _middle(model: Any) -> list[nn.Module]:
    return [] if model.mid_block is None else [model.mid_block]
