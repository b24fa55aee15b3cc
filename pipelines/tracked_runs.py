"""Finished runs in a tracking store, by MLflow's filters."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.stores import check_recorded, redact
from pipelines.tracking import PARENT_TAG, client_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """A finished run as the store has it."""

    name: str
    """Its name there."""
    run_id: str
    """MLflow's id."""
    report: bytes
    """Its report.json."""


def find_runs(uri: str, query: str) -> list[Tracked]:
    """The runs with a report that a filter of MLflow finds in a store, by itself or through one of their stages.

    Raises:
        ValueError: there is no store, it does not answer, the filter is wrong, or it finds no run with a report.
    """
    from mlflow.exceptions import MlflowException

    check_recorded(uri)
    client = client_of(uri)
    try:
        found = [one for run in _matching(client, query) if (one := _with_report(client, run))]
    except MlflowException as error:
        raise ValueError(f"--query {query!r} at {redact(uri)}: {(str(error).splitlines() or [''])[0]}") from None
    if not found:
        raise ValueError(f"--query {query!r} finds no run with a report in {redact(uri)}: `hdistill ui` shows its runs")
    return found


def _matching(client: "MlflowClient", query: str) -> list["Run"]:
    """The root runs of what a filter finds, oldest first."""
    experiments = [one.experiment_id for one in client.search_experiments()]
    matching, token = [], None
    while True:
        page = client.search_runs(experiments, query, order_by=["attributes.start_time ASC"], page_token=token)
        matching += page
        if not (token := page.token):
            break
    roots = dict.fromkeys(run.data.tags.get(PARENT_TAG, run.info.run_id) for run in matching)
    return [client.get_run(run_id) for run_id in roots]


def _with_report(client: "MlflowClient", run: "Run") -> Tracked | None:
    if not any(file.path == "report.json" for file in client.list_artifacts(run.info.run_id)):
        return None
    with tempfile.TemporaryDirectory(prefix="hdistill-") as folder:
        path = client.download_artifacts(run.info.run_id, "report.json", folder)
        report = Path(path).read_bytes()
    return Tracked(name=run.info.run_name or run.info.run_id, run_id=run.info.run_id, report=report)
