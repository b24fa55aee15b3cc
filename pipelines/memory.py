"""Peak memory of a GPU in each phase of a recipe, estimated from shapes alone.

Counted are weights, gradients, the optimisers' two moments, averages, stored states and all tensors that are alive in
a forward and a backward pass. Not counted are the discriminator's heads, feature nets, batches, the workspaces of
kernels, fragmentation and what CUDA itself takes (about half a GiB).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from math import prod

import torch
from torch import nn

from hd_core.guidance import branches
from hd_core.networks.dit import ScalarEmbedding
from hd_core.objectives.dmd import DMD
from hd_core.objectives.meanflow import MeanFlow
from pipelines.architectures import Architecture
from pipelines.latents import DECODE_ROWS
from pipelines.live_bytes import Activations, decoding_bytes, inference_bytes, training_bytes
from pipelines.production import Actors
from pipelines.recipe import Recipe
from pipelines.stages import TuningConfig

_FLOAT32 = 4
_MOVING = 4 * _FLOAT32
"""Bytes of a weight that is trained: itself, its gradient and AdamW's two moments."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Peak bytes of one phase on one GPU."""

    weights: int
    """Weights of all networks, with gradients, moments and averages."""
    activations: int
    """The most of what else is alive at once."""
    checkpointed: int | None = None
    """The same with gradient checkpointing in every network; None where there is no backward pass to save for, or
    where the network cannot do it."""

    @property
    def peak(self) -> int:
        """All of it."""
        return self.weights + self.activations

    @property
    def checkpointed_peak(self) -> int | None:
        """All of it, with gradient checkpointing."""
        return None if self.checkpointed is None else self.weights + self.checkpointed


def memory(recipe: Recipe, built: Architecture) -> dict[str, Estimate]:
    """The estimates of a recipe's phases, by name and in order: precompute (where needed), stages, evaluate."""
    stages = _Stages(recipe, built)
    before = {"precompute": _precompute(recipe, built)} if recipe.needs_trajectories else {}
    trained = {name: stages.estimate(name) for name in recipe.stages}
    return {**before, **trained, "evaluate": _evaluate(recipe, built)}


def _precompute(recipe: Recipe, built: Architecture) -> Estimate:
    config = recipe.precompute
    rows = min(config.batch_size, config.shard_rows, config.num_samples)
    states = (config.intervals + 1) * rows * prod(built.shape) * _FLOAT32
    call = inference_bytes(built, rows * branches(recipe.teacher.guidance_scale))
    # The states are gathered in a list and then copied into one tensor.
    one = Estimate(weights=_frozen(built), activations=max(call + states, 2 * states))
    return _side_by_side(one, config.actors)


def _side_by_side(one: Estimate, actors: Actors) -> Estimate:
    """Of all actors that share one GPU."""
    count = min(max(1, actors.most), int(1 / actors.gpus)) if 0 < actors.gpus < 1 else 1
    return Estimate(weights=count * one.weights, activations=count * one.activations)


def _evaluate(recipe: Recipe, built: Architecture) -> Estimate:
    config = recipe.evaluate
    scales = {recipe.teacher.guidance_scale, *config.guidance_scales}
    rows = min(config.batch_size, config.num_samples)
    call = inference_bytes(built, rows * max(map(branches, scales)))
    student = max((student_parameters(recipe, name, built) for name in recipe.stages), default=0)
    decoding = decoding_bytes(built, min(rows, DECODE_ROWS))
    one = Estimate(weights=_frozen(built) + _FLOAT32 * student, activations=max(call, decoding))
    return _side_by_side(one, config.actors)


def _frozen(built: Architecture) -> int:
    """Bytes of the teacher and its autoencoder, which every phase loads."""
    return _FLOAT32 * (parameters(built.network) + parameters(built.autoencoder))


def parameters(network: nn.Module | None) -> int:
    """Parameters of a network; 0 of none."""
    return 0 if network is None else sum(parameter.numel() for parameter in network.parameters())


def student_parameters(recipe: Recipe, name: str, built: Architecture) -> int:
    """Parameters of a stage's student: the teacher's, and its embeddings."""
    embeddings = 1 + recipe.knows_steps(name)
    return parameters(built.network) + embeddings * parameters(interval_embedding(built.embedding_width))


def interval_embedding(width: int) -> nn.Module:
    """What a student has beyond its teacher, on the meta device."""
    with torch.device("meta"):
        return ScalarEmbedding(width)


class _Stages:
    """Estimates of training stages; passes that stages have in common are measured once."""

    def __init__(self, recipe: Recipe, built: Architecture) -> None:
        self.recipe, self.built = recipe, built
        autocast = recipe.train.autocast != "none"
        self._pass: Callable[..., Activations] = cache(partial(training_bytes, built, autocast=autocast))
        self._call: Callable[[int], int] = cache(partial(inference_bytes, built))

    def estimate(self, name: str) -> Estimate:
        return Estimate(
            weights=self._weights(name),
            activations=self._activations(name, checkpointing=False),
            checkpointed=self._activations(name, checkpointing=True) if self.built.can_checkpoint else None,
        )

    def _weights(self, name: str) -> int:
        stage, network = self.recipe.stages[name], self.built.network
        whole = student_parameters(self.recipe, name, self.built)
        student = _tuned(stage.student, network) + _MOVING * (whole - parameters(network))
        copies = 2 if "start" in stage.objective.needs else 1  # the average, and the frozen weights that it starts from
        fake = _tuned(stage.fake_score, network) if "fake_score" in stage.objective.players else 0
        return _frozen(self.built) + student + copies * _FLOAT32 * whole + fake

    def _activations(self, name: str, *, checkpointing: bool) -> int:
        stage = self.recipe.stages[name]
        rows = stage.batch_size // max(1, self.recipe.train.most_workers)
        teacher = self._call(rows * branches(stage.guided(self.recipe.teacher)))
        own = self._pass(rows, checkpointing=checkpointing)
        if isinstance(stage.objective, MeanFlow):  # the student's graph waits for its derivative
            return max(teacher, own.kept + self._call(rows), own.peak)
        if isinstance(stage.objective, DMD):
            return self._matching(stage.objective, rows, teacher, own, checkpointing)
        return own.peak

    def _matching(self, objective: DMD, rows: int, teacher: int, own: Activations, checkpointing: bool) -> int:
        """Where the generator moves, the graph of its samples waits for the other players' turns."""
        waiting = (objective.gradient_steps or objective.intervals - objective.afs) * own.kept
        seen = self._pass(rows, checkpointing=False, frozen=True).peak if objective.adversarial.weight else 0
        return waiting + max(own.peak, teacher, seen)


def _tuned(config: TuningConfig, network: nn.Module) -> int:
    """Bytes of a network that is trained: all of it moving, or frozen with adapters that move."""
    if config.kind == "full":
        return _MOVING * parameters(network)
    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    adapters = config.rank * sum(linear.in_features + linear.out_features for linear in linears)
    return _FLOAT32 * parameters(network) + _MOVING * adapters
