"""Latents of real images and embeddings of prompts, made once, with what they are made by in every shard."""

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.artifacts import fingerprint
from pipelines.data import DataConfig, DataSplits, ImageSet, load_images, to_model
from pipelines.latents import pixels_hash
from pipelines.lazy import LazyPixels
from pipelines.pictures import Pixels
from pipelines.precompute import PrecomputeConfig
from pipelines.production import InParts, unit_rows
from pipelines.prompts import load_prompts
from pipelines.prompts_table import Vocabulary, write_prompts
from pipelines.shards import Shard, ShardSet, ShardSetSpec, decode, in_dtype, tensor_table
from pipelines.teachers import Teacher, TeacherConfig, load_codec, text_files
from pipelines.text import TextFiles

# Latents

HASH = "pixels_sha256"
"""Column that tells which picture a latent is of."""


def latent_spec(config: PrecomputeConfig, teacher: Teacher, images: ImageSet, data: str, labels: str) -> ShardSetSpec:
    """What the latents of a recipe's training images are.

    Args:
        data: fingerprint of the images.
        labels: fingerprint of what their labels stand for.
    """
    assert teacher.codec is not None
    return ShardSetSpec(
        kind="latents",
        rows=len(images) * (2 if config.flip else 1),
        shard_rows=config.shard_rows,
        dtype=config.dtype,
        shape=(2, *teacher.shape),
        inputs={**teacher.codec.provenance, "data": data, "labels": labels, "flip": config.flip},
        details={"layout": ["mean and spread", "channel", "height", "width"], "pixels": list(images.images.shape[1:])},
    )


def latent_parts(
    shards: ShardSet,
    *,
    config: PrecomputeConfig,
    teacher: TeacherConfig,
    images: DataConfig | LazyPixels | Pixels,
    labels: np.ndarray,
) -> InParts:
    """How latents are made: pictures are read and decoded on CPUs, the autoencoder encodes them.

    Args:
        images: pixels, or from where whoever reads them is to load them: they would not fit into what travels.
        labels: ``(rows,)`` int64, of the images; rows of the set past them are of mirrored images.
    """
    pixels = shards.spec.details["pixels"]
    return InParts(
        read=partial(read_pixels, images, labels),
        encoder=partial(LatentEncoder, config=config, teacher=teacher, pixels=pixels),
        rows=unit_rows(int(np.prod(pixels)), config.batch_size),
        readers=1 if isinstance(images, DataConfig) else None,  # each holds a copy of all of them
    )


def read_pixels(images: DataConfig | LazyPixels | Pixels, labels: np.ndarray, ids: range) -> pa.Table:
    """Pixels of some rows, raw, as ``values``; with ``sample_id``, ``label`` and ``pixels_sha256``."""
    rows, held = np.arange(ids.start, ids.stop), _loaded(images) if isinstance(images, DataConfig) else images
    pixels = held[rows % len(labels)]
    pixels = np.where((rows >= len(labels))[:, None, None, None], pixels[:, :, ::-1], pixels)
    hashes = pa.array([pixels_hash(image) for image in pixels], pa.string())
    return tensor_table(rows, labels[rows % len(labels)], pixels).append_column(HASH, hashes)


@lru_cache(maxsize=1)
def _loaded(config: DataConfig) -> Pixels | LazyPixels:
    """Images of a config; those in memory are kept there, as one process reads many units."""
    return load_images(config).train.images


class LatentEncoder:
    """Holds the autoencoder, and makes latents of pixels."""

    def __init__(self, device: str, *, config: PrecomputeConfig, teacher: TeacherConfig, pixels: Sequence[int]) -> None:
        codec = load_codec(teacher)
        assert codec is not None
        self._codec, self._dtype, self._pixels = codec.to(device), config.dtype, pixels

    def __call__(self, table: pa.Table) -> pa.Table:
        """Rows of `read_pixels` as they are stored: latents in place of pixels.

        Raises:
            ValueError: a latent is not finite, or does not fit into the stored dtype.
        """
        rows = decode(table, "uint8", self._pixels)
        latents = self._codec.encode(to_model(rows.values)).cpu().numpy()
        stored = in_dtype(latents, self._dtype, "latents", ", and check teacher.vae")
        return tensor_table(rows.sample_ids, rows.labels, stored).append_column(HASH, table.column(HASH))


# Prompts


def vocabulary_of(config: PrecomputeConfig, splits: DataSplits) -> Vocabulary:
    """The prompts of a run: those to train on from a file or the training captions, the reference's to measure with.

    Raises:
        ValueError: there are none, or the file cannot be read.
    """
    captions = splits.train.captions or ()
    training = load_prompts(Path(config.prompts).expanduser()) if config.prompts else captions
    if not training:
        raise ValueError(
            "the teacher reads text, and there is none: give precompute.prompts a file of prompts, or data that has"
            " captions"
        )
    return Vocabulary.of(training, splits.reference.captions or (), captions)


def prompt_spec(config: PrecomputeConfig, teacher: Teacher, files: TextFiles, vocabulary: Vocabulary) -> ShardSetSpec:
    """What the text embeddings of a run are."""
    return ShardSetSpec(
        kind="prompts",
        rows=len(vocabulary.texts),
        shard_rows=config.shard_rows,
        dtype=config.dtype,
        shape=(teacher.text_width,),
        inputs={
            "text_encoder": files.fingerprint,
            "prompts": fingerprint(vocabulary.texts),
            "num_training": vocabulary.num_training,
        },
        details={"length": files.length, "layout": ["token", "feature"]},
    )


class PromptMaker:
    """Holds the text encoder, and makes shards of embeddings."""

    def __init__(
        self,
        device: str,
        *,
        shards: ShardSet,
        config: PrecomputeConfig,
        teacher: TeacherConfig,
        vocabulary: Vocabulary,
    ) -> None:
        self._encoder = text_files(teacher).load().to(device)
        self._shards, self._config, self._vocabulary = shards, config, vocabulary

    def shard(self, index: int) -> Shard:
        """Encode and commit one shard."""
        spec, size = self._shards.spec, self._config.batch_size
        ids = spec.ids(index)
        texts = self._vocabulary.texts[ids.start : ids.stop]
        parts = [self._encoder.encode(texts[start : start + size]) for start in range(0, len(texts), size)]
        embeddings = [embedding for part in parts for embedding in part]
        if self._vocabulary.num_training in ids:
            embeddings[self._vocabulary.num_training - ids.start] = self._encoder.null()
        return write_prompts(self._shards.folder, spec, index, texts, embeddings)
