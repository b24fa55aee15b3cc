"""Files that are whole or absent, fingerprints, differences, and what makes a run directory."""

import hashlib
import json
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.artifacts import (
    RunDir,
    atomic_folder,
    atomic_path,
    differences,
    ensure_same,
    file_hash,
    fingerprint,
    flatten,
    read_json,
    write_json,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def python(code: str, *arguments: object, **options: object) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, stdout=-1, stderr=-1, stdin=-1, **options)  # type: ignore[call-overload]


# Atomic writing


def test_a_new_file_is_there_at_the_end_and_not_before(tmp_path: Path):
    path = tmp_path / "deep" / "er" / "file"
    with atomic_path(path) as temporary:
        temporary.write_text("all of it")
        assert not path.exists() and temporary.parent == path.parent and temporary.name.startswith(".")
    assert path.read_text() == "all of it"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("bug")])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_path(path) as temporary:
        temporary.write_text("half of it")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_before_anything_is_written_is_not_hidden(tmp_path: Path):
    with pytest.raises(RuntimeError, match="early"), atomic_path(tmp_path / "file"):
        raise RuntimeError("early")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file(tmp_path: Path):
    """A real one, as far as a limit on file sizes is: the system cuts the write off in the middle."""
    code = """
        import resource, signal, sys
        from pathlib import Path
        from pipelines.artifacts import write_json
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            write_json(Path(sys.argv[1]), ["x" * 100] * 1000)
        except OSError as error:
            print(error.strerror)
    """
    path = tmp_path / "file.json"
    write_json(path, "old")
    out, err = python(code, path).communicate(timeout=60)
    assert out.strip() == "File too large", err
    assert read_json(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_open_to_whom_the_umask_lets(tmp_path: Path, umask: int, mode: int):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "file.json", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.json").stat().st_mode) == mode


def test_a_folder_comes_whole_or_not_at_all(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "made") as temporary:
        (temporary / "part").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path / "made") as temporary:
        (temporary / "part").write_text("whole")
    assert (tmp_path / "made" / "part").read_text() == "whole"
    with pytest.raises(ValueError, match="exists already"), atomic_folder(tmp_path / "made"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


# JSON


@given(JSON)
def test_json_round_trip(tmp_path_factory: pytest.TempPathFactory, value: object):
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    write_json(path, value)
    assert read_json(path) == value


def test_no_json_is_none(tmp_path: Path):
    assert read_json(tmp_path / "none.json") is None


@pytest.mark.parametrize("garbage", [b"", b"{", b"\xff\xfe\x00", b'{"a": 1'])
def test_damaged_json_says_where_and_what_to_do(tmp_path: Path, garbage: bytes):
    path = tmp_path / "bad.json"
    path.write_bytes(garbage)
    with pytest.raises(ValueError, match=r"bad\.json is damaged \(.*\); delete it to have it made again") as raised:
        read_json(path)
    assert len(str(raised.value).splitlines()) == 1


def test_numbers_that_are_none_are_not_written(tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "nan.json", float("nan"))
    assert list(tmp_path.iterdir()) == []


# Fingerprints and differences


@given(st.dictionaries(st.text(), JSON))
def test_a_fingerprint_does_not_know_order_or_kind_of_sequence(value: dict[str, object]):
    backwards = dict(reversed(list(value.items())))
    assert fingerprint(value) == fingerprint(backwards) == fingerprint(json.loads(json.dumps(value)))


def test_fingerprints_are_those_of_every_machine():
    assert fingerprint({"b": [1, 2.5, None], "a": "x"}) == fingerprint({"a": "x", "b": (1, 2.5, None)})
    text = '{"a":"x","b":[1,2.5,null]}'
    assert fingerprint({"b": [1, 2.5, None], "a": "x"}) == hashlib.sha256(text.encode()).hexdigest()
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})


def test_file_hash(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"abc")
    assert file_hash(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


def test_differences_name_the_field_the_old_and_the_new():
    old = {"a": 1, "b": {"c": "x", "d": [1, 2]}, "gone": True}
    new = {"a": 1, "b": {"c": "y", "d": [1, 3]}, "new": None}
    assert differences(old, new) == [
        "b.c: x there, y here",
        "b.d: [1, 2] there, [1, 3] here",
        "gone: true there, not set here",
        "new: not set there, null here",
    ]
    assert differences(old, old) == []


def test_differences_keep_long_values_short():
    (line,) = differences({"sha": "a" * 64}, {"sha": "b" * 64})
    assert line == f"sha: {'a' * 24}...{'a' * 8} there, {'b' * 24}...{'b' * 8} here"


def test_ensure_same_does_not_mind_tuples_and_names_what_differs():
    ensure_same("thing", {"betas": [0.5, 0.9]}, {"betas": (0.5, 0.9)})
    with pytest.raises(ValueError, match=r"^thing was made from other inputs: seed: 0 there, 1 here. Use another"):
        ensure_same("thing", {"seed": 0}, {"seed": 1})


# The run directory


def test_a_run_directory_is_made_with_its_parents(tmp_path: Path):
    assert RunDir.create(tmp_path / "a" / "b").path.is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("under", ["file", "file/run", "loop/run"])
def test_a_run_directory_that_cannot_be_written_is_refused(tmp_path: Path, under: str):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ValueError, match=r"cannot be written: .*\. Choose another with --run-dir") as raised:
        RunDir.create(tmp_path / under)
    assert len(str(raised.value).splitlines()) == 1


def test_a_read_only_run_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # the permission bits do not stop root, as in containers
    with pytest.raises(ValueError, match="cannot be written: Permission denied"):
        RunDir.create(tmp_path)


def test_a_full_disk_is_told_of_as_such_by_every_writer(tmp_path: Path):
    """safetensors' own error names the system's only in its text."""
    with pytest.raises(OSError) as raised, atomic_path(tmp_path / "x.safetensors"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert raised.value.errno == 28 and raised.value.filename == str(tmp_path / "x.safetensors")
    with pytest.raises(RuntimeError, match="a bug"), atomic_path(tmp_path / "x"):
        raise RuntimeError("a bug")
