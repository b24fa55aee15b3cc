"""Teachers: embedded ones, folders in diffusers' layout, and names on the Hugging Face hub, as velocities.

An adaptor (`pipelines.adaptors`), chosen by ``_class_name`` of the model's config.json, converts path, time and
prediction; nothing outside it knows that they were ever different.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from hd_core.networks.dit import DiT
from pipelines.adaptors import ADAPTORS
from pipelines.adaptors.teacher import Teacher
from pipelines.artifacts import atomic_folder
from pipelines.hub import fetched, is_hub_name
from pipelines.latents import LatentCodec
from pipelines.model_files import NEEDED, WEIGHTS, ModelFiles
from pipelines.prompts_table import PromptTable
from pipelines.shards import ShardSet
from pipelines.text import TextFiles

__all__ = [
    "EMBEDDED",
    "Teacher",
    "TeacherConfig",
    "embedded",
    "load_codec",
    "load_teacher",
    "save_native",
    "text_files",
]

EMBEDDED = Path(__file__).parent / "assets" / "teachers"
"""Teachers that come with the package, a folder each."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Which teacher, and how strongly it is guided."""

    path: str = "digits"
    """Name of an embedded teacher, a local folder in diffusers' layout (of a pipeline, or of its model alone), or the
    name of such a repository on the Hugging Face hub."""
    revision: str = ""
    """Commit, tag or branch of the hub's repository; empty: its main branch."""
    vae: str = ""
    """Folder or hub name of an autoencoder in place of the pipeline's own; empty: its own, where it has one."""
    guidance_scale: float = 1.0
    """Classifier-free guidance: 1 is the conditional velocity itself, more follows the condition more."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(f"a teacher needs a path: embedded ({_embedded_names()}) or a local folder; none given")
        if not (isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise ValueError(f"guidance_scale must be a number of at least 0; given {self.guidance_scale}")
        if self.revision and not is_hub_name(self.path):
            raise ValueError(f"revision is for a name on the hub, and {self.path} is none; given {self.revision!r}")


def load_teacher(config: TeacherConfig, prompts: ShardSet | None = None) -> Teacher:
    """Load a teacher, with its autoencoder and its prompts' embeddings where it has them.

    Raises:
        ValueError: it is not there, or cannot be served; the message says why in a line or two.
    """
    source = ModelFiles.of(teacher_folder(config))
    if source.class_name not in ADAPTORS:
        raise ValueError(
            f"{source.folder / 'config.json'} names the class {source.class_name}, for which there is no adaptor; "
            f"there is one for {', '.join(ADAPTORS)}"
        )
    teacher = replace(ADAPTORS[source.class_name](source), codec=_codec(config, source))
    teacher.backbone.requires_grad_(False).eval()
    return teacher if prompts is None else teacher.reading(PromptTable.read(prompts))


def text_files(config: TeacherConfig) -> TextFiles:
    """The text encoder of a teacher that reads text. ValueError where it has none that is served."""
    return TextFiles.of(ModelFiles.of(teacher_folder(config)).folder)


def load_codec(config: TeacherConfig) -> LatentCodec | None:
    """The autoencoder of a teacher without the teacher. ValueError where it cannot be served."""
    return _codec(config, ModelFiles.of(teacher_folder(config)))


def _codec(config: TeacherConfig, source: ModelFiles) -> LatentCodec | None:
    """The autoencoder that is asked for, or the one beside the model."""
    if config.vae:
        given = Path(config.vae).expanduser()
        return LatentCodec.of(fetched(config.vae) if is_hub_name(config.vae) else given)
    beside = [source.folder / "vae", source.folder.parent / "vae"]
    folder = next((folder for folder in beside if (folder / "config.json").is_file()), None)
    return None if folder is None else LatentCodec.of(folder)


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


def teacher_folder(config: TeacherConfig) -> Path:
    """An embedded name comes first: a folder of the same name is reached as ./NAME."""
    if config.path in embedded():
        return EMBEDDED / config.path
    folder = Path(config.path).expanduser()
    if folder.is_dir():
        return folder
    if is_hub_name(config.path):
        return fetched(config.path, config.revision)
    nearest = difflib.get_close_matches(config.path, embedded(), n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise ValueError(
        f"no teacher {config.path!r}: neither embedded ({_embedded_names()}), nor a local folder, nor a name on the hub"
        f" (owner/name){hint}\nA folder must hold {NEEDED}"
    )
