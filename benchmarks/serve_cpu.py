"""Serving `flash/nano` on a CPU: an engine host of Flash beside `transformers serve`, under the same load.

Both sides answer the same streamed completions (greedy, the same prompts, the same tokens) with the same number
of threads, each in its own process and environment, in alternating pairs. Then what each can do with 1, 8 and 32
adapters of that base in one load, and how much sooner a long prompt answers when its prefix is known. One
command: `python benchmarks/run.py serve_cpu`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import torch
from benchmarks.measure import ROOT, Spread, ensure_peers, write_result
from transformers import AutoTokenizer

import flash.catalog
from flash.artifacts.manifests import manifest_key, write_checkpoint
from flash.artifacts.store import Store
from flash.inference.loading import load_base
from flash.inference.lora import save_adapter
from flash.serving.hello import ADAPTER_HEADER, MANIFEST_HEADER, EngineHello, adapter_digest

NANO = Path(flash.catalog.__file__).parent / "nano"
ROWS = ROOT.parent / "examples" / "arithmetic" / "dataset" / "train.jsonl"
PAIRS = 3
JOB: dict[str, Any] = {
    "threads": 2, "requests": 64, "at_once": 16, "prompt_tokens": 96, "max_tokens": 48, "lora_rank": 16,
    "adapters": [1, 8, 32], "long_prompt": 3600, "long_shared": 3500,
}  # fmt: skip
TOKEN = "benchmark"


@dataclass(frozen=True)
class Ask:
    """One request: its text, the model's name, and what else goes into the headers."""

    text: str
    model: str
    headers: dict[str, str]


@dataclass(frozen=True)
class Heard:
    """One streamed answer: when its pieces came, in seconds from the start of the load."""

    began: float
    pieces: list[float]
    text: str


# --- the load -----------------------------------------------------------------------------------------------


async def load(url: str, asks: Sequence[Ask], *, at_once: int, max_tokens: int) -> tuple[list[Heard], float]:
    """Sends every request, `at_once` at a time; the answers, and the seconds from first to last."""
    gate = asyncio.Semaphore(at_once)
    started = time.perf_counter()
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(base_url=url, timeout=600, headers=headers, trust_env=False) as client:

        async def one(ask: Ask) -> Heard:
            async with gate:
                began, pieces, text = time.perf_counter() - started, [], ""
                body = {"model": ask.model, "prompt": ask.text, "max_tokens": max_tokens, "temperature": 0.0,
                        "stream": True}  # fmt: skip
                async with client.stream("POST", "/v1/completions", json=body, headers=ask.headers) as answer:
                    if answer.status_code != 200:
                        raise SystemExit(f"error: {url} answered {answer.status_code}: {await answer.aread()!r:.500}")
                    async for line in answer.aiter_lines():
                        if not line.startswith("data: {"):
                            continue
                        choices = json.loads(line[6:]).get("choices") or [{}]
                        piece = choices[0].get("text") or ""
                        if piece:
                            pieces.append(time.perf_counter() - started)
                            text += piece
                return Heard(began, pieces, text)

        heard = await asyncio.gather(*(one(ask) for ask in asks))
    return list(heard), time.perf_counter() - started


def measured(url: str, asks: Sequence[Ask], tokenizer: Any) -> dict[str, float]:
    """Tokens a second over all, and the medians of the times to the first token and between tokens, in seconds."""
    heard, seconds = asyncio.run(load(url, asks, at_once=JOB["at_once"], max_tokens=JOB["max_tokens"]))
    tokens = sum(len(tokenizer(each.text, add_special_tokens=False)["input_ids"]) for each in heard)
    spoke = [each for each in heard if each.pieces]
    return {
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "first_token_s": statistics.median(each.pieces[0] - each.began for each in spoke),
        "between_tokens_s": statistics.median(
            (each.pieces[-1] - each.pieces[0]) / (len(each.pieces) - 1) for each in spoke if len(each.pieces) > 1
        ),
    }


def first_token(url: str, ask: Ask) -> float:
    (heard,), _ = asyncio.run(load(url, [ask], at_once=1, max_tokens=1))
    return heard.pieces[0] - heard.began


# --- the two sides --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ended_with_us(command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("FLASH_", "PYTHON"))}
    return kept | {"OMP_NUM_THREADS": str(JOB["threads"]), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@contextlib.contextmanager
def flash_host(folder: Path) -> Iterator[str]:
    """An engine host as the control plane starts it; the plane here only says that it is wanted."""
    ready: list[str] = []

    class Plane(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            beat = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if beat["state"] == "ready":
                ready.append(beat["url"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"desired": "serve"}')

        def log_message(self, *_: Any) -> None: ...

    plane = ThreadingHTTPServer(("127.0.0.1", 0), Plane)
    threading.Thread(target=plane.serve_forever, daemon=True).start()
    hello = EngineHello(
        engine_id="benchmark", plane_url=f"http://127.0.0.1:{plane.server_port}", token=TOKEN, model="flash/nano",
        source=str(NANO), device="cpu", work_dir=str(folder / "work"), store_url=(folder / "store").as_uri(),
        cache_dir=str(folder / "cache"), heartbeat_s=0.5, lease_s=600, idle_s=0, max_rows=64, max_waiting=256,
        cache_bytes=256 << 20, max_adapters=40, threads=JOB["threads"],
    )  # fmt: skip
    command = [sys.executable, "-P", "-m", "flash.serving.host"]
    with (folder / "host.log").open("wb") as log, ended_with_us(
        command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment()
    ) as process:
        assert process.stdin is not None
        process.stdin.write(hello.model_copy().model_dump_json().encode() + b"\n")
        process.stdin.close()
        wait_for(lambda: bool(ready), process, folder / "host.log")
        yield ready[0]
    plane.shutdown()


@contextlib.contextmanager
def transformers_serve(python: Path, folder: Path, *, batching: bool) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [str(python.parent / "transformers"), "serve", "--host", "127.0.0.1", "--port", str(port),
               "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    if batching:
        command.append("--continuous-batching")
    with (folder / "peer.log").open("wb") as log, ended_with_us(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment()
    ) as process:

        def up() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200
            return False

        wait_for(up, process, folder / "peer.log")
        yield url


def wait_for(condition: Any, process: subprocess.Popen[bytes], log: Path, limit_s: float = 180) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        if process.poll() is not None or time.monotonic() > until:
            raise SystemExit(f"error: the server does not serve\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.1)


# --- prompts and adapters ---------------------------------------------------------------------------------------


def texts(tokenizer: Any, count: int, tokens: int) -> list[str]:
    """Different prompts of about `tokens` tokens, from the arithmetic example's rows."""
    rows = [json.loads(line)["input"] for line in ROWS.read_text().splitlines()]
    found = []
    for number in range(count):
        words, place = "", number * 7
        while len(tokenizer(words, add_special_tokens=False)["input_ids"]) < tokens:
            words += rows[place % len(rows)] + "\n"
            place += 1
        found.append(words)
    return found


def make_adapters(folder: Path) -> tuple[list[Path], list[dict[str, str]]]:
    """Random adapters: their PEFT folders, and the headers that name each of them to our host."""
    base, store = load_base(NANO), Store((folder / "store").as_uri())
    folders, headers = [], []
    for number in range(max(JOB["adapters"])):
        adapter = base.adapters.create("made", rank=JOB["lora_rank"], alpha=32, seed=number)
        generator = torch.Generator().manual_seed(number)
        for pair in adapter.pairs.values():
            pair.B.data = torch.randn(pair.B.shape, generator=generator) * 0.02
        place = folder / f"adapter-{number}"
        save_adapter(adapter, place / "adapter", base_model=str(NANO))
        manifest, _ = write_checkpoint(store, "flash-1700000000-0000abcd", number + 1, place, False, {})
        folders.append(place / "adapter")
        headers.append({
            ADAPTER_HEADER: adapter_digest(manifest),
            MANIFEST_HEADER: manifest_key("flash-1700000000-0000abcd", number + 1),
        })  # fmt: skip
    return folders, headers


# --- the benchmark ----------------------------------------------------------------------------------------------


def our_side(folder: Path, prompts: list[str], headers: list[dict[str, str]], tokenizer: Any) -> dict[str, Any]:
    with flash_host(folder) as url:
        for named in ({}, *headers):  # warm: every adapter is there
            measured(url, [Ask("Two and two", "flash/nano", named)] * 2, tokenizer)
        found: dict[str, Any] = {"base": measured(url, [Ask(text, "flash/nano", {}) for text in prompts], tokenizer)}
        for count in JOB["adapters"]:
            asks = [Ask(f"{count}: {text}", "flash/nano", headers[i % count]) for i, text in enumerate(prompts)]
            found[f"adapters_{count}"] = measured(url, asks, tokenizer)
        shared, *ends = long_prompts(tokenizer)
        cold = [first_token(url, Ask(f"{i} {shared}{end}", "flash/nano", {})) for i, end in enumerate(ends)]
        first_token(url, Ask(shared, "flash/nano", {}))
        hits = [first_token(url, Ask(shared + end, "flash/nano", {})) for end in ends]
        found["prefix"] = {"cold_s": statistics.median(cold), "hit_s": statistics.median(hits)}
        return found


def long_prompts(tokenizer: Any) -> list[str]:
    (shared,) = texts(tokenizer, 1, JOB["long_shared"])
    return [shared, *texts(tokenizer, 5, JOB["long_prompt"] - JOB["long_shared"])]


def their_side(
    python: Path, folder: Path, prompts: list[str], adapters: list[Path], tokenizer: Any, *, batching: bool
) -> dict[str, Any]:
    with transformers_serve(python, folder, batching=batching) as url:
        measured(url, [Ask("Two and two", str(NANO), {})] * 2, tokenizer)
        return {"base": measured(url, [Ask(text, str(NANO), {}) for text in prompts], tokenizer)}


def main() -> None:
    python = ensure_peers()
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    prompts = texts(tokenizer, JOB["requests"], JOB["prompt_tokens"])
    ours, theirs = [], {True: [], False: []}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        adapters, headers = make_adapters(folder)
        for number in range(PAIRS):
            ours.append(our_side(folder, prompts, headers, tokenizer))
            for batching in (True, False):
                theirs[batching].append(their_side(python, folder, prompts, adapters, tokenizer, batching=batching))
            speeds = [run[-1]["base"]["tokens_per_s"] for run in (ours, theirs[True], theirs[False])]
            print(f"  pair {number + 1}, tokens/s: flash {speeds[0]:.0f}, transformers serve {speeds[1]:.0f} with "
                  f"continuous batching, {speeds[2]:.0f} without", file=sys.stderr)  # fmt: skip
    report(ours, theirs)


def report(ours: list[dict[str, Any]], theirs: dict[bool, list[dict[str, Any]]]) -> None:
    # the peer at its best settings here: the faster of its two ways, by throughput
    best = max(theirs, key=lambda way: statistics.median(run["base"]["tokens_per_s"] for run in theirs[way]))
    peer = theirs[best]

    def spread(runs: list[dict[str, Any]], *path: str) -> dict[str, float]:
        return vars(Spread.of([run[path[0]][path[1]] for run in runs]))

    def ratio(*path: str) -> Spread:
        return Spread.of([a[path[0]][path[1]] / b[path[0]][path[1]] for a, b in zip(ours, peer, strict=True)])

    names = ("tokens_per_s", "first_token_s", "between_tokens_s")
    ratios = {name: ratio("base", name) for name in names}
    many, one = f"adapters_{JOB['adapters'][-1]}", f"adapters_{JOB['adapters'][0]}"
    keeps = Spread.of([run[many]["tokens_per_s"] / run[one]["tokens_per_s"] for run in ours])
    sooner = Spread.of([run["prefix"]["cold_s"] / run["prefix"]["hit_s"] for run in ours])
    path = write_result("serve_cpu", {
        "job": {**JOB, "model": "flash/nano", "precision": "fp32"}, "pairs": PAIRS,
        "flash": {part: {name: spread(ours, part, name) for name in ours[0][part]} for part in ours[0]},
        "transformers_serve": {
            "settings": "--continuous-batching" if best else "without continuous batching",
            "base": {name: spread(peer, "base", name) for name in peer[0]["base"]},
        },
        "ratio": {name: vars(value) for name, value in ratios.items()},
        "many_adapters_keep": vars(keeps), "prefix_hit_sooner": vars(sooner),
    })  # fmt: skip
    print(f"Serving flash/nano, CPU fp32, {JOB['threads']} threads: {JOB['requests']} streamed completions of "
          f"{JOB['max_tokens']} tokens, {JOB['at_once']} at once")  # fmt: skip
    for name in names:
        print(f"  {name:17} flash {Spread(**spread(ours, 'base', name))}   transformers serve "
              f"{Spread(**spread(peer, 'base', name))}   ratio {ratios[name]}")  # fmt: skip
    for count in JOB["adapters"]:
        speed = Spread(**spread(ours, f"adapters_{count}", "tokens_per_s"))
        print(f"  {count:2} adapters       flash {speed} tokens/s")
    print(f"  {JOB['adapters'][-1]} adapters keep {keeps} of one's throughput (goal at least 0.85)")
    print(f"  a known prefix ({JOB['long_shared']} of {JOB['long_prompt']} tokens) answers {sooner} x sooner (goal 5)")
    print(f"  written to {path.relative_to(ROOT.parent)}")


if __name__ == "__main__":
    main()
