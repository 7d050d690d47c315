"""Too many requests, clients that leave, readers that dawdle, adapters without room: the others are served."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager

import httpx
import openai
import pytest
from tests.serving.sites import TOKEN, made_up_adapter

CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
LONG = "all work and no play " * 40


def until(condition, *, most_s: float = 60.0) -> None:
    deadline = time.monotonic() + most_s
    while not condition():
        assert time.monotonic() < deadline, "this never came about"
        time.sleep(0.02)


def at_rest(site) -> bool:
    stats = site.engine.stats()
    return site.room.traffic.in_flight == stats["running"] == stats["waiting"] == 0


@contextmanager
def unread(site, body, *, buffer: int = 4096):
    """A connection that has sent a request and reads nothing by itself."""
    address = httpx.URL(site.url)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.connect((address.host, address.port))
        content = json.dumps(body).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        connection.sendall(head.encode() + content)
        yield connection


# --- too many ---------------------------------------------------------------------------------------------


def test_three_hundred_at_once(scripted):
    site = scripted(LONG, max_rows=4, max_waiting=12, max_running=4, step_seconds=0.001)

    async def ask_all() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(base_url=site.url, headers=headers, timeout=110, limits=limits) as client:
            return await asyncio.gather(*(client.post(CHAT, json={**BODY, "max_tokens": 40}) for _ in range(300)))

    answers = asyncio.run(ask_all())
    counts = Counter(answer.status_code for answer in answers)
    assert set(counts) == {200, 429}
    assert counts[200] >= 16
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        else:
            assert answer.json()["usage"]["completion_tokens"] == 40
    until(lambda: at_rest(site))
    assert site.sums()["flash_engine_requests_total"] >= 300


def test_a_patient_client_gets_through(scripted):
    site = scripted("ok", max_rows=1, max_waiting=1, max_running=1, step_seconds=0.01)
    client = site.openai(max_retries=20)
    done = []

    def ask() -> None:
        done.append(client.chat.completions.create(**BODY).choices[0].message.content)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == ["ok"] * 6


def test_prompts_of_one_request_stay_or_go_together(scripted):
    site = scripted(LONG, max_rows=2, max_waiting=2, max_running=1, step_seconds=0.001)
    body = {"model": "m", "max_tokens": 1000, "temperature": 0}
    error = site.refused("/v1/completions", {**body, "prompt": ["a"] * 9}, 400)
    assert "at most 4" in error["message"]
    with pytest.raises(openai.RateLimitError):
        site.openai().completions.create(prompt=["a"] * 4, **body)
    until(lambda: at_rest(site))


# --- clients that leave -----------------------------------------------------------------------------------


def test_leaving_a_stream_cancels_it(scripted):
    site = scripted(LONG, step_seconds=0.01)
    stream = site.openai().chat.completions.create(**BODY, stream=True, n=3)
    next(iter(stream))
    assert site.engine.stats()["running"] == 1
    stream.close()
    until(lambda: at_rest(site))
    assert site.sums()["flash_engine_cancelled_total"] == 1


def test_leaving_before_the_answer_cancels_it(scripted):
    site = scripted(LONG, step_seconds=0.05)
    with pytest.raises(httpx.ReadTimeout):
        site.http.post(CHAT, json=BODY, timeout=0.5)
    until(lambda: at_rest(site))
    assert len(site.engine.requests) <= 1
    assert site.http.post(CHAT, json={**BODY, "max_tokens": 1}).status_code == 200


def test_leaving_the_queue_cancels_it(scripted):
    site = scripted(LONG, step_seconds=0.01, max_running=1)
    first = site.openai().chat.completions.create(**BODY, stream=True)
    next(iter(first))
    with unread(site, {**BODY, "stream": True}):
        until(lambda: site.engine.stats()["waiting"] == 1)
    until(lambda: site.engine.stats()["waiting"] == 0)
    first.close()
    until(lambda: at_rest(site))


# --- readers that dawdle ----------------------------------------------------------------------------------

WORDY = {**BODY, "stream": True, "logprobs": True, "top_logprobs": 20, "n": 8}  # about 20 KB a step


def test_a_slow_reader_is_cancelled_and_told(scripted):
    site = scripted(LONG * 4, step_seconds=0.001, unread_tokens=8_000)
    with unread(site, WORDY) as connection:
        until(lambda: site.engine.stats()["tokens_total"] > 0)
        until(lambda: site.engine.stats()["running"] == 0)
        assert site.http.post(CHAT, json={**BODY, "max_tokens": 3}).status_code == 200, "the others go on"
        connection.settimeout(60)
        received = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert b"[DONE]" not in received
    error = json.loads(received.rpartition(b"data: ")[2].partition(b"\n")[0])
    assert error["error"]["code"] == "slow_reader"
    until(lambda: at_rest(site))


def test_a_reader_that_takes_nothing_is_dropped(scripted):
    site = scripted(LONG * 4, step_seconds=0.001, stalled_s=0.5)
    with unread(site, WORDY):
        until(lambda: site.sums().get("flash_engine_cancelled_total") == 1)
        until(lambda: at_rest(site))


# --- adapters ---------------------------------------------------------------------------------------------


def ask(site, adapter, **more):
    answer = site.http.post(CHAT, json={**BODY, "max_tokens": 2, **more}, headers=adapter.headers)
    assert answer.status_code == 200, answer.text


def test_the_least_recently_used_adapter_makes_place(scripted, tmp_path):
    site = scripted("ok", max_adapters=2)
    one, two, three = (made_up_adapter(site.store, tmp_path, step) for step in (1, 2, 3))
    for adapter in (one, two, one, three):
        ask(site, adapter)
    until(lambda: len(site.engine.adapters) == 3)  # with the engine's own
    assert {one.digest, three.digest} < set(site.engine.adapters)
    ask(site, two)
    assert site.sums()["flash_engine_adapter_loads_total"] == 4
    assert site.sums()["flash_engine_adapter_evictions_total"] == 2
    assert [request.adapter for request in site.engine.requests] == [
        each.digest for each in (one, two, one, three, two)
    ]


def test_an_adapter_in_use_keeps_its_place(scripted, tmp_path):
    site = scripted(LONG, max_adapters=2, step_seconds=0.005)
    busy, *others = (made_up_adapter(site.store, tmp_path, step) for step in range(5))
    stream = site.openai(busy.headers).chat.completions.create(**BODY, stream=True)
    next(iter(stream))
    for adapter in others:
        ask(site, adapter)
    assert busy.digest in site.engine.adapters
    second = site.openai(others[0].headers).chat.completions.create(**BODY, stream=True)
    next(iter(second))
    late = threading.Thread(target=ask, args=[site, others[1]])
    late.start()
    time.sleep(0.2)
    assert late.is_alive(), "both places are taken"
    stream.close()
    late.join()
    second.close()
    assert busy.digest not in site.engine.adapters


def test_one_load_serves_all_who_wait_for_it(scripted, tmp_path):
    site = scripted("ok")
    adapter = made_up_adapter(site.store, tmp_path, 1)
    threads = [threading.Thread(target=ask, args=[site, adapter]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert site.sums()["flash_engine_adapter_loads_total"] == 1


def test_a_body_that_is_too_large(scripted):
    site = scripted("ok")
    try:
        answer = site.http.post(CHAT, content=b'{"model": "m", "messages": "' + b"x" * (33 << 20) + b'"}')
    except httpx.TransportError:
        pass  # the answer came, and the connection went, while it was still sending
    else:
        assert answer.status_code == 413
        assert "33,554,432" in answer.json()["error"]["message"]
    until(lambda: at_rest(site))
