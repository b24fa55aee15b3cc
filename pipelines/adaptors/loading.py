"""What the adaptors share: weights that must fit, shapes, schedules."""

from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipelines.diffusers_library import diffusers, from_pretrained
from pipelines.discrete_time import PREDICTIONS, DiscretePath
from pipelines.model_files import ModelFiles, read_object


def load_strictly(model: nn.Module, source: ModelFiles) -> None:
    """Load weights whose names and shapes must be exactly the model's. ValueError says which are not."""
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


def load_diffusers(source: ModelFiles, name: str) -> tuple[Any, Any]:
    """A model of diffusers in float32 and its config; every weight must have found its place, else ValueError."""
    kind = getattr(diffusers(), name)
    model, report = from_pretrained(kind, str(source.folder), source.name, output_loading_info=True)
    _refuse_misfit(
        source, missing=report["missing_keys"], unknown=report["unexpected_keys"], misshapen=report["mismatched_keys"]
    )
    return model, model.config


def _refuse_misfit(source: ModelFiles, **keys: Any) -> None:
    found = [f"{len(names)} {kind} ({', '.join(sorted(names)[:3])})" for kind, names in keys.items() if names]
    if found:
        raise ValueError(f"the weights of {source.name} do not fit its config.json: {'; '.join(found)}")


def image_shape(source: ModelFiles, config: Any) -> tuple[int, int, int]:
    """Channels, height and width; the output may hold a learned variance in a second half of its channels.

    Raises:
        ValueError: there is no size, or the output has other channels.
    """
    size, channels, outputs = config.sample_size, config.in_channels, config.out_channels or config.in_channels
    if not size or outputs not in (channels, 2 * channels):
        given = f"sample_size {size}, in_channels {channels}, out_channels {outputs}"
        raise ValueError(f"{source.name} has {given}; it must have a size, and out_channels once or twice in_channels")
    height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width


def refuse_settings(source: ModelFiles, config: Any, **allowed: Any) -> None:
    """Raises ValueError where fields of the config are not what the adaptor can serve."""
    wrong = {name: config.get(name) for name, value in allowed.items() if config.get(name) != value}
    if wrong:
        given = ", ".join(f"{name} {value}" for name, value in wrong.items())
        wanted = ", ".join(f"{name} {allowed[name]}" for name in wrong)
        raise ValueError(f"{source.name} has {given}; only {wanted} is supported")


def scheduler_file(source: ModelFiles) -> Path:
    """The scheduler's config beside a model. ValueError where there is none."""
    folders = [source.folder, source.folder / "scheduler", source.folder.parent / "scheduler"]
    files = [folder / "scheduler_config.json" for folder in folders]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ValueError(f"{source.name} has no schedule: {files[0].name} is missing beside it and from {folders[1]}")
    return file


def discrete_path(source: ModelFiles) -> tuple[DiscretePath, Path]:
    """The DDPM schedule that lies beside a model, and its file. ValueError where it is none that can be served."""
    file = scheduler_file(source)
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
        return diffusers().DDPMScheduler(**{name: config[name] for name in names if name in config}).alphas_cumprod
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{file} is no DDPM schedule: {error}") from error


def flow_timesteps(source: ModelFiles) -> tuple[float, Path]:
    """Timesteps of the flow schedule that lies beside a model, and its file. ValueError where it is no flow."""
    file = scheduler_file(source)
    config = read_object(file)
    flow = "FlowMatch" in str(config.get("_class_name")) or config.get("prediction_type") == "flow_prediction"
    if not flow:
        raise ValueError(
            f"{file} is no flow: its class must be a FlowMatch scheduler, or its prediction_type flow_prediction; given"
            f" {config.get('_class_name')} with {config.get('prediction_type')}"
        )
    return float(config.get("num_train_timesteps", 1000)), file
