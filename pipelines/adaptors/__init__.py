"""Teachers by the class that their config.json names: one short file for each, which converts path, time and inputs."""

from collections.abc import Callable

from pipelines.adaptors.dit import dit_transformer
from pipelines.adaptors.native import native
from pipelines.adaptors.sana import sana_transformer
from pipelines.adaptors.teacher import Teacher
from pipelines.adaptors.unet import unet
from pipelines.adaptors.unet_condition import unet_condition
from pipelines.model_files import ModelFiles

ADAPTORS: dict[str, Callable[[ModelFiles], Teacher]] = {
    "DiT": native,
    "DiTTransformer2DModel": dit_transformer,
    "Transformer2DModel": dit_transformer,  # what the first published DiT folders call it
    "UNet2DModel": unet,
    "UNet2DConditionModel": unet_condition,
    "SanaTransformer2DModel": sana_transformer,
}
"""How a folder of each class becomes a teacher."""
