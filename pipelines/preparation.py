"""What training reads, made before it: text embeddings, pixels, latents, trajectories."""

import numpy as np

from hd_core.guidance import branches
from pipelines.cluster import is_running, stop_ray
from pipelines.costs import ShardBill
from pipelines.data import ImageSet
from pipelines.phases import Phases
from pipelines.production import Made, produce, start_for
from pipelines.progress import Counter
from pipelines.shards import ShardSet, write_shard


class Preparation(Phases):
    """Makes the shard sets of a run, each as far as it is not there."""

    def prepare_shards(self) -> None:
        """Text embeddings, real images, latents and trajectories, as far as this run reads them."""
        needs = {need for stage in self.recipe.stages.values() for need in stage.objective.needs}
        before = is_running()
        if self.prompts and self.vocabulary:
            self._make("prompts", self.prompts, self.prompt_maker(self.prompts, self.vocabulary), "prompts")
        self.write_images()
        if self.latents and "images" in needs:
            self._make("latents", self.latents, self.latent_maker(self.latents), "latents")
        if "trajectories" in needs:
            self._make("precompute", self.trajectories, self.trajectory_maker(), "teacher trajectories")
        if is_running() and not (before or self.recipe.train.num_workers or self._streams()):
            with self.phase("ray stop"):
                stop_ray()

    def _make(self, phase: str, shards: ShardSet, maker: Made, what: str) -> None:
        """Make a set's missing and damaged shards, or find it whole."""
        for file in shards.mend():
            self.say(f"[yellow]shard {file} is missing or damaged (its hash does not fit): making it again[/]")
        if shards.complete:
            self.record(phase, 0.0, reused=True)
            return
        actors = self.recipe.precompute.actors
        if actors.count and not is_running():
            with self.phase("ray start"):
                start_for(shards, maker, actors)
        with self.phase(phase):
            self._produce(phase, shards, maker, what)

    def _produce(self, phase: str, shards: ShardSet, maker: Made, what: str) -> None:
        billed = ShardBill(self.bill, phase, shards, self._calls_per_row(phase))
        done = sum(shard.rows for shard in shards.shards)
        if done:
            self.say(f"{what}: {done:,} of {shards.spec.rows:,} are there; making the rest")
        with self.progress(what, shards.spec.rows) as show:
            counter = Counter(done, lambda rows: (billed.see(), show(rows)))
            show(done)
            produce(shards, maker, self.recipe.precompute.actors, counter.add)

    def _calls_per_row(self, phase: str) -> int:
        """Network calls for one row of a shard set: encoders run once."""
        if phase != "precompute":
            return 1
        return self.recipe.precompute.calls_per_sample * branches(self.recipe.teacher.guidance_scale)

    def write_images(self) -> None:
        """Real images, and what probes score against, as far as any stage reads them."""
        stages, kept = self.recipe.stages.values(), self.splits.validation
        if any(stage.needs_images for stage in stages):
            self._write_pixels(self.images, self.splits.train, self.image_labels)
        if any(stage.probe.every for stage in stages):
            if self.validation is not None and kept is not None:
                self._write_pixels(self.validation, kept, kept.labels)
            self.make_judged_by()

    def _write_pixels(self, shards: ShardSet, images: ImageSet, labels: np.ndarray) -> None:
        for file in shards.mend():
            self.say(f"[yellow]shard {file} of images is missing or damaged: writing it again[/]")
        for index in shards.missing:
            ids = shards.spec.ids(index)
            part = slice(ids.start, ids.stop)
            shards.commit(write_shard(shards.folder, shards.spec, index, labels[part], images.images[part]))

    def _streams(self) -> bool:
        return self.recipe.needs_trajectories and self.trajectories.spec.bytes > self.recipe.train.resident_bytes
