"""Frames, calls that overlap, errors across the wire, and the end of the stream."""

import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flash.errors import ConfigError, InternalError, UserCodeError
from flash.worker.channel import MAX_FRAME_BYTES, Channel, ChannelClosed

Pair = Callable[..., tuple[Channel, Channel]]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """pair(on_call=..., on_frame=...): a started channel, and a started one that answers by these handlers."""
    opened: list[Channel] = []

    def make(**handlers: Any) -> tuple[Channel, Channel]:
        ours, theirs = socket.socketpair()
        channels = Channel(ours).start(), Channel(theirs, **handlers).start()
        opened.extend(channels)
        return channels

    yield make
    for channel in opened:
        channel.close()


def test_a_call_carries_method_params_and_limit(pair: Pair) -> None:
    asking, _ = pair(on_call=lambda method, params, timeout_s: [method, params, timeout_s])
    assert asking.call("score", {"text": "ünï\n\u2028"}, timeout_s=1.5) == ["score", {"text": "ünï\n\u2028"}, 1.5]


def test_calls_overlap_and_replies_find_their_callers(pair: Pair) -> None:
    together = threading.Barrier(8)

    def answer(method: str, params: dict[str, Any], timeout_s: float | None) -> int:
        together.wait(5)  # passes only when all eight run at once
        time.sleep(0.01 * (8 - params["n"]))
        return params["n"] * 10

    asking, _ = pair(on_call=answer)
    calls = [asking.begin("double", {"n": n}) for n in range(8)]
    assert [call.result.result(5) for call in calls] == [n * 10 for n in range(8)]


@pytest.mark.parametrize(
    "error", [UserCodeError("bad", remedy="mend it", detail="trace"), ConfigError(["a: wrong", "b: wrong"])]
)
def test_errors_keep_their_class_across_the_wire(pair: Pair, error: UserCodeError) -> None:
    def answer(method: str, params: dict[str, Any], timeout_s: float | None) -> None:
        raise error

    asking, _ = pair(on_call=answer)
    with pytest.raises(type(error)) as caught:
        asking.call("x", {})
    assert caught.value.to_wire() == error.to_wire()


def test_a_defect_in_a_handler_is_an_internal_error_with_its_traceback(pair: Pair) -> None:
    asking, _ = pair(on_call=lambda method, params, timeout_s: 1 / 0)
    with pytest.raises(InternalError, match="x failed: ZeroDivisionError") as caught:
        asking.call("x", {})
    assert "1 / 0" in str(caught.value.detail)
    with pytest.raises(InternalError):  # an answer that is no JSON
        pair(on_call=lambda method, params, timeout_s: {1, 2})[0].call("x", {})


def test_other_frames_arrive_in_order(pair: Pair) -> None:
    got: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    sending, _ = pair(on_frame=got.put)
    for n in range(100):
        sending.send({"type": "report", "n": n})
    assert [got.get(timeout=5)["n"] for _ in range(100)] == list(range(100))


def test_frames_of_many_threads_do_not_mix(pair: Pair) -> None:
    got: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    sending, _ = pair(on_frame=got.put)
    texts = [str(n) * 100_000 for n in range(8)]
    threads = [threading.Thread(target=sending.send, args=({"type": "t", "text": text},)) for text in texts]
    for thread in threads:
        thread.start()
    assert sorted(got.get(timeout=5)["text"] for _ in texts) == texts


def test_the_end_of_the_stream_fails_waiting_and_later_calls_once(pair: Pair) -> None:
    closed: queue.SimpleQueue[bool] = queue.SimpleQueue()
    release = threading.Event()
    ours, theirs = socket.socketpair()
    asking = Channel(ours, on_close=lambda: closed.put(True)).start()
    answering = Channel(theirs, on_call=lambda *_: release.wait(5)).start()
    call = asking.begin("wait", {})
    answering.close()
    with pytest.raises(ChannelClosed):
        call.result.result(5)
    with pytest.raises(ChannelClosed):
        asking.call("again", {})
    asking.close()
    release.set()
    assert asking.wait_closed(5)
    assert closed.get(timeout=5)
    assert closed.empty()


@pytest.mark.parametrize("end", [b"", b'{"type": "report"', b"not json\n", b"[1]\n"])
def test_a_stream_that_breaks_off_or_is_no_json_is_closed(end: bytes) -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours).start()
    theirs.sendall(end)
    theirs.close()
    assert channel.wait_closed(5)


def test_a_frame_beyond_the_limit_is_refused_before_it_is_sent(pair: Pair) -> None:
    asking, _ = pair(on_call=lambda *_: "fine")
    with pytest.raises(InternalError, match="at most"):
        asking.call("x", {"text": "a" * MAX_FRAME_BYTES})
    assert asking.call("x", {}) == "fine"


def test_a_peer_that_stopped_reading_does_not_hold_a_sender() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours, send_timeout_s=0.2).start()
    with pytest.raises(ChannelClosed):
        for _ in range(100):
            channel.send({"type": "t", "text": "x" * 1_000_000})
    assert channel.closed
    theirs.close()


def test_a_reply_to_nobody_is_ignored(pair: Pair) -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours, on_call=lambda *_: "fine").start()
    theirs.sendall(b'{"type":"reply","id":99,"result":1}\n{"type":"call","id":1,"method":"m"}\n')
    assert json.loads(theirs.recv(1000))["result"] == "fine"
    channel.close()
    theirs.close()
