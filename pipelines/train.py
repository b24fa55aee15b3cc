"""Training on Ray Train: a stage's worker loop, in this process or in a group of workers."""

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.feed import batch_plan
from pipelines.process import WORKER_ENVIRONMENT, prepare_process
from pipelines.stages import StageJob, TrainConfig
from pipelines.trainer import Group, StageTrainer, Watch


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
