"""What a generator is worth: samples at fixed noises, features, mergeable statistics, and the metrics of them.

Samples stream block by block; a sample's noise and label come from its id alone, so every generator answers to the
same noises, and the result is the same however the blocks are spread.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hd_core.guidance import branches
from hd_core.metrics.clip_score import clip_score
from hd_core.metrics.frechet import frechet_estimate
from hd_core.solvers import SOLVERS
from hd_core.times import GridConfig
from pipelines.artifacts import ensure_same, plain_name, read_json, write_arrays, write_json
from pipelines.clip import Clip
from pipelines.feature_shards import (
    Draw,
    FeatureJob,
    FeatureMaker,
    FeatureMakers,
    Joined,
    feature_spec,
    read_cosines,
    read_pictures,
)
from pipelines.generators import (
    FLOW_MAP,
    Generator,
    class_labels,
    evaluation_seed,
    load_student,
    make_sampler,
    texts_of,
)
from pipelines.measures import Estimates, fid_infinity, measured, told
from pipelines.peers import PICTURES, PeerConfig
from pipelines.production import Actors, produce
from pipelines.references import Reference
from pipelines.report import Row
from pipelines.shards import ShardSet
from pipelines.storage import remove_tree
from pipelines.teachers import Teacher

__all__ = [
    "FLOW_MAP",
    "EvaluateConfig",
    "Evaluator",
    "Generator",
    "Reference",
    "class_labels",
    "evaluation_seed",
    "load_student",
    "make_sampler",
    "teacher_generators",
]


CLIP = "clip"
"""Name of what a CLIP score is by, among a row's inputs; absent where there is none."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured of every generator."""

    num_samples: int = 5000
    """Samples behind each FID."""
    batch_size: int = 500
    """Samples drawn at once."""
    features: str = "digits"
    """Feature net: digits, inception, or a folder of `hdistill features`; its name stands beside every metric."""
    second_features: str = ""
    """Another feature net, under which a second FID is measured; empty: none."""
    clip: str = ""
    """CLIP model of the CLIP score, for a teacher that reads text: a folder in transformers' format, or a name on the
    Hugging Face hub; empty: none."""
    statistics: str = ""
    """What FID is against instead of the held-out images: an npz file of mu and sigma, or one of clean-fid's sets as
    NAME/SPLIT/SIZE, such as cifar10/train/32; empty: those images."""
    neighbours: int = 5
    """Neighbours that set the radii of precision and recall."""
    pairs: int = 10_000
    """Samples, and real images, that KID, precision, recall, density and coverage compare pair by pair."""
    solvers: dict[str, tuple[int, ...]] = field(
        default_factory=lambda: {"euler": (1, 2, 4, 8, 32), "dpmpp_3m": (1, 2, 4, 5, 8, 32)}
    )
    """Solver steps at which the teacher is measured."""
    grid: GridConfig = field(default_factory=GridConfig)
    """How the teacher's times are spread."""
    step_counts: tuple[int, ...] = ()
    """Numbers of steps at which students are measured that are told of them, besides those of their training."""
    guidance_scales: tuple[float, ...] = (1.0,)
    """Guidance with which students are sampled; any but 1 calls the network twice a step."""
    peers: dict[str, PeerConfig] = field(default_factory=dict)
    """Generators of others, by the names that the table gives them."""
    pictures: int = 80
    """Samples of each generator that are kept as pictures."""
    num_actors: int | tuple[int, int] = 0
    """Processes that sample side by side, each with networks of its own, or the fewest and the most; 0: this process,
    without Ray."""
    cpus_per_actor: float = 1.0
    """CPUs that each of them gets."""
    gpus_per_actor: float = 0.0
    """GPUs that each of them gets; may be a fraction."""

    def __post_init__(self) -> None:
        if self.num_samples < 2 or self.batch_size < 1 or self.neighbours < 1 or self.pictures < 1:
            raise ValueError("num_samples must be at least 2; batch_size, neighbours and pictures at least 1")
        if not self.features or Path(self.features).name == Path(self.second_features).name:
            raise ValueError(
                "features must name a net, and second_features one of another name; given"
                f" {self.features!r} and {self.second_features!r}"
            )
        if self.neighbours >= min(self.num_samples, self.pairs):
            raise ValueError(
                "neighbours must be below num_samples and pairs; given"
                f" {self.neighbours}, {self.num_samples} and {self.pairs}"
            )
        for name, values in (("step_counts", self.step_counts), ("guidance_scales", self.guidance_scales)):
            if len(set(values)) < len(values) or any(not 0 <= value < float("inf") for value in values):
                raise ValueError(f"{name}: each once, and none below 0; given {list(values)}")
        if not self.guidance_scales or 0 in self.step_counts:
            raise ValueError("guidance_scales must hold at least one, and step_counts none below 1")
        for name in self.peers:
            if not name.replace("_", "").replace("-", "").isalnum() or name == "teacher":
                raise ValueError(f"peers: names are letters, digits, - and _, and not teacher; given {name!r}")
        for solver, steps in self.solvers.items():
            if solver not in SOLVERS:
                raise ValueError(f"solvers: {solver!r} is not one of {', '.join(SOLVERS)}")
            if not steps or min(steps) < 1:
                raise ValueError(f"solvers.{solver}: step counts must be at least 1; given {list(steps)}")
            if len(set(steps)) < len(steps):
                raise ValueError(f"solvers.{solver}: each step count once; given {list(steps)}")
            for count in steps:
                self.grid.times(count)  # a grid of free times has its own multiples
        _ = self.actors  # checks them

    @property
    def actors(self) -> Actors:
        """Who samples."""
        return Actors(count=self.num_actors, cpus=self.cpus_per_actor, gpus=self.gpus_per_actor)


def teacher_generators(config: EvaluateConfig, teacher: Teacher, guidance_scale: float) -> Iterator[Generator]:
    """The teacher at every solver and step count that is asked for."""
    for solver, counts in config.solvers.items():
        for steps in counts:
            yield Generator(
                label="teacher",
                stage="",
                solver=solver,
                grid=tuple(config.grid.times(steps).tolist()),
                calls_per_image=steps * SOLVERS[solver].calls_per_step * branches(guidance_scale),
                train_seconds=0.0,
                identity=f"{teacher.fingerprint}@{guidance_scale:g}",
                guidance_scale=guidance_scale,
            )


class Evaluator:
    """Measures generators of one teacher against one reference."""

    def __init__(
        self,
        config: EvaluateConfig,
        teacher: Teacher,
        reference: Reference,
        second: Reference | None,
        splits_fingerprint: str,
        seed: int,
        folder: Path,
        labels: Callable[[range], Tensor],
        elsewhere: Callable[..., FeatureMakers],
        clip: Clip | None = None,
    ) -> None:
        """``elsewhere`` is `load_feature_makers` with all that is the same for every recipe."""
        self.config, self.teacher, self.labels, self.elsewhere = config, teacher, labels, elsewhere
        self.reference, self.second, self.folder, self.seed = reference, second, folder, seed
        self.clip = clip
        self._against = {"reference": splits_fingerprint, "feature_net": reference.extractor.fingerprint}
        if config.statistics:
            self._against["statistics"] = reference.moments_sha256
        if second:  # absent without one, as in rows that were measured before there was a second net
            self._against["second_feature_net"] = second.extractor.fingerprint
        if teacher.codec:
            self._against["autoencoder"] = teacher.codec.fingerprint

    def inputs(self, generator: Generator) -> dict[str, Any]:
        """All that determines a generator's row."""
        config = self.config
        settings = {"num_samples": config.num_samples, "neighbours": config.neighbours, "pairs": config.pairs}
        grid = {"grid": list(generator.grid), "solver": generator.solver, "afs": generator.afs}
        grid["guidance_scale"] = generator.guidance_scale
        pictures = {"pictures": config.pictures, "seed": self.seed, "identity": generator.identity}
        return {**settings, **grid, **pictures, **self._against, **self._prompted(generator)}

    def _prompted(self, generator: Generator) -> dict[str, Any]:
        """What the CLIP score of a generator is by; nothing without CLIP, and where prompts are not known."""
        if self.clip is None or (generator.solver == PICTURES and not generator.captions):
            return {}
        given = {"captions": generator.captions} if generator.captions else {}
        return {CLIP: {"model": self.clip.fingerprint, **given}}

    def judges(self, generator: Generator) -> bool:
        """Whether a generator's row has a CLIP score."""
        return bool(self._prompted(generator))

    def finished(self, generator: Generator) -> Row | None:
        """The row of a generator that was measured before; ``None`` too where it is to be measured again.

        That is where its weights were made again since, or it has no CLIP score and one is asked for.

        Raises:
            ValueError: it was measured with other inputs.
        """
        stored = read_json(self.folder / f"{generator.key}.json")
        if stored is None or not self._samples_of(generator, stored["row"]).is_file():
            return None
        inputs = self.inputs(generator)
        made_with, row = (stored["inputs"], stored["row"]) if CLIP in inputs else _without_clip(stored)
        again: dict[str, Any] = {}
        if generator.weights and made_with["identity"] != generator.identity:
            again["identity"] = generator.identity  # made again, its weights differ in the last bits: so shall its row
        if CLIP in inputs and CLIP not in made_with:
            again[CLIP] = inputs[CLIP]  # the row is right, and lacks something
        ensure_same(f"evaluation {generator.key}", {**made_with, **again}, inputs)
        row = {**row, "generator": generator.label, "train_seconds": generator.train_seconds}
        return None if again else Row(**row)

    def _samples_of(self, generator: Generator, row: dict[str, Any]) -> Path:
        return self.folder / plain_name(row["samples"], self.folder / f"{generator.key}.json")

    def measure(
        self,
        generators: Sequence[Generator],
        progress: Callable[[int], None] = lambda _: None,
        done: Callable[[Row], None] = lambda _: None,
    ) -> list[Row]:
        """Sample, extract, compare; rows and first pictures are kept as soon as they are known, features dropped.

        Blocks that an earlier, killed process sampled are taken as they are. ``progress`` is told of samples, ``done``
        of rows, which come in any order where several processes sample.
        """
        jobs = [FeatureJob(generator=generator, shards=self.shards(generator)) for generator in generators]
        draw = Draw(
            seed=self.seed,
            labels=self.labels(range(self.config.num_samples)).numpy(),
            pictures=self.config.pictures,
        )
        here = FeatureMakers(jobs, draw, self.teacher, [net.extractor for net in self.references], self.clip)
        rows: dict[int, Row] = {}

        def finish(place: int) -> None:
            rows[place] = self._close(jobs[place], here.of(place))
            done(rows[place])

        self._sample(jobs, draw, here, finish, progress)
        return [rows[place] for place in range(len(jobs))]

    def _sample(
        self,
        jobs: Sequence[FeatureJob],
        draw: Draw,
        here: FeatureMakers,
        finish: Callable[[int], None],
        progress: Callable[[int], None],
    ) -> None:
        """Make the features that are missing; finish each generator whose features are all there."""
        if there := sum(shard.rows for job in jobs for shard in job.shards.shards):
            progress(there)
        for place, job in enumerate(jobs):
            if job.shards.complete:
                finish(place)
        joined = Joined([job.shards for job in jobs], finish)
        if joined.missing:
            elsewhere = partial(self.elsewhere, jobs=jobs, draw=draw)
            maker = elsewhere if self.config.num_actors else lambda _device: here
            produce(joined, maker, self.config.actors, progress)

    def _close(self, job: FeatureJob, maker: FeatureMaker) -> Row:
        features = np.concatenate([rows.values for rows in job.shards])
        ours, theirs = np.split(features, [self.reference.features.shape[1]], axis=1)
        cosines = read_cosines(job.shards) if self.judges(job.generator) else None
        speed, work = images_per_second(job.shards, maker), operations(maker) / 1e9
        row = self.row(job.generator, ours, theirs, cosines, images_per_second=speed, gflops_per_image=work)
        self.keep(job.generator, row, read_pictures(job.shards, self.reference.pixels, self.config.pictures))
        remove_tree(job.shards.folder.parent)
        return row

    def shards(self, generator: Generator) -> ShardSet:
        """The features of a generator's samples, as far as they are there; of each way to make them a folder."""
        some = np.concatenate([net.features[:1] for net in self.references], axis=1)
        spec = feature_spec(self.config.num_samples, self.config.batch_size, some, self.inputs(generator))
        return ShardSet.open(self.folder / f"{generator.key}-features" / spec.fingerprint[:16], spec)

    @property
    def references(self) -> list[Reference]:
        """The reference under each net."""
        return [self.reference, self.second] if self.second else [self.reference]

    def row(
        self, generator: Generator, ours: np.ndarray, theirs: np.ndarray, cosines: np.ndarray | None, **cost: Any
    ) -> Row:
        """The row of a generator, from what is known of its samples.

        Args:
            ours: ``(n, d)`` features.
            theirs: ``(n, e)``, under the second net.
            cosines: ``(n,)`` with their prompts under CLIP; ``None``: not asked for, or not known.
        """
        found = self._estimates(ours, theirs)
        if cosines is not None:
            found["clip_score"] = clip_score(cosines)
        return Row(
            generator=generator.label,
            stage=generator.stage,
            solver=generator.solver,
            nfe=generator.calls_per_image,
            guidance_scale=generator.guidance_scale,
            num_samples=len(ours),
            fid_features=self.reference.extractor.name,
            fid_infinity=fid_infinity(ours, self.reference.moments, found["fid"].value),
            train_seconds=generator.train_seconds,
            samples=f"{generator.key}.npz",
            second_features=self.second.extractor.name if self.second else "",
            **told(found),
            **cost,
        )

    def _estimates(self, ours: np.ndarray, theirs: np.ndarray) -> Estimates:
        net, config = self.reference, self.config
        known = {"neighbours": config.neighbours, "pairs": config.pairs}
        found = measured(ours, net.extractor, net.moments, net.features, **known)
        return found | {"second_fid": frechet_estimate(theirs, self.second.moments)} if self.second else found

    def keep(self, generator: Generator, row: Row, pictures: np.ndarray) -> None:
        """Write a row, and the first pictures beside it."""
        labels = self.labels(range(len(pictures))).numpy()
        texts = texts_of(self.teacher, labels.tolist())
        prompts = {} if texts is None else {"prompts": np.array(texts)}
        write_arrays(self.folder / row.samples, images=pictures, labels=labels, **prompts)
        stored = {"inputs": self.inputs(generator), "row": asdict(row)}
        write_json(self.folder / f"{generator.key}.json", stored)


def _without_clip(stored: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and values of a kept row, without a CLIP score that is not asked for now."""
    inputs = {name: value for name, value in stored["inputs"].items() if name != CLIP}
    intervals = {name: ends for name, ends in stored["row"].get("intervals", {}).items() if name != "clip_score"}
    return inputs, {**stored["row"], "clip_score": None, "intervals": intervals}


def operations(maker: FeatureMaker) -> float:
    """Floating-point operations for one image; a multiply and its add are two."""
    # The counter does not know the fused attention of CPUs: the plain one is counted on every device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        maker.samples(range(1))
    return float(counter.get_total_flops())


def images_per_second(shards: ShardSet, maker: FeatureMaker) -> float:
    """Of one maker while it samples, over the blocks whose seconds are known, or a block that is sampled for it."""
    timed = [(shard.rows, shard.seconds) for shard in shards.shards if shard.seconds]
    if not timed:  # all were adopted from a driver that died
        images, seconds = maker.block(0)
        timed = [(len(images), seconds)]
    return sum(rows for rows, _ in timed) / sum(seconds for _, seconds in timed)
