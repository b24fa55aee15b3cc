"""Threads and devices of a process."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipelines import process
from pipelines.process import WORKER_ENVIRONMENT, available_cpus, default_device, give_memory_back, prepare_process


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("cpus", "threads"), [(1, 1), (2.0, 2), (2.9, 2), (0.5, 1), (0, 1)])
def test_a_worker_takes_as_many_threads_as_it_has_cpus(cpus: float, threads: int):
    assert prepare_process(cpus) == threads == torch.get_num_threads()


def test_a_process_of_its_own_takes_what_the_system_lets_it_have(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(process, "available_cpus", lambda: 3)
    assert prepare_process() == 3 == torch.get_num_threads()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_available_cpus_follow_the_affinity():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert available_cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert available_cpus() == len(allowed)


def test_without_affinity_the_machine_counts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cpus() == 1


def test_workers_wait_passively():
    assert WORKER_ENVIRONMENT["OMP_WAIT_POLICY"] == "passive"


def test_other_systems_keep_their_allocator(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(process.ctypes, "CDLL", lambda _: pytest.fail("no libc is asked for"))
    assert prepare_process(1) == 1


def test_a_libc_without_mallopt_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(process.ctypes, "CDLL", lambda _: object())
    assert prepare_process(1) == 1


def resident() -> int:
    """Bytes of this process's own memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
def test_what_an_ended_thread_has_freed_goes_back():
    prepare_process(1)
    held: list[torch.Tensor] = []

    def work() -> None:
        blocks = [torch.ones(1 << 14) for _ in range(4000)]  # 250 MiB
        held.append(torch.ones(1 << 14))  # above them
        del blocks

    give_memory_back()
    before = resident()
    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert resident() - before > 150 << 20
    give_memory_back()
    assert resident() - before < 20 << 20


def test_without_glibc_nothing_is_given_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(process.ctypes, "CDLL", lambda _: object())
    give_memory_back()


@pytest.mark.parametrize(("there", "name"), [(True, "cuda"), (False, "cpu")])
def test_the_accelerator_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch, there: bool, name: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert default_device() == name


def test_the_commit_is_that_of_the_repository(monkeypatch: pytest.MonkeyPatch):
    root = Path(process.__file__).parents[1]
    asked = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
    wanted = asked.stdout.strip() if (root / ".git").exists() else ""
    process.commit.cache_clear()
    assert process.commit().rstrip("+") == wanted
    monkeypatch.setenv("PATH", "/none")
    process.commit.cache_clear()
    assert process.commit() == ""
    process.commit.cache_clear()
