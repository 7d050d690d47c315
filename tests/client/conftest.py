"""A real HTTP server on loopback whose every answer the test writes, down to connections that break."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Handler = Callable[["Request"], None]


class Request(BaseHTTPRequestHandler):
    """One request; `site.handler` answers it with `answer`, `begin_stream` and `event`, or by returning early."""

    server: Site
    body = b""

    def _handle(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.command, self.path, dict(self.headers), self.body))
        self.server.handler(self)

    do_GET = do_POST = do_DELETE = _handle

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, body: Any, status: int = 200) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()

    def event(self, event: dict[str, Any]) -> None:
        self.wfile.write(f": ping\n\nid: {event['seq']}\ndata: {json.dumps(event)}\n\n".encode())


class Site(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.handler: Handler = lambda request: request.answer({})
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def site() -> Iterator[Site]:
    server = Site()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
