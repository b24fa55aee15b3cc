"""What a training stage is: its configuration, its files, and all that determines its result."""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from hd_core.networks.awd import AWDConfig
from hd_core.networks.student import StepStart
from hd_core.objectives.dmd import DMD
from hd_core.objectives.mean_velocity import MeanVelocity
from hd_core.objectives.meanflow import MeanFlow
from hd_core.objectives.sfd import SFD
from hd_core.random import fold_in
from hd_core.step import OptimizerConfig
from hd_core.types import Grid
from pipelines.artifacts import ensure_same, file_hash, read_json
from pipelines.later import changed
from pipelines.shards import ShardSet
from pipelines.stability import StopConfig
from pipelines.storage import located
from pipelines.teachers import TeacherConfig

Logged = dict[str, float]
Sharded = Literal["student", "fake_score", "teacher"]

FREE_STAGE_FIELDS = ("label", "log_every", "checkpoint_every", "stop")
"""Fields of a stage that change nothing of what is trained."""
FREE_PROBE_FIELDS = ("beside", "cpus", "gpus")
"""Fields of a stage's probe that change nothing of what it sees."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """When a student is looked at while it trains, and what is kept of it."""

    every: int = 0
    """Iterations between looks, the last one included; 0: never."""
    num_samples: int = 1000
    """Samples of each look, at the same noises and classes every time."""
    keep: Literal["last", "best"] = "last"
    """Which weights the stage passes on: the last, or those with the best FID of a probe. The other file stays too."""
    fake_score_moves: int = 0
    """Moves by which a copy of the fake score is trained on, to tell how far the fake score lags; 0: not measured."""
    beside: bool = False
    """Score in a task of its own, anywhere in the cluster, while workers train on; without workers it changes nothing.
    The signs of a collapse are then sought in losses and gradients alone."""
    cpus: float = 1.0
    """CPUs of that task."""
    gpus: float = 0.0
    """GPUs of that task; may be a fraction."""

    def __post_init__(self) -> None:
        if self.cpus <= 0 or self.gpus < 0:
            raise ValueError(f"cpus must be positive and gpus not negative; given {self.cpus} and {self.gpus}")
        if self.beside and self.fake_score_moves:
            raise ValueError("fake_score_moves needs the networks in training: set beside to false, or it to 0")
        if self.every < 0 or self.fake_score_moves < 0 or self.num_samples < 2:
            raise ValueError(
                "every and fake_score_moves must not be negative and num_samples at least 2; given"
                f" {self.every}, {self.fake_score_moves} and {self.num_samples}"
            )
        if self.keep == "best" and not self.every:
            raise ValueError("keep best needs probes: set every to a number of iterations")


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """What of a network moves."""

    kind: Literal["full", "lora"] = "full"
    """full: all of it. lora: low-rank adapters at its linear layers, beside frozen weights."""
    rank: int = 32
    """Rank of the adapters."""
    alpha: float = 32.0
    """Scale of the adapters, divided by their rank."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank must be at least 1 and alpha positive; given {self.rank} and {self.alpha}")


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
    objective: MeanVelocity | MeanFlow | DMD | SFD
    """The method, by its ``name``."""
    guidance_scale: float | None = None
    """Guidance of the teacher that this stage learns from; null: the recipe's teacher.guidance_scale."""
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
    student: TuningConfig = field(default_factory=TuningConfig)
    """What of the student moves; its new embeddings always do. Adapters are folded into the weights it passes on."""
    fake_score: TuningConfig = field(default_factory=TuningConfig)
    """What of the fake score moves, where the objective has one; it starts as the teacher."""
    step_embedding: StepStart = "zero"
    """Where the embedding of the number of steps starts from, in SFD-v. zero: from nothing. random: as its authors."""
    perceptual: str = ""
    """Net of the objective's perceptual distance, if any: lpips, digits, or a folder of `hdistill features`."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """When the student is looked at while it trains, and which of its weights are passed on."""
    stop: StopConfig = field(default_factory=StopConfig)
    """Signs of a collapse, which end the stage early with a message."""
    log_every: int = 10
    """Iterations between points of the training curve."""
    checkpoint_every: int = 200
    """Iterations between checkpoints: what a kill can cost."""
    later: dict[int, dict[str, float]] = field(default_factory=dict)
    """Numbers of objective, optimizers and ema_decay that change on the way, by the iteration from which they hold:
    ``{250: {objective.adversarial.weight: 0.3}}``."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; given {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1); given {self.ema_decay}")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale must be a number of at least 0, or null; given {self.guidance_scale}")
        if self.guidance_scale is not None and isinstance(self.objective, MeanVelocity | SFD):
            raise ValueError(
                f"{self.objective.name} learns from stored trajectories, which are guided by teacher.guidance_scale:"
                " leave this stage's guidance_scale out"
            )

        weight = getattr(self.objective, "perceptual_weight", 0)
        if bool(weight) != bool(self.perceptual):
            raise ValueError(
                "perceptual names the net of objective.perceptual_weight: set both or neither; given"
                f" {self.perceptual!r} and {weight}"
            )
        self._check_later()

    def _check_later(self) -> None:
        """What changes on the way must leave the same players, data and steps."""
        for step in self.later:
            if not 0 < step < self.num_steps:
                raise ValueError(f"later: iterations lie between 0 and num_steps ({self.num_steps}); given {step}")
            for what in ("players", "needs"):
                if getattr(self.at(step).objective, what) != getattr(self.objective, what):
                    raise ValueError(f"later: from {step} on the objective would have other {what}")
            if self.at(step).objective.sampling_grid().tolist() != self.objective.sampling_grid().tolist():
                raise ValueError(f"later: from {step} on the objective would have other steps")

    def at(self, step: int) -> "StageConfig":
        """The stage as it trains at an iteration: with all that has changed by then, and nothing to change later."""
        found = replace(self, later={})
        for since in sorted(self.later):
            found = changed(found, self.later[since]) if since <= step else found
        return found

    def spans(self) -> list[tuple[int, "StageConfig"]]:
        """How many iterations it trains as what, in order."""
        ends = [0, *sorted(self.later), self.num_steps]
        return [(end - start, self.at(start)) for start, end in pairwise(ends)]

    @property
    def step_counts(self) -> tuple[int, ...]:
        """Numbers of steps that its student is told of; empty where it is not told."""
        return getattr(self.objective, "step_counts", ())

    def guided(self, teacher: TeacherConfig) -> float:
        """Guidance of the teacher in this stage: its own, or the teacher's."""
        return teacher.guidance_scale if self.guidance_scale is None else self.guidance_scale

    @property
    def needs_images(self) -> bool:
        """Whether its objective or its probes read real images."""
        return "images" in self.objective.needs or self.probe.every > 0


def measured_steps(stage: StageConfig, asked: Collection[int]) -> Sequence[int | None]:
    """Numbers of steps at which a student is measured: those it is told of and those asked for, or None, its own."""
    return sorted({*stage.step_counts, *asked}) if stage.step_counts else [None]


def sampling_grid(name: str, stage: StageConfig, steps: int | None = None) -> Grid:
    """The times at which a stage's student is sampled.

    Raises:
        ValueError: a number of steps is asked for that its student does not know.
    """
    if steps is None:
        return stage.objective.sampling_grid()
    if not stage.step_counts or not isinstance(stage.objective, SFD):
        raise ValueError(f"stage {name} is sampled in its own number of steps only: its student knows no other")
    least = 1 + stage.objective.afs
    if steps < least:
        raise ValueError(f"stage {name} takes at least {least} steps; given {steps}")
    return stage.objective.grid.times(steps)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How training is spread."""

    num_workers: int | tuple[int, int] = 0
    """0: in this process, without a cluster. 1 or more: that many Ray Train workers. [least, most]: as many as the
    cluster has room for, changing as nodes come and go."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every worker holds every network, and gradients are averaged. fsdp: the networks of ``sharded`` are split
    among the workers (FSDP2)."""
    sharded: tuple[Sharded, ...] = ("student", "fake_score", "teacher")
    """What fsdp splits: student (with its average), fake_score, teacher. The rest is held whole."""
    micro_batch_size: int = 0
    """Rows that a worker computes at once; a larger share is computed in passes whose gradients add up. 0: no limit."""
    cpus_per_worker: float = 1.0
    """CPUs of each worker, which set its threads."""
    gpus_per_worker: int = 0
    """GPUs of each worker. In this process (no workers) a GPU is used where there is one."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Precision of the networks' matrix products; parameters and losses stay float32."""
    gradient_checkpointing: bool = False
    """Compute activations of student and fake score again in the backward pass: less memory, more time."""
    resident_bytes: int = 2 * 2**30
    """A shard set up to this size is held in each worker's memory; a larger one streams through Ray Data."""
    max_failures: int = 3
    """Worker failures that are survived by restarting from the last checkpoint."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept while a stage is trained."""
    resize_seconds: float = 60.0
    """How often a group of workers that may grow looks for room."""

    def __post_init__(self) -> None:
        if min(self.max_failures, self.resident_bytes, self.micro_batch_size) < 0:
            raise ValueError("max_failures, resident_bytes and micro_batch_size must not be negative")
        self._check_workers()
        if self.keep_checkpoints < 1 or self.resize_seconds <= 0:
            raise ValueError("keep_checkpoints must be at least 1 and resize_seconds positive")
        if self.cpus_per_worker <= 0 or self.gpus_per_worker < 0:
            raise ValueError(
                "cpus_per_worker must be positive and gpus_per_worker not negative;"
                f" given {self.cpus_per_worker} and {self.gpus_per_worker}"
            )

    def _check_workers(self) -> None:
        if isinstance(self.num_workers, int) and self.num_workers < 0:
            raise ValueError(f"num_workers must not be negative; given {self.num_workers}")
        if not isinstance(self.num_workers, int) and not 1 <= self.num_workers[0] <= self.num_workers[1]:
            raise ValueError(f"num_workers: [least, most] needs 1 <= least <= most; given {list(self.num_workers)}")
        if self.strategy == "fsdp" and not self.num_workers:
            raise ValueError("strategy fsdp splits networks among workers: set num_workers to at least 1")
        if len(set(self.sharded)) < len(self.sharded) or (self.strategy == "fsdp" and not self.sharded):
            raise ValueError(f"sharded names each network once, and one at least under fsdp; given {self.sharded}")

    @property
    def least_workers(self) -> int:
        """Workers without which no stage starts; 0: there are none."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """Workers that there may be at once."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    def splits(self, network: Sharded) -> bool:
        """Whether a network is split among the workers."""
        return self.strategy == "fsdp" and network in self.sharded


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """All that a worker needs to train one stage: plain values, which travel to any machine."""

    name: str
    stage: StageConfig
    train: TrainConfig
    teacher: TeacherConfig
    seed: int
    folder: str
    """Where checkpoints, curve and weights go: a path, the same on every worker, or a URL."""
    start_weights: str
    """Weights that the student starts from; empty: the teacher's own."""
    trajectories: ShardSet | None
    images: ShardSet | None
    """Real images as pixels."""
    inputs: dict[str, Any]
    """What determines the result; a checkpoint from other inputs is refused."""
    features: str = ""
    """Feature net of the probes, where there are any."""
    validation: ShardSet | None = None
    """What these score against, as pixels, where it is not ``images``."""
    judged_by: ShardSet | None = None
    """The same as features of that net."""
    perceptual: str = ""
    """Net of the perceptual distance, where there is one."""
    start_knows_steps: bool = False
    """Whether the weights that the student starts from have an embedding of the number of steps."""
    latents: ShardSet | None = None
    """Real images as the latents of the teacher's autoencoder, where it has one."""
    prompts: ShardSet | None = None
    """Text embeddings, where the teacher reads text."""

    @property
    def real(self) -> ShardSet | None:
        """Real images as the teacher's flow has them."""
        return self.latents or self.images

    @property
    def data(self) -> list[ShardSet]:
        """The shard sets that the objective reads in batches."""
        given = {"trajectories": self.trajectories, "images": self.real}
        return [shards for need, shards in given.items() if need in self.stage.objective.needs and shards is not None]

    @property
    def guidance_scale(self) -> float:
        """Guidance of the teacher in this stage."""
        return self.stage.guided(self.teacher)

    @property
    def checkpoints(self) -> Path:
        return located(self.folder) / "checkpoints"

    @property
    def weights(self) -> Path:
        return located(self.folder) / "student.safetensors"

    @property
    def other_weights(self) -> Path:
        """The last weights, where the best were chosen; `student-best` beside it holds those."""
        return located(self.folder) / "student-last.safetensors"

    @property
    def scores(self) -> Path:
        """Averages that wait for their score, and the scores."""
        return located(self.folder) / "scores"

    @property
    def scored_beside(self) -> bool:
        """Whether its probes are scored in a task of their own."""
        return self.stage.probe.every > 0 and self.stage.probe.beside and self.train.num_workers != 0

    @property
    def looks(self) -> Path:
        """What the discriminator said of some images when the stage ended."""
        return located(self.folder) / "token_weights.npz"

    @property
    def manifest(self) -> Path:
        return located(self.folder) / "stage.json"

    @property
    def curve(self) -> Path:
        return located(self.folder) / "metrics.jsonl"

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
        return manifest if whole and manifest["start_sha256"] == self.start_hash() else None

    def identity(self) -> dict[str, Any]:
        """The inputs, and the weights that the student really starts from: reads them to hash them."""
        return {**self.inputs, "start_sha256": self.start_hash()}

    def start_hash(self) -> str:
        """Hash of the weights that the student starts from; empty where they are the teacher's, or are not there."""
        path = located(self.start_weights)
        return file_hash(path) if self.start_weights and path.is_file() else ""


def stage_inputs(
    stage: StageConfig, train: TrainConfig, upstream: dict[str, str], seed: int, name: str
) -> dict[str, Any]:
    """All that determines a stage's result."""
    settings = asdict(stage)
    for free in (*FREE_STAGE_FIELDS, "start"):
        settings.pop(free)
    for free in FREE_PROBE_FIELDS:
        settings["probe"].pop(free)
    return json.loads(json.dumps({**settings, "autocast": train.autocast, "seed": seed, "name": name, **upstream}))


def step_seed(job: StageJob, step: int) -> int:
    """Seed of one step's draws."""
    return fold_in(job.seed, "stage", job.name, "step", step)
