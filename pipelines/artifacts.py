"""Files that are whole or absent, and how a result remembers what made it.

Every artifact has a manifest: its inputs, their fingerprint, and the hash of each file. Equal fingerprint: reuse it.
Other fingerprint: refuse, and name the inputs that differ. Unreadable file: make it again, and say so.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

from pipelines.locks import held
from pipelines.storage import check_writable, failure, is_remote, read_bytes, upload

Inputs = Mapping[str, Any]
OTHER_RUN_DIR = "Use another --run-dir"


def fingerprint(value: object) -> str:
    """Hash of a JSON value, the same for equal values on every machine."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        flat |= flatten(item, f"{name}.") if isinstance(item, Mapping) and item else {name: item}
    return flat


def differences(made_with: Inputs, wanted: Inputs) -> list[str]:
    """The fields that differ, each as ``field: is OLD there, NEW here``."""
    found = differing([made_with, wanted])
    return [f"{key}: {old} there, {new} here" for key, (old, new) in found.items()]


def differing(values: Sequence[Inputs]) -> dict[str, list[str]]:
    """The fields that are not the same in all, by dotted key in order of the alphabet: short texts, one for each."""
    flat, absent = [flatten(value) for value in values], "not set"
    keys = sorted(set().union(*flat))
    columns = {key: [one.get(key, absent) for one in flat] for key in keys}
    return {key: [_short(one) for one in told] for key, told in columns.items() if any(x != told[0] for x in told)}


def as_text(value: object) -> str:
    """A value as YAML has it: text as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _short(value: object) -> str:
    text = as_text(value)
    return text if len(text) <= 40 else f"{text[:24]}...{text[-8:]}"


def ensure_same(what: str, made_with: Inputs, wanted: Inputs, remedy: str = OTHER_RUN_DIR) -> None:
    """Refuse an artifact that was made from other inputs, naming them and what to do.

    Raises:
        ValueError: the inputs differ.
    """
    differing = differences(made_with, json.loads(json.dumps(wanted)))
    if differing:
        raise ValueError(f"{what} was made from other inputs: {'; '.join(differing)}. {remedy}")


def plain_name(name: object, listed_in: Path) -> str:
    """A file name that was read from a manifest, as one that stays in the manifest's own folder.

    Raises:
        ValueError: it leads elsewhere.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
        raise ValueError(f"{listed_in} names the file {name!r}, which is no plain name in its own folder: not opened")
    return name


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A local temporary file; what was written there takes the place of ``path``, whole and durable, at the end.

    The file is beside ``path`` where that is local; else it is uploaded, and an object appears whole.
    """
    with _uploaded(path) if is_remote(path) else _renamed(path) as temporary:
        try:
            yield temporary
        except Exception as error:
            if (told := _system_error(error, path)) is None:
                raise
            raise told from None


def _system_error(error: Exception, path: Path) -> OSError | None:
    """What the disk said, where the error is of another kind and tells of it, as safetensors' does."""
    code = re.search(r"\(os error (\d+)\)", str(error))
    if code is None or isinstance(error, OSError):
        return None
    return OSError(int(code[1]), os.strerror(int(code[1])), str(path))


@contextmanager
def _uploaded(path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hdistill-") as folder:
        temporary = Path(folder, path.name)
        yield temporary
        upload(temporary, path)


@contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # unlike mkstemp's, open to whom the umask lets
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that becomes it, whole and durable, at the end.

    Raises:
        ValueError: ``folder`` exists already, and is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; it is not overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        temporary.replace(folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays as a compressed npz, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file; ``None`` where there is none.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(read_bytes(path))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to have it made again") from None


class RunDir:
    """Where one run keeps everything it makes."""

    def __init__(
        self, path: Path, shared: Path | None = None, own_stage: str = "", references: Path | None = None
    ) -> None:
        """``shared`` holds, for several runs, what they read and every stage but each one's ``own_stage``."""
        self.path, self._shared, self._own_stage = path, shared or path, own_stage
        self.references = references or path / "evaluate" / "reference"
        """Features of the real images that generators are compared with."""

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make the directory, and see that it can be written.

        Raises:
            ValueError: it cannot be made or written.
        """
        try:
            check_writable(path)
        except Exception as error:
            reason = getattr(error, "strerror", None) or failure(error)
            if reason is None:
                raise
            raise ValueError(
                f"run directory {path} cannot be written: {reason}. Choose another with --run-dir"
            ) from None
        return cls(path)

    @property
    def recipe(self) -> Path:
        """The resolved recipe that made this directory."""
        return self.path / "recipe.json"

    @property
    def state(self) -> Path:
        """The tracker's run id."""
        return self.path / "run.json"

    @property
    def trajectories(self) -> Path:
        """Teacher trajectories: shards and manifest."""
        return self._shared / "trajectories"

    @property
    def images(self) -> Path:
        """Real training images: shards and manifest."""
        return self._shared / "images"

    @property
    def validation(self) -> Path:
        """Real images that are kept from training: shards and manifest."""
        return self._shared / "validation"

    @property
    def latents(self) -> Path:
        """Real training images as the teacher's latents: shards and manifest."""
        return self._shared / "latents"

    @property
    def prompts(self) -> Path:
        """Text embeddings of the run's prompts: shards and manifest."""
        return self._shared / "prompts"

    @property
    def evaluation(self) -> Path:
        """Figures of each generator, and the pictures of its first samples."""
        return self.path / "evaluate"

    @property
    def holds_results(self) -> bool:
        """Whether anything was computed here that another recipe would clash with."""
        made = (self.prompts, self.trajectories, self.images, self.latents, self.evaluation, self.path / "stages")
        return any(part.is_dir() for part in made)

    def stage(self, name: str) -> Path:
        """Checkpoints, curve and final weights of one stage."""
        return (self.path if name == self._own_stage else self._shared) / "stages" / name

    @contextmanager
    def locked(self, say: Callable[[str], None] = lambda _text: None) -> Iterator[None]:
        """Hold the directory against a second driver; ``say`` is told where that takes a while.

        Raises:
            ValueError: another process holds it, or has taken it over.
        """
        with held(self.path, say):
            yield
