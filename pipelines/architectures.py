"""Architectures without weights: networks and decoders built from a config.json on torch's meta device.

A tensor there has a shape and no numbers, so what a network costs can be counted before anything is downloaded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hd_core.networks.dit import DiT, DiTConfig
from hd_core.types import Condition, Images
from pipelines.diffusers_library import diffusers
from pipelines.model_files import read_object
from pipelines.teachers import EMBEDDED, embedded

ARCHITECTURES = Path(__file__).parent / "assets" / "architectures"
"""Configs of published teachers, in folders ``OWNER--NAME`` of diffusers' layout; no weights."""

CLIP_TOKENS = 77
"""Tokens to which Stable Diffusion's prompts are padded."""
SANA_TOKENS = 300
"""Tokens to which SANA's prompts are padded."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Architecture:
    """A teacher on the meta device."""

    network: nn.Module
    """The network that is called at every step."""
    call: Callable[[Images], Tensor]
    """What the network puts out for rows of noised images, all at one time and with conditions made up for them."""
    shape: tuple[int, int, int]
    """Channels, height and width of one image or latent."""
    embedding_width: int
    """Width of the time embedding, to which a student adds its own."""
    autoencoder: nn.Module | None
    """Its autoencoder; None where it works on pixels, or where none lies beside it."""

    @property
    def can_checkpoint(self) -> bool:
        """Whether activations can be recomputed in the backward pass instead of being kept."""
        return bool(getattr(self.network, "_supports_gradient_checkpointing", False))

    def decode(self, latents: Images) -> Tensor:
        """Images of latents."""
        autoencoder: Any = self.autoencoder
        return autoencoder.decode(latents, return_dict=False)[0]


def shipped() -> list[str]:
    """Hub names of the architectures that come with the package."""
    return sorted(folder.name.replace("--", "/", 1) for folder in ARCHITECTURES.iterdir() if folder.is_dir())


def architecture_folder(path: str) -> Path:
    """The folder of a teacher's configs: an embedded teacher, a local folder, or what ships for a hub name.

    Raises:
        ValueError: it is none of these.
    """
    if path in embedded():
        return EMBEDDED / path
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path in shipped():
        return ARCHITECTURES / path.replace("/", "--", 1)
    raise ValueError(
        f"no architecture {path!r}: neither an embedded teacher ({', '.join(embedded())}) nor a local folder with"
        f" config.json, nor one of those that come with the package:\n{', '.join(shipped())}"
    )


def architecture(path: str, device: str = "meta") -> Architecture:
    """Build a teacher; see `architecture_folder` for what a path may be.

    On another device than the meta device its weights are random: only the costs can be looked at.

    Raises:
        ValueError: there is no such teacher, or its config.json cannot be built.
    """
    folder = _model_folder(architecture_folder(path))
    config = read_object(folder / "config.json")
    name = str(config.get("_class_name"))
    if name not in _BUILDERS:
        raise ValueError(f"{folder / 'config.json'} names the class {name}; there is {', '.join(_BUILDERS)}")
    autoencoder = folder.parent / "vae" / "config.json"
    decoder = _built(autoencoder, device, _diffusers_model) if autoencoder.is_file() else None
    return _built(folder / "config.json", device, lambda given: _BUILDERS[name](given, decoder))


def _model_folder(folder: Path) -> Path:
    """The denoising model's own folder, inside a pipeline's folder or the same."""
    parts = [folder / "transformer", folder / "unet", folder]
    found = next((part for part in parts if (part / "config.json").is_file()), None)
    if found is None:
        raise ValueError(f"{folder} holds no architecture: it must have a config.json, or one in transformer or unet")
    return found


def _built(file: Path, device: str, build: Callable[[dict[str, Any]], Any]) -> Any:
    config = read_object(file)
    try:
        with torch.device(device):
            return build(config)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be built: {' '.join(str(error).split())[:300]}") from error


def _diffusers_model(config: dict[str, Any], name: str = "") -> Any:
    return getattr(diffusers(), name or config["_class_name"]).from_config(config).eval()


def _native(config: dict[str, Any], autoencoder: nn.Module | None) -> Architecture:
    model = DiT(DiTConfig(**{key: value for key, value in config.items() if not key.startswith("_")}))

    def call(x: Images) -> Tensor:
        return model(x, _times(x), Condition(labels=_labels(x)))

    size = model.config.image_size
    return Architecture(
        network=model,
        call=call,
        shape=(model.config.channels, size, size),
        embedding_width=model.config.width,
        autoencoder=autoencoder,
    )


def _dit_transformer(config: dict[str, Any], autoencoder: nn.Module | None) -> Architecture:
    model = _diffusers_model(config, "DiTTransformer2DModel")

    def call(x: Images) -> Tensor:
        return model(x, _times(x), class_labels=_labels(x), return_dict=False)[0]

    return _of_diffusers(model, call, model.inner_dim, autoencoder)


def _unet(config: dict[str, Any], autoencoder: nn.Module | None) -> Architecture:
    model = _diffusers_model(config)
    has_classes = bool(model.config.num_class_embeds)

    def call(x: Images) -> Tensor:
        return model(x, _times(x), class_labels=_labels(x) if has_classes else None, return_dict=False)[0]

    return _of_diffusers(model, call, model.time_embedding.linear_2.out_features, autoencoder)


def _unet_condition(config: dict[str, Any], autoencoder: nn.Module | None) -> Architecture:
    model = _diffusers_model(config)

    def call(x: Images) -> Tensor:
        text = _text(x, CLIP_TOKENS, model.config.cross_attention_dim)
        return model(x, _times(x), encoder_hidden_states=text, return_dict=False)[0]

    return _of_diffusers(model, call, model.time_embedding.linear_2.out_features, autoencoder)


def _sana_transformer(config: dict[str, Any], autoencoder: nn.Module | None) -> Architecture:
    model = _diffusers_model(config)

    def call(x: Images) -> Tensor:
        text = _text(x, SANA_TOKENS, model.config.caption_channels)
        return model(x, encoder_hidden_states=text, timestep=_times(x), return_dict=False)[0]

    width = model.config.num_attention_heads * model.config.attention_head_dim
    return _of_diffusers(model, call, width, autoencoder)


def _of_diffusers(
    model: Any, call: Callable[[Images], Tensor], width: int, autoencoder: nn.Module | None
) -> Architecture:
    size = model.config.sample_size
    height, breadth = (size, size) if isinstance(size, int) else size
    return Architecture(
        network=model,
        call=call,
        shape=(model.config.in_channels, height, breadth),
        embedding_width=width,
        autoencoder=autoencoder,
    )


def _times(x: Images) -> Tensor:
    return torch.zeros(len(x), device=x.device)


def _labels(x: Images) -> Tensor:
    return torch.zeros(len(x), dtype=torch.long, device=x.device)


def _text(x: Images, tokens: int, width: int) -> Tensor:
    return torch.zeros(len(x), tokens, width, device=x.device)


_BUILDERS: dict[str, Callable[[dict[str, Any], nn.Module | None], Architecture]] = {
    "DiT": _native,
    "DiTTransformer2DModel": _dit_transformer,
    "Transformer2DModel": _dit_transformer,
    "UNet2DModel": _unet,
    "UNet2DConditionModel": _unet_condition,
    "SanaTransformer2DModel": _sana_transformer,
}
