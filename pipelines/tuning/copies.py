"""What a trial takes over from another whose training is its own up to some iteration.

Its weights would come out the same without it: a checkpoint that is not there costs time alone.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.artifacts import Inputs, atomic_path, ensure_same, file_hash, read_json, write_json
from pipelines.checkpoints import checkpoint_file
from pipelines.curve import Curve
from pipelines.stages import StageJob
from pipelines.storage import local_copy, remove_tree

_FOLDER = "taken-over"


def hand_over(stage: Path, copy: Path, step: int) -> None:
    """Put the checkpoint and the curve of a stage's folder into the directory of a trial that copies it."""
    checkpoint = checkpoint_file(stage / "checkpoints", step)
    there = [checkpoint, checkpoint.with_suffix(".json"), stage / "metrics.jsonl"]
    for source in there if all(file.is_file() for file in there) else ():
        _copy(source, copy / _FOLDER / source.name)


def take_over(copy: Path, job: StageJob, step: int) -> None:
    """Make what was put into a trial's directory its own, if it has nothing yet.

    Raises:
        ValueError: it was not trained as this trial would have been until then.
    """
    checkpoint = checkpoint_file(copy / _FOLDER, step)
    about = read_json(checkpoint.with_suffix(".json"))
    if about and not job.checkpoints.exists() and file_hash(checkpoint) == about["sha256"]:
        ensure_same(f"checkpoint {checkpoint}", _until(about["inputs"], step), _until(job.inputs, step))
        Curve.write(job.curve, Curve.read(checkpoint.with_name("metrics.jsonl")))
        mine = job.checkpoints / checkpoint.name
        _copy(checkpoint, mine)
        write_json(mine.with_suffix(".json"), {**about, "inputs": job.inputs})
    remove_tree(copy / _FOLDER)


def _copy(source: Path, target: Path) -> None:
    with local_copy(source) as found, atomic_path(target) as temporary:
        shutil.copyfile(found, temporary)


def _until(inputs: Mapping[str, Any], step: int) -> Inputs:
    """What determined a stage up to an iteration."""
    return {**inputs, "later": {since: what for since, what in inputs["later"].items() if int(since) < step}}
