"""SANA (Xie et al. 2024): a linear-attention flow transformer of deeply compressed latents, conditioned by text."""

from typing import Any

from hd_core.types import Condition
from pipelines.adaptors.loading import flow_timesteps, image_shape, load_diffusers, refuse_settings
from pipelines.adaptors.teacher import Teacher
from pipelines.backbones import FlowTimeBackbone
from pipelines.model_files import ModelFiles


def sana_transformer(source: ModelFiles) -> Teacher:
    """A folder of ``SanaTransformer2DModel`` without an embedding of guidance (Sana-Sprint, a student, has one)."""
    model, config = load_diffusers(source, "SanaTransformer2DModel")
    refuse_settings(source, config, guidance_embeds=False)
    timesteps, scheduler = flow_timesteps(source)
    width = config.num_attention_heads * config.attention_head_dim
    backbone = FlowTimeBackbone(model, timesteps=timesteps * config.timestep_scale, embedding_width=width, inputs=_text)
    backbone.add_extra_to(model.time_embed.emb.timestep_embedder)
    return Teacher(
        backbone=backbone,
        shape=image_shape(source, config),
        num_classes=0,
        blocks=list(model.transformer_blocks),
        feature_widths=[width] * config.num_layers,
        null_condition=None,
        text_width=config.caption_channels,
        fingerprint=source.fingerprint(scheduler),
    )


def _text(condition: Condition) -> dict[str, Any]:
    return {"encoder_hidden_states": condition.embeddings, "encoder_attention_mask": condition.mask}
