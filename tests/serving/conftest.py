"""A scripted engine behind the real HTTP application, and a real one in its own process; see `sites`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serving.sites import Host, Plane, Scripted, hello, process, put_adapter, running
from transformers import AutoTokenizer

from flash.artifacts.store import Store
from flash.catalog.catalog import load_catalog
from flash.inference.loading import load_base
from flash.inference.lora import save_adapter
from flash.inference.scripted_engine import ScriptedEngine
from flash.serving.adapters import AdapterFiles, AdapterShelf
from flash.serving.answering import Served
from flash.serving.app import Room, create_app


@pytest.fixture(scope="session")
def nano() -> Any:
    return AutoTokenizer.from_pretrained(load_catalog().get("flash/nano").source)


@pytest.fixture
def scripted(tmp_path, nano):
    """`scripted(text_or_texts, ...)` serves an engine whose sample i says text i, then ends its turn.

    Keyword arguments that ScriptedEngine knows go there, the others into the hello.
    """
    with_exits: list[Any] = []
    engine_options = {"step_seconds", "max_running", "context_length"}

    def start(says: str | list[str] | Callable[..., Any], *, end: bool = True, **options: Any) -> Scripted:
        texts = [says] if isinstance(says, str) else says
        stop_id = nano.convert_tokens_to_ids("<|im_end|>")

        def script(request: Any, sample: int) -> list[int]:
            text = texts(request, sample) if callable(texts) else texts[sample % len(texts)]
            return [*nano(text, add_special_tokens=False)["input_ids"], *([stop_id] if end else [])]

        told = hello(tmp_path, **{name: value for name, value in options.items() if name not in engine_options})
        engine = ScriptedEngine(
            script,
            stop_ids=[stop_id],
            decode=nano.decode,
            max_waiting=told.max_waiting,
            **{name: value for name, value in options.items() if name in engine_options},
        )
        store = Store(told.store_url)
        files = AdapterFiles(store, Path(told.cache_dir), most_bytes=told.adapter_disk_bytes)
        served = Served(
            model=told.model, revision="abc", tokenizer=nano, stop_ids=(stop_id,),
            context_length=options.get("context_length", 4096), vocabulary_size=640,
        )  # fmt: skip
        rooms: list[Room] = []

        def app() -> Any:
            rooms.append(Room(told, served, engine, AdapterShelf(engine, files, room=told.max_adapters)))
            return create_app(rooms[0])

        context = running(app)
        site = Scripted(context.__enter__(), rooms[0], engine, store, nano)
        with_exits.append((context, site))
        return site

    yield start
    for context, site in with_exits:
        site.http.close()
        site.engine.close()
        context.__exit__(None, None, None)


@pytest.fixture
def plane():
    made = Plane()
    yield made
    made.close()


@pytest.fixture(scope="module")
def base():
    told = hello(Path("/nowhere"))
    return load_base(told.source, name=told.model, device="cpu")


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Six adapters with weights of their own, in the store; folder by name beside them."""
    folder = tmp_path_factory.mktemp("serving")
    store = Store(hello(folder).store_url)
    generator = torch.Generator().manual_seed(3)
    stored = []
    for number in range(6):
        adapter = base.adapters.create(f"a{number}", rank=4 + number, alpha=16, seed=number)
        for pair in adapter.pairs.values():
            pair.B.data.copy_(0.2 * torch.randn(pair.B.shape, generator=generator))
        place = folder / f"step-{number}"
        save_adapter(adapter, place / "adapter", base_model="flash/nano")
        stored.append(put_adapter(store, place, number))
    return folder, stored


@pytest.fixture(scope="module")
def host(adapters):
    folder, _ = adapters
    plane = Plane()
    told = hello(folder, plane_url=plane.url, max_adapters=2, max_loaded_adapters=3, max_rows=32, max_waiting=64)
    with process(told) as started:
        url = plane.wait_for(lambda beat: beat["state"] == "ready")["url"]
        yield Host(url, plane, started)
    plane.close()
