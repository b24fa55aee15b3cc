"""Teacher trajectories, made once: (sample id, label) to the dense path from noise to data, as Parquet shards.

Ray Data streams blocks of sample ids through an actor pool that holds the teacher. One block is one shard, committed by
the actor that made it, so a kill loses only the shards in flight; a restart makes what is missing.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from hd_core.random import fold_in, sample_labels, sample_noise
from hd_core.solvers import SOLVERS, analytical_first, trajectory
from hd_core.times import GridConfig
from hd_core.types import Condition
from pipelines.process import WORKER_ENVIRONMENT, default_device, prepare_process
from pipelines.shards import Shard, ShardSet, ShardSetSpec, write_shard
from pipelines.teachers import Teacher, TeacherConfig, load_teacher

Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig:
    """The teacher trajectories that training reads."""

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
    """How states are stored."""
    shard_rows: int = 1024
    """Trajectories per file: the unit that is committed, and that a restart makes again."""
    batch_size: int = 512
    """Trajectories that the teacher solves at once."""
    num_actors: int = 2
    """Teachers that work side by side."""
    cpus_per_actor: float = 1.0
    """CPUs that each of them gets."""
    gpus_per_actor: float = 0.0
    """GPUs that each of them gets; may be a fraction."""

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}; given {self.solver!r}")
        for name in ("num_samples", "intervals", "shard_rows", "batch_size", "num_actors"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; given {getattr(self, name)}")
        if not 0 <= self.null_share <= 1:
            raise ValueError(f"null_share must lie in [0, 1]; given {self.null_share}")
        if self.cpus_per_actor <= 0 or self.gpus_per_actor < 0:
            raise ValueError(
                "cpus_per_actor must be positive and gpus_per_actor not negative;"
                f" given {self.cpus_per_actor} and {self.gpus_per_actor}"
            )

    @property
    def calls_per_sample(self) -> int:
        """Network calls for one trajectory, without guidance."""
        return self.intervals * SOLVERS[self.solver].calls_per_step - self.afs


def trajectory_spec(
    config: PrecomputeConfig, teacher_config: TeacherConfig, teacher: Teacher, seed: int
) -> ShardSetSpec:
    """What the trajectories of a recipe are.

    Raises:
        ValueError: some are to have no class, which the teacher does not know.
    """
    if config.null_share and teacher.null_condition is None:
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
        condition = Condition(labels=labels[start : start + config.batch_size])
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


class ShardWorker:
    """A Ray Data actor: holds the teacher, turns one block of sample ids into one committed shard."""

    def __init__(
        self, folder: str, spec: ShardSetSpec, config: PrecomputeConfig, teacher: TeacherConfig, seed: int
    ) -> None:
        prepare_process(config.cpus_per_actor)
        self._folder, self._spec, self._config, self._seed = Path(folder), spec, config, seed
        device = default_device() if config.gpus_per_actor else "cpu"
        self._scale, self._teacher = teacher.guidance_scale, load_teacher(teacher).to(device)

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """The shard; or the mistake, as a value: a raised one would arrive wrapped into Ray's, without its cause."""
        try:
            return {"made": [self._commit(block)]}
        except (ValueError, OSError) as error:
            return {"made": [error]}

    def _commit(self, block: dict[str, np.ndarray]) -> Shard:
        index = int(block["sample_id"][0]) // self._spec.shard_rows
        ids, labels = self._spec.ids(index), torch.from_numpy(block["label"].copy())
        states = solve(self._teacher, self._config, self._scale, self._seed, ids, labels)
        return write_shard(self._folder, self._spec, index, block["label"], states)


def precompute(
    shards: ShardSet, config: PrecomputeConfig, teacher: TeacherConfig, seed: int, progress: Progress
) -> None:
    """Make the missing shards with Ray Data; ``progress`` is told of rows as their shard is committed.

    Raises:
        ValueError: the actors do not fit into the cluster, or the teacher's states into their dtype.
        OSError: a shard cannot be written.
    """
    for shard in _made(shards, config, teacher, seed):
        shards.commit(shard)
        progress(shard.rows)


def start_for(shards: ShardSet, config: PrecomputeConfig) -> int:
    """Start Ray, or see that it has room, for the missing shards; returns the number of actors.

    Raises:
        ValueError: the actors do not fit into the cluster.
    """
    from pipelines.cluster import ensure_ray

    count = min(config.num_actors, len(shards.missing))
    ensure_ray(reserved_cpus=count * config.cpus_per_actor, reserved_gpus=count * config.gpus_per_actor)
    return count


def _made(shards: ShardSet, config: PrecomputeConfig, teacher: TeacherConfig, seed: int) -> Iterator[Shard]:
    import ray.data

    num_actors = start_for(shards, config)
    blocks = ray.data.from_arrow([_block(shards.spec, index, seed) for index in shards.missing])
    worker = {"folder": str(shards.folder.resolve()), "spec": shards.spec, "config": config, "teacher": teacher}
    made = blocks.map_batches(
        ShardWorker,
        fn_constructor_kwargs={**worker, "seed": seed},
        batch_size=None,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor,
        runtime_env={"env_vars": WORKER_ENVIRONMENT},
    )
    for row in made.iter_rows():
        if isinstance(row["made"], Exception):
            raise row["made"]
        yield row["made"]


def _block(spec: ShardSetSpec, index: int, seed: int) -> Any:
    """Sample ids and labels of one shard, as an Arrow table: one block of the dataset."""
    import pyarrow as pa

    ids = spec.ids(index)
    return pa.table({"sample_id": np.arange(ids.start, ids.stop), "label": trajectory_labels(spec, seed, ids).numpy()})


def trajectory_labels(spec: ShardSetSpec, seed: int, ids: range) -> torch.Tensor:
    """The class of each trajectory, from its id alone; the number of classes itself is "no class"."""
    classes, share = max(1, spec.inputs["num_classes"]), spec.inputs["null_share"]
    labels = sample_labels(noise_seed(seed), ids, classes)
    if not share:
        return labels
    without = [fold_in(noise_seed(seed), "null", int(sample_id)) < share * 2**63 for sample_id in ids]
    return labels.where(~torch.tensor(without), classes)
