"""What is run: sketches of several widths, and refinement of one small width from three starts."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from examples.theory.measures import Measures, measure
from examples.theory.networks import Correction, Members
from examples.theory.target import SHAPE, RingOfRings, flow_ends
from examples.theory.training import Pairs, Refinement, draw, refine, sketch, velocity_network
from hd_core.objectives.adversarial import Adversarial
from hd_core.objectives.dmd import DMD
from hd_core.random import generator
from hd_core.step import OptimizerConfig

STARTS = ("random", "velocity network", "sketch")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes and lengths of the experiment."""

    seeds: int = 3
    """Networks of each kind."""
    widths: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    """Hidden width of the sketches; three hidden layers each."""
    sketch_steps: int = 2500
    """Iterations of a sketch."""
    small: int = 32
    """Width of the students that are refined; one of the widths."""
    fake_width: int = 64
    """Width of the fake score, which only training uses."""
    refine_steps: int = 2500
    """Iterations of the refinement."""
    looks: int = 10
    """Times that the refinement is measured after its start."""
    rows: int = 256
    """Rows of each network in a batch."""
    pairs: int = 32768
    """Ends of the exact flow that sketches learn from."""
    tests: int = 8192
    """Fresh noises that everything is measured on."""
    target: RingOfRings = field(default_factory=RingOfRings)
    """The data."""


QUICK = Setting(
    seeds=2, widths=(4, 16, 48), sketch_steps=500, small=16, fake_width=48, refine_steps=400, looks=4, rows=256,
    pairs=8192, tests=8192,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Exam:
    """What students are measured on."""

    target: RingOfRings
    noise: Tensor
    ends: Tensor
    data: Tensor

    def of(self, student: Members) -> list[Measures]:
        """Of every member."""
        return [measure(points, self.target, self.data, self.ends) for points in draw(student, self.noise)]

    @property
    def exact(self) -> Measures:
        """Of the exact flow's ends: what no student can be better than but by chance."""
        return measure(self.ends, self.target, self.data, self.ends)


@dataclass(frozen=True, kw_only=True)
class Sketched:
    """A width's sketches."""

    width: int
    parameters: int
    measures: list[Measures]
    points: np.ndarray
    """Of the first seed, ``(tests, 2)``. An array, for a tensor must not outlive the process that shares it."""


@dataclass(frozen=True, kw_only=True)
class Refined:
    """The three starts on their way."""

    steps: list[int]
    curves: dict[str, list[list[Measures]]]
    """By start: at each of the steps, every seed's."""
    before: dict[str, np.ndarray]
    """By start: points of the first seed, ``(tests, 2)``."""
    after: dict[str, np.ndarray]
    """The same after the refinement."""


def exam_of(setting: Setting) -> Exam:
    """Noises that no training saw, their exact ends and independent data."""
    noise = _noise(setting.tests, "exam")
    return Exam(
        target=setting.target,
        noise=noise,
        ends=flow_ends(setting.target, noise),
        data=setting.target.sample(setting.tests, seed=1),
    )


def pairs_of(setting: Setting) -> Pairs:
    """What sketches learn from."""
    noise = _noise(setting.pairs, "pairs")
    return Pairs(noise=noise, ends=flow_ends(setting.target, noise))


def sketched(setting: Setting, exam: Exam, pairs: Pairs, width: int) -> Sketched:
    """One width's sketches, trained and measured."""
    student = _sketch(setting, pairs, width)
    measures, points = exam.of(student), _cloud(student, exam, 0)
    return Sketched(width=width, parameters=student.parameters_each, measures=measures, points=points)


def refined(setting: Setting, exam: Exam, pairs: Pairs) -> Refined:
    """Refinement of the small width from each start, all in one training with nothing shared but the steps."""
    students, seeds = _starts(setting, pairs), setting.seeds
    network = Members(len(STARTS) * seeds, setting.fake_width, times=1, seed=5, waves=(1.5, 3.0, 6.0, 12.0))
    steps: list[int] = []
    curves: dict[str, list[list[Measures]]] = {start: [] for start in STARTS}

    def watch(step: int, student: Members) -> None:
        measures = exam.of(student)
        steps.append(step)
        for place, start in enumerate(STARTS):
            curves[start].append(measures[place * seeds : (place + 1) * seeds])

    before = {start: _cloud(students, exam, place * seeds) for place, start in enumerate(STARTS)}
    every = setting.refine_steps // setting.looks
    fake = Correction(setting.target, network)
    student = refine(students, fake, setting.target, refinement(setting), seed=7, watch=watch, every=every)
    after = {start: _cloud(student, exam, place * seeds) for place, start in enumerate(STARTS)}
    return Refined(steps=steps, curves=curves, before=before, after=after)


def refinement(setting: Setting) -> Refinement:
    """Settings of the refinement, the same for every start."""
    return Refinement(
        steps=setting.refine_steps,
        rows=setting.rows,
        objective=DMD(update_ratio=2, adversarial=Adversarial(weight=0.0)),
        student=OptimizerConfig(learning_rate=5e-4, betas=(0.0, 0.99), decay="cosine"),
        fake_score=OptimizerConfig(learning_rate=2e-3, betas=(0.0, 0.99), decay="cosine"),
    )


def _starts(setting: Setting, pairs: Pairs) -> Members:
    """Students of the small width: random, trained to be the velocity, and sketches, ``seeds`` of each."""
    seeds, width = setting.seeds, setting.small
    students = Members(len(STARTS) * seeds, width, times=2, seed=4)
    teacher = Members(seeds, width, times=2, seed=2)
    steps = setting.sketch_steps // 2
    velocity_network(teacher, setting.target, steps=steps, rows=setting.rows, rate=3e-3, seed=2)
    students.set_members(seeds, teacher)
    students.set_members(2 * seeds, _sketch(setting, pairs, width))
    return students


def _sketch(setting: Setting, pairs: Pairs, width: int) -> Members:
    student = Members(setting.seeds, width, times=2, seed=1)
    return sketch(student, pairs, steps=setting.sketch_steps, rows=setting.rows, rate=5e-3, seed=width)


def _cloud(student: Members, exam: Exam, member: int) -> np.ndarray:
    return draw(student, exam.noise)[member].flatten(1).numpy()


def _noise(rows: int, tag: str) -> Tensor:
    return torch.randn(rows, *SHAPE, generator=generator(0, tag))
