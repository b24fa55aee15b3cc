"""Checkpoints of a stage: safetensors and JSON, written whole, with the hash of every file.

A checkpoint holds weights, optimiser moments, the average, the step and the moves of each player. There is no random
state to keep: every random number is a function of the seed and the step.
"""

from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hd_core.step import TrainState
from pipelines.adapters import merged
from pipelines.artifacts import OTHER_RUN_DIR, Inputs, atomic_path, ensure_same, file_hash, read_json, write_json
from pipelines.sharding import as_held, is_split, load, whole
from pipelines.storage import local_copy, remove_tree


def save_weights(path: Path, network: nn.Module) -> str:
    """Write a network's weights, adapters folded into them; returns the file's hash."""
    return write_tensors(path, weights_of(network))


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """A network's weights on the CPU, adapters folded into them; of a split one every worker must ask at once."""
    state = (network if is_split(network) else merged(network)).state_dict()
    return {name: whole(value).cpu().contiguous() for name, value in state.items()}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write tensors, whole or not at all; returns the file's hash."""
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)
        return file_hash(temporary)


def load_weights(path: Path, network: nn.Module) -> None:
    """Read a network's weights.

    Raises:
        ValueError: the file is damaged, or belongs to another network.
    """
    try:
        network.load_state_dict(_read(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold this network's weights: {str(error).splitlines()[0]}") from None


def _read(path: Path) -> dict[str, Tensor]:
    with local_copy(path) as file:
        return load_file(file)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The training state of a step, on the CPU and apart from what training goes on to change."""

    tensors: dict[str, Tensor]
    counters: dict[str, Any]
    """Step and moves."""

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def snapshot(state: TrainState) -> Snapshot:
    """The state as it is now; of a split state every worker must ask at the same moment."""
    tensors, moves = _flatten(state)
    return Snapshot(tensors=tensors, counters={"step": state.step, "moves": moves})


def checkpoint_file(folder: Path, step: int) -> Path:
    """Where the tensors of a step are; beside them a JSON file of the same name."""
    return folder / f"step-{step:08d}.safetensors"


def save_checkpoint(folder: Path, state: TrainState | Snapshot, inputs: Inputs, keep: int = 2) -> None:
    """Write the training state of a step, then drop all but the newest few."""
    taken = state if isinstance(state, Snapshot) else snapshot(state)
    path = checkpoint_file(folder, taken.counters["step"])
    sha256 = write_tensors(path, taken.tensors)
    write_json(path.with_suffix(".json"), {**taken.counters, "sha256": sha256, "inputs": dict(inputs)})
    for old in sorted(folder.glob("step-*.json"))[:-keep]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)


class Saver:
    """Writes checkpoints in a thread of its own while training goes on, one at a time.

    As a context it ends only when what was begun is written, also where training is interrupted.
    """

    def __init__(self, folder: Path, inputs: Inputs, keep: int) -> None:
        self._folder, self._inputs, self._keep = folder, inputs, keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self.bytes_written = 0
        """Of checkpoints, so far."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(Exception) if kind else nullcontext():  # what went wrong first is what is told
            self.wait()

    def save(self, taken: Snapshot) -> None:
        """Begin to write a snapshot; raises what the one before could not do."""
        self.wait()
        self.bytes_written += taken.bytes
        self._writing = self._thread.submit(save_checkpoint, self._folder, taken, self._inputs, self._keep)

    def wait(self) -> None:
        """Return when what was begun is written.

        Raises:
            OSError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def load_latest(folder: Path, state: TrainState, inputs: Inputs, remedy: str = OTHER_RUN_DIR) -> list[str]:
    """Bring the state to the newest whole checkpoint, if there is one; returns the names of damaged ones passed over.

    Raises:
        ValueError: the checkpoint was made from other inputs, or is a file of another kind.
    """
    damaged: list[str] = []
    for about_path in sorted(folder.glob("step-*.json"), reverse=True):
        path = about_path.with_suffix(".safetensors")
        about = _whole(about_path, path)
        if about is None:
            damaged.append(path.name)
            continue
        ensure_same(f"checkpoint {path}", about["inputs"], inputs, remedy)
        try:
            _restore(state, _read(path), about)
        except SafetensorError as error:
            raise ValueError(f"{path} is no checkpoint of this project: {error}") from None
        return damaged
    return damaged


def _whole(about_path: Path, path: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself, if both of its files are as they were written."""
    try:
        about = read_json(about_path)
        return about if file_hash(path) == about["sha256"] else None
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def remove_checkpoints(folder: Path) -> None:
    """Drop what a finished stage no longer needs."""
    remove_tree(folder)


def _flatten(state: TrainState) -> tuple[dict[str, Tensor], dict[str, int]]:
    frozen = _frozen(state.players["student"].network)  # of the average all is, but what follows the student moves
    tensors = _prefixed("average", state.average.state_dict(), frozen)
    moves: dict[str, int] = {}
    for name, player in state.players.items():
        tensors |= _prefixed(f"{name}/network", player.network.state_dict(), _frozen(player.network))
        for index, slot in player.optimizer.state_dict()["state"].items():
            tensors |= _prefixed(f"{name}/optimizer/{index}", slot)
        moves[name] = player.moves
    return {key: _apart(value) for key, value in tensors.items()}, moves


def _apart(value: Tensor) -> Tensor:
    full = whole(value)
    return (full.clone() if full.device.type == "cpu" else full.cpu()).contiguous()


def _prefixed(prefix: str, values: Mapping[str, Tensor], left_out: Collection[str] = ()) -> dict[str, Tensor]:
    return {f"{prefix}/{key}": value for key, value in values.items() if key not in left_out}


def _frozen(network: nn.Module) -> set[str]:
    """Names of parameters that never move: they are what the network was built from, and are not stored."""
    return {name for name, parameter in network.named_parameters() if not parameter.requires_grad}


def _restore(state: TrainState, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    _load(state.average, _under("average", tensors), _frozen(state.players["student"].network))
    for name, player in state.players.items():
        _load(player.network, _under(f"{name}/network", tensors), _frozen(player.network))
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in _under(f"{name}/optimizer", tensors).items():
            index, entry = key.split("/")
            slots.setdefault(int(index), {})[entry] = value
        for index, slot in slots.items():
            slots[index] = {entry: _slot(value, player.parameters[index]) for entry, value in slot.items()}
        groups = player.optimizer.state_dict()["param_groups"]
        player.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        player.moves = about["moves"][name]
    state.step = about["step"]


def _load(network: nn.Module, tensors: Mapping[str, Tensor], frozen: Collection[str]) -> None:
    missing = load(network, dict(tensors))
    assert missing == set(frozen), missing


def _slot(value: Tensor, parameter: Tensor) -> Tensor:
    """An optimiser's number as it is; its moments as the parameter is held."""
    return as_held(value, parameter) if value.shape == parameter.shape else value


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}/"
    return {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
