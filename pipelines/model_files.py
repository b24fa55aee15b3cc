"""The files of one model in diffusers' layout: its config and its weights, as safetensors only."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pipelines.artifacts import file_hash, plain_name

WEIGHTS = "diffusion_pytorch_model.safetensors"
NEEDED = f"model_index.json, or the model's own config.json and {WEIGHTS}"
"""What a folder must hold."""

_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
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

    @classmethod
    def of(cls, folder: Path) -> Self:
        """The denoising model in a folder, or in a pipeline's folder. ValueError says what is missing."""
        folder = _model_folder(folder)
        return cls(folder=folder, config=read_object(folder / "config.json"), weights=_weights(folder))

    def fingerprint(self, *more: Path) -> str:
        """One sha256 over the names and contents of config and weights, and of more files that decide what it is."""
        files = [self.folder / "config.json", *more, *self.weights]
        lines = [f"{file.name} {file_hash(file)}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. ValueError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object; it holds {type(value).__name__}")
    return value


def _model_folder(folder: Path) -> Path:
    """The folder of the denoising model itself, inside a pipeline's folder or the same."""
    if (folder / "model_index.json").is_file():
        index = read_object(folder / "model_index.json")
        parts = [folder / name for name in ("transformer", "unet") if name in index]
        folder = next((part for part in parts if (part / "config.json").is_file()), folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no teacher: it must hold {NEEDED}")
    return folder


def _weights(folder: Path) -> list[Path]:
    """The safetensors files; a pickle is never opened, since loading one can run any code."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        names = sorted(set(read_object(index).get("weight_map", {}).values()))
        shards = [folder / plain_name(name, index) for name in names]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise ValueError(f"{index} lists {', '.join(missing[:3])}, missing from the folder")
        return [index, *shards]
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise ValueError(
            f"{folder} has only {', '.join(pickles)}: pickled weights are never loaded, since they can run any code\n"
            f"Convert them with diffusers' save_pretrained, which writes {WEIGHTS}"
        )
    raise ValueError(f"{folder} has no weights: {WEIGHTS} is missing")
