"""Generators that others made, for the same table: a pipeline of diffusers, or a folder of pictures that it drew."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hd_core.random import fold_in
from pipelines.artifacts import file_hash, fingerprint
from pipelines.diffusers_library import diffusers, from_pretrained
from pipelines.hub import fetched, is_hub_name

PIPELINE, PICTURES = "pipeline", "pictures"
"""Stand for the solver of a peer."""
_NETWORKS = ("transformer", "unet")


@dataclass(frozen=True, kw_only=True)
class PeerConfig:
    """What a peer is."""

    path: str
    """A folder of pictures, or a pipeline of diffusers: its folder, or its name on the hub. One that brings code of its
    own is not loaded."""
    calls: int = 0
    """Network calls a picture, which a folder of pictures cannot tell; 0: a pipeline, whose calls are counted."""
    steps: int = 0
    """Steps of a pipeline, as it understands them; 0: its own default."""
    guidance_scale: float | None = None
    """Guidance of a pipeline; none given: its own default."""

    def __post_init__(self) -> None:
        if self.calls < 0 or self.steps < 0:
            raise ValueError(f"calls and steps must not be negative; given {self.calls} and {self.steps}")
        folder = Path(self.path).expanduser()
        if self.calls and (folder / "model_index.json").is_file():
            raise ValueError(f"the calls of the pipeline {self.path} are counted: leave them out")
        if self.calls and (self.steps or self.guidance_scale is not None):
            raise ValueError(
                f"{self.path} is given calls, as pictures are, which have neither steps nor guidance_scale"
            )
        if not self.calls and folder.is_dir() and not (folder / "model_index.json").is_file():
            raise ValueError(
                f"{self.path} is no pipeline's folder: pictures need calls, the network calls that each of them took"
            )

    @property
    def is_pipeline(self) -> bool:
        """Whether it draws pictures, rather than being some."""
        return not self.calls

    @property
    def identity(self) -> str:
        """Of a pipeline's weights and settings."""
        folder = self._folder()
        files = sorted(file for pattern in ("*.json", "*.safetensors") for file in folder.rglob(pattern))
        hashes = [[file.relative_to(folder).as_posix(), file_hash(file)] for file in files]
        return fingerprint([hashes, self.steps, self.guidance_scale])

    def _folder(self) -> Path:
        return fetched(self.path) if is_hub_name(self.path) else Path(self.path).expanduser()

    def load(self, device: torch.device | str) -> "Peer":
        """The pipeline. ValueError where it cannot be loaded."""
        kind = diffusers().DiffusionPipeline
        pipeline = from_pretrained(kind, str(self._folder()), f"the pipeline {self.path}").to(device)
        pipeline.set_progress_bar_config(disable=True)
        return Peer(self, pipeline)


class Peer:
    """A pipeline of diffusers that draws one picture for each sample id."""

    def __init__(self, config: PeerConfig, pipeline: Any) -> None:
        self._config, self._pipeline = config, pipeline
        self._takes = inspect.signature(pipeline.__call__).parameters
        networks = [getattr(pipeline, name, None) for name in _NETWORKS]
        self._network = next((one for one in networks if isinstance(one, nn.Module)), None)
        if self._network is None:
            raise ValueError(
                f"the pipeline {config.path} has neither a unet nor a transformer: its calls are not known"
            )

    def __call__(self, ids: range, labels: Sequence[int], prompts: Sequence[str] | None, seed: int) -> Tensor:
        """Pictures in [-1, 1], ``(b, c, h, w)``: each from a noise of its own id.

        Raises:
            ValueError: the pipeline reads text, and there is none.
        """
        noises = [torch.Generator().manual_seed(fold_in(seed, "peer", number)) for number in ids]
        drawn = self._pipeline(**self._asked(labels, prompts), generator=noises, output_type="np").images
        images = torch.as_tensor(drawn)
        images = images[..., None] if images.ndim == 3 else images
        return images.permute(0, 3, 1, 2).float() * 2 - 1

    def _asked(self, labels: Sequence[int], prompts: Sequence[str] | None) -> dict[str, Any]:
        config = self._config
        given: dict[str, Any] = {"num_inference_steps": config.steps} if config.steps else {}
        if config.guidance_scale is not None:
            given["guidance_scale"] = config.guidance_scale
        if "prompt" in self._takes:
            if prompts is None:
                raise ValueError(f"the pipeline {config.path} reads text, and the recipe's data have none")
            return {**given, "prompt": list(prompts)}
        if "class_labels" in self._takes:
            return {**given, "class_labels": list(labels)}
        return {**given, "batch_size": len(labels)}

    def calls(self, labels: Sequence[int], prompts: Sequence[str] | None) -> int:
        """Rows that its network sees for one picture: both branches of guidance count."""
        seen: list[int] = []

        def count(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], _output: object) -> None:
            rows = next(value for value in (*args, *named.values()) if isinstance(value, Tensor))
            seen.append(len(rows))

        assert self._network is not None
        handle = self._network.register_forward_hook(count, with_kwargs=True)
        try:
            self(range(1), labels[:1], prompts[:1] if prompts else None, 0)
        finally:
            handle.remove()
        return sum(seen)
