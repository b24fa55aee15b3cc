"""Teachers: folders in diffusers' layout as velocities in this project's own time. The only importer of diffusers.

An adaptor, chosen by ``_class_name`` of the model's config.json, converts path, time and prediction; nothing outside
this file knows that they were ever different.
"""

import contextlib
import difflib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
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
from hd_core.paths import expand, log_snr_half, to_gaussian, velocity_from_eps, velocity_from_v_prediction
from hd_core.types import Condition, Images, Times, Velocity
from pipelines.artifacts import file_hash
from pipelines.torchvision_ops import declare_missing_operators

EMBEDDED = Path(__file__).parent / "assets" / "teachers"
"""Teachers that come with the package, a folder each."""

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
_NEEDED = f"model_index.json, or the model's own config.json and {_WEIGHTS}"


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


@dataclass(frozen=True, kw_only=True)
class _Source:
    """The files of one model."""

    folder: Path
    """Where config.json and the weights are."""
    config: dict[str, Any]
    """Fields of config.json."""
    weights: list[Path]
    """Safetensors files, with the index first where there are several."""

    @property
    def class_name(self) -> str:
        return str(self.config.get("_class_name"))

    @property
    def name(self) -> str:
        """What error messages call the model."""
        return f"{self.class_name} of {self.folder}"


def load_teacher(config: TeacherConfig) -> Teacher:
    """Load an embedded teacher or a local folder. ValueError says in a line or two what is wrong with it."""
    source = _source(_model_folder(_teacher_folder(config.path)))
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
    with _new_folder(folder) as made:
        _write_json(made / "model_index.json", _MODEL_INDEX)
        _write_json(made / "transformer" / "config.json", config)
        _write_json(made / "scheduler" / "scheduler_config.json", _FLOW_SCHEDULER)
        save_file(state, made / "transformer" / _WEIGHTS, metadata={"format": "pt"})
        if readme:
            (made / "README.md").write_text(readme, encoding="utf-8")


_MODEL_INDEX = {
    "_class_name": "DiffusionPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "transformer": ["hd_core.networks.dit", "DiT"],
}
_FLOW_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary sibling that becomes ``folder`` when the block ends well, and vanishes when it does not."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; it is not overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        made.chmod(0o755)
        yield made
        for path in [*made.rglob("*"), made]:
            _sync(path)
        made.replace(folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _embedded_names() -> str:
    return ", ".join(_embedded()) or "none is installed"


def _embedded() -> list[str]:
    entries = EMBEDDED.iterdir() if EMBEDDED.is_dir() else []
    return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _teacher_folder(path: str) -> Path:
    """An embedded name comes first: a folder of the same name is reached as ./NAME."""
    if path in _embedded():
        return EMBEDDED / path
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    nearest = difflib.get_close_matches(path, _embedded(), n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise ValueError(
        f"no teacher {path!r}: neither embedded ({_embedded_names()}) nor a local folder{hint}\n"
        f"A folder must hold {_NEEDED}; hub names are not supported: download, then give the folder"
    )


def _model_folder(folder: Path) -> Path:
    """The folder of the denoising model itself, inside a pipeline's folder or the same."""
    if (folder / "model_index.json").is_file():
        index = _read_json(folder / "model_index.json")
        parts = [folder / name for name in ("transformer", "unet") if name in index]
        folder = next((part for part in parts if (part / "config.json").is_file()), folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no teacher: it must hold {_NEEDED}")
    return folder


def _source(folder: Path) -> _Source:
    return _Source(folder=folder, config=_read_json(folder / "config.json"), weights=_weights(folder))


def _weights(folder: Path) -> list[Path]:
    """The safetensors files; a pickle is never opened, since loading one can run any code."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    index = folder / f"{_WEIGHTS}.index.json"
    if index.is_file():
        shards = [folder / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise ValueError(f"{index} lists {', '.join(missing[:3])}, missing from the folder")
        return [index, *shards]
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise ValueError(
            f"{folder} has only {', '.join(pickles)}: pickled weights are never loaded, since they can run any code\n"
            f"Convert them with diffusers' save_pretrained, which writes {_WEIGHTS}"
        )
    raise ValueError(f"{folder} has no weights: {_WEIGHTS} is missing")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object; it holds {type(value).__name__}")
    return value


def _fingerprint(*files: Path) -> str:
    """One sha256 over the names and contents of files."""
    lines = [f"{file.name} {file_hash(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _native(source: _Source) -> Teacher:
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
        fingerprint=_fingerprint(source.folder / "config.json", *source.weights),
    )


def _dit_config(source: _Source) -> DiTConfig:
    given = {key: value for key, value in source.config.items() if not key.startswith("_")}
    known = {field.name for field in fields(DiTConfig)}
    wrong = sorted(given.keys() ^ known) or sorted(key for key in given if type(given[key]) is not int)
    if wrong:
        path, allowed = source.folder / "config.json", ", ".join(sorted(known))
        raise ValueError(f"{path} is no DiT config at {', '.join(wrong)}: it must give whole numbers for {allowed}")
    return DiTConfig(**given)


def _load_strictly(model: nn.Module, source: _Source) -> None:
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


def _refuse_misfit(source: _Source, **keys: Any) -> None:
    found = [f"{len(names)} {kind} ({', '.join(sorted(names)[:3])})" for kind, names in keys.items() if names]
    if found:
        raise ValueError(f"the weights of {source.name} do not fit its config.json: {'; '.join(found)}")


class DiscretePath:
    """A DDPM schedule of discrete timesteps, read continuously and in this project's time; all in float64.

    Its ``alpha^2 + sigma^2 = 1``, so ``t = sigma / (alpha + sigma)`` gives both. Only the timestep, which the network
    wants to know, needs the table: it is interpolated linearly in log-SNR.
    """

    def __init__(self, alphas_cumprod: Float[Tensor, " steps"], prediction: str) -> None:
        alpha, sigma = alphas_cumprod.double().sqrt(), (1 - alphas_cumprod.double()).sqrt()
        self.times = sigma / (alpha + sigma)
        self.to_velocity = _PREDICTIONS[prediction]

    def point(self, t: Times) -> "DiscretePoint":
        """The point of the schedule at ``t``; outside of the table (as at 0 and 1) the table's nearest end.

        A time within float32's rounding of a table's entry is that entry: solvers hand times over in float32, and
        the fastest sinusoid of a timestep would see the difference.
        """
        times = self.times.to(t.device)
        t = t.double().clamp(times[0], times[-1])
        above = torch.searchsorted(times, t.detach()).clamp(1, len(times) - 1)
        low, high = log_snr_half(times[above - 1]), log_snr_half(times[above])
        timestep = above - 1 + (low - log_snr_half(t)) / (low - high)
        entry = timestep.detach().round()
        at_entry = (times[entry.long()] - t.detach()).abs() <= 2.0**-24
        timestep, t = (
            torch.where(at_entry, value + (exact - value).detach(), value)  # keeps the derivative
            for value, exact in ((timestep, entry), (t, times[entry.long()]))
        )
        norm = (t**2 + (1 - t) ** 2).sqrt()
        return DiscretePoint(timestep=timestep, t=t, alpha=(1 - t) / norm, sigma=t / norm)


@dataclass(frozen=True, kw_only=True, eq=False)
class DiscretePoint:
    """Where rows stand on a discrete schedule, ``(b,)`` float64 each."""

    timestep: Times
    """Continuous timestep, 0 at the cleanest."""
    t: Times
    """This project's time, held within the table."""
    alpha: Times
    """Scale of the data."""
    sigma: Times
    """Scale of the noise."""


class DiscreteTimeBackbone(nn.Module):
    """A diffusers network over discrete timesteps as a velocity; satisfies `hd_core.types.Backbone`.

    Beyond the table's noisy end the data prediction is held, so an Euler step from t = 1 is DDIM's first step. The
    network's own class and parameter names stay, under ``model``; conditioning and taps are forward hooks.
    """

    def __init__(self, model: nn.Module, path: DiscretePath, *, embedding_width: int, has_classes: bool) -> None:
        super().__init__()
        self.model, self.path = model, path
        self.embedding_width, self.has_classes = embedding_width, has_classes
        self.tokens = nn.ModuleList()
        self._extra: Tensor | None = None

    def add_extra_to(self, embedder: nn.Module) -> None:
        """Let ``extra`` be added to what a module of the network puts out."""
        embedder.register_forward_hook(self._with_extra)

    def show_tokens_of(self, block: nn.Module) -> nn.Module:
        """A module whose output is the output of a convolutional block as tokens (b, h * w, c)."""
        tokens = _Tokens()
        self.tokens.append(tokens)
        block.register_forward_hook(tokens.hook)
        return tokens

    def forward(self, x_t: Images, t: Times, condition: Condition, extra: Float[Tensor, "b d"] | None = None) -> Images:
        point = self.path.point(t)
        x = to_gaussian(x_t, point.alpha, point.sigma)
        prediction = self._predict(x, point.timestep.float(), condition, extra)[:, : x.shape[1]]  # no learned variance
        held = point.t / torch.maximum(t.double(), point.t)
        return expand(held, x) * self.path.to_velocity(x, prediction, point.alpha, point.sigma)

    def _predict(self, x: Images, timestep: Times, condition: Condition, extra: Tensor | None) -> Images:
        labels = condition.labels if self.has_classes else None
        if extra is not None and torch.is_grad_enabled() and getattr(self.model, "is_gradient_checkpointing", False):
            raise ValueError(
                "gradient checkpointing recomputes time embeddings without a student's interval: turn it off"
            )
        self._extra = extra
        try:
            return self.model(x, timestep, class_labels=labels, return_dict=False)[0]
        finally:
            self._extra = None

    def _with_extra(self, _module: nn.Module, _inputs: tuple[Any, ...], embedding: Tensor) -> Tensor:
        return embedding if self._extra is None else embedding + self._extra


class _Tokens(nn.Module):
    def forward(self, images: Images) -> Float[Tensor, "b n d"]:
        return images.flatten(2).transpose(1, 2)

    def hook(self, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Any]) -> None:
        self(output[0] if isinstance(output, tuple) else output)


_PREDICTIONS = {"epsilon": velocity_from_eps, "v_prediction": velocity_from_v_prediction}


def _diffusers() -> ModuleType:
    declare_missing_operators()
    import diffusers

    return diffusers


def _dit_transformer(source: _Source) -> Teacher:
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
        fingerprint=_fingerprint(source.folder / "config.json", scheduler, *source.weights),
    )


def _unet(source: _Source) -> Teacher:
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
        fingerprint=_fingerprint(source.folder / "config.json", scheduler, *source.weights),
    )


def _load_diffusers(source: _Source, name: str) -> tuple[Any, Any]:
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


def _shape(source: _Source, config: Any) -> tuple[int, int, int]:
    """Channels, height and width; the output may hold a learned variance in a second half of its channels."""
    size, channels, outputs = config.sample_size, config.in_channels, config.out_channels or config.in_channels
    if not size or outputs not in (channels, 2 * channels):
        given = f"sample_size {size}, in_channels {channels}, out_channels {outputs}"
        raise ValueError(f"{source.name} has {given}; it must have a size, and out_channels once or twice in_channels")
    height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width


def _discrete_path(source: _Source) -> tuple[DiscretePath, Path]:
    """The DDPM schedule that lies beside a model, and its file."""
    folders = [source.folder, source.folder / "scheduler", source.folder.parent / "scheduler"]
    files = [folder / "scheduler_config.json" for folder in folders]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ValueError(f"{source.name} has no schedule: {files[0].name} is missing beside it and from {folders[1]}")
    config = _read_json(file)
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise ValueError(f"{file} has prediction_type {prediction}; there is {' and '.join(_PREDICTIONS)}")
    return DiscretePath(_alphas_cumprod(config, file), prediction), file


def _alphas_cumprod(config: dict[str, Any], file: Path) -> Float[Tensor, " steps"]:
    if not {"beta_schedule", "trained_betas"} & config.keys() or config.get("rescale_betas_zero_snr"):
        raise ValueError(f"{file} must be a DDPM schedule (beta_schedule) without rescale_betas_zero_snr")
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    try:
        return _diffusers().DDPMScheduler(**{name: config[name] for name in names if name in config}).alphas_cumprod
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{file} is no DDPM schedule: {error}") from error


_ADAPTORS: dict[str, Callable[[_Source], Teacher]] = {
    "DiT": _native,
    "DiTTransformer2DModel": _dit_transformer,
    "Transformer2DModel": _dit_transformer,  # what the first published DiT folders call it
    "UNet2DModel": _unet,
}
