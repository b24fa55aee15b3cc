"""Networks, optimisers and average of a stage at step 0, and the cast that its objective calls."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hd_core.networks.awd import AdaptiveWeightedDiscriminator
from hd_core.networks.features import FeatureTaps
from hd_core.networks.student import FlowMapStudent
from hd_core.objectives.turns import Cast, PlayerName
from hd_core.random import fold_in
from hd_core.step import Player, TrainState
from pipelines.checkpoints import load_weights
from pipelines.stages import StageJob
from pipelines.teachers import Teacher


def build(job: StageJob, teacher: Teacher) -> tuple[TrainState, Cast]:
    """Networks, optimisers and average of a stage at step 0, and the cast that its objective calls."""
    stage, dtype = job.stage, job.train.autocast
    with _seeded(job, "student"):  # its interval embedding is new
        networks: dict[PlayerName, nn.Module] = {"student": FlowMapStudent(copy.deepcopy(teacher.backbone))}
    if job.start_weights:
        load_weights(Path(job.start_weights), networks["student"])
    if "fake_score" in stage.objective.players:
        networks["fake_score"] = copy.deepcopy(teacher.backbone)
    features = None
    if "discriminator" in stage.objective.players:
        networks["discriminator"], features = _discriminator(job, teacher)
    for network in networks.values():
        network.to(teacher.device)
    optimizers = {name: getattr(stage.optimizers, name) for name in networks}
    average = copy.deepcopy(networks["student"]).eval().requires_grad_(False)
    state = TrainState(
        players={name: Player(network=network, config=optimizers[name]) for name, network in networks.items()},
        average=average,
        ema_decay=stage.ema_decay,
    )
    cast = Cast(
        teacher=in_precision(teacher.velocity(job.teacher.guidance_scale), dtype),
        student=in_precision(networks["student"], dtype),
        fake_score=in_precision(networks["fake_score"], dtype) if "fake_score" in networks else None,
        discriminator=networks.get("discriminator"),
        features=features,
    )
    return state, cast


def _discriminator(job: StageJob, teacher: Teacher) -> tuple[nn.Module, FeatureTaps]:
    layers = job.stage.discriminator.layers
    taps = FeatureTaps(teacher.backbone, teacher.blocks, layers)
    widths = {teacher.feature_widths[layer] for layer in layers}
    if len(widths) > 1:
        raise ValueError(f"stage {job.name}: tapped layers {list(layers)} have different widths {sorted(widths)}")
    with _seeded(job, "discriminator"):
        return AdaptiveWeightedDiscriminator(widths.pop(), job.stage.discriminator), taps


@contextmanager
def _seeded(job: StageJob, network: PlayerName) -> Iterator[None]:
    """New weights come from the stage and the seed, so that every worker and every restart has the same."""
    with torch.random.fork_rng():
        torch.manual_seed(fold_in(job.seed, "stage", job.name, network))
        yield


def in_precision(network: Callable[..., Tensor], autocast: str) -> Callable[..., Tensor]:
    """The network with its products in bfloat16 where that is asked for; what it returns is float32."""
    if autocast == "none":
        return network

    def reduced(x: Tensor, *rest: Any) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return network(x, *rest).float()

    return reduced
