"""A cluster of several nodes on one machine, and the driver of a run on it, all of which may be killed."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from pipelines.storage import located

STAGES = ("sketch", "refine")
PHASES = ("precompute", *STAGES, "evaluate")
ACTORS = {"precompute": "ShardActor", "evaluate": "ShardActor"} | dict.fromkeys(STAGES, "RayTrainWorker")
"""What the processes that work on a phase are called."""
CHECKPOINT_EVERY = 20
"""Steps of a stage."""
NOTICE_SECONDS = 10
"""Between the announcement that a node goes and its end, or until the workers have saved what they have."""
_PREEMPTION = 2  # DRAIN_NODE_REASON_PREEMPTION of Ray's autoscaler.proto


class Nodes:
    """A head, which takes no work but the drivers', and two nodes that may die."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._folder = tempfile.mkdtemp(prefix="chaos-")  # paths of sockets must be short
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "temp_dir": self._folder})
        for _ in range(2):
            self.add()

    @property
    def address(self) -> str:
        """What a driver connects to."""
        return self._cluster.address

    def add(self) -> None:
        """Bring a node up; only the main thread can."""
        self._cluster.add_node(num_cpus=3)

    def kill_worker(self, phase: str, chance: random.Random) -> bool:
        """Kill a process that works on a phase; whether there is one."""
        found = [process for node in self._cluster.list_all_nodes() for process in workers_of(node, ACTORS[phase])]
        if found:
            chance.choice(found).kill()
        return bool(found)

    def victim(self, phase: str, chance: random.Random) -> Any:
        """A node on which a phase is worked on, if there is one."""
        found = [node for node in self._cluster.worker_nodes if list(workers_of(node, ACTORS[phase]))]
        return chance.choice(sorted(found, key=lambda node: node.unique_id)) if found else None

    def announce(self, node: Any) -> None:
        """Tell the cluster that a node goes, as the agents of clouds do."""
        from ray._raylet import GcsClient  # `ray drain-node` does the same, seconds later

        until = int(1000 * (time.time() + NOTICE_SECONDS))
        GcsClient(address=self.address).drain_node(node.node_id, _PREEMPTION, "spot", until)

    def replace(self, node: Any) -> None:
        """Kill a node, and bring another."""
        self._cluster.remove_node(node, allow_graceful=False)
        self.add()

    def stop(self) -> None:
        """Take everything down."""
        self._cluster.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)


def workers_of(node: Any, called: str) -> Iterator[psutil.Process]:
    """Processes of a node that run actors of some class."""
    (raylet,) = node.all_processes["raylet"]
    try:
        for process in psutil.Process(raylet.process.pid).children(recursive=True):
            if called in " ".join(process.cmdline()):
                yield process
    except psutil.NoSuchProcess:
        return


class Driver:
    """One life of a run: `hdistill run` in a process of its own, and how far it says that it is."""

    def __init__(self, recipe: Path, run_dir: str, address: str) -> None:
        command = [sys.executable, "-m", "pipelines.cli", "run", str(recipe), "--run-dir", run_dir]
        self._run_dir, self._born = run_dir, time.time()
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "RAY_ADDRESS": address, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.finished: dict[str, float] = {}
        self.lines: list[str] = []
        self.since = time.monotonic()
        """When its phase began."""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self.lines.append(line)
            name, *rest = line.split() or [""]
            if name in PHASES and rest and (rest[0] == "reused" or rest[-1] == "s"):
                self.finished[name] = 0.0 if rest[0] == "reused" else float(rest[0].replace(",", ""))
            self.since = time.monotonic()

    @property
    def phase(self) -> str:
        """The first phase that it has not said to be over; empty after the last."""
        return next((name for name in PHASES if name not in self.finished), "")

    @property
    def trains(self) -> bool:
        """Whether its phase is no training, or one that has taken steps in this life."""
        curve = self._stage / "metrics.jsonl"
        return self.phase not in STAGES or (curve.is_file() and curve.stat().st_mtime > self._born)

    @property
    def has_saved(self) -> bool:
        """Whether there is a checkpoint of a step at which none was due."""
        steps = [int(path.stem.removeprefix("step-")) for path in (self._stage / "checkpoints").glob("step-*.json")]
        return any(step % CHECKPOINT_EVERY for step in steps)

    @property
    def _stage(self) -> Path:
        return located(self._run_dir) / "stages" / self.phase

    @property
    def code(self) -> int | None:
        """Its exit code; ``None`` while it lives."""
        return self._process.poll()

    def kill(self) -> None:
        """End it where it is."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._reader.join()
