"""Files on local disks and behind the URLs of object stores, by the methods of `Path`; and where a store is no disk.

An object appears whole or not at all, cannot be appended to, and a store knows no folders, no renaming and no locks.
Throttled requests and cut connections are tried again by the store's own client, with growing pauses.
"""

import errno
import hashlib
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from pipelines.stores import redact

_URL = re.compile(r"([a-zA-Z][\w+.-]*)://(.*)", re.DOTALL)
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
_CLIENTS = ("aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "s3fs")
_RETRIES = {"mode": "standard", "max_attempts": 6}
"""Of botocore; s3fs tries each of these again up to five times, which outlasts a store's outage of about a minute."""


def located(text: str | Path) -> Path:
    """A local path, its `~` expanded, or the object of a URL such as s3://bucket/runs/digits, with `Path`'s methods.

    Raises:
        ValueError: the URL names no place, holds credentials, or needs a package that is not installed.
    """
    if not isinstance(text, str):
        return text
    url = _URL.fullmatch(text)
    if url is None or url[1].lower() == "file":
        path = Path(url[2] if url else text)
        with suppress(RuntimeError):  # there is no such user
            path = path.expanduser()
        return path
    return _remote(text.rstrip("/"), url[1].lower(), url[2].rstrip("/"))


def _remote(url: str, protocol: str, place: str) -> Path:
    if re.search(r":.*@|[?&][\w-]*(?:token|secret|key|password)[\w-]*=", place, re.IGNORECASE):
        raise ValueError(
            f"{redact(url)} holds credentials, which would be stored with the run: give them by the environment, such"
            " as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or by a profile"
        )
    if not place or not {"", ".", ".."}.isdisjoint(place.split("/")):
        raise ValueError(f"{url} names no place in a store: give PROTOCOL://BUCKET/FOLDER, without empty parts or dots")
    _require(protocol, url)
    from upath import UPath

    options: dict[str, Any] = {"config_kwargs": {"retries": _RETRIES}} if _EXTRAS.get(protocol) == "s3" else {}
    path = UPath(url, use_listings_cache=False, **options)  # others write there while this process looks
    return cast(Path, path)


def _require(protocol: str, url: str) -> None:
    """See that there is a client for a protocol."""
    from fsspec import get_filesystem_class

    try:
        get_filesystem_class(protocol)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'hdistill[{extra}]'" if extra else str(error)
        raise ValueError(f"{url} needs a package that is not installed: {remedy}") from None
    except ValueError:
        raise ValueError(f"{url} is of no known kind: give a local path, s3://... or gs://...") from None


def is_remote(path: Path) -> bool:
    """Whether a path of `located` lies in an object store."""
    return not isinstance(path, Path)


def store_of(path: Path) -> tuple[Any, str]:
    """The fsspec file system of a remote path, and what it calls the object."""
    remote: Any = path
    return remote.fs, remote.path


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """A file or folder itself where it is local, else a copy of it under the same name that is gone at the end.

    Raises:
        FileNotFoundError: it is not there.
    """
    if not is_remote(path):
        yield path
        return
    store, key = store_of(path)
    with tempfile.TemporaryDirectory(prefix="hdistill-") as folder:
        copy = Path(folder, path.name)
        store.get(key, str(copy), recursive=True)
        yield copy


def read_bytes(path: Path) -> bytes:
    """All of a file; of an object in one request, so that one that is replaced meanwhile is read whole, old or new.

    Raises:
        FileNotFoundError: it is not there.
    """
    if not is_remote(path):
        return path.read_bytes()
    store, key = store_of(path)
    return store.cat_file(key)


def upload(file: Path, path: Path) -> None:
    """Bring a local file to a remote path, where it appears whole; what was there before is replaced.

    Raises:
        OSError: the object has not the file's size afterwards.
    """
    store, key = store_of(path)
    store.put_file(str(file), key)
    there, here = store.info(key)["size"], file.stat().st_size
    if there != here:
        raise OSError(errno.EIO, f"{here:,} bytes were uploaded and {there:,} are there", str(path))


def check_writable(folder: Path) -> None:
    """Write a file and drop it again; raises what the disk or the store says."""
    if is_remote(folder):
        probe = folder / f".probe-{uuid.uuid4().hex}"
        probe.write_bytes(b"")
        probe.unlink()
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def remove_tree(folder: Path) -> None:
    """Drop a folder and all that is in it, if it is there."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    store, key = store_of(folder)
    with suppress(FileNotFoundError):
        store.rm(key, recursive=True)


def local_stand_in(run_dir: Path) -> Path:
    """Where that of a run lies which a store cannot hold, such as a database: the folder itself, or one in `runs`."""
    if not is_remote(run_dir):
        return run_dir
    url = str(run_dir)
    name = re.sub(r"[^\w.-]+", "-", url)
    return Path("runs") / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def failure(error: BaseException) -> str | None:
    """What a disk or a store that fails says, in one line; ``None`` where the error is of another kind."""
    if isinstance(error, OSError) and error.strerror and error.errno != errno.EPIPE:  # a closed pipe is no failure
        return error.strerror + (f" ({error.filename})" if error.filename else "")
    if isinstance(error, FileNotFoundError):
        return f"not there: {redact(str(error))}"
    kinds = {type(one).__module__.partition(".")[0] for one in (error, error.__cause__) if one}
    if kinds.isdisjoint(_CLIENTS):
        return None
    return redact((str(error).splitlines() or [type(error).__name__])[0])
