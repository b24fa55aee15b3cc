"""The text-conditional U-Net of Stable Diffusion 1.x and 2.x (Rombach et al. 2022), of latents."""

from typing import Any

from hd_core.types import Condition
from pipelines.adaptors.loading import discrete_path, image_shape, load_diffusers, refuse_settings
from pipelines.adaptors.teacher import Teacher
from pipelines.adaptors.unet import stages, widths
from pipelines.backbones import DiscreteTimeBackbone
from pipelines.model_files import ModelFiles


def unet_condition(source: ModelFiles) -> Teacher:
    """A folder of ``UNet2DConditionModel`` that reads nothing but text."""
    model, config = load_diffusers(source, "UNet2DConditionModel")
    refuse_settings(
        source,
        config,
        time_embedding_type="positional",
        class_embed_type=None,
        num_class_embeds=None,
        addition_embed_type=None,
        encoder_hid_dim_type=None,
    )
    path, scheduler = discrete_path(source)
    width = model.time_embedding.linear_2.out_features
    backbone = DiscreteTimeBackbone(model, path, embedding_width=width, inputs=_text)
    backbone.add_extra_to(model.time_embedding)
    return Teacher(
        backbone=backbone,
        shape=image_shape(source, config),
        num_classes=0,
        blocks=stages(backbone, model),
        feature_widths=widths(model, config),
        null_condition=None,
        text_width=config.cross_attention_dim,
        fingerprint=source.fingerprint(scheduler),
    )


def _text(condition: Condition) -> dict[str, Any]:
    return {"encoder_hidden_states": condition.embeddings, "encoder_attention_mask": condition.mask}
