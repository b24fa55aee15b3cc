"""A recipe as a job on a Ray cluster: checked here, sent with this installation's code, watched until it ends.

What travels is one folder, the job's working directory: the resolved recipe and, unless the cluster's image has them,
the packages. Data, teachers and run directories do not travel: every machine of the cluster must see them.
"""

import asyncio
import logging
import os
import shlex
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rich.console import Console

from pipelines.cluster import ENVIRONMENT
from pipelines.process import WORKER_ENVIRONMENT
from pipelines.recipe import Recipe, to_yaml
from pipelines.storage import is_remote, located

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PACKAGES = ("hd_core", "pipelines", "tune_spaces")
_ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
"""Ray takes these before an address that it is given."""
_OUTPUT = {"PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
"""The job writes to a file: line by line, and as wide as its table."""
_SECONDS_TO_CONNECT = 10
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Loggers of Ray that tell of every upload."""


def submit(
    recipe: Recipe, run_dir: str, address: str, console: Console, *, wait: bool = True, send_code: bool = True
) -> int:
    """Run a recipe on a cluster; returns the exit code of the job, or 0 as soon as it is accepted if not to wait.

    Args:
        run_dir: Absolute path or URL of the run directory, as the machines of the cluster name it.
        address: Address of the cluster's dashboard, such as http://127.0.0.1:8265.
        send_code: Whether the installed packages go along.

    Raises:
        ValueError: no cluster answers there, it does not let us in, or the recipe names files of this machine alone.
    """
    url = cluster_url(address)
    _check_paths(recipe)
    with _own_address(), TemporaryDirectory() as folder:
        client = _connect(url)
        for warning in _warnings(recipe, run_dir, url):
            console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        stage(Path(folder), recipe, send_code)
        job = _send(client, recipe, run_dir, folder)
        _tell(console, f"{job}: {recipe.name} in {run_dir}")
        if not wait:
            _tell(console, _how_to_go_on(job, url))
            return 0
        return _watch(client, job, url, console)


def shared_path(run_dir: str) -> str:
    """A run directory as the job names it: a URL as it is, a path from this machine's root.

    Raises:
        ValueError: a URL that is none, or that holds credentials.
    """
    path = located(run_dir)
    return str(path if is_remote(path) else path.resolve())


def cluster_url(address: str) -> str:
    """The address of a cluster's dashboard as a URL.

    Raises:
        ValueError: it is none.
    """
    url = urlsplit(address if "://" in address else f"http://{address}")
    if url.username or url.password:
        raise ValueError("--address must not hold a name or password: the token of a cluster is read by Ray itself")
    if url.scheme not in ("http", "https") or not url.hostname or not _has_port(url.netloc):
        raise ValueError(f"--address is that of the cluster's dashboard, http://127.0.0.1:8265; given {address!r}")
    return f"{url.scheme}://{url.netloc}"


def _has_port(place: str) -> bool:
    try:
        return urlsplit(f"//{place}").port != 0
    except ValueError:
        return False


def stage(folder: Path, recipe: Recipe, send_code: bool) -> None:
    """Fill a job's working directory: ``recipe.yaml`` and, if the code is to be sent, packages and their version."""
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    for package in PACKAGES if send_code else ():
        source = str(resources.files(package))
        shutil.copytree(source, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.py[co]", ".*"))
    if send_code:
        about = folder / f"hdistill-{version('hdistill')}.dist-info" / "METADATA"
        about.parent.mkdir()
        about.write_text(f"Metadata-Version: 2.1\nName: hdistill\nVersion: {version('hdistill')}\n")


def _check_paths(recipe: Recipe) -> None:
    """Refuse what is found from this directory, and would not be from the job's."""
    named = {
        "data.path": recipe.data.path,
        "teacher.path": recipe.teacher.path,
        "evaluate.features": recipe.evaluate.features,
        "evaluate.second_features": recipe.evaluate.second_features,
        "evaluate.clip": recipe.evaluate.clip,
    }
    for field, path in named.items():
        if path and not path.startswith("~") and not Path(path).is_absolute() and Path(path).exists():
            raise ValueError(
                f"{field} {path} is relative to this directory, and the job runs in another: give an absolute path or"
                " a URL that every machine of the cluster can read"
            )


@contextmanager
def _own_address() -> Iterator[None]:
    """Let the address that was given count, and show the cluster this user's token where there is one."""
    kept = {name: os.environ.pop(name) for name in _ADDRESSES if name in os.environ}
    if _token_is_there():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        yield
    finally:
        os.environ.update(kept)


def _token_is_there() -> bool:
    """Whether this user has a token; Ray ends the process where the file that is named does not exist."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if named and not Path(named).is_file():
        raise ValueError(f"RAY_AUTH_TOKEN_PATH names {named}, which does not exist")
    return bool(os.environ.get("RAY_AUTH_TOKEN") or named or (Path.home() / ".ray" / "auth_token").is_file())


def _connect(url: str) -> "JobSubmissionClient":
    place = urlsplit(url)
    try:
        port = place.port or (443 if place.scheme == "https" else 80)
        socket.create_connection((str(place.hostname), port), _SECONDS_TO_CONNECT).close()
    except OSError as error:
        raise ValueError(
            f"nothing answers at {url} ({error.strerror or error}): is the cluster up, and its dashboard's tunnel open"
            " (ray dashboard cluster.yaml)?"
        ) from None
    from ray.job_submission import JobSubmissionClient

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    with _explained(url):
        return JobSubmissionClient(url)


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Ray's refusals as mistakes, of one line each.

    Raises:
        ValueError: in place of what Ray raises.
    """
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise ValueError(f"{url} {_refusal(error)}") from None
    except (RuntimeError, OSError, ValueError) as error:
        why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(f"{url} does not answer as the dashboard of a Ray cluster does: {why}") from None


def _refusal(error: Exception) -> str:
    where = "in ~/.ray/auth_token, RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
    if "Authentication failed" in str(error):
        return f"does not accept this token: put the cluster's own {where} (on its head node: ray get-auth-token)"
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    also = f"; RAY_AUTH_MODE is {mode}, and must be token or not set" if mode != "token" else ""
    return f"wants a token: put the cluster's {where} (on its head node: ray get-auth-token){also}"


def _warnings(recipe: Recipe, run_dir: str, url: str) -> list[str]:
    """What is likely a mistake on a cluster of several machines, or of one that is to grow."""
    if not _spreads(url):
        return []
    found: list[str] = []
    if "://" not in run_dir:
        found.append(
            f"{run_dir} is a path on each machine of the cluster; unless they share it, what one writes the others miss"
            " (shared storage, or --run-dir s3://BUCKET/...)"
        )
    counts = {"train.num_workers": recipe.train.num_workers, "evaluate.num_actors": recipe.evaluate.num_actors}
    found += [f"{name} is 0: the job's own process on the head node does it" for name in counts if not counts[name]]
    return found


def _spreads(url: str) -> bool:
    """Whether the work goes to other machines than the head: there are some, or the head takes none."""
    from ray.util.state import list_nodes

    try:
        nodes: list[Any] = list_nodes(address=url, filters=[("state", "=", "ALIVE")])
    except Exception:  # only a warning depends on it
        return True
    return len(nodes) != 1 or not nodes[0]["resources_total"].get("CPU")


def _send(client: "JobSubmissionClient", recipe: Recipe, run_dir: str, folder: str) -> str:
    with _explained(client.get_address()):
        return client.submit_job(
            entrypoint=f"python -m pipelines.cli run recipe.yaml --run-dir {shlex.quote(run_dir)}",
            runtime_env={"working_dir": folder, "env_vars": {**ENVIRONMENT, **WORKER_ENVIRONMENT, **_OUTPUT}},
            metadata={"recipe": recipe.name, "run_dir": run_dir, "hdistill": version("hdistill")},
        )


def _watch(client: "JobSubmissionClient", job: str, url: str, console: Console) -> int:
    """Show what the job writes until it ends; returns its exit code. Losing sight of it does not stop it."""
    try:
        asyncio.run(_follow(client, job, console))
        info = asyncio.run(_ended(client, job))
    except KeyboardInterrupt:
        _tell(console, f"\n{job} goes on without you. {_how_to_go_on(job, url)}")
        return 130
    except (RuntimeError, OSError):
        _tell(console, f"lost sight of {job}, which may go on. {_how_to_go_on(job, url)}")
        return 1
    return _exit_code(info, console)


async def _follow(client: "JobSubmissionClient", job: str, console: Console) -> None:
    async for text in client.tail_job_logs(job):
        _tell(console, text, end="")


async def _ended(client: "JobSubmissionClient", job: str) -> Any:
    """The job's record once it says how it ended, which is a moment after its last line."""
    while not (info := client.get_job_info(job)).status.is_terminal():
        await asyncio.sleep(0.5)
    return info


def _exit_code(info: Any, console: Console) -> int:
    if info.status == "SUCCEEDED":
        return 0
    code = info.driver_exit_code
    if code is None:  # its process never ran, or nobody knows how it ended
        _tell(console, f"the job {info.status.lower()}: {info.message}")
        return 1
    return code if code > 0 else 128 - code or 1


def _how_to_go_on(job: str, url: str) -> str:
    mode = "RAY_AUTH_MODE=token " if os.environ.get("RAY_AUTH_MODE") == "token" else ""
    watch, stop = (f"{mode}ray job {verb} --address {url} {job}" for verb in ("logs --follow", "stop"))
    return f"Watch it: {watch}\nStop it: {stop}"


def _tell(console: Console, text: str, end: str = "\n") -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True, end=end)
