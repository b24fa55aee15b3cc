"""Checkpoints of a stage: safetensors and JSON, written whole, with the hash of every file.

A checkpoint holds weights, optimiser moments, the average, the step and the moves of each player. There is no random
state to keep: every random number is a function of the seed and the step.
"""

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hd_core.step import TrainState
from pipelines.adapters import merged
from pipelines.artifacts import OTHER_RUN_DIR, Inputs, atomic_path, ensure_same, file_hash, read_json, write_json

_KEEP = 2


def save_weights(path: Path, network: nn.Module) -> str:
    """Write a network's weights, adapters folded into them; returns the file's hash."""
    with atomic_path(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in merged(network).state_dict().items()}, temporary)
    return file_hash(path)


def load_weights(path: Path, network: nn.Module) -> None:
    """Read a network's weights.

    Raises:
        ValueError: the file is damaged, or belongs to another network.
    """
    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold this network's weights: {str(error).splitlines()[0]}") from None


def save_checkpoint(folder: Path, state: TrainState, inputs: Inputs) -> None:
    """Write the training state of a step, then drop all but the newest few."""
    tensors, counters = _flatten(state)
    path = folder / f"step-{state.step:08d}.safetensors"
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)
    about = {"step": state.step, **counters, "sha256": file_hash(path), "inputs": dict(inputs)}
    write_json(path.with_suffix(".json"), about)
    for old in sorted(folder.glob("step-*.json"))[:-_KEEP]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def load_latest(folder: Path, state: TrainState, inputs: Inputs, remedy: str = OTHER_RUN_DIR) -> list[str]:
    """Bring the state to the newest whole checkpoint, if there is one; returns the names of damaged ones passed over.

    Raises:
        ValueError: the checkpoint was made from other inputs.
    """
    damaged: list[str] = []
    for about_path in sorted(folder.glob("step-*.json"), reverse=True):
        path = about_path.with_suffix(".safetensors")
        about = _whole(about_path, path)
        if about is None:
            damaged.append(path.name)
            continue
        ensure_same(f"checkpoint {path}", about["inputs"], inputs, remedy)
        _restore(state, load_file(path), about)
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
    shutil.rmtree(folder, ignore_errors=True)


def _flatten(state: TrainState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    frozen = _frozen(state.players["student"].network)  # of the average all is, but what follows the student moves
    tensors = _prefixed("average", state.average.state_dict(), frozen)
    moves: dict[str, int] = {}
    for name, player in state.players.items():
        tensors |= _prefixed(f"{name}/network", player.network.state_dict(), _frozen(player.network))
        for index, slot in player.optimizer.state_dict()["state"].items():
            tensors |= _prefixed(f"{name}/optimizer/{index}", slot)
        moves[name] = player.moves
    return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}, {"moves": moves}


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
        groups = player.optimizer.state_dict()["param_groups"]
        player.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        player.moves = about["moves"][name]
    state.step = about["step"]


def _load(network: nn.Module, tensors: Mapping[str, Tensor], frozen: Collection[str]) -> None:
    found = network.load_state_dict(tensors, strict=False)
    assert not found.unexpected_keys and set(found.missing_keys) == set(frozen), found


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}/"
    return {key.removeprefix(start): torch.clone(value) for key, value in tensors.items() if key.startswith(start)}
