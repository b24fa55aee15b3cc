"""One Ray cluster per process: the one that is there, or a local one."""

import logging
import os

from pipelines.process import available_cpus

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # each report waits for a poll: 2 s by default
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # a harmless error line is printed for every actor pool
}


def ensure_ray(*, reserved_cpus: float) -> None:
    """Connect to Ray, starting it on this machine where no cluster is named, and check that the work fits.

    A local cluster gets one logical CPU more than the machine has: Ray Data's own short tasks need a slot beside the
    actors, and without one the pipeline waits for ever without a word.

    Raises:
        ValueError: the actors would reserve every CPU of the cluster.
    """
    import ray
    import ray.data

    if not ray.is_initialized():
        _start()
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    total = ray.cluster_resources().get("CPU", 0)
    if reserved_cpus >= total:
        raise ValueError(
            f"{reserved_cpus:g} CPUs are asked for by workers, and the Ray cluster has {total:g}: leave at least one"
            " free (fewer precompute.num_actors or train.num_workers, or fewer CPUs for each)"
        )


def _start() -> None:
    import ray

    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
        return
    ray.init(
        address="local",
        num_cpus=max(3, available_cpus() + 1),
        include_dashboard=False,
        object_store_memory=400 * 2**20,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
