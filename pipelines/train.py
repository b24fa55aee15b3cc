"""Training on Ray Train: a stage's worker loop, in this process or in a group of workers."""

import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipelines.artifacts import write_json
from pipelines.feed import batch_plan
from pipelines.group import Group
from pipelines.process import WORKER_ENVIRONMENT, prepare_process
from pipelines.scoring import validate
from pipelines.stages import Logged, StageJob, TrainConfig
from pipelines.storage import is_remote, located, remove_tree, store_of
from pipelines.trainer import StageTrainer, Watch


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
    if job.train.num_workers:
        ensure_ray(**_reserved(job))
    storage = located(job.folder) / "ray"
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config={"job": job, "watch": watch},
        torch_config=TorchConfig(backend="nccl" if job.train.gpus_per_worker else "gloo"),
        scaling_config=_scaling(job.train),
        validation_config=_validation(job),
        run_config=RunConfig(
            name=f"train-{uuid.uuid4().hex}",
            **ray_storage(storage),
            failure_config=FailureConfig(max_failures=job.train.max_failures),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
        ),
    )
    try:
        mistake = _fit(trainer)
    finally:
        remove_tree(storage)  # Ray's own record of the workers; the stage's folder is the truth
    if mistake:
        raise mistake


def check(job: StageJob) -> None:
    """See that the batches of a stage can be made.

    Raises:
        ValueError: the global batch leaves a worker without a row, or is larger than the data.
    """
    group = Group(size=max(1, job.train.most_workers))
    try:
        group.rows(job.stage.batch_size)
        for shards in job.data:
            batch_plan(job, shards)
    except ValueError as error:
        raise ValueError(f"stage {job.name}: {error}") from None


def _reserved(job: StageJob) -> dict[str, float]:
    """What must be free before a stage starts: its least workers, and the task that scores beside them."""
    train, probe, beside = job.train, job.stage.probe, job.scored_beside
    return {
        "reserved_cpus": train.least_workers * train.cpus_per_worker + beside * probe.cpus,
        "reserved_gpus": train.least_workers * train.gpus_per_worker + beside * probe.gpus,
    }


def ray_storage(folder: Path) -> dict[str, Any]:
    """Where Ray keeps its own record of a job, as a RunConfig has it."""
    if not is_remote(folder):
        return {"storage_path": str(folder.resolve())}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    store, key = store_of(folder)
    return {"storage_path": key, "storage_filesystem": PyFileSystem(FSSpecHandler(store))}


def _validation(job: StageJob) -> Any:
    """How Ray Train scores averages beside the workers."""
    from ray.train import ValidationConfig, ValidationTaskConfig

    if not job.scored_beside:
        return None
    resources = {"num_cpus": job.stage.probe.cpus, "num_gpus": job.stage.probe.gpus}
    environment = {"runtime_env": {"env_vars": WORKER_ENVIRONMENT}}
    task = ValidationTaskConfig(fn_kwargs={"job": job})
    return ValidationConfig(fn=validate, task_config=task, ray_remote_kwargs={**resources, **environment})


class RayReport:
    """Reports to Ray Train's controller. Its checkpoints are mere tokens: ours are in the stage's folder."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def __call__(self, step: int, values: Logged, *, score: bool) -> None:
        from ray.train import Checkpoint, ValidationTaskConfig, report

        validation = ValidationTaskConfig(fn_kwargs={"step": step}) if score else False
        with TemporaryDirectory() as folder:
            write_json(Path(folder) / "step.json", {"step": step})
            token = Checkpoint.from_directory(folder) if self._group.leads else None
            report({"step": step, **values}, checkpoint=token, validation=validation)

    def wait(self) -> None:
        from ray.train import get_all_reported_checkpoints

        get_all_reported_checkpoints()

    def leaving(self) -> tuple[str, ...]:
        from ray.train import get_preemption_info

        told = get_preemption_info()
        return tuple(told.preempted_node_ids) if told else ()


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
        num_workers=train.num_workers,
        use_gpu=train.gpus_per_worker > 0,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=train.resize_seconds,
    )


def _train_loop(config: dict[str, Any]) -> Exception | None:
    """One worker's life. A mistake of the user's is returned, since Ray would try again after a raised one."""
    job: StageJob = config["job"]
    group = Group.current() if job.train.num_workers else Group()
    prepare_process(job.train.cpus_per_worker if job.train.num_workers else None)
    watch = config["watch"]() if group.rank == 0 else Watch()
    report = RayReport(group) if job.train.num_workers else None
    try:
        trainer, mistake = StageTrainer(job, group, watch, report), None
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
