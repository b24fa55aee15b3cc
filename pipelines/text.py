"""Text encoders: prompts to embeddings, by the very code with which a pipeline of diffusers encodes them."""

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipelines.artifacts import file_hash
from pipelines.diffusers_library import diffusers, from_pretrained
from pipelines.model_files import read_object

PARTS = ("text_encoder", "tokenizer")
"""Folders of a pipeline that decide its embeddings."""


class TextEncoder(Protocol):
    """A frozen text encoder with its tokenizer."""

    def encode(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """Float32 ``(tokens, width)`` of each prompt, without padding."""
        ...

    def null(self) -> np.ndarray:
        """The same of "no text", which guidance goes away from."""
        ...

    def to(self, device: torch.device | str) -> "TextEncoder": ...


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """The text encoder of a pipeline's folder, not loaded yet."""

    folder: Path
    kind: str
    """Class of the pipeline."""

    @classmethod
    def of(cls, folder: Path) -> "TextFiles":
        """The encoder in a pipeline's folder, or beside the model in it. ValueError where it has none."""
        root = folder if (folder / "model_index.json").is_file() else folder.parent
        missing = [part for part in PARTS if not (root / part).is_dir()]
        if missing or not (root / "model_index.json").is_file():
            raise ValueError(
                f"{folder} reads text, and {' and '.join(missing) or 'model_index.json'} is missing beside it: give the"
                " folder of the whole pipeline"
            )
        kind = str(read_object(root / "model_index.json").get("_class_name"))
        if kind not in _ENCODERS:
            raise ValueError(f"{root} is a {kind}, whose prompts are not served; there is {', '.join(_ENCODERS)}")
        return cls(folder=root, kind=kind)

    @property
    def fingerprint(self) -> str:
        """sha256 over the names and contents of the encoder's and tokenizer's files, and the pipeline's class."""
        files = [file for part in PARTS for file in sorted((self.folder / part).rglob("*")) if file.is_file()]
        lines = [f"{file.relative_to(self.folder).as_posix()} {file_hash(file)}\n" for file in files]
        return hashlib.sha256("".join([self.kind, "\n", *lines]).encode()).hexdigest()

    @property
    def length(self) -> int:
        """Tokens to which embeddings are padded when they are used."""
        return _ENCODERS[self.kind].length_of(self.folder)

    def load(self) -> TextEncoder:
        """The encoder. ValueError where it cannot be loaded."""
        kind = getattr(diffusers(), self.kind)
        absent = {name: None for name in inspect.signature(kind.__init__).parameters if name not in (*PARTS, "self")}
        flags = {name for name in absent if name.startswith("requires") or name == "force_zeros_for_empty_prompt"}
        options = {name: value for name, value in absent.items() if name not in {*flags, "scheduler"}}
        pipeline = from_pretrained(kind, str(self.folder), f"the text encoder of {self.folder}", **options)
        pipeline.text_encoder.requires_grad_(False).eval()
        return _ENCODERS[self.kind](pipeline)


class _Clip:
    """Stable Diffusion: all of the tokenizer's places count, the padded ones too."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline

    @staticmethod
    def length_of(folder: Path) -> int:
        """Tokens of every prompt."""
        return int(read_object(folder / "tokenizer" / "tokenizer_config.json")["model_max_length"])

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[np.ndarray]:
        device = self._pipeline.text_encoder.device
        found: Tensor = self._pipeline.encode_prompt(list(prompts), device, 1, False)[0]
        return [row.float().cpu().numpy() for row in found]

    def null(self) -> np.ndarray:
        return self.encode([""])[0]

    def to(self, device: torch.device | str) -> "_Clip":
        self._pipeline.text_encoder.to(device)
        return self


class _Gemma:
    """SANA: prompts behind its instruction, the empty one without; padded places are masked, so they are dropped."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        call = inspect.signature(type(pipeline).__call__).parameters
        self._instruction = call["complex_human_instruction"].default

    @staticmethod
    def length_of(_folder: Path) -> int:
        """Tokens of the longest prompt, the pipeline's default."""
        return 300

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[np.ndarray]:
        found = self._pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            device=self._pipeline.text_encoder.device,
            complex_human_instruction=self._instruction,
        )
        return _unpadded(found[0], found[1])

    @torch.no_grad()
    def null(self) -> np.ndarray:
        found = self._pipeline.encode_prompt(
            [""],
            do_classifier_free_guidance=True,
            device=self._pipeline.text_encoder.device,
            complex_human_instruction=self._instruction,
        )
        return _unpadded(found[2], found[3])[0]

    def to(self, device: torch.device | str) -> "_Gemma":
        self._pipeline.text_encoder.to(device)
        return self


def _unpadded(embeddings: Tensor, mask: Tensor) -> list[np.ndarray]:
    if not mask.any(1).all():
        raise ValueError("the tokenizer makes no token of a prompt: it must mark where a text begins")
    rows = zip(embeddings, mask.bool(), strict=True)
    return [embedding[kept].float().cpu().numpy() for embedding, kept in rows]


_ENCODERS: dict[str, Any] = {"StableDiffusionPipeline": _Clip, "SanaPipeline": _Gemma}
