"""The scripted engine keeps the promises of the protocol that real engines keep."""

from __future__ import annotations

import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from flash.errors import Busy, InvalidInput, ModelError, Unavailable
from flash.inference.engine import (
    Completion,
    Engine,
    Failed,
    Prefilled,
    Request,
    Sampled,
    Sampling,
    Scored,
    ServingEngine,
)
from flash.inference.scripted_engine import ScriptedEngine


def letters(request: Request, sample: int) -> list[int]:
    return list(f"{len(request.prompt)}{sample}abcdef".encode())


def test_it_ends_completions_by_stops_limits_and_the_scripts_end() -> None:
    engine: Engine = ScriptedEngine(letters, stop_ids=[ord("d")], decode=lambda tokens: bytes(tokens).decode())
    whole, limited, stopped = engine.generate(
        [
            Request((1, 2), Sampling(50), n=2),
            Request((1,), Sampling(3)),
            Request((1,), Sampling(50, stop=("bc",))),
        ]
    )
    assert [bytes(completion.tokens) for completion in whole] == [b"20abcd", b"21abcd"]
    assert (bytes(limited[0].tokens), limited[0].finish_reason) == (b"10a", "length")
    assert (bytes(stopped[0].tokens), stopped[0].finish_reason) == (b"10abc", "stop")
    assert whole[0].logprobs == (-1.0,) * 6 and whole[0].finish_reason == "stop"


def test_streaming_and_generating_agree() -> None:
    engine = ScriptedEngine(letters)
    request = Request((1,), Sampling(4), n=2)
    deltas = list(engine.stream([request]))
    for sample, completion in enumerate(engine.generate([request])[0]):
        own = [delta for delta in deltas if delta.sample == sample]
        streamed = Completion(
            tuple(d.token for d in own), tuple(d.logprob for d in own), own[-1].finish_reason or "cancelled"
        )
        assert streamed == completion


def test_it_refuses_cancels_and_remembers() -> None:
    engine = ScriptedEngine(letters)
    with pytest.raises(InvalidInput):
        engine.generate([Request((), Sampling(4))])
    with pytest.raises(ModelError):
        engine.generate([Request((1,), Sampling(4), adapter="other")])
    engine.load_adapter("other", Path("anywhere"))
    asked = Request((1,), Sampling(4), adapter="other")
    assert engine.generate([asked], watch=lambda: True)[0][0].finish_reason == "cancelled"
    assert engine.requests == [asked]
    engine.unload_adapter("other")
    assert set(engine.adapters) == {"policy"}


def test_serving_tells_each_sample_token_by_token() -> None:
    engine: ServingEngine = ScriptedEngine(letters, stop_ids=[ord("b")])
    news: SimpleQueue[Any] = SimpleQueue()
    asked = Request((5, 6, 7), Sampling(9, top_logprobs=2), n=2, prompt_logprobs=True)
    engine.submit(asked, news.put)
    first = news.get(timeout=20)
    assert first == Prefilled(0, (Scored(6, -1.0, ((6, -1.0), (7, -2.0))), Scored(7, -1.0, ((7, -1.0), (8, -2.0)))))
    sampled = [news.get(timeout=20) for _ in range(8)]
    for k in (0, 1):
        own = [piece for piece in sampled if piece.sample == k]
        assert bytes(piece.scored.token for piece in own) == f"3{k}ab".encode()
        assert [piece.finish_reason for piece in own] == [None, None, None, "stop"]
    engine.submit(Request((5, 6, 7), Sampling(0), prompt_logprobs=True), news.put)
    assert len(news.get(timeout=20).prompt) == 2
    engine.close()
    assert engine.stats()["tokens_total"] == 8 and news.empty()


def test_serving_counts_prefixes_within_an_adapter_and_scope() -> None:
    engine = ScriptedEngine(letters)
    news: SimpleQueue[Any] = SimpleQueue()

    def cached(prompt: tuple[int, ...], scope: str = "a", adapter: str | None = None) -> int:
        engine.submit(Request(prompt, Sampling(1), adapter=adapter, cache_scope=scope), news.put)
        hit: int = news.get(timeout=20).cached_tokens
        assert isinstance(news.get(timeout=20), Sampled)
        return hit

    assert [cached((1, 2, 3, 4)), cached((1, 2, 3, 4)), cached((1, 2, 9, 9, 9))] == [0, 3, 2]
    assert [cached((1, 2, 3, 4), scope="b"), cached((1, 2, 3, 4), adapter="policy")] == [0, 0]
    engine.close()


def test_serving_is_bounded_and_lets_go() -> None:
    engine = ScriptedEngine(lambda request, sample: [1] * 1000, step_seconds=0.01, max_running=1, max_waiting=1)
    news: SimpleQueue[Any] = SimpleQueue()
    running = engine.submit(Request((1,), Sampling(1000), adapter="policy"), news.put)
    assert isinstance(news.get(timeout=20), Prefilled)
    waiting = engine.submit(Request((2,), Sampling(1000)), news.put)
    with pytest.raises(Busy):
        engine.submit(Request((3,), Sampling(1)), news.put)
    unloading = threading.Thread(target=engine.unload_adapter, args=("policy",))
    unloading.start()
    unloading.join(timeout=0.05)
    assert unloading.is_alive()
    running.cancel()
    unloading.join(timeout=20)
    assert not unloading.is_alive()
    while not isinstance(news.get(timeout=20), Prefilled):
        pass  # the last of the cancelled one, then the other's turn
    engine.close()
    with pytest.raises(Unavailable):
        engine.submit(Request((3,), Sampling(1)), news.put)
    waiting.cancel()
    last = None
    while not news.empty():
        last = news.get()
    assert isinstance(last, Failed) and isinstance(last.error, Unavailable)
