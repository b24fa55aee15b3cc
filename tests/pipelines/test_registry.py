"""The best student as a version of a registered model: once, with the alias where it leads, and sampled from there."""

import json
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from pipelines.journal import Journal
from pipelines.recipe import load
from pipelines.registry import BEST, MODEL_TAG, register
from pipelines.stores import TrackConfig
from pipelines.tracking import open_tracker
from tests.pipelines.conftest import Finished
from tests.pipelines.tiny import hdistill

pytestmark = pytest.mark.usefixtures("without_ray")
MEASURED = {
    "features": "digits", "features_sha256": "ab", "reference": "held-out images", "num_reference": "600",
    "num_samples": "5000", "data": "cd",
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "mlflow.db"


@pytest.fixture(autouse=True)
def _own_store(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
    monkeypatch.setattr("pipelines.process.available_cpus", lambda: 1)


@pytest.fixture
def client(store: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{store}")


def exported(folder: Path) -> Path:
    """What registering needs to find, without a network."""
    (folder / "pipeline").mkdir(parents=True)
    (folder / "pipeline" / "model_index.json").write_text("{}")
    told = {"stock": True, "asks": "class_labels", "settings": {}, "picture": [8, 8, 1]}
    (folder / "sampler.json").write_text(json.dumps(told))
    return folder


def test_the_best_student_is_registered_once_and_sampled_from_there(copied: Finished, client: MlflowClient) -> None:
    settings = ("--set", "track.register=digits-best")
    for _ in range(2):
        result = hdistill("run", *copied.arguments, *settings)
        assert result.exit_code == 0, result.output
    (version,) = client.search_model_versions("name = 'digits-best'")
    rows = json.loads((copied.run_dir / "report.json").read_text())["rows"]
    best = min((row for row in rows if row["stage"]), key=lambda row: row["fid"])
    assert float(version.tags["fid"]) == best["fid"] and version.tags["stage"] == best["stage"]
    assert version.tags["fingerprint"] == load(str(copied.recipe_file)).fingerprint

    model = mlflow.pyfunc.load_model("models:/digits-best@best")
    assert model.metadata.signature.inputs.input_names() == ["label", "seed"]
    assert model.metadata.signature.outputs.inputs[0].shape == (-1, 8, 8, 1)
    some = model.predict(pd.DataFrame({"label": [3, 3, 7], "seed": [5, 6, 5]}))
    assert some.shape == (3, 8, 8, 1) and some.dtype == np.uint8 and some.std() > 10
    alone = model.predict({"label": [3], "seed": [6]})
    assert np.abs(alone[0].astype(int) - some[1]).max() <= 1 and not np.array_equal(some[0], some[1])
    assert model.predict(pd.DataFrame({"label": [1] * 70})).shape == (70, 8, 8, 1)  # more than a batch, without seeds
    files = {path.suffix for path in Path(client.download_artifacts(version.run_id, "registered")).rglob("*")}
    assert ".safetensors" in files and not files & {".pkl", ".pt", ".bin"}


def test_the_alias_follows_the_lowest_fid_that_was_measured_alike(tmp_path: Path, client: MlflowClient) -> None:
    folder, experiment = exported(tmp_path / "made"), client.create_experiment("alias", (tmp_path / "files").as_uri())
    run_id = client.create_run(experiment).info.run_id

    def registered(key: str, fid: float, **changes: str) -> str:
        register(client, run_id, "aliased", folder, {MODEL_TAG: key, "fid": str(fid), **MEASURED, **changes})
        return client.get_model_version_by_alias("aliased", BEST).tags[MODEL_TAG]

    assert registered("one", 3.0) == "one"
    assert registered("two", 4.0) == "one"
    assert registered("three", 1.0, num_samples="100") == "one"  # of another number of samples
    assert registered("four", 2.0) == "four"
    assert registered("one", 3.0) == "four"
    assert len(client.search_model_versions("name = 'aliased'")) == 4


def test_what_a_store_that_was_away_missed_is_registered_once_later(
    store: Path, tmp_path: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported(tmp_path / "run" / "registered" / "one")
    about = {"recipe_name": "away", "run_name": "run", "run_dir": tmp_path / "run", "default_store": store, "tags": {}}
    away = open_tracker(TrackConfig(uri="http://127.0.0.1:9"), **about)
    away.register("later", folder, {MODEL_TAG: "one", "fid": 3.0, **MEASURED})
    assert not away.flush()
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "drop", lambda self, count: None)  # a kill between sending and forgetting
        open_tracker(TrackConfig(), **about, resume_run_id=away.run_id)
    open_tracker(TrackConfig(), **about, resume_run_id=away.run_id)
    (version,) = client.search_model_versions("name = 'later'")
    assert client.get_model_version_by_alias("later", BEST).version == version.version


def test_a_name_that_no_registry_takes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"track\.register is 'a/b'"):
        TrackConfig(register="a/b")
