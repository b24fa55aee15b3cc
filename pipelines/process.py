"""Settings of a process that computes with torch on shared cores: threads and memory allocation.

Several processes with torch's default threads on the same cores made one step more than twenty times slower, so every
worker's thread count follows from the CPUs that it was given. glibc returns large blocks to the system on every free;
keeping them made inference of a small transformer 1.3 times faster.
"""

import ctypes
import gc
import os
import platform
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_KEEP_BYTES = 1 << 30
_TOP_PAD_BYTES = 64 << 20

WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}
"""What the environment of a worker process must hold before it starts: its cores are shared."""


def prepare_process(cpus: float | None = None) -> int:
    """Set this process's torch threads to the CPUs it may use (at least one) and keep its memory; returns the threads.

    ``cpus`` is what Ray gave a worker; ``None`` stands for all that the operating system lets this process use.
    """
    import torch

    threads = max(1, int(cpus)) if cpus is not None else available_cpus()
    torch.set_num_threads(threads)
    _keep_freed_memory()
    return threads


def available_cpus() -> int:
    """CPUs that the operating system lets this process use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _keep_freed_memory() -> None:
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
        mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)


def give_memory_back() -> None:
    """Free what is left in cycles, and return what is free to the system.

    For a process that goes on to other work: every thread's memory is kept apart, so that of one that has ended would
    lie idle. A worker of a sweep grew by 250 MB with each trial, to 9 GB.
    """
    gc.collect()
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Any:
    """A function of glibc's; ``None`` on other systems (musl has neither)."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def default_device() -> str:
    """The accelerator that this process sees, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def environment() -> dict[str, Any]:
    """Versions and machine, for the report."""
    packages = ("hdistill", "torch", "ray", "diffusers", "pyarrow", "clean-fid", "mlflow", "numpy")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        **({"commit": commit()} if commit() else {}),
        "cpus": available_cpus(),
        "system": f"{platform.system()} {platform.machine()}",
    }


@cache
def commit() -> str:
    """The git commit of this code, with a + where files differ from it; empty where it has no repository around it."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def process_started() -> float:
    """When this process began, in `time.time` seconds; now, where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.time()
