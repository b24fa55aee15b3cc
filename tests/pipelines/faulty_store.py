"""A proxy in front of an S3 server that throttles, or cuts connections in the middle of a body."""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

import pytest
from s3fs import S3FileSystem

Fault = Literal["", "throttle", "cut_upload", "cut_download"]
_SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
_HOP = ("transfer-encoding", "connection", "content-length")


@dataclass
class Faults:
    """What goes wrong, request by request, and what did."""

    choose: Callable[[int, str, str], Fault]
    """The fault of a request by its number from 1, its method and its path."""
    seen: list[tuple[str, str, Fault]] = field(default_factory=list)
    """Method, path and fault of every request."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self, method: str, path: str) -> Fault:
        """The fault of the next request."""
        with self.lock:
            fault = self.choose(len(self.seen) + 1, method, path)
            self.seen.append((method, path, fault))
        return fault

    def count(self, fault: Fault) -> int:
        """How often a fault was seen."""
        return sum(one == fault for _, _, one in self.seen)


@contextmanager
def faulty(endpoint: str, choose: Callable[[int, str, str], Fault]) -> Iterator[Faults]:
    """S3 through the proxy, for all that reads the environment, with short pauses between tries."""
    faults = Faults(choose)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(faults, urlsplit(endpoint).netloc))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        S3FileSystem.clear_instance_cache()
        try:
            yield faults
        finally:
            S3FileSystem.clear_instance_cache()
            server.shutdown()
            server.server_close()


def _handler(faults: Faults, upstream: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None: ...

        def _serve(self) -> None:
            fault = faults.next(self.command, self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if fault == "throttle":
                self._answer(503, {}, _SLOW_DOWN)
            elif fault == "cut_upload":
                self._send_half(body)
                self.close_connection = True
            else:
                self._forward(body, cut=fault == "cut_download")

        def _send_half(self, body: bytes) -> None:
            """Half of the body goes on to the server, then both connections end."""
            connection = self._connection()
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            connection.send(body[: len(body) // 2])
            connection.close()

        def _forward(self, body: bytes, *, cut: bool) -> None:
            connection = self._connection()
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            content = answer.read()
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP}
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self._answer(answer.status, headers, content, length, cut=cut)
            connection.close()

        def _answer(
            self, status: int, headers: dict[str, str], content: bytes, length: str | None = None, *, cut: bool = False
        ) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if status != 204:
                self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if cut else content)
            self.close_connection = self.close_connection or cut

        def _connection(self) -> http.client.HTTPConnection:
            return http.client.HTTPConnection(upstream, timeout=30)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    return Handler
