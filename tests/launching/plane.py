"""A control plane played by a few lines of HTTP, as far as launches meet it."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "fslw_of-the-attempt"


class Plane:
    """Exchanges tickets for start lines, of an attempt unless `hello` says more, and puts claims off."""

    def __init__(self) -> None:
        self.hello: dict[str, Any] = {"device": "cpu"}
        self.tickets: list[str] = []
        self.claims: list[str] = []
        plane = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                bearer = self.headers["Authorization"].removeprefix("Bearer ")
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                worker = self.path.split("/")[3]
                if self.path.startswith("/worker/launches/"):
                    plane.tickets.append(bearer)
                    hello = {"attempt_id": worker, "api_url": plane.url, "token": TOKEN, "work_dir": "-"}
                    self.answer(200, {**hello, **plane.hello})
                else:
                    plane.claims.append(bearer)
                    self.answer(503, {})  # not now: the supervisor waits

            def answer(self, status: int, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
