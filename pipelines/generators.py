"""Generators and how they are sampled: a teacher by its solver, a student by its walk, from noises of sample ids."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hd_core.guidance import guided_map
from hd_core.random import fold_in, sample_labels, sample_noise
from hd_core.solvers import SOLVERS, last
from hd_core.times import custom
from hd_core.types import Condition, FlowMap, Images
from hd_core.walk import walk
from pipelines.cast import new_student
from pipelines.checkpoints import load_weights
from pipelines.peers import Peer, PeerConfig
from pipelines.storage import located
from pipelines.teachers import Teacher

FLOW_MAP = "flow_map"
Sampler = Callable[[Images, Condition], Images]
Painter = Callable[[range], Tensor]


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
    peer: PeerConfig | None = None
    """What others made; its solver is ``pipeline``, and it has no grid."""
    captions: str = ""
    """Fingerprint of the prompts of given pictures; empty: not known."""

    @property
    def key(self) -> str:
        """A file name of its own."""
        guided = f"-guided-{self.guidance_scale:g}" if self.stage and self.guidance_scale != 1 else ""
        return f"{self.stage or self.label}-{self.solver}-{self.calls_per_image}{guided}"


def make_painter(generator: Generator, teacher: Teacher, seed: int, labels: np.ndarray) -> Painter:
    """From sample ids to images in [-1, 1], ``(b, c, h, w)``.

    Args:
        seed: of the run.
        labels: ``(n,)``, of all samples.
    """
    if generator.peer:
        return _peer_painter(generator.peer.load(teacher.device), teacher, seed, labels)
    sampler = make_sampler(generator, teacher)

    def paint(ids: range) -> Tensor:
        noise = sample_noise(evaluation_seed(seed), ids, teacher.shape).to(teacher.device)
        condition = teacher.condition(torch.tensor(labels[ids.start : ids.stop])).to(teacher.device)
        return teacher.decoded(sampler(generator.grid[0] * noise, condition))

    return paint


def _peer_painter(peer: Peer, teacher: Teacher, seed: int, labels: np.ndarray) -> Painter:
    def paint(ids: range) -> Tensor:
        some = labels[ids.start : ids.stop].tolist()
        return peer(ids, some, texts_of(teacher, some), evaluation_seed(seed))

    return paint


def texts_of(teacher: Teacher, labels: Sequence[int]) -> list[str] | None:
    """The prompts that labels stand for; ``None`` where the teacher reads no text."""
    return None if teacher.prompts is None else [teacher.prompts.texts[label] for label in labels]


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
    load_weights(located(generator.weights), student)
    return student.to(teacher.device).eval().requires_grad_(False)


def class_labels(seed: int, classes: int, ids: range) -> Tensor:
    """The class of each sample that is measured, from its id alone."""
    return sample_labels(evaluation_seed(seed), ids, max(1, classes))


def evaluation_seed(seed: int) -> int:
    """Seed of the evaluation's noises and labels, apart from those of training."""
    return fold_in(seed, "evaluate")
