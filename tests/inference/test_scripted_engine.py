"""The scripted engine keeps the promises of the protocol that real engines keep."""

from __future__ import annotations

from pathlib import Path

import pytest

from flash.errors import InvalidInput, ModelError
from flash.inference.engine import Completion, Engine, Request, Sampling
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
