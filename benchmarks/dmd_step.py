"""What a generator step and a fake-score step of distribution matching cost against plain training.

    python -m benchmarks.dmd_step [--quick]

Plain is forward, backward and AdamW of the same network. Iterations go through `hd_core.step.train_step`, draws and
moving average included, with the native DiT and no guidance:

    fake score       one iteration in which the generator does not move: its samples, and a step of the fake score
    generator        what an iteration costs more when the generator moves too (its samples are there already)
    discriminator    what an iteration costs more with the discriminator's step
    with AWD         the generator's step through the discriminator

All are timed in turn, round after round, in seconds of one thread's CPU, so that other jobs count for little; a figure
is the median over rounds of the round's own ratio.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from hd_core.networks.awd import AdaptiveWeightedDiscriminator, AWDConfig
from hd_core.networks.dit import DiT, DiTConfig
from hd_core.networks.features import FeatureTaps
from hd_core.networks.student import FlowMapStudent
from hd_core.objectives.adversarial import Adversarial
from hd_core.objectives.dmd import DMD
from hd_core.objectives.turns import Batch, Cast, PlayerName
from hd_core.random import Draws
from hd_core.step import OptimizerConfig, Player, TrainState, train_step
from hd_core.types import Condition
from pipelines.process import prepare_process

SIZES = {
    "": (DiTConfig(image_size=32, patch_size=4, width=96, depth=4, heads=4), 32),
    "_digits": (DiTConfig(width=64, depth=4, heads=4), 128),
}
FIGURES = ("generator", "fake_score", "generator_with_awd", "discriminator", "both")


@dataclass(kw_only=True)
class Training:
    """A stage that can be moved on by one iteration, with the generator's turn or without."""

    objective: DMD
    state: TrainState
    cast: Cast
    batch: Batch
    iteration: int = field(default=0)

    def step(self, *, generator: bool) -> None:
        """One iteration; the objective moves the generator at even steps."""
        self.state.step = self.iteration + (self.iteration % 2 != (0 if generator else 1))
        self.iteration = self.state.step + 1
        draws = Draws(seed=self.iteration, rows=slice(0, len(self.batch.noise)), total=len(self.batch.noise))
        train_step(self.state, self.objective, self.cast, self.batch, draws, progress=0.0)


def batch_of(config: DiTConfig, rows: int) -> Batch:
    """Random noise and random data."""
    shape, labels = (rows, config.channels, config.image_size, config.image_size), torch.randint(10, (rows,))
    condition = Condition(labels=labels)
    return Batch(noise=torch.randn(shape), condition=condition, images=torch.randn(shape), images_condition=condition)


def training(config: DiTConfig, rows: int, weight: float) -> Training:
    """Student and fake score from one frozen teacher, and a discriminator where the weight is above 0."""
    teacher = DiT(config)
    networks: dict[PlayerName, nn.Module] = {
        "student": FlowMapStudent(copy.deepcopy(teacher)),
        "fake_score": copy.deepcopy(teacher),
    }
    teacher.requires_grad_(False).eval()
    if weight:
        networks["discriminator"] = AdaptiveWeightedDiscriminator([config.width] * 2, AWDConfig())
    cast = Cast(
        teacher=teacher,
        student=networks["student"],  # pyright: ignore[reportArgumentType]
        fake_score=networks["fake_score"],  # pyright: ignore[reportArgumentType]
        discriminator=networks.get("discriminator"),  # pyright: ignore[reportArgumentType]
        features=FeatureTaps(teacher, list(teacher.blocks), AWDConfig().layers) if weight else None,
    )
    moving = OptimizerConfig(learning_rate=1e-4)
    players: dict[PlayerName, Player] = {name: Player(network=net, config=moving) for name, net in networks.items()}
    state = TrainState(players=players, average=copy.deepcopy(networks["student"]), ema_decay=0.99)
    objective = DMD(update_ratio=2, adversarial=Adversarial(weight=weight))
    return Training(objective=objective, state=state, cast=cast, batch=batch_of(config, rows))


def plain(config: DiTConfig, rows: int) -> Callable[[], None]:
    """A step of regression on the student's network."""
    net, batch = FlowMapStudent(DiT(config)), batch_of(config, rows)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=True)
    t = torch.rand(rows)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        (net(batch.noise, t, 0 * t, batch.condition) - batch.noise).square().mean().backward()
        optimizer.step()

    return step


def seconds(step: Callable[[], None]) -> float:
    """CPU time of one call."""
    started = time.process_time()
    step()
    return time.process_time() - started


def rounds(config: DiTConfig, rows: int, limit: float) -> list[dict[str, float]]:
    """Ratios to plain, one set a round, for about ``limit`` seconds after a first round that does not count."""
    bare, judged = training(config, rows, 0.0), training(config, rows, 0.1)
    cases: dict[str, Callable[[], None]] = {
        "plain": plain(config, rows),
        "bare": lambda: bare.step(generator=False),
        "bare_both": lambda: bare.step(generator=True),
        "judged": lambda: judged.step(generator=False),
        "judged_both": lambda: judged.step(generator=True),
    }
    measured: list[dict[str, float]] = []
    end = time.perf_counter() + limit
    while len(measured) < 4 or time.perf_counter() < end:
        measured.append({name: seconds(step) for name, step in cases.items()})
    return [ratios(one) for one in measured[1:]]


def ratios(taken: dict[str, float]) -> dict[str, float]:
    """Costs of a round as multiples of its plain step."""
    return {
        "generator": (taken["bare_both"] - taken["bare"]) / taken["plain"],
        "fake_score": taken["bare"] / taken["plain"],
        "generator_with_awd": (taken["judged_both"] - taken["judged"]) / taken["plain"],
        "discriminator": (taken["judged"] - taken["bare"]) / taken["plain"],
        "both": taken["bare_both"] / taken["plain"],
        "plain_ms": 1000 * taken["plain"],
    }


def main() -> None:
    """Time both sizes and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    prepare_process()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    figures: dict[str, float] = {}
    print("| network | plain, ms | generator | fake score | generator with AWD | discriminator | both, no AWD |")
    print("|---|---|---|---|---|---|---|")
    for suffix, (config, rows) in SIZES.items():
        measured = rounds(config, rows, 20 if options.quick else 90)
        median = {name: statistics.median(one[name] for one in measured) for name in measured[0]}
        figures |= {f"{name}_over_plain{suffix}": round(median[name], 2) for name in FIGURES}
        shape = f"{config.image_size}x{config.image_size}, {config.tokens} tokens, batch {rows}"
        cells = " | ".join(f"{median[name]:.2f}" for name in FIGURES)
        print(f"| {shape} | {median['plain_ms']:.0f} | {cells} |")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
