"""What every test gets: one thread, a fixed seed, and shapes checked at run time. And one Ray cluster for all."""

import logging
import os
import signal
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client: no test asks the network
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch, as `pipelines` does: the cores are shared

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401 (the hook looks it up by name)

# A shell's background job ignores Ctrl-C, and so would the commands that tests start and stop.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before anything imports hd_core: a tensor of the wrong rank, or two that disagree on a named size, fails its test.
# hd_core.metrics is left out: its row counts differ under one letter.
CHECKED = ("types", "random", "paths", "times", "solvers", "walk", "jvp", "guidance", "ema", "step")
CHECKED += ("networks", "objectives")
install_import_hook([f"hd_core.{name}" for name in CHECKED], "tests.typecheck.check")

settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _strict():  # pyright: ignore[reportUnusedFunction]
    """One thread (the tensors are tiny, the cores shared) and a seed for the networks' initial weights."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray cluster for every test that asks for it: starting one costs five seconds or more.

    It has four logical CPUs on any machine. `ensure_ray` finds it and starts none of its own.
    """
    import ray

    from pipelines import cluster

    quick = {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
        "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in {**cluster.ENVIRONMENT, **quick}.items():
            patch.setenv(name, value)
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
        yield
        ray.shutdown()
