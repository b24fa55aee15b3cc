"""What a generator is worth: samples at fixed noises, features, mergeable statistics, and the metrics of them.

Samples stream block by block; a sample's noise and label come from its id alone, so every generator answers to the
same noises, and the result is the same however the blocks are spread.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hd_core.guidance import branches, guided_map
from hd_core.metrics.frechet import frechet_distance
from hd_core.metrics.prdc import precision_recall
from hd_core.metrics.statistics import Moments, merge_in_order
from hd_core.random import fold_in, sample_labels, sample_noise
from hd_core.solvers import SOLVERS, last
from hd_core.times import GridConfig, custom
from hd_core.types import Condition, FlowMap, Images
from hd_core.walk import walk
from pipelines.artifacts import ensure_same, read_json, write_arrays, write_json
from pipelines.cast import new_student
from pipelines.checkpoints import load_weights
from pipelines.data import DataSplits, to_uint8
from pipelines.features import Extractor
from pipelines.report import Row
from pipelines.teachers import Teacher

FLOW_MAP = "flow_map"
Sampler = Callable[[Images, Condition], Images]


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
    neighbours: int = 5
    """Neighbours that set the radii of precision and recall."""
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
    pictures: int = 80
    """Samples of each generator that are kept as pictures."""

    def __post_init__(self) -> None:
        if self.num_samples < 2 or self.batch_size < 1 or self.neighbours < 1 or self.pictures < 1:
            raise ValueError("num_samples must be at least 2; batch_size, neighbours and pictures at least 1")
        if not self.features or Path(self.features).name == Path(self.second_features).name:
            raise ValueError(
                "features must name a net, and second_features one of another name; given"
                f" {self.features!r} and {self.second_features!r}"
            )
        if self.neighbours >= self.num_samples:
            raise ValueError(f"neighbours must be below num_samples; given {self.neighbours} and {self.num_samples}")
        for name, values in (("step_counts", self.step_counts), ("guidance_scales", self.guidance_scales)):
            if len(set(values)) < len(values) or any(not 0 <= value < float("inf") for value in values):
                raise ValueError(f"{name}: each once, and none below 0; given {list(values)}")
        if not self.guidance_scales or 0 in self.step_counts:
            raise ValueError("guidance_scales must hold at least one, and step_counts none below 1")
        for solver, steps in self.solvers.items():
            if solver not in SOLVERS:
                raise ValueError(f"solvers: {solver!r} is not one of {', '.join(SOLVERS)}")
            if not steps or min(steps) < 1:
                raise ValueError(f"solvers.{solver}: step counts must be at least 1; given {list(steps)}")
            if len(set(steps)) < len(steps):
                raise ValueError(f"solvers.{solver}: each step count once; given {list(steps)}")
            for count in steps:
                self.grid.times(count)  # a grid of free times has its own multiples


@dataclass(frozen=True, kw_only=True)
class Generator:
    """Something to be measured."""

    label: str
    """What the report calls it."""
    stage: str
    """The stage that trained it; empty for the teacher."""
    solver: str
    """The teacher's solver; ``flow_map`` for a student."""
    grid: tuple[float, ...]
    """Times from noise to data."""
    calls_per_image: int
    """Network calls, both branches of guidance counted, and the analytical first step not."""
    train_seconds: float
    """Seconds of the stages that made it."""
    identity: str
    """Fingerprint of the network: of its weights and of what it is."""
    weights: str = ""
    """The student's weights; empty for the teacher."""
    afs: bool = False
    """Whether the first step is analytical."""
    knows_steps: bool = False
    """Whether the student is told how many steps its walk has."""
    guidance_scale: float = 1.0
    """Guidance of what was trained: of the teacher, or with which a student is sampled."""

    @property
    def key(self) -> str:
        """A file name of its own."""
        guided = f"-guided-{self.guidance_scale:g}" if self.stage and self.guidance_scale != 1 else ""
        return f"{self.stage or self.label}-{self.solver}-{self.calls_per_image}{guided}"


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


def make_sampler(generator: Generator, teacher: Teacher) -> Sampler:
    """From noise at the grid's first time to images."""
    grid = custom(generator.grid)
    if generator.solver == FLOW_MAP:
        student = guided_map(load_student(generator, teacher), teacher.null_condition, generator.guidance_scale)
        return torch.no_grad()(partial(walk, student, grid, afs=generator.afs))
    velocity, states = teacher.velocity(generator.guidance_scale), SOLVERS[generator.solver].states
    return torch.no_grad()(lambda x, condition: last(states(velocity, x, grid, condition)))


def load_student(generator: Generator, teacher: Teacher) -> FlowMap:
    """The frozen network of a generator that is a student."""
    student = new_student(teacher, knows_steps=generator.knows_steps)
    load_weights(Path(generator.weights), student)
    return student.to(teacher.device).eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Real images that nothing was trained on, as features of one net."""

    extractor: Extractor
    """The net."""
    features: np.ndarray
    moments: Moments
    real_fid: float
    """FID of the real training images against these: what a perfect generator would get."""
    halves_fid: float
    """FID of one half of the reference against the other."""

    @classmethod
    def of(cls, splits: DataSplits, extractor: Extractor) -> "Reference":
        """Features and statistics of the held-out images, and how far real images are from them."""
        features = extractor(splits.reference.images)
        half = len(features) // 2
        moments = Moments.of(features)
        return cls(
            extractor=extractor,
            features=features,
            moments=moments,
            real_fid=frechet_distance(Moments.of(extractor(splits.train.images)), moments),
            halves_fid=frechet_distance(Moments.of(features[:half]), Moments.of(features[half:])),
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
    ) -> None:
        self.config, self.teacher, self.labels = config, teacher, labels
        self.reference, self.second, self.folder, self.seed = reference, second, folder, seed
        self._against = {"reference": splits_fingerprint, "feature_net": reference.extractor.fingerprint}
        if second:  # absent without one, as in rows that were measured before there was a second net
            self._against["second_feature_net"] = second.extractor.fingerprint
        if teacher.codec:
            self._against["autoencoder"] = teacher.codec.fingerprint

    def inputs(self, generator: Generator) -> dict[str, Any]:
        """All that determines a generator's row."""
        settings = {"num_samples": self.config.num_samples, "neighbours": self.config.neighbours}
        grid = {"grid": list(generator.grid), "solver": generator.solver, "afs": generator.afs}
        grid["guidance_scale"] = generator.guidance_scale
        pictures = {"pictures": self.config.pictures, "seed": self.seed, "identity": generator.identity}
        return {**settings, **grid, **pictures, **self._against}

    def finished(self, generator: Generator) -> Row | None:
        """The row of a generator that was measured before; ``None`` too where its weights were made again since.

        Raises:
            ValueError: it was measured with other inputs.
        """
        stored = read_json(self.folder / f"{generator.key}.json")
        if stored is None or not (self.folder / stored["row"]["samples"]).is_file():
            return None
        made_with, inputs = stored["inputs"], self.inputs(generator)
        retrained = bool(generator.weights) and made_with["identity"] != generator.identity
        if retrained:  # its weights were lost and made again, and differ in the last bits: so shall its row be
            made_with = {**made_with, "identity": generator.identity}
        ensure_same(f"evaluation {generator.key}", made_with, inputs)
        row = {**stored["row"], "generator": generator.label, "train_seconds": generator.train_seconds}
        return None if retrained else Row(**row)

    def measure(self, generator: Generator, progress: Callable[[int], None] = lambda _: None) -> Row:
        """Sample, extract, compare; the row and the first pictures are kept."""
        sampler = make_sampler(generator, self.teacher)
        moments, features, second, pictures, seconds = [], [], [], [], 0.0
        for ids in self._blocks():
            started = time.perf_counter()
            images = to_uint8(self._sample(sampler, generator, ids))
            seconds += time.perf_counter() - started
            features.append(self.reference.extractor(images))
            moments.append(Moments.of(features[-1]))
            if self.second:
                second.append(Moments.of(self.second.extractor(images)))
            pictures.append(images[: max(0, self.config.pictures - ids.start)])
            progress(len(ids))
        all_features = np.concatenate(features)
        quality = precision_recall(self.reference.features, all_features, neighbours=self.config.neighbours)
        row = Row(
            generator=generator.label,
            stage=generator.stage,
            solver=generator.solver,
            nfe=generator.calls_per_image,
            guidance_scale=generator.guidance_scale,
            num_samples=len(all_features),
            fid=frechet_distance(merge_in_order(moments), self.reference.moments),
            fid_features=self.reference.extractor.name,
            precision=quality.precision,
            recall=quality.recall,
            images_per_second=len(all_features) / seconds,
            gflops_per_image=self.flops(sampler, generator) / 1e9,
            train_seconds=generator.train_seconds,
            samples=f"{generator.key}.npz",
            second_fid=frechet_distance(merge_in_order(second), self.second.moments) if self.second else None,
            second_features=self.second.extractor.name if self.second else "",
        )
        self._keep(generator, row, np.concatenate(pictures))
        return row

    def _blocks(self) -> Iterator[range]:
        total, size = self.config.num_samples, self.config.batch_size
        return (range(start, min(total, start + size)) for start in range(0, total, size))

    def _sample(self, sampler: Sampler, generator: Generator, ids: range) -> Tensor:
        noise = sample_noise(evaluation_seed(self.seed), ids, self.teacher.shape).to(self.teacher.device)
        condition = self.teacher.condition(self.labels(ids)).to(self.teacher.device)
        return self.teacher.decoded(sampler(generator.grid[0] * noise, condition))

    def flops(self, sampler: Sampler, generator: Generator) -> float:
        """Floating-point operations for one image; a multiply and its add are two."""
        # The counter does not know the fused attention of CPUs: the plain one is counted on every device.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self._sample(sampler, generator, range(1))
        return float(counter.get_total_flops())

    def _keep(self, generator: Generator, row: Row, pictures: np.ndarray) -> None:
        labels = self.labels(range(len(pictures))).numpy()
        table = self.teacher.prompts
        prompts = {} if table is None else {"prompts": np.array([table.texts[label] for label in labels])}
        write_arrays(self.folder / row.samples, images=pictures, labels=labels, **prompts)
        stored = {"inputs": self.inputs(generator), "row": asdict(row)}
        write_json(self.folder / f"{generator.key}.json", stored)


def class_labels(seed: int, classes: int, ids: range) -> Tensor:
    """The class of each sample that is measured, from its id alone."""
    return sample_labels(evaluation_seed(seed), ids, max(1, classes))


def evaluation_seed(seed: int) -> int:
    """Seed of the evaluation's noises and labels, apart from those of training."""
    return fold_in(seed, "evaluate")
