"""A teacher of one's own: a native DiT trained on a recipe's images by flow matching, from its last checkpoint on."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from hd_core.networks.dit import DiT, DiTConfig
from hd_core.objectives.flow_matching import FlowMatching
from hd_core.objectives.turns import Batch, Cast
from hd_core.random import Draws, fold_in
from hd_core.step import OptimizerConfig, Player, TrainState, train_step
from hd_core.types import Condition, Images, Times
from pipelines.artifacts import atomic_folder, ensure_same, read_json, write_json
from pipelines.checkpoints import load_latest, remove_checkpoints, save_checkpoint
from pipelines.data import DataConfig, DataSplits, ImageSet, load_images, to_model
from pipelines.process import default_device
from pipelines.progress import bar
from pipelines.teachers import embedded, save_native

Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class TeacherTraining:
    """A class-conditional DiT flow teacher, trained from scratch."""

    patch_size: int = 2
    """Side of the square of pixels that becomes one token."""
    width: int = 64
    """Features per token; a multiple of ``heads``."""
    depth: int = 4
    """Transformer blocks."""
    heads: int = 4
    """Attention heads per block."""
    objective: FlowMatching = field(default_factory=FlowMatching)
    """How times are drawn, and how often the class is left out."""
    num_steps: int = 6000
    """Iterations."""
    batch_size: int = 256
    """Images in each."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=2e-3, weight_decay=0.01, warmup_moves=200, decay="cosine")
    )
    """How the network moves."""
    ema_decay: float = 0.999
    """Decay of the average that becomes the teacher."""
    checkpoint_every: int = 500
    """Iterations between checkpoints: what a kill can cost."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "checkpoint_every", "patch_size", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; given {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1); given {self.ema_decay}")

    def network(self, images: ImageSet) -> DiTConfig:
        """The DiT for a set of images.

        Raises:
            ValueError: they are not square, or their side is not a multiple of the patch.
        """
        channels, height, width = images.shape
        if height != width:
            raise ValueError(f"a DiT needs square images; these are {height}x{width}: set data.image_size")
        return DiTConfig(
            image_size=height,
            channels=channels,
            patch_size=self.patch_size,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            num_classes=images.num_classes,
        )


def teach(path: str, data: DataConfig, config: TeacherTraining | None, seed: int, console: Console) -> None:
    """Make a recipe's teacher with a progress bar, and say where it is.

    Raises:
        ValueError: the recipe does not say how, or the folder is another teacher's.
    """
    if config is None:
        raise ValueError("this recipe trains no teacher: give it teacher_training, such as {width: 64, depth: 4}")
    folder = own_folder(path)
    splits = load_images(data)
    splits.say_skipped(console)
    with bar(console, "train teacher", config.num_steps) as show:
        made = make_teacher(folder, splits, config, seed, show)
    console.print(f"{'wrote' if made else 'there already:'} {path}", highlight=False)


def own_folder(path: str) -> Path:
    """The folder that a teacher's path names.

    Raises:
        ValueError: it names a teacher that comes with the package, which would be loaded instead.
    """
    if path in embedded():
        raise ValueError(f"teacher.path {path!r} is the name of an embedded teacher: name a folder, such as ./{path}")
    return Path(path).expanduser()


def make_teacher(folder: Path, splits: DataSplits, config: TeacherTraining, seed: int, progress: Progress) -> bool:
    """Train a teacher into a folder in diffusers' layout; False where it is there already, made the same way.

    Raises:
        ValueError: the folder holds something else, or a half-trained teacher of other settings.
        FloatingPointError: the training diverged.
    """
    inputs = {"training": _determining(config), "data": splits.fingerprint, "seed": seed}
    about = folder / "training.json"
    if (made_with := read_json(about)) is not None:
        ensure_same(f"the teacher in {folder}", made_with, inputs, "Name another teacher.path")
        return False
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no teacher of `hdistill teacher`: name another teacher.path")
    checkpoints = folder.with_name(f"{folder.name}.training")
    net = train(splits.train, config, seed, progress, checkpoints=checkpoints, inputs=inputs)
    with atomic_folder(folder) as made:
        save_native(made, net)
        write_json(made / about.name, inputs)
    remove_checkpoints(checkpoints)
    return True


def train(
    images: ImageSet,
    config: TeacherTraining,
    seed: int,
    progress: Progress,
    *,
    checkpoints: Path | None = None,
    inputs: dict[str, Any] | None = None,
) -> DiT:
    """The average of a training, resumed from its checkpoints where there are any."""
    device = default_device()
    state = _start(config.network(images), config, seed, device)
    if checkpoints:
        remedy = f"Name another teacher.path, or remove {checkpoints} to begin anew"
        load_latest(checkpoints, state, inputs or {}, remedy)
    cast = _cast(state.players["student"].network)
    values, labels = to_model(images.in_memory()), torch.from_numpy(images.labels)
    while state.step < config.num_steps:
        draws = Draws(
            seed=fold_in(seed, "teacher", state.step),
            rows=slice(0, config.batch_size),
            total=config.batch_size,
            device=device,
        )
        batch = _batch(values, labels, replace(draws, device="cpu")).to(device)
        logged = train_step(state, config.objective, cast, batch, draws, progress=state.step / config.num_steps)
        checkpoint = checkpoints if state.step % config.checkpoint_every == 0 else None
        if checkpoint or state.step % 100 == 0 or state.step == config.num_steps:
            _refuse_divergence(logged, state.step)
        if checkpoint:
            save_checkpoint(checkpoint, state, inputs or {})
        progress(state.step)
    average = state.average
    assert isinstance(average, DiT)
    return average.cpu()


def _determining(config: TeacherTraining) -> dict[str, Any]:
    settings = asdict(config)
    settings.pop("checkpoint_every")
    settings["optimizer"]["betas"] = list(config.optimizer.betas)
    return settings


def _start(network: DiTConfig, config: TeacherTraining, seed: int, device: str) -> TrainState:
    with torch.random.fork_rng():
        torch.manual_seed(fold_in(seed, "teacher", "init"))
        net = DiT(network).to(device)
    player = Player(network=net, config=config.optimizer)
    average = copy.deepcopy(net).eval().requires_grad_(False)
    return TrainState(players={"student": player}, average=average, ema_decay=config.ema_decay)


def _cast(net: torch.nn.Module) -> Cast:
    assert isinstance(net, DiT)

    def velocity(x_t: Images, t: Times, _r: Times, condition: Condition) -> Images:
        return net(x_t, t, condition)

    classes = net.config.num_classes
    null = Condition(labels=torch.tensor([classes], device=net.position.device)) if classes else None
    return Cast(teacher=net, student=velocity, null_condition=null)


def _batch(values: Tensor, labels: Tensor, draws: Draws) -> Batch:
    rows = draws.integers("rows", len(values))
    condition = Condition(labels=labels[rows])
    noise = draws.normal("noise", values.shape[1:])
    return Batch(noise=noise, condition=condition, images=values[rows], images_condition=condition)


def _refuse_divergence(logged: dict[str, Tensor], step: int) -> None:
    loss = float(logged["loss/flow_matching"])
    if not loss < float("inf"):
        raise FloatingPointError(
            f"the teacher's loss is {loss} at step {step}: a lower teacher_training.optimizer.learning_rate helps. The"
            " last checkpoint is kept"
        )
