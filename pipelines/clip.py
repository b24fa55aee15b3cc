"""CLIP: how well pictures fit their prompts, as the cosine of the two embeddings.

A model is a folder in transformers' format, or the name of one on the hub. Pictures go through its own image processor,
prompts through its own tokenizer, cut at the longest text that it reads; no code from the folder is run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipelines.artifacts import file_hash
from pipelines.artifacts import fingerprint as fingerprint_of
from pipelines.diffusers_library import from_pretrained, loading
from pipelines.hub import fetched, is_hub_name
from pipelines.model_files import read_object
from pipelines.pictures import MODES, Picture, Pixels
from pipelines.torchvision_ops import declare_missing_operators

ROWS = 32
"""Pictures that the network is given together: another number changes the last bits."""
_FILES = (".json", ".safetensors", ".txt")
_TOKENIZERS = ({"tokenizer.json"}, {"vocab.json", "merges.txt"})


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A CLIP model, whose parts are loaded when they are first used."""

    name: str
    """The folder, or the name on the hub, as another process finds it."""
    folder: Path
    device: str = "cpu"

    @classmethod
    def of(cls, given: str, device: str = "cpu", field: str = "evaluate.clip") -> "Clip":
        """The model of a folder or of a name on the hub, which is fetched where it is not there yet.

        Args:
            field: what gave it, for the message.

        Raises:
            ValueError: there is none, it is not CLIP, or the hub cannot be reached.
        """
        named = is_hub_name(given)
        folder = fetched(given, field=field) if named else Path(given).expanduser().resolve()
        _check(folder, given, field)
        return cls(name=given if named else str(folder), folder=folder, device=device)

    @cached_property
    def fingerprint(self) -> str:
        """Of the names and contents of its config, weights, tokenizer and image processor."""
        files = sorted(file for file in self.folder.iterdir() if file.suffix in _FILES and file.is_file())
        return fingerprint_of({file.name: file_hash(file) for file in files})

    @property
    def provenance(self) -> dict[str, str]:
        """How a CLIP score was measured, to stand beside it."""
        return {"clip": self.name, "clip_sha256": self.fingerprint}

    def __call__(self, images: Pixels, texts: Sequence[str]) -> Float[np.ndarray, " n"]:
        """The cosine of each image, grey or in colour, and the text of the same place, in float64."""
        parts = [slice(start, start + ROWS) for start in range(0, len(images), ROWS)]
        prepared = (np.stack([self.prepared(image) for image in images[part]]) for part in parts)
        return np.concatenate([self.of_prepared(some, texts[part]) for some, part in zip(prepared, parts, strict=True)])

    def prepared(self, image: Picture) -> Float[np.ndarray, "3 s s"]:
        """One picture of any size, grey or in colour, as the network takes it."""
        height, width, channels = image.shape
        grey_or_not = image.reshape(height, width) if channels == 1 else image
        colours = Image.fromarray(grey_or_not, MODES[channels]).convert("RGB")
        return np.asarray(self._processor(images=colours, return_tensors="np")["pixel_values"][0], np.float32)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of a prepared picture."""
        return self.prepared(np.zeros((8, 8, 3), np.uint8)).shape

    @torch.no_grad()
    def of_prepared(self, images: Float[np.ndarray, "n 3 s s"], texts: Sequence[str]) -> Float[np.ndarray, " n"]:
        """The same of pictures that were prepared, all at once."""
        pixels, tokens = torch.tensor(images).to(self.device), self._tokens(texts)
        pictures = self._network.get_image_features(pixel_values=pixels).pooler_output
        prompts = self._network.get_text_features(**tokens).pooler_output
        return F.cosine_similarity(pictures.cpu().double(), prompts.cpu().double()).numpy()

    def _tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Tokens padded to the longest text that the network reads, so that none depends on its neighbours."""
        length = self._network.config.text_config.max_position_embeddings
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        tokens = self._tokenizer(list(texts), **options)
        return {key: tokens[key].to(self.device) for key in ("input_ids", "attention_mask")}

    @cached_property
    def _network(self) -> Any:
        kind = _transformers().CLIPModel
        return from_pretrained(kind, str(self.folder), self._what).requires_grad_(False).eval().to(self.device)

    @cached_property
    def _tokenizer(self) -> Any:
        return self._part("CLIPTokenizer")

    @cached_property
    def _processor(self) -> Any:
        return self._part("CLIPImageProcessorPil")  # Pillow's bicubic, as CLIP was trained with

    def _part(self, kind: str) -> Any:
        with loading(self._what):
            return getattr(_transformers(), kind).from_pretrained(str(self.folder), local_files_only=True)

    @property
    def _what(self) -> str:
        return f"the CLIP model {self.name}"


def _transformers() -> Any:
    """The library, imported at the first call: it takes seconds, and brings torchvision."""
    declare_missing_operators()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def _check(folder: Path, given: str, field: str) -> None:
    """Raises ValueError where a folder is no CLIP model with safetensors weights."""
    wanted = f"{field} takes a folder of a CLIP model in transformers' format, or its name on the hub (owner/name)"
    if not (folder / "config.json").is_file():
        raise ValueError(f"no CLIP model at {given}: there is no config.json in {folder}. {wanted}")
    kind = read_object(folder / "config.json").get("model_type")
    if kind != "clip":
        raise ValueError(f"{given} is of model_type {kind}, not clip. {wanted}")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{given} has no *.safetensors weights in {folder}; others are never loaded. Write them with transformers'"
            " save_pretrained, or take another model"
        )
    there = {file.name for file in folder.iterdir()}
    if not any(files <= there for files in _TOKENIZERS):  # transformers would make one that knows no word
        raise ValueError(f"{given} has no tokenizer in {folder}: tokenizer.json, or vocab.json and merges.txt")
