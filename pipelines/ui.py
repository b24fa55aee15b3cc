"""The MLflow page: a server for a store that is only a file or a database, until Ctrl-C."""

import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from urllib.parse import urlsplit

import click

from pipelines.stores import artifact_folder, check_recorded, quiet_environment, redact, sqlite_file

DEFAULT_PORT = 5000
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_END_SECONDS = 5.0


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
    check_recorded(uri)
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
    quiet_environment()
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
