"""Latents of real images and embeddings of prompts, made once, with what they are made by in every shard."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.artifacts import fingerprint
from pipelines.data import DataConfig, DataSplits, ImageSet, load_images, to_model
from pipelines.latents import pixels_hash
from pipelines.lazy import LazyPixels
from pipelines.precompute import PrecomputeConfig
from pipelines.prompts import load_prompts
from pipelines.prompts_table import Vocabulary, write_prompts
from pipelines.shards import Shard, ShardSet, ShardSetSpec, commit_table, in_dtype, tensor_table
from pipelines.teachers import Teacher, TeacherConfig, load_codec, text_files
from pipelines.text import TextFiles

# Latents


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


class LatentMaker:
    """Holds the autoencoder, and makes shards of the images' latents. Rows past the images are mirrored.

    Images in memory are read by each maker for itself: they would not fit into what travels to it.
    """

    def __init__(
        self,
        device: str,
        *,
        shards: ShardSet,
        config: PrecomputeConfig,
        teacher: TeacherConfig,
        images: DataConfig | LazyPixels,
        labels: np.ndarray,
    ) -> None:
        codec = load_codec(teacher)
        assert codec is not None
        self._codec, self._shards, self._config = codec.to(device), shards, config
        self._images = load_images(images).train.images if isinstance(images, DataConfig) else images
        self._labels = labels

    def shard(self, index: int) -> Shard:
        """Encode and commit one shard.

        Raises:
            ValueError: a latent is not finite, or does not fit into the stored dtype.
        """
        spec, count = self._shards.spec, len(self._labels)
        ids = np.arange(spec.ids(index).start, spec.ids(index).stop)
        pixels, size = self._images[ids % count], self._config.batch_size
        pixels = np.where((ids >= count)[:, None, None, None], pixels[:, :, ::-1], pixels)
        parts = [self._encoded(pixels[start : start + size]) for start in range(0, len(ids), size)]
        table = tensor_table(ids, self._labels[ids % count], np.concatenate(parts))
        hashes = pa.array([pixels_hash(image) for image in pixels], pa.string())
        return commit_table(self._shards.folder, spec, index, table.append_column("pixels_sha256", hashes))

    def _encoded(self, pixels: np.ndarray) -> np.ndarray:
        latents = self._codec.encode(to_model(pixels)).cpu().numpy()
        return in_dtype(latents, self._config.dtype, "latents", ", and check teacher.vae")


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
