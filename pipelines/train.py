"""Training on Ray Train: one worker loop for every objective, in this process or in a group of workers."""

import copy
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hd_core.networks.awd import AdaptiveWeightedDiscriminator, AWDConfig
from hd_core.networks.features import FeatureTaps
from hd_core.networks.student import FlowMapStudent
from hd_core.objectives.dmd import DMD
from hd_core.objectives.mean_velocity import MeanVelocity
from hd_core.objectives.sfd import SFD
from hd_core.objectives.turns import Batch, Cast, PlayerName
from hd_core.random import Draws, fold_in
from hd_core.step import OptimizerConfig, Player, TrainState, train_step
from hd_core.types import Condition
from pipelines.artifacts import atomic_path, ensure_same, file_hash, read_json, write_json
from pipelines.batches import BatchPlan, resident, streamed
from pipelines.checkpoints import load_latest, load_weights, remove_checkpoints, save_checkpoint, save_weights
from pipelines.data import to_model
from pipelines.process import WORKER_ENVIRONMENT, default_device, prepare_process
from pipelines.shards import Rows, ShardSet
from pipelines.teachers import Teacher, TeacherConfig, load_teacher

Logged = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class PlayersConfig:
    """How each player moves."""

    student: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The generator that is trained."""
    fake_score: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The network that follows the generator's distribution."""
    discriminator: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The token-weighted heads."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One training stage."""

    start: str = "teacher"
    """What the student's weights start from: the teacher, or an earlier stage."""
    label: str = ""
    """What the report calls its generator; empty: the stage's own name."""
    objective: MeanVelocity | DMD | SFD
    """The method, by its ``name``."""
    num_steps: int = 500
    """Iterations."""
    batch_size: int = 128
    """Rows of the global batch, whatever the number of workers."""
    ema_decay: float = 0.99
    """Decay of the average that is sampled and passed on."""
    optimizers: PlayersConfig = field(default_factory=PlayersConfig)
    """How each player moves."""
    discriminator: AWDConfig = field(default_factory=AWDConfig)
    """The discriminator's heads, where the objective has one."""
    log_every: int = 10
    """Iterations between points of the training curve."""
    checkpoint_every: int = 200
    """Iterations between checkpoints: what a kill can cost."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; given {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1); given {self.ema_decay}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How training is spread."""

    num_workers: int = 0
    """0: in this process, without a cluster. 1 or more: that many Ray Train workers."""
    cpus_per_worker: float = 1.0
    """CPUs of each worker, which set its threads."""
    gpus_per_worker: int = 0
    """GPUs of each worker. In this process (no workers) a GPU is used where there is one."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Precision of the networks' matrix products; parameters and losses stay float32."""
    resident_bytes: int = 2 * 2**30
    """A shard set up to this size is held in each worker's memory; a larger one streams through Ray Data."""
    max_failures: int = 3
    """Worker failures that are survived by restarting from the last checkpoint."""

    def __post_init__(self) -> None:
        if self.num_workers < 0 or self.max_failures < 0 or self.resident_bytes < 0:
            raise ValueError("num_workers, max_failures and resident_bytes must not be negative")
        if self.cpus_per_worker <= 0 or self.gpus_per_worker < 0:
            raise ValueError(
                "cpus_per_worker must be positive and gpus_per_worker not negative;"
                f" given {self.cpus_per_worker} and {self.gpus_per_worker}"
            )


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """All that a worker needs to train one stage: plain values, which travel to any machine."""

    name: str
    stage: StageConfig
    train: TrainConfig
    teacher: TeacherConfig
    seed: int
    folder: str
    """Where checkpoints, curve and weights go; the same path on every worker."""
    start_weights: str
    """Weights that the student starts from; empty: the teacher's own."""
    trajectories: ShardSet | None
    images: ShardSet | None
    inputs: dict[str, Any]
    """What determines the result; a checkpoint from other inputs is refused."""

    @property
    def data(self) -> list[ShardSet]:
        """The shard sets that the objective reads."""
        return [shards for shards in (self.trajectories, self.images) if shards is not None]

    @property
    def checkpoints(self) -> Path:
        return Path(self.folder) / "checkpoints"

    @property
    def weights(self) -> Path:
        return Path(self.folder) / "student.safetensors"

    @property
    def manifest(self) -> Path:
        return Path(self.folder) / "stage.json"

    @property
    def curve(self) -> Path:
        return Path(self.folder) / "metrics.jsonl"

    def finished(self) -> dict[str, Any] | None:
        """The stage's manifest, if the stage is done and whole.

        Raises:
            ValueError: it was made from other inputs.
        """
        manifest = read_json(self.manifest)
        if manifest is None:
            return None
        ensure_same(f"stage {self.name} in {self.folder}", manifest["inputs"], self.inputs)
        whole = self.weights.is_file() and file_hash(self.weights) == manifest["sha256"]
        return manifest if whole else None


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Whom to tell how training goes; called on the first worker only."""

    progress: Callable[[int], None] = lambda _step: None
    logged: Callable[[int, Logged], None] = lambda _step, _values: None
    note: Callable[[str], None] = lambda _text: None
    done: Callable[[], object] = lambda: None
    """The stage is trained, or stops for good in this process: what waits to be told can be told now."""


def train_stage(job: StageJob, watch: Callable[[], Watch] = Watch) -> None:
    """Train one stage to its end, from its last checkpoint where there is one.

    ``watch`` is called on the first worker, which may be another process, to make its `Watch`.

    Raises:
        ValueError: the stage cannot be trained as it is asked for; found before any worker starts where possible.
        FloatingPointError: it diverged.
    """
    from ray.train import FailureConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipelines.cluster import ensure_ray, quiet

    quiet()
    check(job)
    workers = job.train.num_workers
    if workers:
        ensure_ray(reserved_cpus=workers * job.train.cpus_per_worker, reserved_gpus=workers * job.train.gpus_per_worker)
    storage = (Path(job.folder) / "ray").resolve()
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config={"job": job, "watch": watch},
        torch_config=TorchConfig(backend="nccl" if job.train.gpus_per_worker else "gloo"),
        scaling_config=_scaling(job.train),
        run_config=RunConfig(
            name=f"train-{time.time_ns()}",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=job.train.max_failures),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
        ),
    )
    try:
        mistake = _fit(trainer)
    finally:
        shutil.rmtree(storage, ignore_errors=True)  # Ray's own record of the workers; the stage's folder is the truth
    if mistake:
        raise mistake


def check(job: StageJob) -> None:
    """See that the batches of a stage can be made.

    Raises:
        ValueError: the global batch does not divide among the workers, or is larger than the data.
    """
    group = Group(size=max(1, job.train.num_workers))
    try:
        group.rows(job.stage.batch_size)
        for shards in job.data:
            batch_plan(job, shards)
    except ValueError as error:
        raise ValueError(f"stage {job.name}: {error}") from None


def _fit(trainer: Any) -> Exception | None:
    """Run the workers; returns a mistake of the user's that they found together.

    Raises:
        ValueError, FloatingPointError, OSError: what a single worker raised, out of Ray's own exception.
    """
    from ray.train import TrainingFailedError

    try:
        with _interruptible():
            return trainer.fit().return_value
    except TrainingFailedError as error:
        failures = getattr(error, "worker_failures", {})
        for failure in failures.values():
            if isinstance(failure, ValueError | FloatingPointError | OSError):
                raise failure from error
        raise  # its message holds every worker's traceback


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is a `KeyboardInterrupt`: Ray's handler would end the process as if all were well, and stays for good."""
    here = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if here:
            signal.signal(signal.SIGINT, before)


def _scaling(train: TrainConfig) -> Any:
    from ray.train import ScalingConfig

    if not train.num_workers:
        return ScalingConfig(num_workers=0)
    resources = {"CPU": train.cpus_per_worker} | ({"GPU": train.gpus_per_worker} if train.gpus_per_worker else {})
    return ScalingConfig(
        num_workers=train.num_workers, use_gpu=train.gpus_per_worker > 0, resources_per_worker=resources
    )


def _train_loop(config: dict[str, Any]) -> Exception | None:
    """One worker's life. A mistake of the user's is returned, since Ray would try again after a raised one."""
    job: StageJob = config["job"]
    group = Group.current()
    prepare_process(job.train.cpus_per_worker if job.train.num_workers else None)
    watch = config["watch"]() if group.rank == 0 else Watch()
    try:
        trainer, mistake = StageTrainer(job, group, watch), None
        trainer.restore()
    except ValueError as error:
        trainer, mistake = None, error
    mistake = group.first(mistake)  # a worker that left alone would keep the others waiting
    try:
        if trainer is not None and mistake is None:
            trainer.run()
    except FloatingPointError as error:  # found in averages, hence by all workers at once
        mistake = error
    watch.done()
    return mistake


@dataclass(frozen=True, kw_only=True)
class Group:
    """The workers that train together."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "Group":
        """This worker's place, as Ray Train tells it."""
        from ray.train import get_context

        context = get_context()
        return cls(rank=context.get_world_rank(), size=context.get_world_size())

    def rows(self, batch_size: int) -> slice:
        """This worker's rows of a global batch.

        Raises:
            ValueError: the batch does not divide among the workers.
        """
        if batch_size % self.size:
            raise ValueError(f"batch_size {batch_size} does not divide among {self.size} workers")
        share = batch_size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def average(self, tensors: list[Tensor]) -> None:
        """Average tensors over the workers, in place, as one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        flat /= self.size
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def first(self, found: Exception | None) -> Exception | None:
        """What the first worker that found something found; the same on every worker."""
        if self.size == 1:
            return found
        everyone: list[Exception | None] = [None] * self.size
        torch.distributed.all_gather_object(everyone, found)
        return next(filter(None, everyone), None)

    def wait(self) -> None:
        """Return when every worker has come here."""
        if self.size > 1:
            torch.distributed.barrier()


def _device(train: TrainConfig) -> str:
    if train.num_workers and not train.gpus_per_worker:
        return "cpu"
    return default_device()


class StageTrainer:
    """The worker loop of one stage."""

    def __init__(self, job: StageJob, group: Group, watch: Watch) -> None:
        self.job, self.group, self.watch = job, group, watch
        self.rows = group.rows(job.stage.batch_size)
        self.device = _device(job.train)
        self.teacher = load_teacher(job.teacher).to(self.device)
        self.state, self.cast = build(job, self.teacher)
        self.recent = _Recent()

    def restore(self) -> None:
        """Go to the last whole checkpoint, if there is one.

        Raises:
            ValueError: it was made from other inputs.
        """
        damaged = load_latest(self.job.checkpoints, self.state, self.job.inputs)
        if damaged:
            self.watch.note(f"stage {self.job.name}: damaged checkpoint {', '.join(damaged)} passed over")

    def run(self) -> None:
        """Train to the end, then leave the average behind as the stage's result."""
        curve = Curve(self.job.curve, self.state.step) if self.group.rank == 0 else None
        feed = Feed(self.job, self.teacher, self.rows, self.state.step)
        before, started = curve.seconds if curve else 0.0, time.perf_counter()
        self.watch.progress(self.state.step)
        for batch in feed.batches(self.job.stage.num_steps):
            self._iterate(batch.to(self.device), curve, lambda: before + time.perf_counter() - started)
        if self.group.rank == 0:
            self._finish(before + time.perf_counter() - started)
        self.group.wait()

    def _iterate(self, batch: Batch, curve: "Curve | None", seconds: Callable[[], float]) -> None:
        stage, step = self.job.stage, self.state.step
        draws = Draws(seed=step_seed(self.job, step), rows=self.rows, total=stage.batch_size, device=self.device)
        logged = train_step(
            self.state,
            stage.objective,
            self.cast,
            batch,
            draws,
            progress=step / stage.num_steps,
            synchronise=self.group.average,
        )
        self.recent.add(logged)
        done, last = self.state.step, self.state.step == stage.num_steps
        checkpoint = done % stage.checkpoint_every == 0 and not last
        if done % stage.log_every == 0 or checkpoint or last or done == 1:
            self._log(done, curve, seconds)
        if checkpoint and self.group.rank == 0:
            save_checkpoint(self.job.checkpoints, self.state, self.job.inputs)
        self.watch.progress(done)

    def _log(self, step: int, curve: "Curve | None", seconds: Callable[[], float]) -> None:
        means = self.recent.means()
        values = torch.stack(list(means.values()))
        self.group.average([values])
        numbers = dict(zip(means, values.tolist(), strict=True))
        bad = [name for name, value in numbers.items() if value != value or abs(value) == float("inf")]
        if bad:
            raise FloatingPointError(
                f"stage {self.job.name} diverged: {', '.join(bad)} is not finite at step {step}. The last checkpoint is"
                " kept; a lower learning rate or max_grad_norm usually helps"
            )
        if curve:
            curve.add(step, {**numbers, "seconds": seconds()})
            self.watch.logged(step, numbers)

    def _finish(self, seconds: float) -> None:
        sha256 = save_weights(self.job.weights, self.state.average)
        result = {"inputs": self.job.inputs, "sha256": sha256, "train_seconds": seconds, "steps": self.state.step}
        write_json(self.job.manifest, result)
        remove_checkpoints(self.job.checkpoints)


class _Recent:
    """Means of what was logged since the last point of the curve: some players move in some iterations only."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}

    def add(self, logged: Mapping[str, Tensor]) -> None:
        """One iteration's scalars."""
        for name, value in logged.items():
            self._values.setdefault(name, []).append(value.float())

    def means(self) -> dict[str, Tensor]:
        """The means, after which it starts anew."""
        values, self._values = self._values, {}
        return {name: torch.stack(some).mean() for name, some in sorted(values.items())}


def step_seed(job: StageJob, step: int) -> int:
    """Seed of one step's draws."""
    return fold_in(job.seed, "stage", job.name, "step", step)


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
    device = next(teacher.backbone.parameters()).device
    for network in networks.values():
        network.to(device)
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


def batch_plan(job: StageJob, shards: ShardSet) -> BatchPlan:
    """The order in which a stage reads a shard set.

    Raises:
        ValueError: the batch is larger than the data.
    """
    return BatchPlan(
        shard_sizes=tuple(shard.rows for shard in shards.shards),
        batch_size=job.stage.batch_size,
        seed=fold_in(job.seed, "stage", job.name, "order", shards.spec.kind),
    )


class Feed:
    """Batches of a stage from a step on."""

    def __init__(self, job: StageJob, teacher: Teacher, rows: slice, first_step: int) -> None:
        self.job, self.teacher, self.rows, self.first_step = job, teacher, rows, first_step

    def batches(self, last_step: int) -> Iterator[Batch]:
        """This worker's rows of each step's batch."""
        needs = self.job.stage.objective.needs
        trajectories = self._rows(self.job.trajectories, last_step) if "trajectories" in needs else None
        images = self._rows(self.job.images, last_step) if "images" in needs else None
        for step in range(self.first_step, last_step):
            batch = self._from_noise(step) if trajectories is None else self._from_trajectory(next(trajectories))
            yield batch if images is None else self._with_images(batch, next(images))

    def _rows(self, shards: ShardSet | None, last_step: int) -> Iterator[Rows]:
        assert shards is not None
        plan = batch_plan(self.job, shards)
        if shards.spec.bytes <= self.job.train.resident_bytes:
            return resident(shards, plan, self.first_step, self.rows)
        return streamed(shards, plan, self.first_step, last_step, self.rows)

    def _from_noise(self, step: int) -> Batch:
        draws = Draws(seed=step_seed(self.job, step), rows=self.rows, total=self.job.stage.batch_size)
        labels = draws.integers("labels", max(1, self.teacher.num_classes))
        return Batch(noise=draws.normal("noise", self.teacher.shape), condition=Condition(labels=labels))

    def _from_trajectory(self, rows: Rows) -> Batch:
        assert self.job.trajectories is not None
        states = torch.from_numpy(rows.values.astype("float32"))
        times = torch.tensor(self.job.trajectories.spec.details["times"], dtype=torch.float64)
        condition = Condition(labels=torch.from_numpy(rows.labels.copy()))
        return Batch(noise=states[:, 0], condition=condition, states=states, grid=times)

    def _with_images(self, batch: Batch, rows: Rows) -> Batch:
        condition = Condition(labels=torch.from_numpy(rows.labels.copy()))
        return replace(batch, images=to_model(rows.values), images_condition=condition)


class Curve:
    """The training curve: one JSON line a logged step, cut back to the checkpoint on a restart."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [line for line in self.read(path) if line["step"] <= step]
        self.seconds: float = kept[-1]["seconds"] if kept else 0.0
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))

    @staticmethod
    def read(path: Path) -> list[dict[str, float]]:
        """All whole lines of a curve."""
        lines = path.read_text().splitlines() if path.is_file() else []
        whole = [line for line in lines if line.endswith("}")]
        return [json.loads(line) for line in whole]

    def add(self, step: int, values: Logged) -> None:
        """Append one point."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def stage_inputs(
    stage: StageConfig, train: TrainConfig, upstream: dict[str, str], seed: int, name: str
) -> dict[str, Any]:
    """All that determines a stage's result."""
    settings = asdict(stage)
    for free in ("log_every", "checkpoint_every", "label", "start"):
        settings.pop(free)
    return json.loads(json.dumps({**settings, "autocast": train.autocast, "seed": seed, "name": name, **upstream}))
