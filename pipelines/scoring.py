"""Checkpoints scored beside training: an average is left in a file, a task somewhere in the cluster samples it.

The figures are those of a probe that stops training for them, since the same code sees the same weights.
"""

from pathlib import Path
from typing import Any

from pipelines.artifacts import read_json, write_json
from pipelines.cast import new_student
from pipelines.checkpoints import load_weights, write_tensors
from pipelines.probing import BestWeights, Probe
from pipelines.process import default_device, prepare_process
from pipelines.stages import Logged, StageJob
from pipelines.teachers import load_teacher


def _file(job: StageJob, step: int) -> Path:
    return job.scores / f"step-{step:08d}.safetensors"


def leave(job: StageJob, step: int, weights: dict[str, Any]) -> None:
    """Write the average of a step, to be scored."""
    write_tensors(_file(job, step), weights)


def waiting(job: StageJob, until: int) -> list[int]:
    """Steps up to one whose averages have no score yet."""
    left = {int(file.stem.removeprefix("step-")) for file in job.scores.glob("step-*.safetensors")}
    return sorted(step for step in left - scores(job).keys() if step <= until)


def scores(job: StageJob) -> dict[int, Logged]:
    """What is known of the averages so far, by step."""
    identity = job.identity()
    found = (read_json(file) for file in sorted(job.scores.glob("step-*.json")))
    return {about["step"]: about["values"] for about in found if about and about["inputs"] == identity}


def score(job: StageJob, step: int) -> Logged:
    """Sample the average of a step, keep it if it is the best so far, and drop its file; done once for each step."""
    known = scores(job).get(step)
    values = _measured(job, step) if known is None else known
    _file(job, step).unlink(missing_ok=True)
    return values


def _measured(job: StageJob, step: int) -> Logged:
    prepare_process(job.stage.probe.cpus)
    file, device = _file(job, step), default_device() if job.stage.probe.gpus else "cpu"
    teacher = load_teacher(job.teacher, job.prompts).to(device)
    student = new_student(teacher, knows_steps=job.start_knows_steps or bool(job.stage.step_counts))
    load_weights(file, student)
    values = Probe(job, teacher).values(student.to(device).eval().requires_grad_(False))
    BestWeights(job).offer(step, values["probe/fid"], student)
    write_json(file.with_suffix(".json"), {"step": step, "values": values, "inputs": job.identity()})
    return values


def validate(checkpoint: object, **asked: Any) -> Logged:
    """As Ray Train's validation calls it, with ``job`` and ``step``; its checkpoint is a mere token of the step."""
    return score(asked["job"], asked["step"])
