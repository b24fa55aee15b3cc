"""`hdistill submit` against a real head node with token authentication: a job to its end, and everybody's mistakes."""

import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.artifacts import file_hash
from pipelines.submit import PACKAGES, _warnings, cluster_url, shared_path, stage
from tests.pipelines import tiny
from tests.pipelines.conftest import Finished
from tests.pipelines.ports import free_ports
from tests.pipelines.test_faults import figures

TOKEN = "0123456789abcdef" * 4
BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
ONE_ACTOR = (*tiny.UNTRACKED, "--set", "precompute.num_actors=1")


def environment(home: Path, **own: str) -> dict[str, str]:
    """What a person's shell has, without the variables of Ray that this one may have."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    shared = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
    return {**kept, "HOME": str(home), "PATH": f"{BIN}:{kept['PATH']}", **shared, **own}


@dataclass(frozen=True)
class Head:
    """A running head node, and a home directory without its token."""

    url: str
    home: Path

    def submit(self, *arguments: object, **own: str) -> subprocess.CompletedProcess[str]:
        """The command as a person with the token, or other variables, runs it."""
        return subprocess.run(
            self.command(*arguments), cwd=self.home, env=self.environment(**own), capture_output=True, text=True
        )

    def command(self, *arguments: object) -> list[str]:
        given = [str(argument) for argument in arguments]
        address = [] if "--address" in given else ["--address", self.url]
        return [str(BIN / "hdistill"), "submit", *given, *address]

    def environment(self, **own: str) -> dict[str, str]:
        return environment(self.home, **{"RAY_AUTH_TOKEN": TOKEN, **own})


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    home = tmp_path_factory.mktemp("home")
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # its sockets' paths must be short
    names = ("dashboard-port", "port", "ray-client-server-port", "dashboard-agent-listen-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    given = {**ports, "num-cpus": 3, "object-store-memory": 200 * 2**20}
    options = [f"--{name}={value}" for name, value in given.items()]
    url = f"http://127.0.0.1:{ports['dashboard-port']}"
    with (home / "head.log").open("w") as log:
        process = subprocess.Popen(
            [BIN / "ray", "start", "--head", "--block", "--disable-usage-stats", f"--temp-dir={folder}", *options],
            env=environment(home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_on_one_processor,
        )
    try:
        wait_for(url, process)
        yield Head(url=url, home=home)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _on_one_processor() -> None:
    """The job computes with as many threads as the other tests do, and gets the same bits."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Return when the dashboard answers; a connection alone may be somebody else's."""
    asked = urllib.request.Request(f"{url}/api/version", headers={"Authorization": f"Bearer {TOKEN}"})
    for _ in range(600):
        assert process.poll() is None, "the head node ended"
        with suppress(OSError), urllib.request.urlopen(asked) as answer:
            if json.load(answer)["ray_version"]:
                return
        time.sleep(0.1)
    raise AssertionError("the head node's dashboard did not come up in a minute")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
class TestOnACluster:
    def test_a_job_runs_to_its_end_as_here(self, head: Head, finished: Finished):
        # RAY_ADDRESS of the shell must not come before --address.
        result = head.submit(
            finished.recipe_file, "--run-dir", "far/away", *ONE_ACTOR, RAY_ADDRESS="http://127.0.0.1:1"
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert not result.stderr, "not a word of Ray's own"
        assert "Teacher" in result.stdout and "evaluate" in result.stdout
        run_dir = head.home / "far" / "away"
        assert figures(run_dir) == figures(finished.run_dir)
        for name in tiny.STAGES:
            weights = Path("stages") / name / "student.safetensors"
            assert file_hash(run_dir / weights) == file_hash(finished.run_dir / weights)

    def test_the_code_that_runs_is_what_was_sent_and_its_exit_code_comes_back(self, head: Head, tmp_path: Path):
        for package in PACKAGES:
            shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
        cli = tmp_path / "pipelines" / "cli.py"
        cli.write_text(cli.read_text().replace("import functools\n", "import functools\nprint('ran', __file__)\n"))
        result = head.submit(
            tiny.write_recipe(tmp_path), "--run-dir", "/proc/no/such", *ONE_ACTOR, PYTHONPATH=str(tmp_path)
        )
        assert re.search(r"ran /\S+/_ray_pkg_\w+/pipelines/cli.py", result.stdout), "not what the cluster has"
        assert "error: run directory /proc/no/such cannot be written" in result.stdout
        assert result.returncode == 2

    def test_ctrl_c_stops_the_watching_and_not_the_job(self, head: Head, tmp_path: Path):
        recipe, settings = tiny.write_recipe(tmp_path), (*tiny.UNTRACKED, "--set", "precompute.num_actors=0")
        settings = (*settings, "--set", "stages.sketch.num_steps=1000000")  # it does not end before it is left
        watching = subprocess.Popen(
            head.command(recipe, "--run-dir", "left", *settings),
            cwd=head.home,
            env=head.environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert watching.stdout
        for line in watching.stdout:
            if "precompute " in line:
                watching.send_signal(signal.SIGINT)
                break
        said = watching.stdout.read()
        assert watching.wait(timeout=30) == 130
        assert "goes on without you" in said and f"ray job logs --follow --address {head.url} raysubmit_" in said
        curve = head.home / "left" / "stages" / "sketch" / "metrics.jsonl"
        assert grows(curve), "the job did not go on"
        (stop,) = re.findall(r"^Stop it: (.*)$", said, re.MULTILINE)
        subprocess.run(stop, shell=True, cwd=head.home, env=head.environment(), check=True, capture_output=True)

    def test_without_waiting_it_says_how_to_watch(self, head: Head, tmp_path: Path):
        result = head.submit(tiny.write_recipe(tmp_path), "--run-dir", "/proc/none", "--no-wait", *ONE_ACTOR)
        assert result.returncode == 0 and "Watch it: RAY_AUTH_MODE=token ray job logs --follow" in result.stdout

    @pytest.mark.parametrize(
        ("own", "message"),
        [
            ({"RAY_AUTH_TOKEN": ""}, "wants a token: put the cluster's in ~/.ray/auth_token"),
            ({"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE is disabled, and must be token or not set"),
            ({"RAY_AUTH_TOKEN": "fedcba9876543210" * 4}, "does not accept this token"),
            ({"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": "/nope"}, "names /nope, which does not exist"),
        ],
    )
    def test_who_has_not_the_token_is_told_what_to_do(self, head: Head, own: dict[str, str], message: str):
        one_line(head.submit("digits", **own), message)


def grows(file: Path, seconds: float = 120) -> bool:
    """Whether a file gets longer, or comes, within some seconds."""
    latest = time.monotonic() + seconds
    before = file.stat().st_size if file.exists() else 0
    while time.monotonic() < latest:
        if file.exists() and file.stat().st_size > before:
            return True
        time.sleep(0.1)
    return False


def one_line(result: subprocess.CompletedProcess[str], message: str) -> None:
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not result.stdout


def node(**resources: float) -> list[dict[str, dict[str, float]]]:
    return [{"resources_total": resources}]


@pytest.mark.parametrize(
    ("nodes", "spreads"),
    [(node(CPU=4), False), (node(), True), (node(CPU=0), True), (node(CPU=1) + node(CPU=4, GPU=1), True)],
)
def test_where_the_work_spreads_what_only_the_head_sees_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: list[object], spreads: bool
):
    monkeypatch.setattr("ray.util.state.list_nodes", lambda **_: nodes)
    recipe = tiny.tiny_recipe(tmp_path)
    found = " ".join(_warnings(recipe, "/runs/x", "http://head"))
    assert ("/runs/x is a path on each machine" in found) == spreads
    assert ("train.num_workers is 0" in found and "evaluate.num_actors is 0" in found) == spreads
    assert "a path on each machine" not in " ".join(_warnings(recipe, "s3://bucket/x", "http://head"))
    spread_out = tiny.tiny_recipe(tmp_path, "train.num_workers=2", "evaluate.num_actors=[1, 2]")
    assert _warnings(spread_out, "s3://bucket/x", "http://head") == []


@pytest.fixture
def nowhere(tmp_path: Path) -> Head:
    """A cluster that is not there: what is found before anybody is asked does not need one."""
    return Head(url="http://127.0.0.1:9", home=tmp_path)


def test_a_mistake_in_the_recipe_is_found_before_the_cluster_is_asked(nowhere: Head):
    one_line(nowhere.submit("digits", "--set", "precompute.num_actor=1"), "did you mean 'num_actors'?")


def test_a_path_that_only_this_machine_knows_is_refused(nowhere: Head):
    (nowhere.home / "pictures").mkdir()
    settings = ("--set", "data.kind=folder", "--set", "data.path=pictures", "--set", "data.image_size=8")
    one_line(nowhere.submit("own_images", *settings), "data.path pictures is relative to this directory")


def test_an_address_where_nothing_listens_is_refused(nowhere: Head):
    one_line(nowhere.submit("digits"), "nothing answers at http://127.0.0.1:9 (Connection refused)")


def test_an_address_of_something_else_is_refused(nowhere: Head):
    class Quiet(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, format: str, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        one_line(nowhere.submit("digits", "--address", url), f"{url} does not answer as the dashboard of a Ray cluster")
        server.shutdown()


@pytest.mark.parametrize("address", ["ray://head:10001", "http://", "http://head:port", "s3://bucket"])
def test_an_address_that_is_no_dashboard_is_refused(address: str):
    with pytest.raises(ValueError, match="--address is that of the cluster's dashboard"):
        cluster_url(address)


def test_an_address_holds_no_secret():
    with pytest.raises(ValueError, match="must not hold a name or password") as refused:
        cluster_url("http://me:secret@head:8265")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("address", "url"),
    [("head:8265", "http://head:8265"), ("https://head/", "https://head"), ("http://[::1]:80", "http://[::1]:80")],
)
def test_an_address_is_brought_to_one_form(address: str, url: str):
    assert cluster_url(address) == url


def test_a_run_directory_is_named_from_the_root_and_a_url_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert shared_path("runs/x") == str(tmp_path / "runs" / "x")
    assert shared_path("s3://bucket/x") == "s3://bucket/x"


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/x", "nope://bucket/x"])
def test_a_run_directory_that_cannot_be_is_refused(url: str):
    with pytest.raises(ValueError) as refused:
        shared_path(url)
    assert "secret" not in str(refused.value)


def test_what_is_sent_is_the_recipe_and_all_of_the_packages_without_caches(tmp_path: Path):
    recipe = tiny.tiny_recipe(tmp_path, "seed=9")
    job = tmp_path / "job"
    job.mkdir()
    stage(job, recipe, send_code=True)
    from pipelines import recipe as recipes

    assert recipes.load(str(job / "recipe.yaml")) == recipe
    for package in PACKAGES:
        ours = {path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts}
        sent = {path.relative_to(job / package) for path in (job / package).rglob("*") if path.is_file()}
        assert sent == {path.relative_to(ROOT / package) for path in ours}
    assert sum(path.stat().st_size for path in job.rglob("*")) < 20 * 2**20
    (about,) = job.glob("hdistill-*.dist-info/METADATA")
    assert "Name: hdistill" in about.read_text()


def test_without_the_code_only_the_recipe_is_sent(tmp_path: Path):
    recipe = tiny.tiny_recipe(tmp_path)
    job = tmp_path / "job"
    job.mkdir()
    stage(job, recipe, send_code=False)
    assert [path.name for path in job.iterdir()] == ["recipe.yaml"]
