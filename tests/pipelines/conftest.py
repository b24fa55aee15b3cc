"""One finished tiny run for all tests of the pipelines, made through the command line, with tracking, without Ray."""

import logging
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines import recipe as recipes
from pipelines.recipe import Recipe
from tests.pipelines import tiny


@dataclass(frozen=True)
class Finished:
    """A run directory that holds everything; tests read it, or work on a copy."""

    recipe_file: Path
    run_dir: Path
    output: str
    """What the command printed."""

    @property
    def recipe(self) -> Recipe:
        return recipes.load(str(self.recipe_file))

    @property
    def arguments(self) -> tuple[Path, str, Path]:
        return self.recipe_file, "--run-dir", self.run_dir


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr("pipelines.process.available_cpus", lambda: 1)
        recipe_file, run_dir = tiny.write_recipe(folder), folder / "runs" / "tiny"
        tiny.make_trajectories(recipes.load(str(recipe_file)), run_dir)
        result = tiny.hdistill("run", recipe_file, "--run-dir", run_dir)
    assert result.exit_code == 0, result.output
    return Finished(recipe_file=recipe_file, run_dir=run_dir, output=result.output)


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Finished:
    """The finished run in a directory of its own, to change or to spoil."""
    run_dir = tmp_path / "tiny"
    shutil.copytree(finished.run_dir, run_dir)
    return Finished(recipe_file=finished.recipe_file, run_dir=run_dir, output="")


@pytest.fixture(scope="session")
def object_store() -> Iterator[str]:
    """The address of an S3 server on this machine, which the environment names too, with the bucket `bucket`."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_CONFIG_FILE", "/dev/null")  # a person's own settings stay out
        patch.delenv("AWS_PROFILE", raising=False)
        S3FileSystem(skip_instance_cache=True).mkdir("bucket")
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def url(object_store: str) -> str:
    """A place of the test's own in an object store."""
    return f"s3://bucket/{uuid.uuid4().hex}"


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting Ray fails the test."""

    def refuse(**_: object) -> None:
        raise AssertionError("this test must not start Ray")

    monkeypatch.setattr("pipelines.cluster.ensure_ray", refuse)
