"""Tracking stores: which one a run is recorded in, where its files lie, and what of its URI may not be printed."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
_SECRET_VARIABLES = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_LONG_SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_LONG = 16  # real ones have more letters; a stand-in such as "test" would be struck out of plain words
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # a fresh sqlite file reports dozens of migrations at INFO
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # MLflow's own two minutes and seven retries would hold up training
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """Where a run is recorded."""

    enabled: bool = True
    """Whether anything is recorded at all."""
    uri: str = field(default="", repr=False)
    """MLflow tracking URI; empty: $MLFLOW_TRACKING_URI, else the sqlite file `mlflow.db` beside the run directories."""
    experiment: str = ""
    """Experiment that groups the runs; empty: the recipe's name."""
    register: str = ""
    """Registered model that the best student becomes a version of, at the end of `hdistill run`; empty: none."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]*", self.register):
            raise ValueError(
                f"track.register is {self.register!r}: a registered model's name has letters, digits, dots, dashes and"
                " underscores"
            )
        if self.uri:
            _check_uri(self.uri, "track.uri")
        if redact(self.uri) != self.uri:
            raise ValueError(
                "track.uri holds a password, and recipes are stored with their runs: put the whole URI in"
                " MLFLOW_TRACKING_URI, or use MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )


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


def check_recorded(uri: str) -> None:
    """Raises ValueError where a store is a file that is not there: MLflow would make an empty one."""
    if (file := sqlite_file(uri)) and not file.exists():
        raise ValueError(
            f"nothing is recorded in {file} yet: start with `hdistill run RECIPE`, or name another --store"
        )


def artifact_folder(uri: str, default_store: Path) -> str | None:
    """Where artifacts go: `mlartifacts` beside the database; a tracking server has its own place."""
    if urlsplit(uri).scheme in ("http", "https", "databricks") or uri == "databricks":
        return None
    return ((sqlite_file(uri) or default_store).resolve().parent / "mlartifacts").as_uri()


def redact(text: str) -> str:
    """The text without passwords: those in URIs and query strings, and those the environment holds for services."""
    for value in _secrets():
        text = text.replace(value, "***")
    text = re.sub(r"(\w://)(?!/)\S*@", r"\1***@", text)
    return re.sub(r"(?i)([?&][\w-]*(?:token|password|passwd|pwd|secret|key)[\w-]*=)[^&\s]+", r"\1***", text)


def _secrets() -> Iterator[str]:
    """Secrets of the environment, as they would stand in a text."""
    yield from filter(None, map(os.environ.get, _SECRET_VARIABLES))
    yield from (value for value in map(os.environ.get, _LONG_SECRET_VARIABLES) if value and len(value) >= _LONG)


def _check_uri(uri: str, source: str) -> None:
    scheme = urlsplit(uri).scheme.partition("+")[0] or uri
    if scheme not in _SCHEMES or (scheme == "sqlite" and not sqlite_file(uri)):
        allowed = "sqlite:///PATH.db, http(s)://HOST:PORT, postgresql://..., mysql://... or mssql://..."
        raise ValueError(f"{source} is {redact(uri)!r}, which is no tracking store: give {allowed}")


def quiet_environment() -> None:
    """Defaults for MLflow that a user's own settings override: no telemetry, no chatter, no long waits."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
