"""One driver for each run directory: the system's lock on a disk, a lease between machines."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import locks
from pipelines.artifacts import RunDir
from pipelines.locks import Holder, Lease
from pipelines.storage import located, read_bytes

HOLDER = """
    import sys
    from pipelines import locks
    from pipelines.artifacts import RunDir
    from pipelines.storage import located
    locks.HEARTBEAT_SECONDS = float(sys.argv[2])
    if sys.argv[3:]:
        locks._MOUNTS = located(sys.argv[3])
    try:
        with RunDir(located(sys.argv[1])).locked():
            print("locked", flush=True)
            sys.stdin.read()
        print("given back", flush=True)
    except ValueError as error:
        print(error, flush=True)
"""
BEAT = 0.4


class Driver:
    """Another process that holds a run directory until it is told to end, stopped or killed."""

    def __init__(self, where: object, *mounts: object, hears_control_c: bool = True) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(where), str(BEAT), *map(str, mounts)]
        command = command if hears_control_c else ["/bin/sh", "-c", 'trap "" INT; exec "$@"', "sh", *command]
        self.process: subprocess.Popen[str] = subprocess.Popen(command, env=environment, text=True, stdout=-1, stdin=-1)
        assert self.line() == "locked"

    def line(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, number: int) -> None:
        self.process.send_signal(number)


@pytest.fixture
def drivers() -> Iterator[list[Driver]]:
    """Processes that end with the test."""
    made: list[Driver] = []
    yield made
    for driver in made:
        driver.process.kill()
        driver.process.wait()
        for pipe in (driver.process.stdin, driver.process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", BEAT)


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of mounts in which a folder of the test is a network file system."""
    table = tmp_path / "mounts"
    (tmp_path / "shared folder").mkdir()
    escaped = str(tmp_path / "shared folder").replace(" ", "\\040")
    table.write_text(f"disk / ext4 rw 0 0\nserver:/export {escaped} nfs4 rw 0 0\n")
    monkeypatch.setattr(locks, "_MOUNTS", table)
    return table


@pytest.fixture(params=["store", "network"])
def shared(request: pytest.FixtureRequest) -> tuple[Path, tuple[object, ...]]:
    """A folder that other machines reach too, and what another process must know of it."""
    if request.param == "store":
        return located(request.getfixturevalue("url")), ()
    table = request.getfixturevalue("mounts")
    return table.parent / "shared folder", (table,)


def content(lock: Path) -> dict[str, Any]:
    return json.loads(read_bytes(lock))


# On one machine


def test_a_second_driver_is_refused_with_the_first_ones_name_until_that_is_killed(
    tmp_path: Path, drivers: list[Driver]
):
    drivers.append(Driver(tmp_path))
    process = drivers[0].process
    match = rf"is in use by process {process.pid} of \S+ on \S+ since 20\S+; wait for it, or use --run-dir"
    with pytest.raises(ValueError, match=match), RunDir(tmp_path).locked():
        pass
    drivers[0].tell(signal.SIGKILL)
    process.wait()
    with RunDir(tmp_path).locked():
        assert content(tmp_path / "lock")["process"] == os.getpid()
    assert not (tmp_path / "lock.json").exists(), "a local disk needs no lease"


@pytest.mark.parametrize("left", ["", "12345", "{", '{"process": 1}', "[]"])
def test_a_lock_file_that_says_nothing_is_no_obstacle(tmp_path: Path, left: str):
    (tmp_path / "lock").write_text(left)
    with RunDir(tmp_path).locked(), pytest.raises(ValueError, match="is in use by process"), RunDir(tmp_path).locked():
        pass


def test_the_lock_is_given_back_after_an_error(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), RunDir(tmp_path).locked():
        raise KeyboardInterrupt
    with RunDir(tmp_path).locked():
        pass
    assert (tmp_path / "lock").read_text() == ""


# Between machines


def test_a_lease_names_its_holder_and_is_gone_at_the_end(shared: tuple[Path, tuple[object, ...]]):
    folder, _ = shared
    with RunDir(folder).locked():
        holder = Holder.read(read_bytes(folder / "lock.json").decode())
        assert holder is not None and holder.process == os.getpid() and holder.host
        time.sleep(2.5 * BEAT)
        assert content(folder / "lock.json")["beat"] >= 1
    assert not (folder / "lock.json").exists()
    with pytest.raises(KeyboardInterrupt), RunDir(folder).locked():
        raise KeyboardInterrupt
    assert not (folder / "lock.json").exists()


def test_a_lease_that_is_renewed_is_respected(url: str, drivers: list[Driver]):
    folder, said = located(url), []
    drivers.append(Driver(url))
    match = rf"is in use by process {drivers[0].process.pid} of .*; wait for it, or use --run-dir"
    with pytest.raises(ValueError, match=match), RunDir(folder).locked(said.append):
        pass
    assert len(said) == 1 and f"watching it for {3 * BEAT:g} s" in said[0]
    assert drivers[0].process.stdin is not None
    drivers[0].process.stdin.close()
    assert drivers[0].line() == "given back"


def test_a_lease_of_a_dead_driver_is_taken_over(shared: tuple[Path, tuple[object, ...]], drivers: list[Driver]):
    folder, mounts = shared
    drivers.append(Driver(folder, *mounts))
    drivers[0].tell(signal.SIGKILL)
    drivers[0].process.wait()
    started = time.monotonic()
    with RunDir(folder).locked():
        assert time.monotonic() - started >= 3 * BEAT
        assert content(folder / "lock.json")["process"] == os.getpid()
    assert not (folder / "lock.json").exists()


@pytest.mark.parametrize("hears_control_c", [True, False])
def test_a_driver_that_slept_too_long_stops_and_says_who_went_on(
    url: str, drivers: list[Driver], hears_control_c: bool
):
    drivers.append(Driver(url, hears_control_c=hears_control_c))
    drivers[0].tell(signal.SIGSTOP)
    with RunDir(located(url)).locked():
        drivers[0].tell(signal.SIGCONT)
        said = drivers[0].line()
        assert content(located(url) / "lock.json")["process"] == os.getpid(), "the sleeper leaves the lease alone"
    assert f"was taken over by process {os.getpid()} of " in said and said.endswith("stopped here")


def test_a_lost_lease_is_told_until_it_is_heard(tmp_path: Path):
    lease, heard, latest = Lease(tmp_path / "lock.json", seconds=0.05), list[float](), time.monotonic() + 20
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(time.monotonic()))
    try:
        lease.acquire(lambda _text: None)
        (tmp_path / "lock.json").write_text(Holder.here().text)
        while len(heard) < 2 and time.monotonic() < latest:
            time.sleep(0.01)
        lease.release()
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(heard) >= 2 and lease.lost and str(os.getpid()) in lease.lost


def test_of_many_that_come_at_once_one_gets_the_lease(shared: tuple[Path, tuple[object, ...]]):
    folder, _ = shared
    (folder / "lock.json").write_text(Holder.here().text)  # of a driver that is dead
    leases = [Lease(folder / "lock.json") for _ in range(4)]
    refused: list[str] = []

    def compete(lease: Lease) -> None:
        try:
            lease.acquire(lambda _: None)
        except ValueError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=compete, args=(lease,)) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    holders = [lease for lease in leases if lease._thread.is_alive()]
    assert len(holders) == 1 and len(refused) == 3
    assert all("is in use by process" in text for text in refused)
    holders[0].release()


@pytest.mark.parametrize("since", ["1970-01-01T00:00:00+00:00", "2999-01-01T00:00:00+00:00"])
@pytest.mark.parametrize("jump", [-(10**9), 10**9])
def test_no_clock_decides_who_holds_a_lease(
    url: str, since: str, jump: int, drivers: list[Driver], monkeypatch: pytest.MonkeyPatch
):
    """Neither the time that a holder noted, nor the clock of who waits, however it jumps."""
    drivers.append(Driver(url))
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    with pytest.raises(ValueError, match="is in use by process"):
        Lease(located(url) / "lock.json").acquire(lambda _: None)
    monkeypatch.undo()
    drivers[0].tell(signal.SIGKILL)
    drivers[0].process.wait()
    left = content(located(url) / "lock.json") | {"since": since}
    (located(url) / "lock.json").write_text(json.dumps(left))
    lease = Lease(located(url) / "lock.json", BEAT)
    lease.acquire(lambda _: None)
    lease.release()


def test_a_store_that_is_away_for_a_while_costs_no_lease(url: str, monkeypatch: pytest.MonkeyPatch):
    lease, away = Lease(located(url) / "lock.json"), threading.Event()
    read = lease._read

    def sometimes() -> str | None:
        if away.is_set():
            raise ConnectionError("away")
        return read()

    monkeypatch.setattr(lease, "_read", sometimes)
    lease.acquire(lambda _: None)
    away.set()
    time.sleep(3 * BEAT)
    away.clear()
    time.sleep(2 * BEAT)
    assert lease.lost is None and content(lease.path)["beat"] >= 1
    lease.release()
    assert not lease.path.exists()
