"""Tracking: what a run did, in an MLflow store that may come and go.

Calls are written to a journal in the run directory and sent from there in order, so a store that is away costs
nothing but time. Sending a thing twice is harmless: runs are found by a key of ours that exists before MLflow's own id
does, the first value of a parameter stays, and a metric's step that an earlier session reached is not logged again.
"""

import errno
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import urlsplit

import click

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Status = Literal["FINISHED", "FAILED", "KILLED"]

KEY_TAG = "hdistill.key"
CHANGED_TAG = "hdistill.params_changed"
_PARENT_TAG = "mlflow.parentRunId"

_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
_SECRET_VARIABLES = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # a fresh sqlite file reports dozens of migrations at INFO
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # MLflow's own two minutes and seven retries would hold up training
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}
_CALLS = ("params", "figure", "artifact", "folder", "tags")
_REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS")
# MLflow's limits.
_KEY_LENGTH, _PARAM_LENGTH, _TAG_LENGTH, _PARAMS_PER_BATCH, _METRICS_PER_BATCH = 250, 6000, 8000, 100, 1000

_SEND_SECONDS = 1.0  # one log_batch to sqlite costs 15 ms: too dear for every training step, cheap once a second
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5.0, 300.0
_PAUSE_PER_FAILED_SECOND = 20.0  # a server that swallows requests may cost training at most 5 % of its time
_JOURNAL_BYTES = 16 * 2**20

DEFAULT_PORT = 5000
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_END_SECONDS = 5.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """Where a run is recorded."""

    enabled: bool = True
    """Whether anything is recorded at all."""
    uri: str = field(default="", repr=False)
    """MLflow tracking URI; empty: $MLFLOW_TRACKING_URI, else the sqlite file `mlflow.db` beside the run directories."""
    experiment: str = ""
    """Experiment that groups the runs; empty: the recipe's name."""

    def __post_init__(self) -> None:
        if self.uri:
            _check_uri(self.uri, "track.uri")
        if redact(self.uri) != self.uri:
            raise ValueError(
                "track.uri holds a password, and recipes are stored with their runs: put the whole URI in"
                " MLFLOW_TRACKING_URI, or use MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )


class Tracker(Protocol):
    """What a stage may say about itself. No method waits for the network or raises because of it."""

    @property
    def run_id(self) -> str:
        """What `attach` and `open_tracker` know this run by: MLflow's id, or our key until the store was reached."""
        ...

    def params(self, values: Mapping[str, object]) -> None:
        """Record settings; nested mappings get dotted keys. The first value is kept, a different one is tagged."""
        ...

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers at a step; a step that an earlier session of the same run reached is left as it is."""
        ...

    def figure(self, name: str, path: Path) -> None:
        """Record a picture as `figures/<name>.<suffix>`; the file must stay until it is sent."""
        ...

    def artifact(self, path: Path, folder: str = "") -> None:
        """Record a file under its own name; the file must stay until it is sent."""
        ...

    def folder(self, path: Path, name: str) -> None:
        """Record everything in a directory, such as an exported model; the files must stay until they are sent."""
        ...

    def tags(self, values: Mapping[str, object]) -> None:
        """Record words to search by; the latest value counts."""
        ...

    def child(self, name: str, tags: Mapping[str, object]) -> "Tracker":
        """The run called `name` inside this one: the same one again after a resume."""
        ...

    def flush(self) -> bool:
        """Try now to send what waits; true when nothing is left."""
        ...

    def finish(self, status: Status = "FINISHED") -> None:
        """Close the run; opening it again is allowed."""
        ...


class NoopTracker:
    """Records nothing."""

    run_id = ""

    def params(self, values: Mapping[str, object]) -> None: ...
    def metrics(self, values: Mapping[str, float], step: int) -> None: ...
    def figure(self, name: str, path: Path) -> None: ...
    def artifact(self, path: Path, folder: str = "") -> None: ...
    def folder(self, path: Path, name: str) -> None: ...
    def tags(self, values: Mapping[str, object]) -> None: ...

    def child(self, name: str, tags: Mapping[str, object]) -> "NoopTracker":
        return self

    def flush(self) -> bool:
        return True

    def finish(self, status: Status = "FINISHED") -> None: ...


class MlflowTracker:
    """One MLflow run, written to at once; errors of the store are raised."""

    def __init__(self, client: "MlflowClient", run: "Run") -> None:
        self._client = client
        self._experiment_id = run.info.experiment_id
        self.run_id: str = run.info.run_id
        self.key: str = run.data.tags.get(KEY_TAG, self.run_id)
        self._params = dict(run.data.params)
        self._reached = {metric.key: metric.step for metric in run.data.to_proto().metrics}

    def params(self, values: Mapping[str, object]) -> None:
        from mlflow.entities import Param

        given = {_legal(key): _shortened(text, _PARAM_LENGTH) for key, text in flatten(values).items()}
        new = {key: text for key, text in given.items() if key not in self._params}
        for batch in _batches((Param(key, text) for key, text in new.items()), _PARAMS_PER_BATCH):
            self._client.log_batch(self.run_id, params=batch)
        self._params |= new
        if changed := sorted(key for key, text in given.items() if self._params[key] != text):
            self.tags({CHANGED_TAG: ", ".join(changed)})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.points([(values, step, _now())])

    def points(self, rows: Iterable[tuple[Mapping[str, float], int, int]]) -> None:
        """Many `metrics` calls in one request; the third element is the time in milliseconds."""
        from mlflow.entities import Metric

        every = (
            Metric(_legal(key), float(value), at, step) for values, step, at in rows for key, value in values.items()
        )
        new = (metric for metric in every if metric.step > self._reached.get(metric.key, metric.step - 1))
        for batch in _batches(new, _METRICS_PER_BATCH):
            self._client.log_batch(self.run_id, metrics=batch)

    def figure(self, name: str, path: Path) -> None:
        target = PurePosixPath("figures", name)
        _check_exists(path)
        with tempfile.TemporaryDirectory() as copies:  # MLflow takes the name from the file
            copy = shutil.copy(path, Path(copies, target.name + path.suffix))
            self._client.log_artifact(self.run_id, str(copy), str(target.parent))

    def artifact(self, path: Path, folder: str = "") -> None:
        _check_exists(path)
        self._client.log_artifact(self.run_id, str(path), folder or None)

    def folder(self, path: Path, name: str) -> None:
        _check_exists(path)
        self._client.log_artifacts(self.run_id, str(path), name)

    def tags(self, values: Mapping[str, object]) -> None:
        from mlflow.entities import RunTag

        tags = (RunTag(_legal(key), _shortened(_text(value), _TAG_LENGTH)) for key, value in values.items())
        for batch in _batches(tags, _PARAMS_PER_BATCH):
            self._client.log_batch(self.run_id, tags=batch)

    def child(self, name: str, tags: Mapping[str, object], at: int | None = None) -> "MlflowTracker":
        tags = {**tags, _PARENT_TAG: self.run_id}
        return _open_run(self._client, self._experiment_id, _child_key(self.key, name), name, tags, at)

    def flush(self) -> bool:
        return True

    def finish(self, status: Status = "FINISHED", at: int | None = None) -> None:
        self._client.set_terminated(self.run_id, status, at)


@dataclass(frozen=True, kw_only=True)
class _Store:
    """A tracking store that may be away, and how to find or make runs in it."""

    uri: str
    """Tracking URI, perhaps with a password: never printed as it is."""
    experiment: str
    """Experiment of runs that have to be made."""
    run_name: str
    """Name of a root run that has to be made."""
    default_store: Path
    """Sqlite file whose directory takes the artifacts of databases that have no directory of their own."""
    may_create: bool
    """Whether runs that are not there are made; a worker waits for its driver to make them."""

    def open(self, key: str, tags: Mapping[str, object], at: int) -> MlflowTracker:
        """The root run of that key, made if it is not there."""
        client = self._client()
        if run := _find_run(client, key, None):
            return _reopened(client, run, tags)
        if not self.may_create:
            raise LookupError(f"run {key} is not there")
        return _open_run(client, self._experiment_id(client), key, self.run_name, tags, at)

    def find(self, key: str, at: int) -> MlflowTracker:
        """The run of that key, after its own opening was sent, perhaps to another store than this one."""
        client = self._client()
        if run := _find_run(client, key, None):
            return MlflowTracker(client, run)
        if "/" not in key:
            return self.open(key, {}, at)
        parent, name = key.rsplit("/", 1)
        above = self.find(parent, at)
        if self.may_create:
            return above.child(name, {}, at)
        if run := _find_run(client, _child_key(above.key, name), None):
            return MlflowTracker(client, run)
        raise LookupError(f"run {key} is not there")

    def _client(self) -> "MlflowClient":
        file = sqlite_file(self.uri)
        if file and self.may_create:
            file.parent.mkdir(parents=True, exist_ok=True)
        elif file and not file.exists():  # MLflow would make an empty store, say on the wrong machine
            raise LookupError(f"{file} is not there")
        return _client(self.uri)

    def _experiment_id(self, client: "MlflowClient") -> str:
        from mlflow.exceptions import MlflowException

        if experiment := client.get_experiment_by_name(self.experiment):
            return experiment.experiment_id
        try:
            return client.create_experiment(self.experiment, artifact_folder(self.uri, self.default_store))
        except MlflowException:  # somebody else was first
            if experiment := client.get_experiment_by_name(self.experiment):
                return experiment.experiment_id
            raise


class Journal:
    """Entries that wait for the store: JSON lines, oldest first. A kill loses at most a torn last line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not (text := path.read_bytes()).endswith(b"\n"):
            os.truncate(path, text.rfind(b"\n") + 1)

    def append(self, entries: Iterable[Mapping[str, object]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)

    def entries(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text("utf-8").splitlines()]

    def drop(self, count: int) -> None:
        """Forget the oldest entries."""
        if not count:
            return
        new = self.path.with_suffix(".new")
        new.write_bytes(b"".join(self.path.read_bytes().splitlines(keepends=True)[count:]))
        os.replace(new, self.path)

    def is_full(self) -> bool:
        return self.path.exists() and self.path.stat().st_size > _JOURNAL_BYTES


class _Sender:
    """Sends a journal in order, and after a failure tries again ever more seldom."""

    def __init__(self, store: _Store, journal: Journal, base: Path) -> None:
        self._store, self._journal, self._base = store, journal, base
        self._open: dict[str, MlflowTracker] = {}
        self._warned: set[str] = set()
        self._failures = 0
        self._due = 0.0

    @property
    def answers(self) -> bool:
        """Whether the last attempt reached the store."""
        return not self._failures

    def add(self, key: str, call: str, *, soon: bool = False, now: bool = False, **arguments: object) -> None:
        """Append one call; send what waits if it is time, or `now`, or `soon` unless the store was away last time."""
        if call == "metrics" and self._failures and self._journal.is_full():
            return self._warn("full", f"{self._journal.path} is full: metrics are dropped until the store is back")
        self._journal.append([{"run": key, "call": call, "at": _now(), "arguments": arguments}])
        if now or (soon and self.answers) or time.monotonic() >= self._due:
            self.flush()

    def run_id(self, key: str) -> str:
        return self._open[key].run_id if key in self._open else key

    def flush(self) -> bool:
        start, sent = time.monotonic(), 0
        try:
            for group in _groups(self._journal.entries()):
                self._send(group)
                sent += len(group)
            self._failures, self._due = 0, time.monotonic() + _SEND_SECONDS
        except Exception as error:  # whatever the cause, tracking does not end a training run
            self._hold(error, time.monotonic() - start)
        finally:
            self._journal.drop(sent)
        return self.answers

    def _send(self, group: Sequence[dict[str, Any]]) -> None:
        key, call, at, arguments = (group[0][name] for name in ("run", "call", "at", "arguments"))
        if call == "open":
            self._open[key] = self._opened(key, at, **arguments)
            return
        if key not in self._open:
            self._open[key] = self._store.find(key, at)
        try:
            self._perform(self._open[key], call, at, arguments, group)
        except Exception as error:
            if not isinstance(error, _MissingFile) and getattr(error, "error_code", "") not in _REFUSALS:
                raise
            self._refuse(group, error)

    def _opened(self, key: str, at: int, parent: str, name: str, tags: Mapping[str, object]) -> MlflowTracker:
        if not parent:
            return self._store.open(key, tags, at)
        if parent not in self._open:
            self._open[parent] = self._store.find(parent, at)
        return self._open[parent].child(name, tags, at)

    def _perform(
        self, tracker: MlflowTracker, call: str, at: int, arguments: dict[str, Any], group: Sequence[dict[str, Any]]
    ) -> None:
        if call == "metrics":
            rows = (entry["arguments"] | {"at": entry["at"]} for entry in group)
            tracker.points((row["values"], row["step"], row["at"]) for row in rows)
        elif call == "finish":
            tracker.finish(arguments["status"], at)
        else:
            assert call in _CALLS, call
            paths = {"path": self._base / arguments["path"]} if "path" in arguments else {}
            getattr(tracker, call)(**(arguments | paths))

    def _refuse(self, group: Sequence[dict[str, Any]], error: Exception) -> None:
        refused = Journal(self._journal.path.with_name("refused.jsonl"))
        if not refused.is_full():
            refused.append(group)
        self._warn(
            "refused", f"Tracking: the store refused an entry ({_first_line(error)}); it is kept in {refused.path}"
        )

    def _hold(self, error: Exception, seconds: float) -> None:
        pause = min(_FIRST_PAUSE_SECONDS * 2 ** min(self._failures, 10), _LONGEST_PAUSE_SECONDS)
        self._due = time.monotonic() + max(pause, _PAUSE_PER_FAILED_SECOND * seconds)
        self._failures += 1
        away = f"Tracking: {redact(self._store.uri)} does not take entries ({_first_line(error)})."
        self._warn("away", f"{away} The run goes on; what is missed waits in {self._journal.path} and is sent later.")

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            _logger.warning("%s", text)
        self._warned.add(kind)


class BufferedTracker:
    """A run whose calls go through the journal, so that they neither wait for the store nor get lost."""

    def __init__(self, sender: _Sender, key: str, base: Path) -> None:
        self._sender, self._key, self._base = sender, key, base

    @property
    def run_id(self) -> str:
        return self._sender.run_id(self._key)

    def params(self, values: Mapping[str, object]) -> None:
        self._sender.add(self._key, "params", values=flatten(values))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        numbers = {key: float(value) for key, value in values.items()}
        self._sender.add(self._key, "metrics", values=numbers, step=int(step))

    def figure(self, name: str, path: Path) -> None:
        self._sender.add(self._key, "figure", name=name, path=self._stored(path))

    def artifact(self, path: Path, folder: str = "") -> None:
        self._sender.add(self._key, "artifact", path=self._stored(path), folder=folder)

    def folder(self, path: Path, name: str) -> None:
        self._sender.add(self._key, "folder", path=self._stored(path), name=name)

    def tags(self, values: Mapping[str, object]) -> None:
        self._sender.add(self._key, "tags", values={key: _text(value) for key, value in values.items()})

    def child(self, name: str, tags: Mapping[str, object]) -> "BufferedTracker":
        key, words = _child_key(self._key, name), {tag: _text(value) for tag, value in tags.items()}
        self._sender.add(key, "open", parent=self._key, name=name, tags=words, soon=True)
        return BufferedTracker(self._sender, key, self._base)

    def flush(self) -> bool:
        return self._sender.flush()

    def finish(self, status: Status = "FINISHED") -> None:
        last_chance = "/" not in self._key
        self._sender.add(self._key, "finish", status=status, soon=True, now=last_chance)

    def _stored(self, path: Path) -> str:
        """Relative inside the run directory, which may be moved before the store is back."""
        whole = path.resolve()
        return str(whole.relative_to(self._base) if whole.is_relative_to(self._base) else whole)


def open_tracker(
    config: TrackConfig,
    *,
    recipe_name: str,
    run_name: str,
    run_dir: Path,
    default_store: Path,
    resume_run_id: str | None = None,
    tags: Mapping[str, object],
) -> Tracker:
    """Open the run of one `hdistill run`, after sending what earlier sessions in this run directory left behind.

    ``default_store`` is the sqlite file to use where neither the recipe nor the environment names a store.
    ``resume_run_id`` continues the run of that `run_id`; where the store has none, a new one answers to it.
    """
    if not config.enabled:
        return NoopTracker()
    base, key, uri = run_dir.resolve(), resume_run_id or uuid.uuid4().hex, tracking_uri(config, default_store)
    names = {"experiment": config.experiment or recipe_name, "run_name": run_name}
    store = _Store(uri=uri, default_store=default_store, may_create=True, **names)
    sender = _Sender(store, Journal(base / "tracking" / "pending.jsonl"), base)
    words = {tag: _text(value) for tag, value in tags.items()}
    sender.add(key, "open", parent="", name=run_name, tags=words, soon=True)
    left_by_workers = sorted((base / "tracking").glob("pending-*.jsonl")) if sender.answers else []
    for path in left_by_workers:
        _Sender(replace(store, may_create=False), Journal(path), base).flush()
    return BufferedTracker(sender, key, base)


def attach(config: TrackConfig, *, run_id: str, run_dir: Path, default_store: Path) -> Tracker:
    """The tracker of a run that another process opened, by its `run_id`; never makes a run or a store.

    It keeps its own journal in the run directory, which the next `open_tracker` there sends if this process cannot.
    """
    if not config.enabled or not run_id:
        return NoopTracker()
    base, uri = run_dir.resolve(), tracking_uri(config, default_store)
    store = _Store(uri=uri, experiment="", run_name="", default_store=default_store, may_create=False)
    name = re.sub(r"[^\w.-]", "_", run_id)
    sender = _Sender(store, Journal(base / "tracking" / f"pending-{name}.jsonl"), base)
    sender.flush()
    return BufferedTracker(sender, run_id, base)


def tracking_uri(config: TrackConfig, default_store: Path) -> str:
    """The recipe's URI, else the environment's, else the sqlite file ``default_store``; sqlite paths made absolute."""
    variable = os.environ.get("MLFLOW_TRACKING_URI", "")
    uri = config.uri or variable or f"sqlite:///{default_store}"
    _check_uri(uri, "track.uri" if config.uri else "MLFLOW_TRACKING_URI")
    file = sqlite_file(uri)
    return f"sqlite:///{file.resolve().as_posix()}" if file else uri


def sqlite_file(uri: str) -> Path | None:
    """The file of a sqlite URI."""
    scheme, _, path = uri.partition(":///")
    return Path(path) if scheme == "sqlite" and path else None


def artifact_folder(uri: str, default_store: Path) -> str | None:
    """Where artifacts go: `mlartifacts` beside the database; a tracking server has its own place."""
    if urlsplit(uri).scheme in ("http", "https", "databricks") or uri == "databricks":
        return None
    return ((sqlite_file(uri) or default_store).resolve().parent / "mlartifacts").as_uri()


def redact(text: str) -> str:
    """The text without passwords: those in URIs, in query strings, and those the environment holds for MLflow."""
    for value in filter(None, map(os.environ.get, _SECRET_VARIABLES)):
        text = text.replace(value, "***")
    text = re.sub(r"(\w://)(?!/)\S*@", r"\1***@", text)
    return re.sub(r"(?i)([?&][\w-]*(?:token|password|passwd|pwd|secret|key)[\w-]*=)[^&\s]+", r"\1***", text)


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys and text as YAML has it, without passwords."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        inner = flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else None
        flat |= {f"{prefix}{key}": _text(value)} if inner is None else inner
    return flat


def _check_uri(uri: str, source: str) -> None:
    scheme = urlsplit(uri).scheme.partition("+")[0] or uri
    if scheme not in _SCHEMES or (scheme == "sqlite" and not sqlite_file(uri)):
        allowed = "sqlite:///PATH.db, http(s)://HOST:PORT, postgresql://..., mysql://... or mssql://..."
        raise ValueError(f"{source} is {redact(uri)!r}, which is no tracking store: give {allowed}")


def _quiet_environment() -> None:
    """Defaults for MLflow that a user's own settings override: no telemetry, no chatter, no long waits."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _client(uri: str) -> "MlflowClient":
    _quiet_environment()
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])
    return MlflowClient(uri)


def _find_run(client: "MlflowClient", key: str, experiment_id: str | None) -> "Run | None":
    """The living run that has this key, or this MLflow id."""
    from mlflow.exceptions import MlflowException

    if re.fullmatch("[0-9a-f]{32}", key):
        try:
            run = client.get_run(key)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        else:
            if run.info.lifecycle_stage == "active":
                return run
    everywhere = [experiment_id] if experiment_id else [one.experiment_id for one in client.search_experiments()]
    found = client.search_runs(everywhere, f"tags.`{KEY_TAG}` = '{key}'", max_results=1) if everywhere else []
    return found[0] if found else None


def _open_run(
    client: "MlflowClient", experiment_id: str, key: str, name: str, tags: Mapping[str, object], at: int | None
) -> MlflowTracker:
    """The run of that key in the experiment, opened again or made."""
    if run := _find_run(client, key, experiment_id):
        return _reopened(client, run, tags)
    words = {_legal(tag): _shortened(_text(value), _TAG_LENGTH) for tag, value in tags.items()}
    own = {KEY_TAG: key, "mlflow.source.name": "hdistill"}
    return MlflowTracker(client, client.create_run(experiment_id, at, own | words, name))


def _reopened(client: "MlflowClient", run: "Run", tags: Mapping[str, object]) -> MlflowTracker:
    client.update_run(run.info.run_id, "RUNNING")
    tracker = MlflowTracker(client, run)
    tracker.tags(tags)
    return tracker


def server_command(uri: str, host: str = "127.0.0.1", port: int = DEFAULT_PORT) -> list[str]:
    """The command that serves a store; a URI with a password is left to MLFLOW_BACKEND_STORE_URI, unseen by `ps`."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--uvicorn-opts", "--log-level warning"]
    if file := sqlite_file(uri):
        command += ["--artifacts-destination", str(artifact_folder(uri, file))]
    return command if redact(uri) != uri else [*command, "--backend-store-uri", uri]


def ui(uri: str, host: str = "127.0.0.1", port: int = DEFAULT_PORT) -> None:
    """Serve a store's pages until Ctrl-C; where the store is a server already, say where."""
    if urlsplit(uri).scheme in ("http", "https"):
        return click.echo(f"MLflow is served at {redact(uri)}")
    if (file := sqlite_file(uri)) and not file.exists():
        raise ValueError(f"nothing is recorded in {file} yet: start with `hdistill run RECIPE`")
    _check_port(host, port)
    handlers = {number: signal.signal(number, signal.default_int_handler) for number in _ENDING_SIGNALS}
    try:
        _serve(uri, host, port)
    except KeyboardInterrupt:
        click.echo("MLflow ended")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _serve(uri: str, host: str, port: int) -> None:
    _quiet_environment()
    own = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_BACKEND_STORE_URI": uri}
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            server_command(uri, host, port),
            env=os.environ | own,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the server starts processes of its own, which are ended as one group
        )
        try:
            _wait_until_served(server, host, port)
            server.wait()
            log.seek(0)
            last = redact((log.read().strip().splitlines() or ["no reason given"])[-1])
            raise ValueError(f"the MLflow server ended by itself: {last}")
        finally:
            _end_group(server)


def _wait_until_served(server: "subprocess.Popen[bytes]", host: str, port: int) -> None:
    click.echo("MLflow starts ...")
    while server.poll() is None:
        with suppress(OSError), socket.create_connection((host, port), timeout=1):
            return click.echo(f"MLflow is at http://{host}:{port} (Ctrl-C ends it)")
        time.sleep(0.2)


def _end_group(server: "subprocess.Popen[bytes]") -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
            os.killpg(server.pid, number)
        with suppress(subprocess.TimeoutExpired):
            server.wait(_END_SECONDS)


def _check_port(host: str, port: int) -> None:
    if not 0 < port < 2**16:
        raise ValueError(f"port {port} is not between 1 and 65535: choose another with --port")
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise ValueError(f"cannot listen on {host}, port {port}: {error.strerror}") from None
        raise ValueError(f"port {port} is in use on {host}: choose another with --port") from None


class _MissingFile(FileNotFoundError):
    """An artifact that was gone before it could be sent."""


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise _MissingFile(f"{path} is not there")


def _groups(entries: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Neighbouring metrics of one run together, everything else alone."""
    numbered = enumerate(entries)
    same = groupby(numbered, lambda pair: pair[1]["run"] if pair[1]["call"] == "metrics" else pair[0])
    return ([entry for _, entry in group] for _, group in same)


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    return iter(lambda: list(islice(iterator, size)), [])


def _child_key(parent: str, name: str) -> str:
    return parent + "/" + re.sub(r"[^\w.: -]", "_", name)


def _legal(key: str) -> str:
    return re.sub(r"[^\w./: -]", "_", key)[:_KEY_LENGTH]


def _text(value: object) -> str:
    return redact(value if isinstance(value, str) else json.dumps(value, default=str))


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _first_line(error: Exception) -> str:
    lines = redact(str(error)).splitlines() or [""]
    return f"{type(error).__name__}: {_shortened(lines[0], 200)}"


def _now() -> int:
    return time.time_ns() // 1_000_000
