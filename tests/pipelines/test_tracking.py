"""Tracking against a real MLflow on sqlite, read back with MLflow's own client, and against stores that are away."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from pipelines import journal
from pipelines.artifacts import flatten
from pipelines.journal import BufferedTracker, Journal, texts
from pipelines.stores import TrackConfig, quiet_environment, redact, tracking_uri
from pipelines.tracking import CHANGED_TAG, MlflowTracker, NoopTracker, Tracker, attach, open_tracker
from pipelines.ui import server_command, ui
from tests.pipelines.ports import free_ports

EXPERIMENT = "digits"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sqlite file for the module: a fresh one costs seconds."""
    return tmp_path_factory.mktemp("runs") / "mlflow.db"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(journal, "_SEND_SECONDS", 0.0)


@pytest.fixture
def client(store: Path) -> MlflowClient:
    quiet_environment()
    return MlflowClient(f"sqlite:///{store}")


def _open(
    store: Path, run_dir: Path, *, uri: str = "", resume: str | None = None, name: str = "run", **tags: object
) -> BufferedTracker:
    tracker = open_tracker(
        TrackConfig(uri=uri),
        recipe_name=EXPERIMENT,
        run_name=name,
        run_dir=run_dir,
        default_store=store,
        resume_run_id=resume,
        tags=tags,
    )
    assert isinstance(tracker, BufferedTracker)
    return tracker


def _dead_uri() -> str:
    return f"http://127.0.0.1:{free_ports(1)[0]}"


def _steps(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, key)]


def _runs(client: MlflowClient, name: str) -> list[Run]:
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(ids, f"attributes.run_name = '{name}'")


def _journal(run_dir: Path) -> list[dict]:
    return Journal(run_dir / "tracking" / "pending.jsonl").entries()


def test_a_run_with_a_child_is_recorded(store: Path, tmp_path: Path, client: MlflowClient) -> None:
    tracker = _open(store, tmp_path, recipe="digits")
    child = tracker.child("sketch", {"stage": "sketch"})
    child.metrics({"loss": 0.5, "odd@key": float("nan")}, step=1)
    child.finish()
    tracker.finish("FAILED")

    run, inner = client.get_run(tracker.run_id), client.get_run(child.run_id)
    assert run.data.tags["recipe"] == "digits"
    assert run.info.status == "FAILED" and run.info.end_time
    assert inner.data.tags["mlflow.parentRunId"] == run.info.run_id
    assert inner.info.run_name == "sketch" and inner.info.status == "FINISHED"
    assert inner.info.experiment_id == run.info.experiment_id
    assert inner.data.metrics["loss"] == 0.5 and "odd_key" in inner.data.metrics
    experiment = client.get_experiment(run.info.experiment_id)
    assert experiment.name == EXPERIMENT and experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert _journal(tmp_path) == []


def test_trackers_keep_the_protocol(store: Path, tmp_path: Path, client: MlflowClient) -> None:
    buffered = _open(store, tmp_path)
    trackers: list[Tracker] = [NoopTracker(), buffered, MlflowTracker(client, client.get_run(buffered.run_id))]
    (tmp_path / "a.txt").write_text("a")
    for tracker in trackers:
        tracker.params({"a": 1})
        tracker.metrics({"loss": 1.0}, 1)
        tracker.summary({"fid": 1.0}, 1)
        tracker.tags({"b": 2})
        tracker.artifact(tmp_path / "a.txt")
        tracker.child("inner", {}).finish()
        tracker.finish()
        assert tracker.flush()


def test_parameters_are_flat_and_long_values_cut(store: Path, tmp_path: Path, client: MlflowClient) -> None:
    stages = {"sketch": {"objective": {"name": "meanflow", "weight": 0.1}, "steps": [1, 2], "amp": True, "x": None}}
    tracker = _open(store, tmp_path)
    tracker.params({"stages": stages, "empty": {}, "long": "x" * 7000, "many": {str(i): i for i in range(250)}})
    params = client.get_run(tracker.run_id).data.params
    assert params["stages.sketch.objective.name"] == "meanflow"
    assert params["stages.sketch.objective.weight"] == "0.1"
    assert (params["stages.sketch.steps"], params["stages.sketch.amp"]) == ("[1, 2]", "true")
    assert (params["stages.sketch.x"], params["empty"]) == ("null", "{}")
    assert len(params["long"]) == 6000 and params["long"].endswith("...")
    assert len(params) == 5 + 2 + 250  # more than one request takes


def test_a_changed_parameter_keeps_the_first_value(store: Path, tmp_path: Path, client: MlflowClient) -> None:
    first = _open(store, tmp_path)
    first.params({"seed": 1, "lr": 0.1})
    again = _open(store, tmp_path, resume=first.run_id)
    again.params({"seed": 1, "lr": 0.2, "new": 3})
    data = client.get_run(first.run_id).data
    assert data.params == {"seed": "1", "lr": "0.1", "new": "3"}
    assert data.tags[CHANGED_TAG] == "lr"


def test_a_resumed_run_logs_no_step_twice(store: Path, tmp_path: Path, client: MlflowClient) -> None:
    first = _open(store, tmp_path)
    stage = first.child("sketch", {})
    for step in range(1, 8):
        stage.metrics({"loss": 1 / step}, step)
    first.finish("KILLED")

    second = _open(store, tmp_path, resume=first.run_id)
    again = second.child("sketch", {})
    for step in range(4, 11):  # the checkpoint was at step 3
        again.metrics({"loss": 1 / step, "late": 1.0}, step)

    assert (second.run_id, again.run_id) == (first.run_id, stage.run_id)
    assert client.get_run(first.run_id).info.status == "RUNNING"
    assert _steps(client, stage.run_id, "loss") == [(step, 1 / step) for step in range(1, 11)]
    assert [step for step, _ in _steps(client, stage.run_id, "late")] == list(range(4, 11))


def test_steps_of_one_session_may_come_in_any_order(store: Path, tmp_path: Path, client: MlflowClient) -> None:
    tracker = _open(store, tmp_path)
    for nfe in (8, 2, 4):
        tracker.metrics({"fid_digits": 10 / nfe}, nfe)
    assert sorted(step for step, _ in _steps(client, tracker.run_id, "fid_digits")) == [2, 4, 8]


def test_the_same_request_twice_leaves_one_point(store: Path, tmp_path: Path, client: MlflowClient) -> None:
    run = client.get_run(_open(store, tmp_path).run_id)
    rows = [({"loss": float(step)}, step, 1_700_000_000_000 + step) for step in range(2500)]  # three batches
    tracker = MlflowTracker(client, run)
    tracker.points(rows)
    tracker.points(rows)  # as after a reply that never came
    assert len(_steps(client, tracker.run_id, "loss")) == 2500


def test_pictures_files_and_folders_are_kept(store: Path, tmp_path: Path, client: MlflowClient) -> None:
    (tmp_path / "model" / "unet").mkdir(parents=True)
    for name in ("grid-tmp.png", "report.json", "model/index.json", "model/unet/w.safetensors"):
        (tmp_path / name).write_text(name)
    tracker = _open(store, tmp_path)
    tracker.figure("hd/grid", tmp_path / "grid-tmp.png")
    tracker.artifact(tmp_path / "report.json")
    tracker.artifact(tmp_path / "report.json", "reports")
    tracker.folder(tmp_path / "model", "student")
    assert tracker.flush()

    def names(folder: str | None = None) -> set[str]:
        return {file.path for file in client.list_artifacts(tracker.run_id, folder)}

    assert names() == {"figures", "report.json", "reports", "student"}
    assert names("figures/hd") == {"figures/hd/grid.png"}
    assert names("reports") == {"reports/report.json"}
    assert names("student/unet") == {"student/unet/w.safetensors"}
    assert list((store.parent / "mlartifacts").glob("*/artifacts/figures/hd/grid.png"))


def test_a_deleted_run_is_replaced_once(store: Path, tmp_path: Path, client: MlflowClient) -> None:
    gone = _open(store, tmp_path).run_id
    client.delete_run(gone)
    second = _open(store, tmp_path, resume=gone)
    third = _open(store, tmp_path, resume=gone)
    assert second.run_id != gone
    assert third.run_id == second.run_id


def test_an_unknown_run_to_resume_becomes_a_new_one(store: Path, tmp_path: Path, client: MlflowClient) -> None:
    tracker = _open(store, tmp_path, resume="0" * 32)
    assert client.get_run(tracker.run_id).info.run_name == "run"
    assert _open(store, tmp_path, resume="0" * 32).run_id == tracker.run_id


def test_a_dead_server_delays_nothing_and_loses_nothing(
    store: Path, tmp_path: Path, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Recorded while the store is away; the later session overlaps with it and everything arrives once, in order."""
    started = time.monotonic()
    (tmp_path / "report.json").write_text("{}")
    away = _open(store, tmp_path, uri=_dead_uri(), name="offline", recipe="digits")
    stage = away.child("sketch", {})
    stage.params({"seed": 1})
    for step in range(500):
        stage.metrics({"loss": float(step)}, step)
    away.artifact(tmp_path / "report.json")
    away.finish("KILLED")
    assert time.monotonic() - started < 8  # most of it MLflow's import
    assert [entry["call"] for entry in _journal(tmp_path)][:3] == ["open", "open", "params"]
    assert len(_journal(tmp_path)) == 505
    assert [record.levelname for record in caplog.records if record.name == journal.__name__] == ["WARNING"]
    assert not away.flush()

    back = _open(store, tmp_path, resume=away.run_id, name="offline")
    again = back.child("sketch", {})
    for step in range(400, 600):
        again.metrics({"loss": float(step)}, step)
    back.finish()

    (run,), (inner,) = _runs(client, "offline"), [one for one in _runs(client, "sketch") if one.data.params]
    assert (run.info.run_id, inner.info.run_id) == (back.run_id, again.run_id)
    assert run.data.tags["recipe"] == "digits" and run.info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(back.run_id)] == ["report.json"]
    assert _steps(client, again.run_id, "loss") == [(step, float(step)) for step in range(600)]
    assert _journal(tmp_path) == []
    assert _open(store, tmp_path, resume=away.run_id).run_id == back.run_id


def test_a_silent_server_costs_a_fixed_share_of_the_time(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that accepts connections and never replies is asked once, and then not for twenty times that time."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracker = _open(store, tmp_path, uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        for step in range(300):
            tracker.metrics({"loss": 1.0}, step)
    assert time.monotonic() - started < 1
    assert len(_journal(tmp_path)) == 301


def test_a_kill_between_sending_and_forgetting_repeats_nothing(
    store: Path, tmp_path: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "drop", lambda self, count: None)
        tracker = _open(store, tmp_path, name="killed")
        stage = tracker.child("refine", {})
        stage.params({"seed": 1})
        for step in range(5):
            stage.metrics({"loss": float(step)}, step)
    assert len(_journal(tmp_path)) == 8

    again = _open(store, tmp_path, resume=tracker.run_id, name="killed")
    assert _journal(tmp_path) == []
    assert again.run_id == tracker.run_id and len(_runs(client, "killed")) == 1
    assert [step for step, _ in _steps(client, stage.run_id, "loss")] == list(range(5))


def test_a_summary_is_what_came_out_last(store: Path, tmp_path: Path, client: MlflowClient) -> None:
    tracker = _open(store, tmp_path, name="summed")
    tracker.summary({"best/fid": 3.0, "best/nfe": 1}, 0)
    again = _open(store, tmp_path, resume=tracker.run_id, name="summed")
    again.summary({"best/fid": 2.5, "best/nfe": 1}, 0)
    again.summary({"best/fid": 2.5, "best/nfe": 1}, 0)
    assert client.get_run(tracker.run_id).data.metrics == {"best/fid": 2.5, "best/nfe": 1}
    assert _steps(client, tracker.run_id, "best/nfe") == [(0, 1.0)]
    assert sorted(_steps(client, tracker.run_id, "best/fid")) == [(0, 2.5), (0, 3.0)]


def test_a_finished_stage_takes_more_entries_without_being_opened_again(
    store: Path, tmp_path: Path, client: MlflowClient
) -> None:
    tracker = _open(store, tmp_path, name="parent")
    stage = tracker.child("sketch", {})
    stage.finish("FAILED")
    ended = client.get_run(stage.run_id).info
    tracker.child("sketch", {"features": "digits"}, reopen=False).summary({"fid": 1.0}, 5)
    run = client.get_run(stage.run_id)
    assert (run.info.status, run.info.end_time) == (ended.status, ended.end_time) == ("FAILED", ended.end_time)
    assert run.data.tags["features"] == "digits" and run.data.metrics == {"fid": 1.0}
    new = tracker.child("unseen", {"stage": "unseen"}, reopen=False)
    assert client.get_run(new.run_id).info.status == "FINISHED"


def test_what_waits_moves_to_another_store(store: Path, tmp_path: Path, client: MlflowClient) -> None:
    """The entries of a run whose opening was sent to a store that is not the one in use now."""
    entry = {"run": "f" * 32 + "/sketch", "call": "metrics", "at": 1, "arguments": {"values": {"loss": 1.0}, "step": 3}}
    Journal(tmp_path / "tracking" / "pending.jsonl").append([entry])
    tracker = _open(store, tmp_path, resume="f" * 32, name="moved")
    assert _steps(client, tracker.child("sketch", {}).run_id, "loss") == [(3, 1.0)]
    assert len(_runs(client, "moved")) == 1


def test_a_refused_entry_does_not_block_the_rest(
    store: Path, tmp_path: Path, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = _open(store, tmp_path)
    tracker.artifact(tmp_path / "missing.png")
    tracker.metrics({"loss": 1.0}, 1)
    assert tracker.flush()
    assert _steps(client, tracker.run_id, "loss") == [(1, 1.0)]
    assert Journal(tmp_path / "tracking" / "refused.jsonl").entries()[0]["arguments"]["path"] == "missing.png"
    assert "missing.png" in caplog.text


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "tracking" / "pending.jsonl"
    Journal(path).append([{"a": 1}, {"a": 2}])
    os.truncate(path, path.stat().st_size - 4)
    assert Journal(path).entries() == [{"a": 1}]


def test_a_full_journal_drops_metrics_only(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal, "_JOURNAL_BYTES", 2000)
    tracker = _open(store, tmp_path, uri=_dead_uri())
    for step in range(100):
        tracker.metrics({"loss": 1.0}, step)
    tracker.tags({"kept": "yes"})
    calls = [entry["call"] for entry in _journal(tmp_path)]
    assert 5 < calls.count("metrics") < 50 and calls[-1] == "tags"
    assert "is full" in caplog.text


def test_a_worker_attaches_to_the_run_of_its_driver(store: Path, tmp_path: Path, client: MlflowClient) -> None:
    stage = _open(store, tmp_path).child("refine", {})
    worker = attach(TrackConfig(), run_id=stage.run_id, run_dir=tmp_path, default_store=store)
    worker.metrics({"loss": 1.0}, 1)
    assert worker.flush() and worker.run_id == stage.run_id
    assert _steps(client, stage.run_id, "loss") == [(1, 1.0)]


def test_what_a_worker_could_not_send_is_sent_by_the_next_driver(
    store: Path, tmp_path: Path, client: MlflowClient
) -> None:
    """Neither a run nor a store is made by a worker, whose machine may not have the driver's sqlite file."""
    driver = _open(store, tmp_path, uri=_dead_uri())
    key = driver.child("refine", {}).run_id
    elsewhere = tmp_path / "elsewhere" / "mlflow.db"
    worker = attach(TrackConfig(), run_id=key, run_dir=tmp_path, default_store=elsewhere)
    worker.metrics({"loss": 1.0}, 1)
    assert not worker.flush() and not elsewhere.exists()

    back = _open(store, tmp_path, resume=driver.run_id)
    assert _steps(client, back.child("refine", {}).run_id, "loss") == [(1, 1.0)]
    assert [path.read_text() for path in (tmp_path / "tracking").glob("pending-*.jsonl")] == [""]


def test_disabled_tracking_leaves_no_trace(tmp_path: Path) -> None:
    config = TrackConfig(enabled=False)
    tracker = open_tracker(
        config, recipe_name="r", run_name="r", run_dir=tmp_path, default_store=tmp_path / "m.db", tags={}
    )
    tracker.child("a", {}).metrics({"loss": 1.0}, 1)
    assert isinstance(tracker, NoopTracker) and not list(tmp_path.iterdir())


def test_the_store_comes_from_the_recipe_then_the_environment_then_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = tmp_path / "mlflow.db"
    assert tracking_uri(TrackConfig(), default) == f"sqlite:///{default}"
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(TrackConfig(uri="sqlite:///a/b.db"), default) == f"sqlite:///{tmp_path}/a/b.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert tracking_uri(TrackConfig(), default) == "http://host:5000"
    assert tracking_uri(TrackConfig(uri="https://other"), default) == "https://other"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(ValueError, match=r"MLFLOW_TRACKING_URI is './mlruns'.*sqlite:///"):
        tracking_uri(TrackConfig(), default)


@pytest.mark.parametrize("uri", ["htp://host", "mlflow.db", "sqlite://", "file:///tmp/mlruns"])
def test_a_uri_of_no_store_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match=r"track\.uri is .*no tracking store"):
        TrackConfig(uri=uri)


def test_a_recipe_holds_no_password() -> None:
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        TrackConfig(uri="postgresql://me:hunter2@host/db")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("http://me:hunter2@host:5000/x", "http://***@host:5000/x"),
        ("postgresql+psycopg://me:hun/ter@2@host/db", "postgresql+psycopg://***@host/db"),
        ("see https://hunter2@host and more", "see https://***@host and more"),
        ("https://host/db?user=me&password=hunter2&x=1", "https://host/db?user=me&password=***&x=1"),
        ("https://host/?access_token=hunter2", "https://host/?access_token=***"),
        ("Bearer s3cret-token", "Bearer ***"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("http://host:5000", "http://host:5000"),
    ],
)
def test_secrets_are_redacted(text: str, clean: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "s3cret-token")
    assert redact(text) == clean


def test_no_secret_reaches_the_log_or_the_journal(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    dead = _dead_uri().replace("//", "//me:hunter2@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead)
    tracker = _open(store, tmp_path)
    tracker.params({"track": {"uri": dead}})
    tracker.tags({"uri": dead})
    assert not tracker.flush()
    assert "***@127.0.0.1" in caplog.text and "hunter2" not in caplog.text
    assert "hunter2" not in (tmp_path / "tracking" / "pending.jsonl").read_text()


def test_flatten_redacts_and_writes_values_as_yaml_has_them() -> None:
    flat = texts(flatten({"a": {"b": Path("x"), "c": {}}, "u": "http://me:pw@host", "n": 1e-3}))
    assert flat == {"a.b": '"x"', "a.c": "{}", "u": "http://***@host", "n": "0.001"}


def test_a_first_use_prints_nothing(tmp_path: Path) -> None:
    """A fresh store, in a fresh process: MLflow would print its migrations there."""
    script = f"""
        from pathlib import Path
        from pipelines.tracking import TrackConfig, open_tracker
        import sys
        assert "mlflow" not in sys.modules
        root = Path({str(tmp_path)!r})
        tracker = open_tracker(TrackConfig(), recipe_name="digits", run_name="run", run_dir=root / "digits",
                               default_store=root / "mlflow.db", tags={{}})
        tracker.metrics({{"loss": 1.0}}, 1)
        tracker.finish()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "mlflow.db").exists()


def test_ui_errors_are_one_line(store: Path, tmp_path: Path, client: MlflowClient) -> None:
    client.search_experiments()
    with pytest.raises(ValueError, match="hdistill run"):
        ui(f"sqlite:///{tmp_path}/none.db")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} is in use.*--port"):
            ui(f"sqlite:///{store}", port=port)
    with pytest.raises(ValueError, match="--port"):
        ui(f"sqlite:///{store}", port=70000)


def test_ui_of_a_server_says_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    ui("http://me:hunter2@host:5000")
    assert capsys.readouterr().out == "MLflow is served at http://***@host:5000\n"


def test_the_server_command_shows_no_password() -> None:
    plain = server_command("sqlite:////runs/mlflow.db", port=5001)
    assert plain[plain.index("--backend-store-uri") + 1] == "sqlite:////runs/mlflow.db"
    assert plain[plain.index("--host") + 1] == "127.0.0.1" and plain[plain.index("--workers") + 1] == "1"
    assert plain[plain.index("--artifacts-destination") + 1] == "file:///runs/mlartifacts"
    assert "hunter2" not in " ".join(server_command("postgresql://me:hunter2@host/db"))


@pytest.mark.slow
def test_the_page_is_served_and_ends_with_control_c(store: Path, tmp_path: Path, client: MlflowClient) -> None:
    (tmp_path / "grid.png").write_text("picture")
    tracker = _open(store, tmp_path, name="seen")
    tracker.figure("grid", tmp_path / "grid.png")
    tracker.finish()
    port = free_ports(1)[0]
    script = f"from pipelines.ui import ui; ui('sqlite:///{store}', port={port})"
    process = subprocess.Popen([sys.executable, "-u", "-c", script], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    try:
        assert process.stdout
        assert process.stdout.readline() == "MLflow starts ...\n"
        assert process.stdout.readline() == f"MLflow is at http://127.0.0.1:{port} (Ctrl-C ends it)\n"
        page = f"http://127.0.0.1:{port}"
        with urllib.request.urlopen(page + "/", timeout=30) as reply:
            assert reply.status == 200 and b"<html" in reply.read().lower()
        artifact = f"{page}/get-artifact?run_uuid={tracker.run_id}&path=figures/grid.png"
        with urllib.request.urlopen(artifact, timeout=30) as reply:
            assert reply.read() == b"picture"
        over_http = _open(store, tmp_path / "remote", uri=page, name="over http")
        over_http.metrics({"loss": 1.0}, 1)
        over_http.artifact(tmp_path / "grid.png")
        assert over_http.flush()
        assert _steps(client, over_http.run_id, "loss") == [(1, 1.0)]
    finally:
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "MLflow ended\n")
    socket.create_server(("127.0.0.1", port)).close()


def test_journal_lines_are_json(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "pending.jsonl")
    journal.append([{"text": "a\nb\u2028c", "nan": float("nan")}, {"n": 2}])
    assert len(journal.entries()) == 2
    journal.drop(1)
    assert [json.loads(line) for line in journal.path.read_text().splitlines()] == [{"n": 2}]
