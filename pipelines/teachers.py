"""Teachers: folders in diffusers' layout as velocities in this project's own time. The only importer of diffusers.

An adaptor, chosen by ``_class_name`` of the model's config.json, converts path, time and prediction; nothing outside
this file knows that they were ever different.
"""

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from math import isfinite
from pathlib import Path
from types import ModuleType
from typing import Any, Self, cast

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hd_core.guidance import guided
from hd_core.networks.dit import DiT, DiTConfig
from hd_core.types import Condition, Velocity
from pipelines.artifacts import atomic_folder
from pipelines.discrete_time import PREDICTIONS, DiscretePath, DiscreteTimeBackbone
from pipelines.model_files import NEEDED, WEIGHTS, ModelFiles, read_object
from pipelines.torchvision_ops import declare_missing_operators

EMBEDDED = Path(__file__).parent / "assets" / "teachers"
"""Teachers that come with the package, a folder each."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Which teacher, and how strongly it is guided."""

    path: str = "digits"
    """Name of an embedded teacher, or a local folder in diffusers' layout (of a pipeline, or of its model alone)."""
    guidance_scale: float = 1.0
    """Classifier-free guidance: 1 is the conditional velocity itself, more follows the condition more."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(f"a teacher needs a path: embedded ({_embedded_names()}) or a local folder; none given")
        if not (isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise ValueError(f"guidance_scale must be a number of at least 0; given {self.guidance_scale}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """A frozen velocity network and what others must know of it."""

    backbone: nn.Module
    """Frozen, in eval mode; satisfies `hd_core.types.Backbone`. Unfreeze a deepcopy of it before training that."""
    shape: tuple[int, int, int]
    """Channels, height and width of one image or latent."""
    num_classes: int
    """Classes that a condition may name; 0 for an unconditional teacher."""
    blocks: list[nn.Module]
    """Modules whose outputs are tokens (b, n, d), first to last: what `FeatureTaps` taps."""
    feature_widths: list[int]
    """Features per token of each block."""
    null_condition: Condition | None
    """One row of "no class"; None where the teacher was trained without one."""
    fingerprint: str
    """sha256 over the bytes of config and weights (and of the scheduler's config, where that decides the path)."""

    def velocity(self, scale: float = 1.0) -> Velocity:
        """The velocity guided at ``scale``; ValueError where that needs a null condition and there is none."""
        return guided(cast(Velocity, self.backbone), self.null_condition, scale)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.backbone.parameters()).device

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, in place."""
        self.backbone.to(device)
        return self


def load_teacher(config: TeacherConfig) -> Teacher:
    """Load an embedded teacher or a local folder. ValueError says in a line or two what is wrong with it."""
    source = ModelFiles.of(_teacher_folder(config.path))
    if source.class_name not in _ADAPTORS:
        raise ValueError(
            f"{source.folder / 'config.json'} names the class {source.class_name}, for which there is no adaptor; "
            f"there is one for {', '.join(_ADAPTORS)}"
        )
    teacher = _ADAPTORS[source.class_name](source)
    teacher.backbone.requires_grad_(False).eval()
    return teacher


def save_native(folder: Path, model: DiT, *, readme: str = "") -> None:
    """Write a native DiT in diffusers' layout, atomically; ``readme`` becomes README.md.

    ValueError where ``folder`` exists already and is not empty.
    """
    config = {"_class_name": "DiT", **asdict(model.config)}
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with atomic_folder(folder) as made:
        _write_json(made / "model_index.json", _MODEL_INDEX)
        _write_json(made / "transformer" / "config.json", config)
        _write_json(made / "scheduler" / "scheduler_config.json", _FLOW_SCHEDULER)
        save_file(state, made / "transformer" / WEIGHTS, metadata={"format": "pt"})
        if readme:
            (made / "README.md").write_text(readme, encoding="utf-8")


_MODEL_INDEX = {
    "_class_name": "DiffusionPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "transformer": ["hd_core.networks.dit", "DiT"],
}
_FLOW_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _embedded_names() -> str:
    return ", ".join(embedded()) or "none is installed"


def embedded() -> list[str]:
    """Names of the teachers that come with the package."""
    entries = EMBEDDED.iterdir() if EMBEDDED.is_dir() else []
    return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _teacher_folder(path: str) -> Path:
    """An embedded name comes first: a folder of the same name is reached as ./NAME."""
    if path in embedded():
        return EMBEDDED / path
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    nearest = difflib.get_close_matches(path, embedded(), n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise ValueError(
        f"no teacher {path!r}: neither embedded ({_embedded_names()}) nor a local folder{hint}\n"
        f"A folder must hold {NEEDED}; hub names are not supported: download, then give the folder"
    )


def _native(source: ModelFiles) -> Teacher:
    """`hd_core.networks.dit.DiT`: a velocity in our own time, so nothing is converted."""
    config = _dit_config(source)
    model = DiT(config)
    _load_strictly(model, source)
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


def _dit_config(source: ModelFiles) -> DiTConfig:
    given = {key: value for key, value in source.config.items() if not key.startswith("_")}
    known = {field.name for field in fields(DiTConfig)}
    wrong = sorted(given.keys() ^ known) or sorted(key for key in given if type(given[key]) is not int)
    if wrong:
        path, allowed = source.folder / "config.json", ", ".join(sorted(known))
        raise ValueError(f"{path} is no DiT config at {', '.join(wrong)}: it must give whole numbers for {allowed}")
    return DiTConfig(**given)


def _load_strictly(model: nn.Module, source: ModelFiles) -> None:
    """Load weights whose names and shapes must be exactly the model's."""
    try:
        state = {
            key: value for file in source.weights if file.suffix != ".json" for key, value in load_file(file).items()
        }
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the weights of {source.name} cannot be read: {error}") from error
    own = model.state_dict()
    shapes = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    _refuse_misfit(source, missing=own.keys() - state.keys(), unknown=state.keys() - own.keys(), misshapen=shapes)
    model.load_state_dict(state)


def _refuse_misfit(source: ModelFiles, **keys: Any) -> None:
    found = [f"{len(names)} {kind} ({', '.join(sorted(names)[:3])})" for kind, names in keys.items() if names]
    if found:
        raise ValueError(f"the weights of {source.name} do not fit its config.json: {'; '.join(found)}")


def _diffusers() -> ModuleType:
    declare_missing_operators()
    import diffusers

    return diffusers


def _dit_transformer(source: ModelFiles) -> Teacher:
    """Class-conditional DiT over discrete timesteps; each block embeds the time for itself."""
    model, config = _load_diffusers(source, "DiTTransformer2DModel")
    path, scheduler = _discrete_path(source)
    backbone = DiscreteTimeBackbone(model, path, embedding_width=model.inner_dim, has_classes=True)
    for block in model.transformer_blocks:
        backbone.add_extra_to(block.norm1.emb.timestep_embedder)
        block.norm1.emb.class_embedder.dropout_prob = 0.0  # in training it would draw from the global generator
    return Teacher(
        backbone=backbone,
        shape=_shape(source, config),
        num_classes=config.num_embeds_ada_norm,
        blocks=list(model.transformer_blocks),
        feature_widths=[model.inner_dim] * config.num_layers,
        null_condition=Condition(labels=torch.tensor([config.num_embeds_ada_norm])),
        fingerprint=source.fingerprint(scheduler),
    )


def _unet(source: ModelFiles) -> Teacher:
    """U-Net over discrete timesteps, with or without classes; it has no "no class", so no guidance."""
    model, config = _load_diffusers(source, "UNet2DModel")
    if config.time_embedding_type != "positional" or config.class_embed_type is not None:
        kinds = f"time_embedding_type {config.time_embedding_type}, class_embed_type {config.class_embed_type}"
        raise ValueError(f"{source.name} has {kinds}; only positional and null are supported")
    path, scheduler = _discrete_path(source)
    width, classes = model.time_embedding.linear_2.out_features, config.num_class_embeds or 0
    backbone = DiscreteTimeBackbone(model, path, embedding_width=width, has_classes=classes > 0)
    backbone.add_extra_to(model.time_embedding)
    middle, widths = ([] if model.mid_block is None else [model.mid_block]), list(config.block_out_channels)
    return Teacher(
        backbone=backbone,
        shape=_shape(source, config),
        num_classes=classes,
        blocks=[backbone.show_tokens_of(block) for block in [*model.down_blocks, *middle, *model.up_blocks]],
        feature_widths=widths + widths[-1:] * len(middle) + widths[::-1],
        null_condition=None,
        fingerprint=source.fingerprint(scheduler),
    )


def _load_diffusers(source: ModelFiles, name: str) -> tuple[Any, Any]:
    """The model in float32 and its config; every weight must have found its place."""
    kind = getattr(_diffusers(), name)
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    try:
        model, report = kind.from_pretrained(str(source.folder), torch_dtype=torch.float32, **options)
    except (OSError, ValueError, TypeError, RuntimeError, NotImplementedError, SafetensorError) as error:
        raise ValueError(f"{source.name} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    _refuse_misfit(
        source, missing=report["missing_keys"], unknown=report["unexpected_keys"], misshapen=report["mismatched_keys"]
    )
    return model, model.config


def _shape(source: ModelFiles, config: Any) -> tuple[int, int, int]:
    """Channels, height and width; the output may hold a learned variance in a second half of its channels."""
    size, channels, outputs = config.sample_size, config.in_channels, config.out_channels or config.in_channels
    if not size or outputs not in (channels, 2 * channels):
        given = f"sample_size {size}, in_channels {channels}, out_channels {outputs}"
        raise ValueError(f"{source.name} has {given}; it must have a size, and out_channels once or twice in_channels")
    height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width


def _discrete_path(source: ModelFiles) -> tuple[DiscretePath, Path]:
    """The DDPM schedule that lies beside a model, and its file."""
    folders = [source.folder, source.folder / "scheduler", source.folder.parent / "scheduler"]
    files = [folder / "scheduler_config.json" for folder in folders]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ValueError(f"{source.name} has no schedule: {files[0].name} is missing beside it and from {folders[1]}")
    config = read_object(file)
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(f"{file} has prediction_type {prediction}; there is {' and '.join(PREDICTIONS)}")
    return DiscretePath(_alphas_cumprod(config, file), prediction), file


def _alphas_cumprod(config: dict[str, Any], file: Path) -> Float[Tensor, " steps"]:
    if not {"beta_schedule", "trained_betas"} & config.keys() or config.get("rescale_betas_zero_snr"):
        raise ValueError(f"{file} must be a DDPM schedule (beta_schedule) without rescale_betas_zero_snr")
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    try:
        return _diffusers().DDPMScheduler(**{name: config[name] for name in names if name in config}).alphas_cumprod
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{file} is no DDPM schedule: {error}") from error


_ADAPTORS: dict[str, Callable[[ModelFiles], Teacher]] = {
    "DiT": _native,
    "DiTTransformer2DModel": _dit_transformer,
    "Transformer2DModel": _dit_transformer,  # what the first published DiT folders call it
    "UNet2DModel": _unet,
}
