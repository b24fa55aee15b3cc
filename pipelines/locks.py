"""One driver for each run directory.

On a local disk the system's own lock says who: it ends with its holder. Between machines, on a network file system or
in an object store, a lease says who: a file that its holder renews, and that another takes over once it has stopped
changing. How long that is, each waiter measures by its own clock, which never jumps; no two clocks are compared.
"""

import fcntl
import getpass
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.storage import is_remote, read_bytes, store_of

HEARTBEAT_SECONDS = 10.0
"""Between two renewals of a lease; after three without one it may be taken over."""
_SHARED = ("9p", "afs", "beegfs", "ceph", "cifs", "fuse.", "glusterfs", "gpfs", "lustre", "nfs", "smb", "virtiofs")
_MOUNTS = Path("/proc/self/mounts")
_SECONDS_BETWEEN_LOOKS = 0.2

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a run directory, as people and other processes know it."""

    host: str
    process: int
    user: str
    since: str
    """For people alone: nothing is decided by it."""
    token: str
    """Tells this holding from every other."""
    beat: int = 0
    """Renewals so far."""

    @classmethod
    def here(cls) -> "Holder":
        """This process, from now on."""
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a container's user may have no name
            user = str(os.getuid())
        since = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(host=socket.gethostname(), process=os.getpid(), user=user, since=since, token=uuid.uuid4().hex)

    @classmethod
    def read(cls, text: str) -> "Holder | None":
        """Who wrote this text; ``None`` where nobody can tell."""
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError):
            return None

    @property
    def text(self) -> str:
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        return f"process {self.process} of {self.user} on {self.host} since {self.since}"


@contextmanager
def held(folder: Path, say: Say) -> Iterator[None]:
    """Hold a run directory; ``say`` is told where that takes a while.

    Raises:
        ValueError: another process holds it, or took it over in the meantime.
    """
    shared = is_remote(folder) or _is_shared(folder)
    own = nullcontext() if is_remote(folder) else _locked(folder, enough=not shared)
    with own, _leased(folder, say) if shared else nullcontext():
        yield


@contextmanager
def awaited(folder: Path, say: Say, seconds: float) -> Iterator[None]:
    """Hold a directory as soon as whoever holds it lets go.

    Raises:
        ValueError: it was still held after so many seconds, or was taken over.
    """
    latest = time.monotonic() + seconds
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(held(folder, say))
                break
            except ValueError:
                if time.monotonic() > latest:
                    raise
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        yield


def _refused(folder: Path, holder: Holder | None) -> ValueError:
    return ValueError(
        f"run directory {folder} is in use by {holder or 'another process'}; wait for it, or use --run-dir"
    )


# On one machine


@contextmanager
def _locked(folder: Path, *, enough: bool) -> Iterator[None]:
    """The system's lock; a file system that has none is refused where a lease does not make up for it."""
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _refused(folder, Holder.read(file.read())) from None
        except OSError:
            if enough:
                raise
        file.truncate(0)
        file.write(Holder.here().text)
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _is_shared(folder: Path) -> bool:
    """Whether a folder lies on a file system that other machines may have mounted too."""
    if not _MOUNTS.exists():
        return False
    lines = [line.split() for line in _MOUNTS.read_text().splitlines()]
    kinds = {where.replace("\\040", " "): kind for _, where, kind, *_ in lines}
    above = [where for where in kinds if folder.resolve().is_relative_to(where)]
    kind = kinds[max(above, key=len)] if above else ""
    return kind.startswith(_SHARED) and kind != "fuse.fuse-overlayfs"


# Between machines


@contextmanager
def _leased(folder: Path, say: Say) -> Iterator[None]:
    with _stoppable() as stop:
        lease = Lease(folder / "lock.json", stop=stop)
        lease.acquire(say)
        try:
            yield
        except KeyboardInterrupt:
            if lease.lost is None:
                raise
        finally:
            lease.release()
    if lease.lost is not None:
        raise ValueError(
            f"run directory {folder} was taken over {lease.lost}, while this process did not answer for"
            f" {3 * lease.seconds:g} s or more: stopped here"
        )


@contextmanager
def _stoppable() -> Iterator[signal.Signals]:
    """The signal that stops the main thread: Ctrl-C's, or another where that is ignored, as in a script's ``&``."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield signal.SIGINT
        return
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        yield signal.SIGUSR1
    finally:
        signal.signal(signal.SIGUSR1, before)


class Lease:
    """A file with the name of its holder, who renews it from a thread of its own."""

    def __init__(self, path: Path, seconds: float | None = None, stop: signal.Signals = signal.SIGINT) -> None:
        self.path, self.seconds = path, HEARTBEAT_SECONDS if seconds is None else seconds
        self.lost: str | None = None
        """By whom it was taken over, if it was."""
        self._holder, self._ended, self._stop = Holder.here(), threading.Event(), stop
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def acquire(self, say: Say) -> None:
        """Take the lease, at once where nobody has it, and after a while where its holder no longer renews it.

        Raises:
            ValueError: its holder renews it.
        """
        while not self._created():
            if (there := self._read()) is not None:
                who = Holder.read(there) or "another process"
                say(f"{self.path.parent} was left by {who}, or is in use: watching it for {3 * self.seconds:g} s")
                self._outwait(there)
            if there is not None and self._taken(there):
                break
        self._thread.start()

    def release(self) -> None:
        """Give it back, unless somebody else has it."""
        self._ended.set()
        self._thread.join()
        with suppress(Exception):  # the run is done, and a lease that is left behind is taken over
            if self._is_ours(self._read()):
                self.path.unlink()

    def _created(self) -> bool:
        try:
            with self.path.open("xb") as file:
                file.write(self._holder.text.encode())
        except FileExistsError:
            return self._is_ours(self._read())  # a request whose answer was lost was made again
        return True

    def _outwait(self, there: str) -> None:
        """Return once the lease has not changed for three heartbeats, or is gone."""
        started = time.monotonic()
        while time.monotonic() - started < 3 * self.seconds:
            time.sleep(self.seconds / 4)
            now = self._read()
            if now is None:
                return
            if now != there:
                raise _refused(self.path.parent, Holder.read(now))

    def _taken(self, there: str) -> bool:
        """Replace what is there by our own; false where another was faster."""
        with suppress(OSError):
            self._replace(there, self._holder)
        time.sleep(self.seconds / 2)  # a store without conditions lets the last of two win: by now that is seen
        return self._is_ours(self._read())

    def _renew(self) -> None:
        while not self._ended.wait(self.seconds):
            try:
                there = self._read()
                if not self._is_ours(there):
                    self.lost = f"by {Holder.read(there) or 'another process'}" if there else "and given back"
                    return self._interrupt()
                self._holder = replace(self._holder, beat=self._holder.beat + 1)
                self._replace(there or "", self._holder)
            except Exception:  # the store is away, for others as well; the next look decides
                continue

    def _interrupt(self) -> None:
        """Stop the main thread, in a wait, too; again and again, since one that comes as a wait begins is not heard."""
        told = False
        while not told:
            signal.pthread_kill(threading.main_thread().ident or 0, self._stop)
            told = self._ended.wait(self.seconds)

    def _is_ours(self, there: str | None) -> bool:
        holder = Holder.read(there) if there else None
        return holder is not None and holder.token == self._holder.token

    def _read(self) -> str | None:
        try:
            return read_bytes(self.path).decode(errors="replace")
        except FileNotFoundError:
            return None

    def _replace(self, there: str, holder: Holder) -> None:
        """Write a holder in the place of ``there``, and of nothing else where the store can promise that."""
        if not is_remote(self.path):
            temporary = self.path.with_name(f".{self.path.name}.{holder.token}")
            temporary.write_text(holder.text)
            temporary.replace(self.path)
            return
        store, key = store_of(self.path)
        condition: dict[str, Any] = {"IfMatch": store.info(key)["ETag"]} if "s3" in store.protocol else {}
        if self._read() == there:
            store.pipe_file(key, holder.text.encode(), **condition)
