"""A bucket by signed addresses, as buckets differ: what each of their answers means."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from flash.artifacts.signed import SignedStore
from flash.errors import Conflict, NotFound, Unavailable


class Site:
    """A bucket in memory. `refusals`: what it answers to the next uploads; `heeds`: whether to If-None-Match, which
    Google's does not; `tells_size`: whether a HEAD does."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.refusals: list[int] = []
        self.heeds = self.tells_size = True
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                taken = site.heeds and "If-None-Match" in self.headers and self.path in site.objects
                status = site.refusals.pop(0) if site.refusals else 412 if taken else 200
                if status == 200:
                    site.objects[self.path] = body
                self.answer(status)

            def do_HEAD(self) -> None:
                found = site.objects.get(self.path)
                self.answer(404 if found is None else 200, len(found or b"") if site.tells_size else None)

            def do_GET(self) -> None:
                found = site.objects.get(self.path)
                self.answer(404 if found is None else 200, len(found or b""))
                self.wfile.write(found or b"")

            def answer(self, status: int, length: int | None = 0) -> None:
                self.send_response(status)
                if length is not None:
                    self.send_header("Content-Length", str(length))
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def store(self) -> SignedStore:
        return SignedStore(lambda _, keys: [f"http://127.0.0.1:{self.server.server_port}/{key}" for key in keys])


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()


@pytest.mark.parametrize("heeds", [True, False])
def test_creating_succeeds_once(site: Site, heeds: bool):
    site.heeds = heeds
    store = site.store()
    store.put_bytes("a/key", b"first", create=True)
    with pytest.raises(Conflict, match="a/key is there already"):
        store.put_bytes("a/key", b"second", create=True)
    assert store.get_bytes("a/key") == b"first"


@pytest.mark.parametrize("status", [409, 412])
def test_only_whoever_creates_is_told_of_a_conflict(site: Site, status: int):
    store = site.store()
    site.refusals = [status]
    with pytest.raises(Conflict):
        store.put_bytes("a/key", b"first", create=True)  # somebody else was quicker
    site.refusals = [status]
    store.put_bytes("a/key", b"second")  # a bucket that is busy with the key is asked again
    assert store.get_bytes("a/key") == b"second"
    site.refusals = [status] * 9
    with pytest.raises(Unavailable, match=f"it answered {status}"):
        store.put_bytes("a/key", b"third")


def test_an_object_of_unknown_size_is_a_failure_of_the_store(site: Site):
    store = site.store()
    store.put_bytes("a/key", b"four")
    assert store.size("a/key") == 4
    assert store.size("a/none") is None
    with pytest.raises(NotFound):
        store.get_bytes("a/none")
    site.tells_size = False
    with pytest.raises(Unavailable, match="did not say how large"):
        store.size("a/key")
