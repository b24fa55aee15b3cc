"""Tracking: what a run did, in an MLflow store that may come and go.

Calls are written to a journal in the run directory, or on this machine where that is an object store, and sent from
there in order, so a tracking store that is away costs nothing but time. Sending a thing twice is harmless: runs are
found by a key of ours that exists before MLflow's own id does, the first value of a parameter stays, and a metric's
step that an earlier session reached is not logged again.
"""

import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from pipelines.artifacts import flatten
from pipelines.journal import (
    BufferedTracker,
    Journal,
    MissingFile,
    Sender,
    Status,
    child_key,
    now_milliseconds,
    shortened,
    texts,
)
from pipelines.registry import register
from pipelines.storage import local_copy, local_stand_in
from pipelines.stores import TrackConfig, artifact_folder, quiet_environment, sqlite_file, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

KEY_TAG = "hdistill.key"
CHANGED_TAG = "hdistill.params_changed"
PARENT_TAG = "mlflow.parentRunId"
_OF_TRAINING = {"mlflow.experimentKind": "custom_model_development"}  # else its page opens on traces of agents
# MLflow's limits.
_KEY_LENGTH, _PARAM_LENGTH, _TAG_LENGTH, _PARAMS_PER_BATCH, _METRICS_PER_BATCH = 250, 6000, 8000, 100, 1000


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

    def summary(self, values: Mapping[str, float], step: int) -> None:
        """Record what came out: the latest numbers count, and the same again leave no second point."""
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

    def register(self, name: str, path: Path, tags: Mapping[str, object]) -> None:
        """Make an exported generator a version of the registered model `name`, once; the files must stay until then."""
        ...

    def child(self, name: str, tags: Mapping[str, object], *, reopen: bool = True) -> "Tracker":
        """The run called `name` inside this one: the same one again after a resume.

        Without `reopen` it only takes more entries: its status and end stay, and one that is new is finished at once.
        """
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
    def summary(self, values: Mapping[str, float], step: int) -> None: ...
    def figure(self, name: str, path: Path) -> None: ...
    def artifact(self, path: Path, folder: str = "") -> None: ...
    def folder(self, path: Path, name: str) -> None: ...
    def tags(self, values: Mapping[str, object]) -> None: ...
    def register(self, name: str, path: Path, tags: Mapping[str, object]) -> None: ...

    def child(self, name: str, tags: Mapping[str, object], *, reopen: bool = True) -> "NoopTracker":
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
        self._latest = dict(run.data.metrics)
        self._reached = {metric.key: metric.step for metric in run.data.to_proto().metrics}

    def params(self, values: Mapping[str, object]) -> None:
        from mlflow.entities import Param

        given = _fitted(texts(flatten(values)), _PARAM_LENGTH)
        new = {key: text for key, text in given.items() if key not in self._params}
        for batch in _batches((Param(key, text) for key, text in new.items()), _PARAMS_PER_BATCH):
            self._client.log_batch(self.run_id, params=batch)
        self._params |= new
        if changed := sorted(key for key, text in given.items() if self._params[key] != text):
            self.tags({CHANGED_TAG: ", ".join(changed)})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.points([(values, step, now_milliseconds())])

    def points(self, rows: Iterable[tuple[Mapping[str, float], int, int]]) -> None:
        """Many `metrics` calls in one request; the third element is the time in milliseconds."""
        from mlflow.entities import Metric

        every = (
            Metric(_legal(key), float(value), at, step) for values, step, at in rows for key, value in values.items()
        )
        new = (metric for metric in every if metric.step > self._reached.get(metric.key, metric.step - 1))
        for batch in _batches(new, _METRICS_PER_BATCH):
            self._client.log_batch(self.run_id, metrics=batch)

    def summary(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        given, at = {_legal(key): float(value) for key, value in values.items()}, now_milliseconds()
        new = {key: value for key, value in given.items() if self._latest.get(key) != value}
        for batch in _batches((Metric(key, value, at, step) for key, value in new.items()), _METRICS_PER_BATCH):
            self._client.log_batch(self.run_id, metrics=batch)
        self._latest |= new

    def figure(self, name: str, path: Path) -> None:
        target = PurePosixPath("figures", name)
        _check_exists(path)
        with local_copy(path) as file, tempfile.TemporaryDirectory() as copies:  # MLflow takes the name from the file
            copy = shutil.copy(file, Path(copies, target.name + path.suffix))
            self._client.log_artifact(self.run_id, str(copy), str(target.parent))

    def artifact(self, path: Path, folder: str = "") -> None:
        _check_exists(path)
        with local_copy(path) as file:
            self._client.log_artifact(self.run_id, str(file), folder or None)

    def folder(self, path: Path, name: str) -> None:
        _check_exists(path)
        with local_copy(path) as files:
            self._client.log_artifacts(self.run_id, str(files), name)

    def tags(self, values: Mapping[str, object]) -> None:
        from mlflow.entities import RunTag

        tags = _fitted(texts(values), _TAG_LENGTH)
        for batch in _batches((RunTag(key, text) for key, text in tags.items()), _PARAMS_PER_BATCH):
            self._client.log_batch(self.run_id, tags=batch)

    def register(self, name: str, path: Path, tags: Mapping[str, object]) -> None:
        _check_exists(path)
        with local_copy(path) as folder:
            register(self._client, self.run_id, name, folder, texts(tags))

    def child(
        self, name: str, tags: Mapping[str, object], at: int | None = None, *, reopen: bool = True
    ) -> "MlflowTracker":
        key, tags = child_key(self.key, name), {**tags, PARENT_TAG: self.run_id}
        if run := _find_run(self._client, key, self._experiment_id):
            return _opened(self._client, run, tags, reopen=reopen)
        tracker = _created(self._client, self._experiment_id, key, name, tags, at)
        if not reopen:
            tracker.finish("FINISHED", at)
        return tracker

    def flush(self) -> bool:
        return True

    def finish(self, status: Status = "FINISHED", at: int | None = None) -> None:
        self._client.set_terminated(self.run_id, status, at)


@dataclass(frozen=True, kw_only=True)
class Store:
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
        run = _find_run(client, key)
        return _opened(client, run, tags, reopen=True) if run else self._root(client, key, tags, at)

    def find(self, key: str, at: int) -> MlflowTracker:
        """The run of that key, after its own opening was sent, perhaps to another store than this one."""
        client = self._client()
        if run := _find_run(client, key):
            return MlflowTracker(client, run)
        if "/" not in key:
            return self._root(client, key, {}, at)
        parent, name = key.rsplit("/", 1)
        above = self.find(parent, at)
        if self.may_create:
            return above.child(name, {}, at)
        if run := _find_run(client, child_key(above.key, name)):
            return MlflowTracker(client, run)
        raise LookupError(f"run {key} is not there")

    def _root(self, client: "MlflowClient", key: str, tags: Mapping[str, object], at: int) -> MlflowTracker:
        if not self.may_create:
            raise LookupError(f"run {key} is not there")
        return _created(client, self._experiment_id(client), key, self.run_name, tags, at)

    def _client(self) -> "MlflowClient":
        file = sqlite_file(self.uri)
        if file and self.may_create:
            file.parent.mkdir(parents=True, exist_ok=True)
        elif file and not file.exists():  # MLflow would make an empty store, say on the wrong machine
            raise LookupError(f"{file} is not there")
        return client_of(self.uri)

    def _experiment_id(self, client: "MlflowClient") -> str:
        from mlflow.exceptions import MlflowException

        if experiment := client.get_experiment_by_name(self.experiment):
            return experiment.experiment_id
        try:
            return client.create_experiment(
                self.experiment, artifact_folder(self.uri, self.default_store), _OF_TRAINING
            )
        except MlflowException:  # somebody else was first
            if experiment := client.get_experiment_by_name(self.experiment):
                return experiment.experiment_id
            raise


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
    store = Store(uri=uri, default_store=default_store, may_create=True, **names)
    journals = local_stand_in(base) / "tracking"
    sender = Sender(store, Journal(journals / "pending.jsonl"), base)
    sender.add(key, "open", parent="", name=run_name, tags=texts(tags), soon=True)
    left_by_workers = sorted(journals.glob("pending-*.jsonl")) if sender.answers else []
    for path in left_by_workers:
        Sender(replace(store, may_create=False), Journal(path), base).flush()
    return BufferedTracker(sender, key)


def attach(config: TrackConfig, *, run_id: str, run_dir: Path, default_store: Path) -> Tracker:
    """The tracker of a run that another process opened, by its `run_id`; never makes a run or a store.

    It keeps its own journal in the run directory, which the next `open_tracker` there sends if this process cannot.
    """
    if not config.enabled or not run_id:
        return NoopTracker()
    base, uri = run_dir.resolve(), tracking_uri(config, default_store)
    store = Store(uri=uri, experiment="", run_name="", default_store=default_store, may_create=False)
    name = re.sub(r"[^\w.-]", "_", run_id)
    sender = Sender(store, Journal(local_stand_in(base) / "tracking" / f"pending-{name}.jsonl"), base)
    sender.flush()
    return BufferedTracker(sender, run_id)


def client_of(uri: str) -> "MlflowClient":
    quiet_environment()
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])
    return MlflowClient(uri)


def _find_run(client: "MlflowClient", key: str, experiment_id: str = "") -> "Run | None":
    """The living run that has this key, or this MLflow id; anywhere, where no experiment is given."""
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


def _created(
    client: "MlflowClient", experiment_id: str, key: str, name: str, tags: Mapping[str, object], at: int | None
) -> MlflowTracker:
    own = {KEY_TAG: key, "mlflow.source.name": "hdistill"}
    words = _fitted(texts(tags), _TAG_LENGTH)
    return MlflowTracker(client, client.create_run(experiment_id, at, own | words, name))


def _opened(client: "MlflowClient", run: "Run", tags: Mapping[str, object], *, reopen: bool) -> MlflowTracker:
    if reopen:
        client.update_run(run.info.run_id, "RUNNING")
    tracker = MlflowTracker(client, run)
    tracker.tags(tags)
    return tracker


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    return iter(lambda: list(islice(iterator, size)), [])


def _legal(key: str) -> str:
    return re.sub(r"[^\w./: -]", "_", key)[:_KEY_LENGTH]


def _fitted(values: Mapping[str, str], length: int) -> dict[str, str]:
    """Names and texts as MLflow takes them."""
    return {_legal(key): shortened(text, length) for key, text in values.items()}


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise MissingFile(f"{path} is not there")
