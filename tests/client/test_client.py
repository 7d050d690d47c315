from __future__ import annotations

import random
import socket

import pytest

from flash.client.client import FlashClient
from flash.errors import ConfigError, Conflict, FlashError, InternalError, InvalidInput, NotFound, Unavailable
from flash.records import RunState, SubmitRequest

RUN = "flash-1700000000-0123abcd"
FAST = (0.0, 0.0, 0.0)


def status(state: str = "running") -> dict[str, object]:
    return {
        "run_id": RUN, "state": state, "phase": None, "step": 0, "total_steps": None, "summary": "", "next": "",
        "spec": {}, "seed": 0, "created_at": 1.0, "updated_at": 1.0, "finished_at": None, "attempts": [],
        "metrics": {}, "checkpoints": [], "adapter_ref": None, "deployment": None, "estimated_cost_usd": None,
        "cost_usd": None, "error": None, "managed": {},
    }  # fmt: skip


def history(count: int) -> list[dict[str, object]]:
    def event(seq, kind, data):
        return {"run_id": RUN, "seq": seq, "time": float(seq), "kind": kind, "epoch": None, "data": data}

    middle = [event(seq, "log", {"stream": "trainer", "text": f"line {seq}"}) for seq in range(1, count)]
    return [*middle, event(count, "state", {"from": "running", "to": "done", "reason": "all steps taken"})]


def client_of(site, **options) -> FlashClient:
    return FlashClient(site.url, "secret-token", retry_delays_s=FAST, **options)


def test_the_token_travels_and_records_come_back(site):
    site.handler = lambda request: request.answer(status())
    with client_of(site) as client:
        assert client.run(RUN).state is RunState.RUNNING
    method, path, headers, _ = site.seen[0]
    assert (method, path) == ("GET", f"/api/runs/{RUN}")
    assert headers["Authorization"] == "Bearer secret-token"


@pytest.mark.parametrize("error", [NotFound("no run x"), Conflict("moved on", remedy="look again")])
def test_the_servers_error_arrives_as_its_class(site, error):
    site.handler = lambda request: request.answer({"error": error.to_wire()}, error.status)
    with client_of(site) as client, pytest.raises(type(error)) as caught:
        client.run(RUN)
    assert str(caught.value) == str(error)


def test_a_config_error_keeps_its_problems_apart(site):
    error = ConfigError(["train.epoch: unknown key", "model: is required"])
    site.handler = lambda request: request.answer({"error": error.to_wire()}, error.status)
    with client_of(site) as client, pytest.raises(ConfigError) as caught:
        client.submit(SubmitRequest(config={}))
    assert caught.value.problems == error.problems


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b'{"error": "no"}', b'{"run_id": 3}'])
def test_an_answer_in_no_known_form_is_one_clear_error(site, body):
    site.handler = lambda request: request.answer(body)
    with client_of(site) as client, pytest.raises(InternalError, match="server status"):
        client.run(RUN)


def test_nobody_listening_is_unavailable_with_the_remedy():
    with socket.socket() as reserved:  # bound and never listening: connections are refused
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        with (
            FlashClient(url, "t", retry_delays_s=FAST, unreachable_remedy="start it") as client,
            pytest.raises(Unavailable, match=r"can't reach the server at .*\(start it\)"),
        ):
            client.runs()


def test_gets_and_submits_are_repeated_with_one_key_but_a_delete_is_not(site):
    def flaky(request):
        if len(site.seen) % 3:
            return  # answers nothing: the connection breaks
        request.answer(status(), 201)

    site.handler = flaky
    with client_of(site) as client:
        client.submit(SubmitRequest(config={"model": "m"}))
        keys = {headers["Idempotency-Key"] for _, _, headers, _ in site.seen}
        assert len(site.seen) == 3
        assert len(keys) == 1
        client.run(RUN)
        assert len(site.seen) == 6
        with pytest.raises(Unavailable):
            client.delete_environment("local", "arithmetic")
        assert len(site.seen) == 7


def test_two_submits_have_two_keys(site):
    site.handler = lambda request: request.answer(status(), 201)
    with client_of(site) as client:
        client.submit(SubmitRequest(config={}))
        client.submit(SubmitRequest(config={}))
    assert len({headers["Idempotency-Key"] for _, _, headers, _ in site.seen}) == 2


def test_a_busy_server_is_asked_again(site):
    site.handler = lambda request: request.answer(status(), 503 if len(site.seen) < 3 else 200)
    with client_of(site) as client:
        assert client.run(RUN).run_id == RUN


@pytest.mark.parametrize("bad", ["../x", "a/b", "", "..", "a?b", "a\nb"])
def test_an_id_never_reaches_another_route(site, bad):
    with client_of(site) as client, pytest.raises(InvalidInput):
        client.run(bad)
    assert site.seen == []


# --- following -----------------------------------------------------------------------------------------


def serve_events(site, events, stream):
    """`stream(request, after)` writes the live stream; history and status are served rightly."""

    def handle(request):
        path, _, query = request.path.partition("?")
        parameters = dict(pair.split("=") for pair in query.split("&") if pair)
        after = int(parameters.get("after", 0))
        if path.endswith("/stream"):
            stream(request, int(request.headers.get("Last-Event-ID", after)))
        elif path.endswith("/events"):
            page = [event for event in events if event["seq"] > after][: int(parameters["limit"])]
            request.answer({"events": page, "last_seq": len(events)})
        else:
            request.answer(status("done"))

    site.handler = handle


@pytest.mark.parametrize("seed", range(3))
def test_a_stream_that_keeps_breaking_loses_and_doubles_nothing(site, seed):
    events, chance = history(60), random.Random(seed)

    def stream(request, after):
        request.begin_stream()
        start = max(0, after - chance.randrange(3))  # some old ones again
        for event in events[start : start + chance.randrange(1, 25)]:
            if chance.random() > 0.1:  # and some left out
                request.event(event)
        if chance.random() < 0.5:
            request.wfile.write(b'id: 99\ndata: {"run_id": "fl')  # torn in the middle of a message

    serve_events(site, events, stream)
    with client_of(site) as client:
        seen = [event.seq for event in client.follow(RUN)]
    assert seen == list(range(1, 61))


def test_following_takes_up_after_what_was_seen(site):
    events = history(9)

    def stream(request, after):
        request.begin_stream()
        for event in events[after:]:
            request.event(event)

    serve_events(site, events, stream)
    with client_of(site) as client:
        assert [event.seq for event in client.follow(RUN, after=6)] == [7, 8, 9]
        assert list(client.follow(RUN, after=9)) == []


def test_following_an_unknown_run_is_an_error_at_once(site):
    site.handler = lambda request: request.answer({"error": NotFound("no run").to_wire()}, 404)
    with client_of(site) as client, pytest.raises(NotFound):
        next(client.follow(RUN))


def test_following_gives_up_when_the_server_stays_away(site):
    calls = []
    site.handler = lambda request: None
    with (
        client_of(site, recover=lambda: calls.append(1)) as client,
        pytest.raises(FlashError, match="can't reach"),
    ):
        list(client.follow(RUN, patience_s=0.3))
    assert calls, "the way to bring the server back was never tried"
