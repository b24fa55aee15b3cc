"""What a run is made from: its teacher, its images, its prompts, and the shard sets that are made of them."""

from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from torch import Tensor

from pipelines.artifacts import RunDir
from pipelines.data import DataSplits, ImageSet, load_images
from pipelines.encoding import PromptMaker, latent_parts, latent_spec, prompt_spec, vocabulary_of
from pipelines.evaluate import class_labels
from pipelines.lazy import LazyPixels
from pipelines.precompute import TrajectoryMaker, trajectory_spec
from pipelines.process import default_device
from pipelines.production import InParts, MakerOn
from pipelines.prompts_table import PromptTable, Vocabulary
from pipelines.recipe import Recipe
from pipelines.shards import ShardSet, ShardSetSpec
from pipelines.teachers import Teacher, load_teacher, text_files

IMAGE_SHARD_ROWS = 4096


class Inputs:
    """The inputs of one recipe in one run directory, each loaded when it is first asked for."""

    def __init__(self, recipe: Recipe, run_dir: RunDir) -> None:
        self.recipe, self.dir = recipe, run_dir

    @cached_property
    def _network(self) -> Teacher:
        path, training = self.recipe.teacher.path, self.recipe.teacher_training
        if training is not None and not Path(path).expanduser().exists():
            raise ValueError(
                f"the teacher {path} is not trained yet: run `hdistill teacher` with the same recipe first"
            )
        teacher = load_teacher(self.recipe.teacher)
        if not teacher.knows_null and set(self.recipe.evaluate.guidance_scales) != {1.0}:
            raise ValueError(
                'evaluate.guidance_scales needs a teacher that knows "no class", and this one does not: use [1]'
            )
        if self.recipe.evaluate.clip and not teacher.text_width:
            raise ValueError(
                f"evaluate.clip compares pictures with their prompts, and the teacher {path} reads no text: leave it"
                f" empty; given {self.recipe.evaluate.clip!r}"
            )
        return teacher.to(default_device())

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher; one of text knows how many prompts there are, and not yet their embeddings."""
        network, vocabulary = self._network, self.vocabulary
        return network if vocabulary is None else replace(network, num_classes=vocabulary.num_training)

    @cached_property
    def reader(self) -> Teacher:
        """The teacher with the embeddings of its prompts, once they are made."""
        return self.teacher if self.prompts is None else self.teacher.reading(PromptTable.read(self.prompts))

    @cached_property
    def splits(self) -> DataSplits:
        splits, made = load_images(self.recipe.data), self._network.image_shape
        if splits.train.shape != made:
            raise ValueError(
                f"data holds images of (channels, height, width) {splits.train.shape}, and the teacher makes"
                f" {made}: set data.image_size and data.channels, or choose another teacher"
            )
        return splits

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The prompts of a teacher that reads text."""
        return vocabulary_of(self.recipe.precompute, self.splits) if self._network.text_width else None

    @cached_property
    def trajectories(self) -> ShardSet:
        recipe = self.recipe
        prompts = self.prompts.spec.fingerprint if self.prompts else ""
        spec = trajectory_spec(recipe.precompute, recipe.teacher, self.teacher, recipe.seed, prompts)
        return ShardSet.open(self.dir.trajectories, spec)

    @cached_property
    def prompts(self) -> ShardSet | None:
        """Text embeddings, where the teacher reads text."""
        if self.vocabulary is None:
            return None
        files = text_files(self.recipe.teacher)
        return ShardSet.open(
            self.dir.prompts, prompt_spec(self.recipe.precompute, self.teacher, files, self.vocabulary)
        )

    @cached_property
    def latents(self) -> ShardSet | None:
        """Real images as latents, where the teacher has an autoencoder."""
        if self.teacher.codec is None:
            return None
        labels = self.prompts.spec.fingerprint if self.prompts else "classes"
        spec = latent_spec(self.recipe.precompute, self.teacher, self.splits.train, self.splits.fingerprint, labels)
        return ShardSet.open(self.dir.latents, spec)

    @cached_property
    def image_labels(self) -> np.ndarray:
        """What each training image is of: its class, or its caption's label."""
        train = self.splits.train
        return train.labels if self.vocabulary is None else self.vocabulary.labels_of(train.captions)

    @cached_property
    def images(self) -> ShardSet:
        """Real images to train on, as pixels."""
        return self._pixels(self.dir.images, self.splits.train)

    @cached_property
    def validation(self) -> ShardSet | None:
        """Those that are kept from training, if any are."""
        kept = self.splits.validation
        return None if kept is None else self._pixels(self.dir.validation, kept)

    def _pixels(self, folder: Path, images: ImageSet) -> ShardSet:
        spec = ShardSetSpec(
            kind="images",
            rows=len(images),
            shard_rows=IMAGE_SHARD_ROWS,
            dtype="uint8",
            shape=images.images.shape[1:],
            inputs={"data": self.splits.fingerprint},
            details={"layout": ["height", "width", "channel"]},
        )
        return ShardSet.open(folder, spec)

    def evaluation_labels(self, ids: range) -> Tensor:
        """The class, or the prompt, of each sample that is measured."""
        if self.vocabulary is not None:
            return self.vocabulary.evaluation_labels(ids)
        return class_labels(self.recipe.seed, self.teacher.num_classes, ids)

    # Who makes them

    def trajectory_maker(self) -> MakerOn:
        recipe = self.recipe
        return partial(
            TrajectoryMaker,
            shards=self.trajectories,
            config=recipe.precompute,
            teacher=recipe.teacher,
            seed=recipe.seed,
            prompts=self.prompts,
        )

    def latent_maker(self, latents: ShardSet) -> InParts:
        recipe, images = self.recipe, self.splits.train.images
        travels = isinstance(images, LazyPixels) or not recipe.precompute.num_actors
        return latent_parts(
            latents,
            config=recipe.precompute,
            teacher=recipe.teacher,
            images=images if travels else recipe.data,
            labels=self.image_labels,
        )

    def prompt_maker(self, prompts: ShardSet, vocabulary: Vocabulary) -> MakerOn:
        recipe = self.recipe
        return partial(
            PromptMaker,
            shards=prompts,
            config=recipe.precompute,
            teacher=recipe.teacher,
            vocabulary=vocabulary,
        )
