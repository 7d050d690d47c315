"""vLLM behind the serving protocol: a process of its own on loopback, in a virtual environment of its own.

vLLM's pins on torch, transformers and FastAPI exclude ours, so nothing of it is imported here. Owns the process,
what adapters it has, and the way from a `Request` to its HTTP API and back: token ids in, token ids and
log-probabilities out. It is loaded by us alone: its port is on loopback and wants a key that only this process
knows. Knows no templates, and no HTTP but vLLM's.

Two things differ from `ContinuousEngine`: a seed draws from vLLM's own streams, and vLLM tells of a prefix hit
only at the end, so `Prefilled.cached_tokens` is 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from flash.errors import Busy, FlashError, InternalError, InvalidInput, ModelError, Unavailable
from flash.inference.engine import Failed, Prefilled, Request, Sampled, Scored, Sink, Ticket
from flash.inference.vllm_adapters import room_for, served_form

_BASE = "base"  # what vLLM calls the bare model
_MOST_LOGPROBS = 20
# vLLM must not outlive us, however we end: its parent kills the whole group once our end of its standard input closes.
_WATCH = """
import os, signal, subprocess, sys, threading

child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)

def end_with_the_host():
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)

threading.Thread(target=end_with_the_host, daemon=True).start()
sys.exit(child.wait())
"""


@dataclass(frozen=True)
class VllmSettings:
    """How vLLM is started. Times are seconds, sizes bytes."""

    python: Path               # of the virtual environment that vLLM lives in
    model: Path                # a folder
    dtype: str                 # "float32", "bfloat16"
    context_length: int        # tokens
    vocabulary: int            # token ids are below this
    max_rows: int = 64         # samples decoding at once
    max_waiting: int = 256     # requests beyond those that decode
    max_adapters: int = 8
    max_rank: int = 64
    cache_bytes: int = 1 << 30     # for keys and values, on a CPU
    memory_share: float = 0.9      # of a GPU's memory
    start_s: float = 900.0
    stop_s: float = 10.0
    options: tuple[str, ...] = ()  # more of vLLM's own command line

    def command(self, port: int) -> list[str]:
        named = {
            "--model": str(self.model),
            "--served-model-name": _BASE,
            "--host": "127.0.0.1",
            "--port": str(port),
            "--dtype": self.dtype,
            "--max-model-len": str(self.context_length),
            "--max-num-seqs": str(self.max_rows),
            "--max-loras": str(self.max_adapters),
            "--max-lora-rank": str(room_for(self.max_rank)),
            "--max-logprobs": str(_MOST_LOGPROBS),
            "--gpu-memory-utilization": str(self.memory_share),
            "--structured-outputs-config.backend": "guidance",
        }
        flags = [part for pair in named.items() for part in pair]
        return [str(self.python), "-m", "vllm.entrypoints.openai.api_server", *flags, "--enable-lora", *self.options]

    def environment(self, key: str) -> dict[str, str]:
        """Ours, with vLLM's key and without anything that it should not have."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        for name in ("FREESOLO_API_KEY", "WANDB_API_KEY", "GITHUB_TOKEN", "HF_TOKEN"):
            kept.pop(name, None)
        return {
            **kept,
            "VLLM_API_KEY": key,
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, self.cache_bytes >> 30)),  # GiB
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }


@dataclass(eq=False)
class _Asked:
    """A request under way; it is its own ticket."""

    engine: VllmEngine
    request: Request
    sink: Sink
    task: asyncio.Task[None] | None = None
    over: bool = field(default=False)

    def cancel(self) -> None:
        self.engine.cancel(self)


class VllmEngine:
    """A `ServingEngine` on a vLLM process, which starts with it and ends with it."""

    def __init__(self, settings: VllmSettings, *, work_dir: Path) -> None:
        """Returns once vLLM serves. Its output goes to `work_dir/vllm.log`. Raises Unavailable when it does not
        start in time or ends while it starts, with the end of its log."""
        self._settings = settings
        self._key = secrets.token_hex(32)
        self._adapters: dict[str, Path] = {}  # the folder that vLLM has read, and may read again
        self._copies = work_dir / "vllm-adapters"
        self._asked: set[_Asked] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._totals = {"requests_total": 0, "prompt_tokens_total": 0, "tokens_total": 0}
        self._log_path = work_dir / "vllm.log"
        port = _free_port()
        self._process = self._start(port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        self._client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Authorization": f"Bearer {self._key}"},
            timeout=httpx.Timeout(10.0, read=None),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )
        try:
            self._wait_until_it_serves()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    # --- the protocol -------------------------------------------------------------------------------------

    def load_adapter(self, name: str, folder: Path) -> None:
        served = served_form(folder, self._settings.model, self._copies)
        body = {"lora_name": name, "lora_path": str(served), "load_inplace": name in self._adapters}
        try:
            self._post("/v1/load_lora_adapter", body)
        except FlashError:
            self._remove_copy(served)
            raise
        self._remove_copy(self._adapters.get(name))
        self._adapters[name] = served

    def unload_adapter(self, name: str) -> None:
        """Waits for the requests in flight on it."""
        while True:
            with self._lock:
                if not any(asked.request.adapter == name for asked in self._asked):
                    break
            time.sleep(0.01)
        if name in self._adapters:
            served = self._adapters.pop(name)
            self._post("/v1/unload_lora_adapter", {"lora_name": name})
            self._remove_copy(served)

    def submit(self, request: Request, sink: Sink) -> Ticket:
        self._check(request)
        asked = _Asked(self, request, sink)
        with self._lock:
            if self._closed:
                raise Unavailable("the engine is closed")
            if len(self._asked) >= self._settings.max_rows + self._settings.max_waiting:
                raise Busy(f"{len(self._asked)} requests are under way or waiting, as many as this engine takes")
            self._asked.add(asked)
            self._totals["requests_total"] += 1
            self._totals["prompt_tokens_total"] += len(request.prompt)
        self._loop.call_soon_threadsafe(self._open, asked)
        return asked

    def cancel(self, asked: _Asked) -> None:
        asked.over = True

        def stop() -> None:
            if asked.task is not None:
                asked.task.cancel()  # closes the connection, on which vLLM drops the request

        with contextlib.suppress(RuntimeError):  # the loop is closed: everything is over
            self._loop.call_soon_threadsafe(stop)

    def stats(self) -> dict[str, float]:
        with self._lock:
            running = len(self._asked)
            return {"running": float(running), "adapters": float(len(self._adapters)), **self._totals}

    def close(self) -> None:
        with self._lock:
            self._closed = True
            pending = list(self._asked)
        for asked in pending:
            self._fail(asked, Unavailable("the engine is closing"))
            self.cancel(asked)
        _end(self._process, self._settings.stop_s)
        shutil.rmtree(self._copies, ignore_errors=True)
        with contextlib.suppress(RuntimeError):
            asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result(5)
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    # --- one request --------------------------------------------------------------------------------------

    def _check(self, request: Request) -> None:
        size, most = len(request.prompt), request.sampling.max_tokens
        if not size:
            raise InvalidInput("the prompt has no tokens")
        if request.n < 1 or most < 0 or (most == 0 and not request.prompt_logprobs):
            raise InvalidInput(f"max_tokens = {most}, n = {request.n}: must be at least 1")
        if not all(0 <= token < self._settings.vocabulary for token in request.prompt):
            raise InvalidInput(f"the prompt has token ids outside 0 to {self._settings.vocabulary - 1}")
        if size + most > self._settings.context_length:
            raise InvalidInput(
                f"a prompt of {size} tokens and max_tokens = {most} exceed the {self._settings.context_length} tokens "
                "of the context",
                remedy=f"shorten the prompt, or lower max_tokens to {max(self._settings.context_length - size, 0)}",
            )
        if request.adapter is not None and request.adapter not in self._adapters:
            raise ModelError(f"no adapter named {request.adapter!r} is loaded")

    def _open(self, asked: _Asked) -> None:
        asked.task = self._loop.create_task(self._serve(asked))
        asked.task.add_done_callback(lambda _: self._forget(asked))

    def _forget(self, asked: _Asked) -> None:
        with self._lock:
            self._asked.discard(asked)

    async def _serve(self, asked: _Asked) -> None:
        try:
            if asked.request.prompt_logprobs:
                await self._whole(asked)
            else:
                await self._streamed(asked)
        except FlashError as error:
            self._fail(asked, error)
        except httpx.HTTPError as error:
            self._fail(asked, Unavailable(f"vLLM can't be reached: {error}"))
        except (KeyError, ValueError, TypeError, IndexError) as error:
            self._fail(asked, InternalError(f"vLLM's answer is not understood: {error!r}"))

    async def _streamed(self, asked: _Asked) -> None:
        opened = False
        body = {**self._body(asked.request), "stream": True}
        async with self._client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise _refusal(answer.status_code, await answer.aread())
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise InternalError(f"vLLM failed: {chunk['error'].get('message', chunk['error'])}")
                for choice in chunk["choices"]:
                    if not opened:
                        self._tell(asked, Prefilled(0))
                        opened = True
                    self._tell_choice(asked, choice)

    async def _whole(self, asked: _Asked) -> None:
        """With the prompt's log-probabilities, which vLLM does not stream."""
        body = {**self._body(asked.request), "prompt_logprobs": asked.request.sampling.top_logprobs}
        body["max_tokens"] = max(1, body["max_tokens"])
        answer = await self._client.post("/v1/completions", json=body)
        if answer.status_code != 200:
            raise _refusal(answer.status_code, answer.content)
        choices = answer.json()["choices"]
        self._tell(asked, Prefilled(0, _prompt_scores(asked.request, choices[0]["prompt_logprobs"])))
        for choice in choices if asked.request.sampling.max_tokens else ():
            self._tell_choice(asked, choice)

    def _body(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": request.adapter or _BASE,
            "prompt": list(request.prompt),
            "n": request.n,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed % (1 << 63),
            "stop": list(sampling.stop),
            "include_stop_str_in_output": True,
            "logprobs": min(sampling.top_logprobs, _MOST_LOGPROBS),
            "return_tokens_as_token_ids": True,
            "return_token_ids": True,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
        }
        if request.cache_scope:
            body["cache_salt"] = request.cache_scope
        if sampling.grammar is not None:
            body["structured_outputs"] = _structured(sampling.grammar)
        return body

    def _tell_choice(self, asked: _Asked, choice: dict[str, Any]) -> None:
        tokens: Sequence[int] = choice["token_ids"] or ()
        scores = choice["logprobs"] or {"token_logprobs": [], "top_logprobs": []}
        for place, token in enumerate(tokens):
            top = scores["top_logprobs"][place] or {}
            ranked = sorted(((_token_id(name), value) for name, value in top.items()), key=lambda pair: -pair[1])
            scored = Scored(
                token, float(scores["token_logprobs"][place]), tuple(ranked[: asked.request.sampling.top_logprobs])
            )
            last = place == len(tokens) - 1
            self._tell(asked, Sampled(choice["index"], scored, choice["finish_reason"] if last else None))
        self._totals["tokens_total"] += len(tokens)

    def _tell(self, asked: _Asked, news: Prefilled | Sampled | Failed) -> None:
        if not asked.over:
            asked.sink(news)

    def _fail(self, asked: _Asked, error: FlashError) -> None:
        if not asked.over:
            asked.over = True
            asked.sink(Failed(error))

    def _remove_copy(self, folder: Path | None) -> None:
        if folder is not None and folder.parent == self._copies:
            shutil.rmtree(folder, ignore_errors=True)

    # --- the process --------------------------------------------------------------------------------------

    def _start(self, port: int) -> subprocess.Popen[bytes]:
        if not self._settings.python.is_file():
            raise Unavailable(
                f"vLLM is not at {self._settings.python}", remedy="install it with `flash engine install vllm`"
            )
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._log_path.open("ab") as log:
                return subprocess.Popen(
                    [sys.executable, "-P", "-c", _WATCH, *self._settings.command(port)],
                    stdin=subprocess.PIPE, stdout=log, stderr=log,
                    env=self._settings.environment(self._key),
                    start_new_session=True,  # it has children: they are ended together
                )  # fmt: skip
        except OSError as error:
            raise Unavailable(f"vLLM can't be started: {error.strerror}") from error

    def _wait_until_it_serves(self) -> None:
        until = time.monotonic() + self._settings.start_s
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise Unavailable("vLLM ended while it started", detail=self._end_of_log())
            with contextlib.suppress(httpx.HTTPError):
                if self._await(self._client.get("/health", timeout=5.0)).status_code == 200:
                    return
            time.sleep(0.2)
        raise Unavailable(f"vLLM does not serve after {self._settings.start_s:g} s", detail=self._end_of_log())

    def _post(self, path: str, body: dict[str, Any]) -> None:
        try:
            answer = self._await(self._client.post(path, json=body))
        except httpx.HTTPError as error:
            raise Unavailable(f"vLLM can't be reached: {error}") from error
        if answer.status_code != 200:
            raise ModelError(f"vLLM refuses the adapter: {_refusal(answer.status_code, answer.content).message}")

    def _await(self, work: Coroutine[Any, Any, httpx.Response]) -> httpx.Response:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end_of_log(self) -> str:
        with contextlib.suppress(OSError):
            return self._log_path.read_text(errors="replace")[-4000:]
        return ""


def _prompt_scores(request: Request, found: list[dict[str, Any] | None]) -> tuple[Scored, ...]:
    scores = []
    for token, ranked in zip(request.prompt[1:], found[1:], strict=True):
        assert ranked is not None
        by_id = {int(name): float(entry["logprob"]) for name, entry in ranked.items()}
        top = sorted(by_id.items(), key=lambda pair: -pair[1])[: request.sampling.top_logprobs]
        scores.append(Scored(token, by_id[token], tuple(top)))
    return tuple(scores)


def _structured(grammar: str) -> dict[str, Any]:
    """What `structured` made, as vLLM takes it: it compiles schemas and grammars by itself."""
    [rule] = json.loads(grammar)["grammars"]
    return {"json": rule["json_schema"]} if rule.get("json_schema") is not None else {"grammar": rule["lark_grammar"]}


def _token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def _refusal(status: int, body: bytes) -> FlashError:
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = body.decode(errors="replace")[:300]
    return InvalidInput(message) if 400 <= status < 500 else InternalError(f"vLLM failed ({status}): {message}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """The process and its children: asked first, then killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # children that outlived it
