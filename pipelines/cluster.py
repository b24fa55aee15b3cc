"""One Ray cluster per process: the one that is there, or a local one."""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.process import available_cpus

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # how often workers are asked whether they are done: 2 s by default
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a relative path of the recipe means the same to a worker
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # a harmless error line is printed for every actor pool
}
_LEVEL_NOTICE = b"Set ray log level from environment variable"
_OBJECT_STORE_BYTES = 400 * 2**20


def ensure_ray(*, reserved_cpus: float, reserved_gpus: float = 0) -> None:
    """Connect to Ray, starting it on this machine where no cluster is named, and check that the work fits.

    A local cluster gets one logical CPU more than the machine has: Ray Data's own short tasks need a slot beside the
    actors, and without one the pipeline waits for ever without a word.

    Raises:
        ValueError: the actors would reserve every CPU of the cluster, or more GPUs than this machine has.
    """
    import ray
    import ray.data

    if not ray.is_initialized():
        _start()
    quiet()
    ray.data.DataContext.get_current().enable_progress_bars = False
    there = ray.cluster_resources()
    if reserved_cpus >= there.get("CPU", 0):
        raise ValueError(
            f"{reserved_cpus:g} CPUs are asked for by workers, and the Ray cluster has {there.get('CPU', 0):g}: leave"
            " at least one free (fewer precompute.num_actors or train.num_workers, or fewer CPUs for each)"
        )
    if reserved_gpus > there.get("GPU", 0) and not os.environ.get("RAY_ADDRESS"):  # a named cluster may grow
        raise ValueError(
            f"{reserved_gpus:g} GPUs are asked for by workers, and this machine has {there.get('GPU', 0):g}: lower"
            " precompute.gpus_per_actor or train.gpus_per_worker"
        )


def is_running() -> bool:
    """Whether this process has started or joined a cluster; Ray is not imported to find out."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def stop_ray() -> None:
    """Give the cores back, if this process started or joined a cluster."""
    import ray

    if ray.is_initialized():
        ray.shutdown()


def quiet() -> None:
    """Let Ray speak of errors only."""
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _start() -> None:
    import ray

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    local: dict[str, Any] = {
        "address": "local",
        "num_cpus": max(3, available_cpus() + 1),
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }
    where = {} if os.environ.get("RAY_ADDRESS") else local
    with _without_level_notice():
        ray.init(**where, logging_level=logging.ERROR, log_to_driver=False)


@contextmanager
def _without_level_notice() -> Iterator[None]:
    """Leave out the line in which Ray says that it was told to be quiet; whatever else it writes comes out after."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            os.write(2, b"".join(line for line in caught if _LEVEL_NOTICE not in line))
