"""This project's own DiT: a velocity in our own time, so nothing is converted."""

from dataclasses import fields

import torch

from hd_core.networks.dit import DiT, DiTConfig
from hd_core.types import Condition
from pipelines.adaptors.loading import load_strictly
from pipelines.adaptors.teacher import Teacher
from pipelines.model_files import ModelFiles


def native(source: ModelFiles) -> Teacher:
    """A folder of `hd_core.networks.dit.DiT`."""
    config = _config(source)
    model = DiT(config)
    load_strictly(model, source)
    null = Condition(labels=torch.tensor([config.num_classes])) if config.num_classes else None
    return Teacher(
        backbone=model,
        shape=(config.channels, config.image_size, config.image_size),
        num_classes=config.num_classes,
        blocks=list(model.blocks),
        feature_widths=[config.width] * config.depth,
        null_condition=null,
        fingerprint=source.fingerprint(),
    )


def _config(source: ModelFiles) -> DiTConfig:
    given = {key: value for key, value in source.config.items() if not key.startswith("_")}
    known = {field.name for field in fields(DiTConfig)}
    wrong = sorted(given.keys() ^ known) or sorted(key for key in given if type(given[key]) is not int)
    if wrong:
        path, allowed = source.folder / "config.json", ", ".join(sorted(known))
        raise ValueError(f"{path} is no DiT config at {', '.join(wrong)}: it must give whole numbers for {allowed}")
    return DiTConfig(**given)
