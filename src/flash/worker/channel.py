"""Frames between an attempt's processes: one line of JSON each, over a socket.

Owns framing, calls and their replies, and what happens at the end of the stream. Knows no method by name
and keeps no process alive: who is on the other side is its owner's business (`docs/architecture.md` lists
the frames).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import struct
import threading
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from flash.errors import FlashError, InternalError, from_wire

MAX_FRAME_BYTES = 64 << 20

Frame = dict[str, Any]
CallHandler = Callable[[str, dict[str, Any], float | None], Any]


class ChannelClosed(FlashError):
    """The process on the other side is gone, or stopped reading."""

    code = "channel_closed"
    status = 503


@dataclass(frozen=True)
class Call:
    """A call on its way: the frame's id and the future of its result."""

    id: int
    result: Future[Any]


class Channel:
    """One end of a connection: sends frames, makes calls and, with `on_call`, answers them.

    `on_call(method, params, timeout_s)` runs on threads of the channel's own, so that calls overlap; what it
    returns or raises becomes the reply. `on_frame` gets every other frame on the receiving thread and must not
    block; without `on_call` it gets calls too. `on_close` runs once, after every waiting call has failed.
    All methods are safe from several threads.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        on_call: CallHandler | None = None,
        on_frame: Callable[[Frame], None] | None = None,
        on_close: Callable[[], None] | None = None,
        send_timeout_s: float | None = None,
        workers: int = 64,
    ) -> None:
        self._sock = sock
        self._on_call = on_call
        self._on_frame = on_frame
        self._on_close = on_close
        self._send_lock = threading.Lock()
        self._calls: dict[int, Future[Any]] = {}
        self._calls_lock = threading.Lock()
        self._ids = itertools.count(1)
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="channel-call") if on_call else None
        self._receiver = threading.Thread(target=self._receive, name="channel-receive", daemon=True)
        if send_timeout_s is not None:  # a peer that has stopped reading must not hold a sender for ever
            seconds = int(send_timeout_s)
            limit = struct.pack("ll", seconds, int((send_timeout_s - seconds) * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def start(self) -> Channel:
        """Begins to receive; separate from construction so that handlers may refer to the channel."""
        self._receiver.start()
        return self

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def wait_closed(self, timeout_s: float | None = None) -> bool:
        return self._closed.wait(timeout_s)

    def send(self, frame: Mapping[str, Any]) -> None:
        """Raises ChannelClosed when the other side is gone, and InternalError when the frame is too large."""
        line = json.dumps(frame, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        if len(line) > MAX_FRAME_BYTES:
            raise InternalError(f"a {frame.get('type')} frame of {len(line):,} bytes: at most {MAX_FRAME_BYTES:,} fit")
        if self.closed:
            raise ChannelClosed("the process on the other side is gone")
        try:
            with self._send_lock:
                self._sock.sendall(line)
        except OSError as error:
            self.close()  # part of a frame may be out: nothing that follows could be read
            raise ChannelClosed(f"the process on the other side is gone: {error}") from None

    def begin(self, method: str, params: Mapping[str, Any], *, timeout_s: float | None = None) -> Call:
        """Sends a call; its future gets the result, the error that the reply describes, or ChannelClosed."""
        call = Call(next(self._ids), Future())
        with self._calls_lock:
            self._calls[call.id] = call.result
        try:
            self.send({"type": "call", "id": call.id, "method": method, "params": params, "timeout_s": timeout_s})
        except BaseException:
            with self._calls_lock:
                self._calls.pop(call.id, None)
            raise
        if self.closed:  # closed between the registration and the sweep in close()
            self._fail_calls()
        return call

    def call(self, method: str, params: Mapping[str, Any], *, timeout_s: float | None = None) -> Any:
        """A call and its result. `timeout_s` goes along for the other side to enforce."""
        return self.begin(method, params, timeout_s=timeout_s).result.result()

    def reply(self, call_id: int, result: Any) -> None:
        self.send({"type": "reply", "id": call_id, "result": result})

    def reply_error(self, call_id: int, error: FlashError) -> None:
        self.send({"type": "reply", "id": call_id, "error": error.to_wire()})

    def close(self) -> None:
        """Ends the connection for both sides; waiting calls fail with ChannelClosed. Idempotent."""
        with self._calls_lock:
            if self._closed.is_set():
                return
            self._closed.set()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes both sides' receivers; close() alone would not
        if threading.current_thread() is not self._receiver and not self._receiver.is_alive():
            self._finish()  # never started, or already gone: nobody else will

    # --- the receiving side ---

    def _receive(self) -> None:
        try:
            with self._sock.makefile("rb", buffering=1 << 16) as stream:
                while line := stream.readline(MAX_FRAME_BYTES + 1):
                    if not line.endswith(b"\n"):
                        break  # the end of the stream in mid-frame, or a frame beyond the limit
                    frame = json.loads(line)
                    if not isinstance(frame, dict):
                        break
                    self._dispatch(frame)
        except (OSError, ValueError):
            pass  # a broken stream ends the connection; whoever waits learns it below
        finally:
            self.close()
            self._finish()

    def _dispatch(self, frame: Frame) -> None:
        kind = frame.get("type")
        if kind == "reply":
            self._settle(frame)
        elif kind == "call" and self._pool is not None:
            self._pool.submit(self._answer, frame)
        elif self._on_frame is not None:
            self._on_frame(frame)

    def _settle(self, frame: Frame) -> None:
        with self._calls_lock:
            future = self._calls.pop(frame["id"], None)
        if future is None:
            return
        try:
            if frame.get("error") is not None:
                future.set_exception(from_wire(frame["error"]))
            else:
                future.set_result(frame.get("result"))
        except InvalidStateError:
            pass  # its caller gave up

    def _answer(self, frame: Frame) -> None:
        assert self._on_call is not None
        try:
            try:
                result = self._on_call(frame["method"], frame.get("params") or {}, frame.get("timeout_s"))
                self.reply(frame["id"], result)
            except ChannelClosed:
                raise
            except FlashError as error:
                self.reply_error(frame["id"], error)
            except Exception as error:
                self.reply_error(
                    frame["id"],
                    InternalError(
                        f"{frame['method']} failed: {type(error).__name__}: {error}",
                        detail=traceback.format_exc(),
                    ),
                )
        except ChannelClosed as error:
            if not self.closed:  # the handler's own channel to a third process, not this one
                self.reply_error(frame["id"], error)

    def _finish(self) -> None:
        self._fail_calls()
        with contextlib.suppress(OSError):
            self._sock.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()

    def _fail_calls(self) -> None:
        with self._calls_lock:
            waiting, self._calls = list(self._calls.values()), {}
        for future in waiting:
            if not future.done():
                future.set_exception(ChannelClosed("the process on the other side is gone"))
