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


def ensure_ray(*, reserved_cpus: float, reserved_gpus: float = 0, other_cpus: float = 0) -> None:
    """Connect to Ray, starting it on this machine where no cluster is named, and check that the work fits.

    A local cluster gets one logical CPU more than the machine has: Ray Data's own short tasks need a slot beside the
    actors, and without one the pipeline waits for ever without a word. A named cluster (RAY_ADDRESS) may grow, even
    from nothing: what it lacks is said, and Ray waits for it. ``other_cpus`` is what those short tasks need at least.

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
    lacking = _lacking(there.get("CPU", 0), there.get("GPU", 0), reserved_cpus, reserved_gpus, other_cpus)
    if lacking and not _may_grow():
        raise ValueError(lacking)
    if lacking:
        logging.getLogger("hdistill").warning("%s. Waiting for the cluster to grow", lacking)


def room_for(*, cpus: float, gpus: float) -> int:
    """How many actors fit into the cluster, one CPU left free; any number where it may grow."""
    import ray

    if _may_grow():
        return sys.maxsize
    there = ray.cluster_resources()
    by_cpus = int((there.get("CPU", 0) - 1) / cpus)
    return min(by_cpus, int(there.get("GPU", 0) / gpus)) if gpus else by_cpus


def _may_grow() -> bool:
    return bool(os.environ.get("RAY_ADDRESS"))


def _lacking(cpus: float, gpus: float, reserved_cpus: float, reserved_gpus: float, other_cpus: float) -> str:
    """What does not fit into so many CPUs and GPUs; empty where all does."""
    if reserved_cpus >= cpus or reserved_cpus + other_cpus > cpus:
        return (
            f"{reserved_cpus:g} CPUs are asked for by workers, and the Ray cluster has {cpus:g}: leave at least one"
            " free (fewer num_actors of precompute or evaluate, or train.num_workers, or fewer CPUs for each)"
        )
    if reserved_gpus > gpus:
        return (
            f"{reserved_gpus:g} GPUs are asked for by workers, and this machine has {gpus:g}: lower"
            " gpus_per_actor of precompute or evaluate, or train.gpus_per_worker"
        )
    return ""


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
