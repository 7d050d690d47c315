"""The worker API's client: what is repeated, what is not, and what errors become."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from flash.errors import Conflict, InvalidInput, Unauthorized, Unavailable
from flash.records import EventBatch, Finish, Heartbeat, Phase
from flash.worker.api import WorkerApi, persist
from flash.worker.settings import WorkerSettings

FAST = WorkerSettings(retry_first_s=0.01, retry_most_s=0.03, claim_patience_s=1.0, request_timeout_s=1.0)
BEAT = Heartbeat(epoch=1, phase=Phase.STARTING)


@pytest.fixture
def api(plane):
    client = WorkerApi(plane.url, "flash-1700000000-0000abcd.1", plane.token, FAST)
    yield client
    client.close()


def failing(times, status):
    left = [times]

    def fault(route):
        left[0] -= 1
        return status if left[0] >= 0 else None

    return fault


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_claim_is_repeated_while_the_plane_says_not_now(plane, api, status):
    plane.fault = failing(3, status)
    assert api.claim(pid=1, device="cpu").run_id == "flash-1700000000-0000abcd"
    assert plane.requests == ["claim"] * 4


def test_a_claim_that_is_refused_is_not_repeated(plane, api):
    plane.fault = lambda route: 409
    with pytest.raises(Conflict):
        api.claim(pid=1, device="cpu")
    assert plane.requests == ["claim"]


def test_a_claim_waits_for_a_server_that_is_still_starting(plane):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    client = WorkerApi(f"http://127.0.0.1:{port}", "r.1", plane.token, FAST)
    started = time.monotonic()
    with pytest.raises(Unavailable, match="can't be reached"):
        client.claim(pid=1, device="cpu")
    assert 0.5 < time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("status", "kind"), [(409, Conflict), (401, Unauthorized), (503, Unavailable), (500, Unavailable)]
)
def test_statuses_become_errors_and_heartbeats_are_not_repeated(plane, api, status, kind):
    plane.fault = lambda route: status
    with pytest.raises(kind, match="scripted"):
        api.heartbeat(BEAT, timeout_s=1)
    assert plane.requests == ["heartbeat"]


def test_another_attempts_token_is_unauthorized(plane):
    with pytest.raises(Unauthorized):
        WorkerApi(plane.url, "r.1", "another-token", FAST).heartbeat(BEAT, timeout_s=1)


def test_a_refusal_keeps_its_words(plane, api):
    error = {"code": "invalid_input", "message": "no such n", "remedy": "fix"}
    plane.answer = lambda route, body: (422, {"error": error})
    with pytest.raises(InvalidInput, match=r"no such n \(fix\)"):
        api.send_events(EventBatch(epoch=1, events=()))


def test_a_plane_that_hangs_is_unavailable_in_time(plane, api):
    release = threading.Event()
    plane.answer = lambda route, body: (release.wait(5), (503, None))[1]
    started = time.monotonic()
    with pytest.raises(Unavailable):
        api.heartbeat(BEAT, timeout_s=0.1)
    assert time.monotonic() - started < 2
    release.set()


def test_persisting_ends_when_told(plane, api):
    stop = threading.Event()
    plane.fault = lambda route: (stop.set() if len(plane.requests) == 3 else None, 503)[1]
    finish = Finish(epoch=1, outcome="done")
    with pytest.raises(Unavailable):
        persist(lambda: api.finish(finish), FAST, patience_s=None, stop=stop)
    assert plane.requests == ["finish"] * 3


def test_settings_come_from_one_variable_and_misspellings_are_errors():
    assert WorkerSettings.from_environment({}) == WorkerSettings()
    settings = WorkerSettings.from_environment({"FLASH_WORKER_SETTINGS": '{"stop_grace_s": 1, "event_batch": 7.0}'})
    assert (settings.stop_grace_s, settings.event_batch) == (1.0, 7)
    for text in ('{"stop_grace": 1}', '{"stop_grace_s": "1"}', '{"stop_grace_s": -1}', "[]", "{"):
        with pytest.raises(InvalidInput, match="FLASH_WORKER_SETTINGS"):
            WorkerSettings.from_environment({"FLASH_WORKER_SETTINGS": text})
