"""DiT over discrete timesteps (Peebles & Xie 2023): classes, a DDPM schedule, and often a learned variance."""

import torch

from hd_core.types import Condition
from pipelines.adaptors.loading import discrete_path, image_shape, load_diffusers
from pipelines.adaptors.teacher import Teacher
from pipelines.backbones import DiscreteTimeBackbone
from pipelines.model_files import ModelFiles


def dit_transformer(source: ModelFiles) -> Teacher:
    """A folder of ``DiTTransformer2DModel``; each of its blocks embeds the time for itself."""
    model, config = load_diffusers(source, "DiTTransformer2DModel")
    path, scheduler = discrete_path(source)
    backbone = DiscreteTimeBackbone(
        model,
        path,
        embedding_width=model.inner_dim,
        inputs=lambda condition: {"class_labels": condition.labels},
    )
    for block in model.transformer_blocks:
        backbone.add_extra_to(block.norm1.emb.timestep_embedder)
        block.norm1.emb.class_embedder.dropout_prob = 0.0  # in training it would draw from the global generator
    return Teacher(
        backbone=backbone,
        shape=image_shape(source, config),
        num_classes=config.num_embeds_ada_norm,
        blocks=list(model.transformer_blocks),
        feature_widths=[model.inner_dim] * config.num_layers,
        null_condition=Condition(labels=torch.tensor([config.num_embeds_ada_norm])),
        fingerprint=source.fingerprint(scheduler),
    )
