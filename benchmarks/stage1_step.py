"""What a training step of the first stage costs, beside plain training of the same network.

    python -m benchmarks.stage1_step [--quick]

Every variant runs through `hd_core.step.train_step` (loss, backward, AdamW and average) on the same student: plain flow
matching, which calls no teacher; `meanflow` with exact derivative and with differences; `mean_velocity`; and MeanFlow
as in the textbook, which differentiates the whole batch by `torch.func.jvp` and then runs it again with gradients. The
teacher is unguided; guidance doubles its call. Times are those of one thread's processor; the variants take turns, and
a figure is the median over the rounds of a variant's time over the plain step's in the same round.
"""

import argparse
import copy
import json
import statistics
import time
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hd_core.networks.dit import DiT, DiTConfig
from hd_core.networks.student import FlowMapStudent
from hd_core.objectives.flow_matching import FlowMatching
from hd_core.objectives.mean_velocity import MeanVelocity
from hd_core.objectives.meanflow import MeanFlow
from hd_core.objectives.turns import Batch, Cast, Objective, Terms, Turn, Turns
from hd_core.paths import expand, flatten_mean, interpolate
from hd_core.random import Draws
from hd_core.step import OptimizerConfig, Player, TrainState, train_step
from hd_core.times import GridConfig
from hd_core.types import Condition
from hd_core.weighting import adaptive
from pipelines.process import prepare_process

SIZES = {
    "digits": (DiTConfig(width=64, depth=4, heads=4), 128),
    "large": (DiTConfig(image_size=32, patch_size=4, width=96, depth=4, heads=4), 32),
}
INTERVALS = 12


@dataclass(frozen=True, kw_only=True)
class Textbook(MeanFlow):
    """MeanFlow as its listing is written: one derivative of the whole batch, then a second pass with gradients."""

    def turns(self, cast: Cast, batch: Batch, draws: Draws, step: int) -> Turns:
        yield Turn(player="student", terms=partial(self._textbook_terms, cast, batch, draws))

    def _textbook_terms(self, cast: Cast, batch: Batch, draws: Draws) -> Terms:
        assert batch.images is not None and batch.images_condition is not None
        (t, r), condition = self.pairs(draws), batch.images_condition
        x_t = interpolate(batch.images, batch.noise, t)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            v = cast.teacher(x_t, t, condition)
            tangents = (v, torch.ones_like(t), torch.zeros_like(r))
            result = torch.func.jvp(lambda x, t_, r_: cast.student(x, t_, r_, condition), (x_t, t, r), tangents)
        error = flatten_mean((cast.student(x_t, t, r, condition) - v + expand(t - r, x_t) * result[1]).square())
        return Terms(losses={"meanflow": adaptive(error, power=self.power, constant=self.constant)})


VARIANTS: dict[str, Objective] = {
    "plain": FlowMatching(label_dropout=0.0),
    "meanflow": MeanFlow(derivative="exact"),
    "meanflow_differences": MeanFlow(),
    "mean_velocity": MeanVelocity(),
    "textbook": Textbook(),
}


def batch_of(config: DiTConfig, rows: int) -> Batch:
    """Random rows: a step costs the same whatever they show."""
    shape = (config.channels, config.image_size, config.image_size)
    condition = Condition(labels=torch.randint(config.num_classes, (rows,)))
    return Batch(
        noise=torch.randn(rows, *shape),
        condition=condition,
        states=torch.randn(rows, INTERVALS + 1, *shape),
        grid=GridConfig().times(INTERVALS),
        images=torch.randn(rows, *shape),
        images_condition=condition,
    )


class Case:
    """One variant on a student of its own."""

    def __init__(self, objective: Objective, config: DiTConfig, batch: Batch) -> None:
        teacher = DiT(config).eval().requires_grad_(False)
        student = FlowMapStudent(copy.deepcopy(teacher))
        self.objective, self.batch = objective, batch
        self.cast = Cast(teacher=teacher, student=student)
        player = Player(network=student, config=OptimizerConfig(learning_rate=1e-4))
        average = copy.deepcopy(student).requires_grad_(False)
        self.state = TrainState(players={"student": player}, average=average, ema_decay=0.999)

    def seconds(self) -> float:
        """One step."""
        rows = len(self.batch.noise)
        draws = Draws(seed=self.state.step, rows=slice(0, rows), total=rows)
        started = time.process_time()
        train_step(self.state, self.objective, self.cast, self.batch, draws, progress=0.0)
        return time.process_time() - started


def ratios(size: str, rounds: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds of each variant, and its median ratio to the plain step."""
    config, rows = SIZES[size]
    torch.manual_seed(0)
    batch = batch_of(config, rows)
    cases = {name: Case(objective, config, batch) for name, objective in VARIANTS.items()}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(3 + rounds):
        for name, case in cases.items():
            times[name].append(case.seconds())
    kept = {name: measured[3:] for name, measured in times.items()}
    over = {name: [a / b for a, b in zip(kept[name], kept["plain"], strict=True)] for name in kept}
    return {name: (1000 * statistics.median(kept[name]), statistics.median(over[name])) for name in kept}


def main() -> None:
    """Time every variant at both sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    rounds = 12 if parser.parse_args().quick else 60
    prepare_process(1)
    figures: dict[str, float] = {}
    print("| size | variant | median, ms | over plain |\n|---|---|---|---|")
    for size, suffix in (("digits", "_digits"), ("large", "")):
        for name, (milliseconds, ratio) in ratios(size, rounds).items():
            print(f"| {size} | {name} | {milliseconds:.1f} | {ratio:.2f} |")
            if name != "plain":
                figures[f"{name}_over_plain{suffix}"] = round(ratio, 3)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
