"""Networks, optimisers and average of a stage at step 0, and the cast that its objective calls."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hd_core.networks.awd import AdaptiveWeightedDiscriminator
from hd_core.networks.features import FeatureTaps
from hd_core.networks.student import FlowMapStudent
from hd_core.objectives.turns import Cast, PlayerName
from hd_core.random import fold_in
from hd_core.step import Player, TrainState
from pipelines.adapters import adapted
from pipelines.checkpoints import load_weights
from pipelines.group import ALONE, Group
from pipelines.perceptual import load_perceptual
from pipelines.sharding import split
from pipelines.stages import Sharded, StageJob, TuningConfig
from pipelines.storage import located
from pipelines.teachers import Teacher

T = TypeVar("T", Tensor, list[Tensor])


def build(job: StageJob, teacher: Teacher, group: Group = ALONE) -> tuple[TrainState, Cast]:
    """Networks, optimisers and average of a stage at step 0, and the cast that its objective calls.

    What the recipe splits among workers is split here, the teacher's own network included.

    Raises:
        ValueError: the teacher lacks what the objective asks of it.
    """
    stage, dtype = job.stage, job.train.autocast
    if getattr(stage.objective, "label_dropout", 0) and teacher.null_condition is None:
        raise ValueError(f'stage {job.name}: label_dropout needs a teacher that knows "no class"; set it to 0')
    student = _student(job, teacher)
    networks: dict[PlayerName, nn.Module] = {"student": student}
    if "fake_score" in stage.objective.players:
        networks["fake_score"] = _fake_score(job, teacher)
    features = None
    if "discriminator" in stage.objective.players:
        networks["discriminator"], features = _discriminator(job, teacher)
    for network in networks.values():
        network.to(teacher.device)
    average = frozen_copy(student)
    if job.train.gradient_checkpointing:
        _checkpoint(student.backbone, *([networks["fake_score"]] if "fake_score" in networks else []))
    start = frozen_copy(student) if "start" in stage.objective.needs else None
    _split(job, group, {"student": [student, average, start], "teacher": [teacher.backbone]}, networks, features)
    optimizers = {name: getattr(stage.optimizers, name) for name in networks}
    state = TrainState(
        players={name: Player(network=network, config=optimizers[name]) for name, network in networks.items()},
        average=average,
        ema_decay=stage.ema_decay,
    )
    cast = Cast(
        teacher=in_precision(teacher.velocity(job.guidance_scale), dtype),
        student=in_precision(networks["student"], dtype),
        fake_score=in_precision(networks["fake_score"], dtype) if "fake_score" in networks else None,
        discriminator=networks.get("discriminator"),
        features=None if features is None else in_precision(features, dtype),
        start=None if start is None else in_precision(start, dtype),
        perceptual=load_perceptual(job.perceptual, teacher.device).distance if job.perceptual else None,
        null_condition=None if teacher.null_condition is None else teacher.null_condition.to(teacher.device),
        mean=group.mean,
        lockstep=job.train.strategy == "fsdp",
    )
    return state, cast


def _split(
    job: StageJob,
    group: Group,
    named: dict[Sharded, list[nn.Module | None]],
    players: dict[PlayerName, nn.Module],
    features: FeatureTaps | None,
) -> None:
    """Split what the recipe says among the workers, before optimisers take hold of its parameters."""
    named = {**named, "fake_score": [players.get("fake_score")]}
    for name, networks in named.items():
        for network in networks if job.train.splits(name) else []:
            if network is not None:
                split(network, group.size, tapped=name == "teacher")
    if features is not None:
        features.stops_early = not job.train.splits("teacher")


def _student(job: StageJob, teacher: Teacher) -> FlowMapStudent:
    with _seeded(job, "student"):  # its embeddings are new
        student = new_student(teacher, knows_steps=job.start_knows_steps)
        if job.start_weights:
            load_weights(located(job.start_weights), student)
        if job.stage.step_counts and not job.start_knows_steps:
            student.learn_steps(job.stage.step_embedding)
        student.backbone = _moving(student.backbone, job.stage.student)
    return student


def new_student(teacher: Teacher, *, knows_steps: bool = False) -> FlowMapStudent:
    """A student that is its teacher, with the embeddings that weights to be loaded have."""
    student = FlowMapStudent(copy.deepcopy(teacher.backbone).requires_grad_(True))
    if knows_steps:
        student.learn_steps("zero")
    return student


def frozen_copy(network: nn.Module) -> nn.Module:
    """A copy that never moves."""
    return copy.deepcopy(network).eval().requires_grad_(False)


def _fake_score(job: StageJob, teacher: Teacher) -> nn.Module:
    with _seeded(job, "fake_score"):
        return _moving(copy.deepcopy(teacher.backbone), job.stage.fake_score)


def _moving(backbone: nn.Module, config: TuningConfig) -> nn.Module:
    """A network of which all moves, or adapters alone."""
    if config.kind == "full":
        return backbone.requires_grad_(True)
    return adapted(backbone, config.rank, config.alpha)


def _discriminator(job: StageJob, teacher: Teacher) -> tuple[nn.Module, FeatureTaps]:
    layers = job.stage.discriminator.layers
    taps = FeatureTaps(teacher.backbone, teacher.blocks, layers)
    widths = [teacher.feature_widths[layer] for layer in layers]
    with _seeded(job, "discriminator"):
        return AdaptiveWeightedDiscriminator(widths, job.stage.discriminator), taps


def _checkpoint(*backbones: Any) -> None:
    for backbone in backbones:
        backbone.checkpoint_blocks()


@contextmanager
def _seeded(job: StageJob, network: PlayerName) -> Iterator[None]:
    """New weights come from the stage and the seed, so that every worker and every restart has the same."""
    with torch.random.fork_rng():
        torch.manual_seed(fold_in(job.seed, "stage", job.name, network))
        yield


def in_precision(network: Callable[..., T], autocast: str) -> Callable[..., T]:
    """The network with its products in bfloat16 where that is asked for; tensors that it returns are float32."""
    if autocast == "none":
        return network

    def reduced(x: Tensor, *rest: Any) -> Any:
        with torch.autocast(x.device.type, torch.bfloat16):
            found: Any = network(x, *rest)
        return found.float() if isinstance(found, Tensor) else [part.float() for part in found]

    return reduced
