"""What a run directory or a teacher's folder may do to who reads it, and what a run may tell of its owner."""

import json
import logging
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from hd_core.step import TrainState
from pipelines import cli
from pipelines.artifacts import file_hash, plain_name, read_json, write_json
from pipelines.checkpoints import load_latest, load_weights
from pipelines.evaluate import Evaluator
from pipelines.journal import texts
from pipelines.model_files import WEIGHTS, ModelFiles
from pipelines.report_page import render_stages
from pipelines.shards import read_shard
from pipelines.stores import redact
from pipelines.teachers import EMBEDDED, TeacherConfig, load_teacher
from pipelines.ui import server_command
from pipelines.weight_sheet import read_looks
from tests.pipelines import tiny
from tests.pipelines.conftest import Finished

ROOT = Path(__file__).parents[2]
OUTSIDE = ["../x.bin", "/etc/passwd", "a/b", "a\\b", "..", ".", "", "x\0y", 7, None]
SECRET = "hunter2-hunter2-hunter2"


# Names that lead elsewhere


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_elsewhere_is_refused(name: object):
    with pytest.raises(ValueError, match=r"manifest.json names the file .* no plain name in its own folder") as raised:
        plain_name(name, Path("manifest.json"))
    assert repr(name) in str(raised.value)


@pytest.mark.parametrize("name", ["part-00000.parquet", "..a", "a b.npz", "ä.json"])
def test_a_plain_name_passes(name: str):
    assert plain_name(name, Path("manifest.json")) == name


def test_a_manifest_that_names_a_file_elsewhere_is_refused(copied: Finished):
    outside = copied.run_dir / "secret.parquet"
    shutil.copy(copied.run_dir / "trajectories" / "part-00000.parquet", outside)
    path = copied.run_dir / "trajectories" / "manifest.json"
    manifest = read_json(path)
    manifest["shards"][0]["file"] = "../secret.parquet"
    write_json(path, manifest)
    result = tiny.hdistill("run", *copied.arguments, *tiny.UNTRACKED)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert f"{path} names the file '../secret.parquet', which is no plain name" in result.stderr
    assert outside.exists()


@pytest.mark.parametrize("damage", [{"file": 1}, {"other": 1}, None])
def test_a_manifest_of_something_else_is_one_line(copied: Finished, damage: dict[str, int] | None):
    path = copied.run_dir / "trajectories" / "manifest.json"
    manifest = read_json(path)
    if damage is None:
        manifest["shards"] = 3
    else:
        manifest["shards"][0] = damage
    write_json(path, manifest)
    with pytest.raises(ValueError, match=r"manifest\.json is no manifest of shards; delete it"):
        _ = tiny.open_run(copied.recipe, copied.run_dir).trajectories


def test_a_row_that_names_pictures_elsewhere_is_refused(copied: Finished):
    run = tiny.open_run(copied.recipe, copied.run_dir)
    generator = run.generators()[0]
    path = copied.run_dir / "evaluate" / f"{generator.key}.json"
    stored = read_json(path)
    stored["row"]["samples"] = "../../elsewhere.npz"
    write_json(path, stored)
    evaluator = Evaluator.__new__(Evaluator)
    evaluator.folder = copied.run_dir / "evaluate"
    with pytest.raises(ValueError, match=r"names the file '\.\./\.\./elsewhere\.npz', which is no plain name"):
        evaluator.finished(generator)


def test_an_index_of_weights_that_names_a_file_elsewhere_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    index = tmp_path / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../stolen.safetensors"}}))
    with pytest.raises(ValueError, match=r"names the file '\.\./stolen\.safetensors', which is no plain name"):
        ModelFiles.of(tmp_path)


# Pickles


class _Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mknod, (str(self._path),)


@pytest.fixture
def trap(tmp_path: Path) -> tuple[bytes, Path]:
    """A pickle, and the file that is there once it was loaded."""
    sprung = tmp_path / "sprung"
    return pickle.dumps(_Payload(sprung)), sprung


def test_the_trap_works(trap: tuple[bytes, Path]):
    content, sprung = trap
    with pytest.raises(TypeError):
        _ = pickle.loads(content) + 1
    assert sprung.exists()


def test_a_pickle_as_weights_is_refused_by_name(tmp_path: Path, trap: tuple[bytes, Path]):
    content, sprung = trap
    path = tmp_path / "student.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"student\.safetensors does not hold this network's weights"):
        load_weights(path, torch.nn.Linear(1, 1))
    assert not sprung.exists()


def test_a_pickle_as_a_checkpoint_is_not_opened(tmp_path: Path, trap: tuple[bytes, Path]):
    content, sprung = trap
    path = tmp_path / "step-00000002.safetensors"
    path.write_bytes(content)
    state = TrainState.__new__(TrainState)
    write_json(path.with_suffix(".json"), {"step": 2, "moves": {}, "sha256": "0" * 64, "inputs": {}})
    assert load_latest(tmp_path, state, {}) == [path.name], "its hash does not fit"
    write_json(path.with_suffix(".json"), {"step": 2, "moves": {}, "sha256": file_hash(path), "inputs": {}})
    with pytest.raises((ValueError, SafetensorError)):
        load_latest(tmp_path, state, {})
    assert not sprung.exists()


def test_a_pickle_as_a_shard_is_refused_by_name(tmp_path: Path, trap: tuple[bytes, Path]):
    content, sprung = trap
    path = tmp_path / "part-00000.parquet"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"part-00000\.parquet is no shard of this project"):
        read_shard(path)
    assert not sprung.exists()


def planted_arrays(path: Path, sprung: Path, *, raw: bool) -> None:
    """A pickle under the name of an npz, or an npz that holds one under every name that is read."""
    if raw:
        path.write_bytes(pickle.dumps(_Payload(sprung)))
        return
    bad = np.array([_Payload(sprung)], dtype=object)
    names = ("images", "labels", "prompts", "fake_images", "fake_logits", "fake_weights", "real_images")
    np.savez(path, **dict.fromkeys(names, bad))


@pytest.mark.parametrize("raw", [True, False])
def test_pickles_as_arrays_are_named_on_the_page_and_not_opened(copied: Finished, tmp_path: Path, raw: bool):
    samples = copied.run_dir / "evaluate" / "refine-flow_map-1.npz"
    looks = copied.run_dir / "stages" / "refine" / "token_weights.npz"
    assert samples.exists() and looks.exists()
    for path in (samples, looks):
        planted_arrays(path, tmp_path / "sprung", raw=raw)
    with pytest.raises(ValueError):
        read_looks(looks)
    render_stages(copied.run_dir)
    result = tiny.hdistill("report", copied.run_dir)
    assert result.exit_code == 0
    page = (copied.run_dir / "report.html").read_text()
    assert "cannot read evaluate/refine-flow_map-1.npz" in page and "token_weights.npz" in page
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pt", "a.ckpt", "b.pkl"])
def test_a_pickle_in_a_teachers_folder_is_refused_by_name(tmp_path: Path, name: str, trap: tuple[bytes, Path]):
    folder = tmp_path / "teacher"
    shutil.copytree(EMBEDDED / "digits", folder)
    for path in folder.rglob("*.safetensors"):
        path.unlink()
        (path.parent / name).write_bytes(trap[0])
    with pytest.raises(ValueError, match=rf"has only {name}: pickled weights are never loaded"):
        load_teacher(TeacherConfig(path=str(folder)))
    assert not trap[1].exists()


def test_a_pickle_under_the_name_of_a_teachers_weights_is_refused_by_name(tmp_path: Path, trap: tuple[bytes, Path]):
    folder = tmp_path / "teacher"
    shutil.copytree(EMBEDDED / "digits", folder)
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(trap[0])
    with pytest.raises(ValueError, match=str(folder)):
        load_teacher(TeacherConfig(path=str(folder)))
    assert not trap[1].exists()


# Who can reach a server


def test_servers_listen_on_this_machine_alone():
    command = server_command("sqlite:///x.db")
    assert command[command.index("--host") + 1] == "127.0.0.1"
    (host,) = [option for option in cli.ui.params if option.name == "host"]
    assert host.default == "127.0.0.1"


# Secrets


def test_credentials_in_a_run_directory_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    result = tiny.hdistill("run", "digits", "--run-dir", f"s3://KEY:{SECRET}@bucket/x")
    assert result.exit_code == 2 and SECRET not in result.output + result.stderr
    assert "holds credentials" in result.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variable", ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN"])
def test_secrets_of_the_environment_are_struck_out(variable: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(variable, SECRET)
    assert redact(f"denied for {SECRET}!") == "denied for ***!"
    assert texts({"key": {"a": SECRET}}) == {"key": '{"a": "***"}'}
    monkeypatch.setenv(variable, "test")
    assert redact("a test") == "a test"


@pytest.mark.slow
def test_no_secret_reaches_files_logs_or_the_terminal(
    copied: Finished, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A tracking server with a password that is away, and keys in the environment: the worst time to be talkative."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:9")
    for variable in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.setenv(variable, SECRET)
    monkeypatch.setattr("pipelines.process.available_cpus", lambda: 1)
    with caplog.at_level(logging.DEBUG, logger="pipelines"):
        result = tiny.hdistill("run", *copied.arguments)
    assert result.exit_code == 0
    assert "does not take entries" in caplog.text and SECRET not in caplog.text
    assert SECRET not in result.output + result.stderr
    told = [path for path in copied.run_dir.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert told == []


# Disks


def test_a_place_that_cannot_be_written_is_one_line():
    result = tiny.hdistill("run", "digits", "--run-dir", "/proc/runs/digits")
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert "run directory /proc/runs/digits cannot be written" in result.stderr


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_costs_nothing_that_is_finished(tmp_path: Path, finished: Finished):
    """As full as a limit on file sizes makes it: shards fit, and the weights of the first stage do not."""
    tiny.write_recipe(tmp_path)
    one_thread = [sys.executable, "-m", "tests.pipelines.mortal", "before", "nothing", "1"]
    command = [*one_thread, "run", "tiny.yaml", "--run-dir", "tiny", "--set", "precompute.num_actors=0"]
    command += tiny.UNTRACKED
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(limit: int) -> "subprocess.CompletedProcess[str]":
        def confine() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250, preexec_fn=confine
        )

    full = run(100_000)
    assert full.returncode == 1, full.stdout + full.stderr
    assert len(full.stderr.splitlines()) == 1, full.stderr
    assert "error: " in full.stderr and "Nothing finished is lost: run the same command again" in full.stderr
    shards = read_json(tmp_path / "tiny" / "trajectories" / "manifest.json")
    assert shards["complete"] and not [path for path in (tmp_path / "tiny").rglob(".*")]
    after = run(resource.RLIM_INFINITY)
    assert after.returncode == 0, after.stderr
    assert "precompute   reused" in after.stdout
    for stage in tiny.STAGES:
        there, here = (folder / "stages" / stage for folder in (finished.run_dir, tmp_path / "tiny"))
        assert file_hash(here / "student.safetensors") == file_hash(there / "student.safetensors"), stage
