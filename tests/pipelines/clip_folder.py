"""A tiny CLIP with random weights in transformers' format, and its score written out longhand."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.pipelines.diffusers_folders import CHARACTERS, CLIPTokenizer, seeded  # declares missing operators first

from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel  # isort: skip

PLACES = 10
"""Tokens of the longest text, its two ends among them."""


def clip_folder(folder: Path, seed: int = 7) -> Path:
    """Pictures of 8x8 after a resize to 10, texts of letters, embeddings of width 4."""
    letters = [*CHARACTERS, *(f"{letter}</w>" for letter in CHARACTERS)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters]
    vocabulary = {word: place for place, word in enumerate(words)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=PLACES).save_pretrained(folder)
    crop = {"height": 8, "width": 8}
    CLIPImageProcessorPil(size={"shortest_edge": 10}, crop_size=crop).save_pretrained(folder)
    small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": len(words)}
    text = {**small, **tokens, "max_position_embeddings": PLACES}
    config = CLIPConfig(
        text_config=text, vision_config={**small, "image_size": 8, "patch_size": 4}, projection_dim=4
    )  # fmt: skip
    seeded(lambda: CLIPModel(config), seed, 0.5).save_pretrained(folder)
    return folder


@torch.no_grad()
def longhand(folder: Path, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
    """Hessel et al. 2021, eq. 1, with w = 1 and nothing cut: one picture and one text at a time, in float64."""
    model = CLIPModel.from_pretrained(folder).eval().double()
    tokenizer, processor = CLIPTokenizer.from_pretrained(folder), CLIPImageProcessorPil.from_pretrained(folder)
    cosines = []
    for image, text in zip(images, texts, strict=True):
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=PLACES)
        pixels = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"].double()
        seen = model.visual_projection(model.vision_model(pixels).pooler_output)[0].numpy()
        read = model.text_projection(model.text_model(**tokens).pooler_output)[0].numpy()
        cosines.append(float(seen @ read / np.sqrt((seen @ seen) * (read @ read))))
    return np.array(cosines)
