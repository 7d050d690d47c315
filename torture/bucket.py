"""A bucket that fails: moto's S3 server behind a proxy that refuses, cuts, stalls, trickles and truncates.

What talks to it is the product's own store over real HTTP. Faults come by chance, at the rate that is set; a writer
of another process can be killed at any of its requests, each part of an upload among them.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from moto.server import ThreadedMotoServer

NAME = "flash-artifacts"
FAULTS = ("503", "500", "refused", "answer lost", "stalled", "cut", "truncated", "slow")
SILENCE_S = 1.0  # a client's patience; a stall is longer
_SLOW_S = 0.3
_REFUSAL = b"<?xml version='1.0'?><Error><Code>%b</Code><Message>as the torture wants it</Message></Error>"
_HOP = ("connection", "keep-alive", "transfer-encoding", "content-length")


@dataclass
class Kill:
    """A process to kill when its n-th request arrives, before or after the bucket has seen it."""

    pid: int
    request: int
    after: bool


class Bucket:
    """Start it with `with`. `options` are what a `Store` needs; `rate` 0 makes it an honest bucket."""

    url = f"s3://{NAME}/team"

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.rate = 0.0
        self.slow_s = 0.0  # that every answer's body takes, in trickles
        self.injected: list[str] = []
        self.kill: Kill | None = None
        self._back: threading.Event | None = None  # None: it is there
        self._silent = False
        self._lock = threading.Lock()
        self._moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)

    def __enter__(self) -> Bucket:
        logging.getLogger("werkzeug").setLevel(logging.WARNING)  # else a line a request
        self._moto.start()
        self.upstream: tuple[str, int] = self._moto.get_host_and_port()
        connection = http.client.HTTPConnection(*self.upstream)
        for method, path in (("POST", "/moto-api/reset"), ("PUT", f"/{NAME}")):  # its buckets are its process's
            connection.request(method, path)
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            answer.read()
        connection.close()
        handler = type("Handler", (_Handler,), {"bucket": self})
        self._proxy = _Quiet(("127.0.0.1", 0), handler)
        threading.Thread(target=self._proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()
        self._moto.stop()

    @property
    def options(self) -> dict[str, str]:
        return {
            "endpoint": f"http://127.0.0.1:{self._proxy.server_port}",
            "region": "us-east-1",
            "access_key_id": "key-of-the-test",
            "secret_access_key": "secret-of-the-test",
            "read_timeout": f"{SILENCE_S}s",
            "max_retries": "1",
        }

    @contextlib.contextmanager
    def away(self, *, silently: bool = False) -> Iterator[None]:
        """For so long it takes no request, or (silently) takes them and says nothing until it is back."""
        self._silent, self._back = silently, threading.Event()
        try:
            yield
        finally:
            back, self._back = self._back, None
            back.set()

    def is_away(self) -> bool:
        """Waits for its return where it is silent."""
        back = self._back
        if back is not None and self._silent:
            back.wait(300)
        return back is not None

    def fault(self, method: str) -> str | None:
        with self._lock:
            if self.chance.random() >= self.rate:
                return None
            found = self.chance.choice([each for each in FAULTS if each != "truncated" or method == "PUT"])
            self.injected.append(found)
            return found

    def deadly(self, *, after: bool) -> bool:
        """Whether the writer dies of this request, here and now."""
        with self._lock:
            kill = self.kill
            if kill is None:
                return False
            kill.request -= not after
            if kill.request > 0 or kill.after != after:
                return False
            self.kill = None
            self.injected.append(f"killed {'after' if after else 'at'} a request")
            with contextlib.suppress(ProcessLookupError):
                os.kill(kill.pid, signal.SIGKILL)
            return True


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was cut off, or died, is what this is for."""


class _Handler(BaseHTTPRequestHandler):
    bucket: Bucket
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _pass(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        if self.bucket.is_away():
            return self._cut()
        fault = self.bucket.fault(self.command)
        if fault == "refused" or self.bucket.deadly(after=False):
            return self._cut()
        body = self.rfile.read(size // 2 if fault == "cut" and self.command == "PUT" else size)
        if fault == "cut" and self.command == "PUT":
            return self._cut()
        if fault in ("503", "500"):
            return self._refuse(int(fault))
        if fault == "stalled":
            time.sleep(SILENCE_S * 1.3)
            return self._cut()
        if fault == "slow":
            time.sleep(_SLOW_S)
        answer, content = self._ask(body[: len(body) // 2] if fault == "truncated" else body)
        if fault == "answer lost" or self.bucket.deadly(after=True):
            return self._cut()
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP:
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        slow_s = _SLOW_S if fault == "slow" else self.bucket.slow_s
        if slow_s:
            return self._trickle(content, slow_s)
        self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        return self._cut() if fault == "cut" else None

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass

    def _ask(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        upstream = http.client.HTTPConnection(*self.bucket.upstream)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
        upstream.request(self.command, self.path, body=body, headers={**headers, "Content-Length": str(len(body))})
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        return answer, content

    def _refuse(self, status: int) -> None:
        content = _REFUSAL % (b"SlowDown" if status == 503 else b"InternalError")
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _trickle(self, content: bytes, seconds: float) -> None:
        step = len(content) // 20 + 1
        for start in range(0, len(content), step):
            self.wfile.write(content[start : start + step])
            time.sleep(seconds / 20)

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
