"""The engine host: a process that holds one base and serves its adapters over HTTP, on loopback or on the address
that it is told.

`python -P -m flash.serving.host` reads one line of JSON, an `EngineHello`, from standard input. It owns the order
of things: beat, load the base, serve, drain, end. What is served and how is `app`'s; when to end is `link`'s.

Exit status: 0 drained (asked to, or idle) · 1 the base can't be loaded · 2 the start line is unusable ·
3 no longer wanted · 4 the plane can't be reached.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import uvicorn
from pydantic import ValidationError

from flash.artifacts.signed import SignedStore
from flash.artifacts.store import Objects, Store
from flash.catalog.catalog import load_catalog
from flash.errors import FlashError, InternalError
from flash.inference.engine import ServingEngine
from flash.serving.adapters import AdapterFiles, AdapterShelf
from flash.serving.answering import Served
from flash.serving.app import Room, create_app
from flash.serving.hello import EngineHello
from flash.serving.link import Link, Vitals

log = logging.getLogger("flash.serving")
DRAINED, FAILED, UNUSABLE = 0, 1, 2
_FLUSH_S = 10  # for the last bytes to a client that reads on, after its answer is complete


Load = Callable[[EngineHello], tuple[Served, ServingEngine]]


def main() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        hello = EngineHello.model_validate_json(sys.stdin.buffer.readline(1 << 20))
    except ValidationError as error:
        named = ", ".join(".".join(map(str, problem["loc"])) or problem["msg"] for problem in error.errors())
        print(f"the start line must be an EngineHello as JSON: {named}", file=sys.stderr)
        sys.exit(UNUSABLE)
    _end(asyncio.run(run(hello, load)))


async def run(hello: EngineHello, load: Load) -> int:
    """From the first heartbeat to the last; the exit status."""
    Path(hello.work_dir).mkdir(parents=True, exist_ok=True, mode=0o700)
    loop = asyncio.get_running_loop()
    draining = asyncio.Event()

    def drain() -> None:
        loop.call_soon_threadsafe(draining.set)

    link = Link(hello, on_drain=drain, on_lost=_lost)
    link.start()
    try:
        served, engine = await loop.run_in_executor(ThreadPoolExecutor(1, "load"), load, hello)
    except Exception as error:
        failed = error if isinstance(error, FlashError) else _defect(error)
        log.error("%s could not be loaded: %s", hello.model, failed, exc_info=error)
        link.end("failed", failed)
        return FAILED
    await _serve(hello, served, engine, link, draining)
    await loop.run_in_executor(None, engine.close)
    link.end("leaving")
    return DRAINED


def load(hello: EngineHello) -> tuple[Served, ServingEngine]:
    """The base on its device, and the engine over it."""
    return _load_built_in(hello) if hello.vllm_python is None else _load_vllm(hello, hello.vllm_python)


def _load_vllm(hello: EngineHello, python: str) -> tuple[Served, ServingEngine]:
    from flash.inference.loading import describe
    from flash.inference.vllm_engine import VllmEngine, VllmSettings

    about = describe(hello.source, name=hello.model, revision=hello.revision)
    settings = VllmSettings(
        python=Path(python),
        model=about.folder,
        dtype="float32" if hello.device == "cpu" else "bfloat16",
        context_length=about.context_length,
        vocabulary=about.vocabulary,
        max_rows=hello.max_rows,
        max_waiting=hello.max_waiting,
        max_adapters=hello.max_adapters,
        max_rank=_rank_cap(hello.model),
        cache_bytes=hello.cache_bytes,
    )
    engine = VllmEngine(settings, work_dir=Path(hello.work_dir))
    served = Served(
        model=hello.model,
        revision=about.revision,
        tokenizer=about.tokenizer,
        stop_ids=about.stop_ids,
        context_length=about.context_length,
        vocabulary_size=about.vocabulary,
    )
    return served, engine


def _rank_cap(model: str) -> int:
    """The largest rank that runs on this model may have: every adapter of theirs must fit."""
    catalog = load_catalog()
    return catalog.get(model).rank_cap if model in catalog else max(entry.rank_cap for entry in catalog)


def _load_built_in(hello: EngineHello) -> tuple[Served, ServingEngine]:
    import torch  # seconds; the first heartbeat doesn't wait for it

    from flash.inference.continuous import ContinuousEngine
    from flash.inference.lanes import share_cpus
    from flash.inference.loading import load_checked

    base, fallback = load_checked(hello.source, name=hello.model, revision=hello.revision, device=hello.device)
    if fallback is not None:
        log.warning(fallback)
    # a small model's products are too short to share among cores, and the loop of this process wants one too
    base = dataclasses.replace(base, lanes=share_cpus(base.model, hello.threads or torch.get_num_threads()))
    engine = ContinuousEngine(
        base,
        max_rows=hello.max_rows,
        max_waiting=hello.max_waiting,
        prefix_bytes=hello.cache_bytes,
        max_device_adapters=hello.max_adapters,
    )
    served = Served(
        model=hello.model,
        revision=base.revision,
        tokenizer=base.tokenizer,
        stop_ids=base.stop_ids,
        context_length=base.context_length,
        vocabulary_size=int(base.head.shape[0]),
    )
    return served, engine


async def _serve(
    hello: EngineHello, served: Served, engine: ServingEngine, link: Link, draining: asyncio.Event
) -> None:
    """Until it is asked to drain and nothing is in flight any more."""
    files = AdapterFiles(_open_store(hello, link), Path(hello.cache_dir), most_bytes=hello.adapter_disk_bytes)
    shelf = AdapterShelf(engine, files, room=max(hello.max_adapters, hello.max_loaded_adapters))
    room = Room(hello, served, engine, shelf)
    config = uvicorn.Config(
        create_app(room),
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_keep_alive=60,
        timeout_graceful_shutdown=_FLUSH_S,
    )
    server = uvicorn.Server(config)
    listening = socket.create_server((hello.bind, 0), family=_family(hello.bind))
    # asyncio sees to this only for sockets made otherwise; without it each piece of a stream waits for an ACK, 40 ms
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    shown = f"[{hello.bind}]" if ":" in hello.bind else hello.bind
    url = f"http://{shown}:{listening.getsockname()[1]}"
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    # over uvicorn's own handler, which would close the door on requests in flight
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, draining.set)
    link.ready(url, lambda: Vitals(room.stats(), room.traffic.idle_s, room.traffic.in_flight))
    log.info("%s is served at %s", hello.model, url)
    await draining.wait()
    room.draining = True
    link.leaving()
    log.info("leaving: %d requests are in flight", room.traffic.in_flight)
    await room.traffic.empty.wait()
    server.should_exit = True
    await serving


def _open_store(hello: EngineHello, link: Link) -> Objects:
    if not hello.signed:
        return Store(hello.store_url, hello.store_options)
    return SignedStore(lambda _, keys: link.addresses(keys))  # only ever to read by


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _lost(status: int, reason: str) -> None:
    log.error("ending: %s", reason)
    _end(status)


def _end(status: int) -> None:
    """At once: whatever still runs here runs for no one."""
    logging.shutdown()
    os._exit(status)


def _defect(error: Exception) -> FlashError:
    detail = "".join(traceback.format_exception(error))
    return InternalError(f"loading failed: {type(error).__name__}: {error}", detail=detail)


if __name__ == "__main__":
    main()
