"""Teacher trajectories, made once: (sample id, label) to the dense path from noise to data, as Parquet shards."""

from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
import torch

from hd_core.random import fold_in, sample_labels, sample_noise
from hd_core.solvers import SOLVERS, analytical_first, trajectory
from hd_core.times import GridConfig
from pipelines.production import Actors
from pipelines.shards import Shard, ShardSet, ShardSetSpec, write_shard
from pipelines.teachers import Teacher, TeacherConfig, load_teacher


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig:
    """What is made once and read by training: the teacher's trajectories, latents and text embeddings."""

    num_samples: int = 8192
    """Trajectories."""
    intervals: int = 12
    """Solver steps of each; every state is stored, so that students on any coarser nested grid can be trained."""
    grid: GridConfig = field(default_factory=GridConfig)
    """How the times are spread."""
    solver: str = "dpmpp_3m"
    """The teacher's solver."""
    afs: bool = False
    """Analytical first step of the teacher: its first call is computed without the network."""
    null_share: float = 0.0
    """Share of trajectories of "no class", which a student needs that is to be guided when it is sampled."""
    dtype: Literal["float16", "float32"] = "float16"
    """How states, latents and text embeddings are stored."""
    prompts: str = ""
    """File of the prompts to train on, for a teacher of text (txt, tsv, csv, jsonl or parquet); empty: the captions of
    the training images."""
    flip: bool = False
    """Latents of the mirrored images too, as a second set of rows."""
    shard_rows: int = 1024
    """Rows per file: the unit that is committed, and that a restart makes again."""
    batch_size: int = 512
    """Rows that a network takes at once."""
    num_actors: int | tuple[int, int] = 2
    """Processes that work side by side, each with a network of its own, or the fewest and the most; 0: this process,
    without Ray."""
    cpus_per_actor: float = 1.0
    """CPUs that each of them gets."""
    gpus_per_actor: float = 0.0
    """GPUs that each of them gets; may be a fraction."""

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}; given {self.solver!r}")
        for name in ("num_samples", "intervals", "shard_rows", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; given {getattr(self, name)}")
        if not 0 <= self.null_share <= 1:
            raise ValueError(f"null_share must lie in [0, 1]; given {self.null_share}")
        _ = self.actors  # checks them

    @property
    def calls_per_sample(self) -> int:
        """Network calls for one trajectory, without guidance."""
        return self.intervals * SOLVERS[self.solver].calls_per_step - self.afs

    @property
    def actors(self) -> Actors:
        """Who makes the shards."""
        return Actors(count=self.num_actors, cpus=self.cpus_per_actor, gpus=self.gpus_per_actor)


def trajectory_spec(
    config: PrecomputeConfig, teacher_config: TeacherConfig, teacher: Teacher, seed: int, prompts: str = ""
) -> ShardSetSpec:
    """What the trajectories of a recipe are. ``prompts`` is the fingerprint of their texts' embeddings, if any.

    Raises:
        ValueError: some are to have no class, which the teacher does not know.
    """
    if config.null_share and not teacher.knows_null:
        raise ValueError('precompute.null_share needs a teacher that knows "no class"; set it to 0')
    grid = config.grid.times(config.intervals)
    return ShardSetSpec(
        kind="trajectories",
        rows=config.num_samples,
        shard_rows=config.shard_rows,
        dtype=config.dtype,
        shape=(config.intervals + 1, *teacher.shape),
        inputs={
            "teacher": teacher.fingerprint,
            "guidance_scale": teacher_config.guidance_scale,
            "solver": config.solver,
            "afs": config.afs,
            "null_share": config.null_share,
            "grid": asdict(config.grid),
            "seed": seed,
            "num_classes": teacher.num_classes,
            **({"prompts": prompts} if prompts else {}),
        },
        details={"times": grid.tolist(), "layout": ["point", "channel", "height", "width"]},
    )


@torch.no_grad()
def solve(
    teacher: Teacher, config: PrecomputeConfig, guidance_scale: float, seed: int, ids: range, labels: torch.Tensor
) -> np.ndarray:
    """The trajectories of some samples, ``(len(ids), points, c, h, w)`` in the stored dtype.

    Raises:
        ValueError: a state is not finite, or does not fit into the stored dtype.
    """
    grid, solver = config.grid.times(config.intervals), SOLVERS[config.solver]
    velocity, device = teacher.velocity(guidance_scale), teacher.device
    if config.afs:
        velocity = analytical_first(velocity, grid[0].item())
    parts: list[np.ndarray] = []
    for start in range(0, len(ids), config.batch_size):
        some = ids[start : start + config.batch_size]
        x = grid[0].item() * sample_noise(noise_seed(seed), some, teacher.shape)
        condition = teacher.condition(labels[start : start + config.batch_size])
        states = trajectory(solver.states(velocity, x.to(device), grid, condition.to(device)))
        if not states.abs().amax() <= np.finfo(config.dtype).max:
            raise ValueError(_unfit(states, some, config.dtype))
        parts.append(states.cpu().numpy().astype(config.dtype))
    return np.concatenate(parts)


def _unfit(states: torch.Tensor, ids: range, dtype: str) -> str:
    where = f"the teacher's trajectories of samples {ids.start} to {ids.stop - 1}"
    if not states.isfinite().all():
        return f"{where} are not finite: check the teacher, its solver and its guidance_scale"
    return f"{where} lie outside the range of {dtype}: set precompute.dtype=float32"


def noise_seed(seed: int) -> int:
    """The seed of the trajectories' starting noise, from which any row's noise can be made again."""
    return fold_in(seed, "trajectories")


class TrajectoryMaker:
    """Holds the teacher, and makes shards of its trajectories."""

    def __init__(
        self,
        device: str,
        *,
        shards: ShardSet,
        config: PrecomputeConfig,
        teacher: TeacherConfig,
        seed: int,
        prompts: ShardSet | None = None,
    ) -> None:
        self._shards, self._config, self._seed = shards, config, seed
        self._scale, self._teacher = teacher.guidance_scale, load_teacher(teacher, prompts).to(device)

    def shard(self, index: int) -> Shard:
        """Solve and commit one shard."""
        spec = self._shards.spec
        ids = spec.ids(index)
        labels = trajectory_labels(spec, self._seed, ids)
        states = solve(self._teacher, self._config, self._scale, self._seed, ids, labels)
        return write_shard(self._shards.folder, spec, index, labels.numpy(), states)


def trajectory_labels(spec: ShardSetSpec, seed: int, ids: range) -> torch.Tensor:
    """The class of each trajectory, from its id alone; the number of classes itself is "no class"."""
    classes, share = max(1, spec.inputs["num_classes"]), spec.inputs["null_share"]
    labels = sample_labels(noise_seed(seed), ids, classes)
    if not share:
        return labels
    without = [fold_in(noise_seed(seed), "null", int(sample_id)) < share * 2**63 for sample_id in ids]
    return labels.where(~torch.tensor(without), classes)
