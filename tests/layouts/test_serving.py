"""Every layout served: adapters of one base together in the engine, and a trained run behind the HTTP API."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.layouts.proofs import proves
from tests.layouts.runs import Run, sft_spec
from tests.serving.sites import Site, hello, put_adapter, running
from transformers import AutoModelForCausalLM

from flash.artifacts.store import Store
from flash.inference.chat import ChatRenderer
from flash.inference.continuous import ContinuousEngine
from flash.inference.engine import Failed, Prefilled, Request, Sampled, Sampling
from flash.inference.loading import BaseModel
from flash.inference.lora import save_adapter
from flash.serving.adapters import AdapterFiles, AdapterShelf
from flash.serving.answering import Served
from flash.serving.app import Room, create_app

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [40, 41, 42], list(range(60, 140))]


@pytest.fixture
def engine(base: BaseModel) -> Iterator[ContinuousEngine]:
    engine = ContinuousEngine(base)
    yield engine
    engine.close()


@pytest.fixture
def adapters(base: BaseModel, tmp_path: Path) -> dict[str | None, Path | None]:
    """The bare base, and two adapters of different ranks."""
    folders: dict[str | None, Path | None] = {None: None}
    for number, rank in enumerate((4, 8)):
        adapter = base.adapters.create("made", rank=rank, alpha=16, seed=number)
        generator = torch.Generator().manual_seed(number)
        for pair in adapter.pairs.values():
            pair.B.data.normal_(std=0.1, generator=generator)
        folders[f"a{number}"] = tmp_path / f"a{number}"
        save_adapter(adapter, tmp_path / f"a{number}", base_model=base.name)
        base.adapters.remove("made")
    return folders


@pytest.fixture
def reference(folder: Path) -> Callable[[Path | None], Any]:
    """PEFT's model with the adapter in a folder, or transformers' own."""

    def load(adapter: Path | None) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()

    return load


def finished(heard: queue.SimpleQueue[Any], samples: int) -> list[Sampled]:
    found: list[Sampled] = []
    while sum(news.finish_reason is not None for news in found) < samples:
        news = heard.get(timeout=60)
        if isinstance(news, Failed):
            raise news.error
        if not isinstance(news, Prefilled):
            found.append(news)
    return found


@proves("serve")
def test_requests_of_several_adapters_at_once_get_pefts_tokens(
    engine: ContinuousEngine, adapters: dict[str | None, Path | None], reference: Callable[[Path | None], Any]
) -> None:
    for name, folder in adapters.items():
        if name is not None and folder is not None:
            engine.load_adapter(name, folder)
    greedy = Sampling(max_tokens=10, temperature=0.0)
    asked: list[tuple[str | None, list[int], queue.SimpleQueue[Any]]] = []
    for prompt in PROMPTS:
        for name in adapters:
            heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
            engine.submit(Request(tuple(prompt), greedy, adapter=name), heard.put)
            asked.append((name, prompt, heard))
    models = {name: reference(folder) for name, folder in adapters.items()}
    said = set()
    for name, prompt, heard in asked:
        news = finished(heard, 1)
        tokens = [each.scored.token for each in news]
        with torch.no_grad():
            rows = models[name](torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for each, row in zip(news, rows, strict=True):
            assert row.max() - row[each.scored.token] < 1e-4  # the likeliest token, or one as likely
            assert each.scored.logprob == pytest.approx(float(row[each.scored.token]), abs=1e-4)
        said.add((tuple(prompt), tuple(tokens)))
    assert len(said) > len(PROMPTS)  # the adapters change what is said


@pytest.fixture
def site(
    base: BaseModel, engine: ContinuousEngine, train: Run, tmp_path: Path
) -> Iterator[tuple[Site, dict[str, str], Path]]:
    """A trained adapter behind the API: the site, the headers that name the adapter, and its folder."""
    result, _ = train(sft_spec(base.name, epochs=8))
    assert result.checkpoint is not None
    told = hello(tmp_path, model=base.name)
    store = Store(told.store_url)
    stored = put_adapter(store, result.checkpoint, result.step)
    served = Served(
        model=base.name, revision=None, tokenizer=base.tokenizer, stop_ids=base.stop_ids,
        context_length=base.context_length, vocabulary_size=int(base.head.shape[0]),
    )  # fmt: skip

    def app() -> Any:
        files = AdapterFiles(store, Path(told.cache_dir), most_bytes=told.adapter_disk_bytes)
        return create_app(Room(told, served, engine, AdapterShelf(engine, files, room=4)))

    with running(app) as url:
        site = Site(url)
        yield site, stored.headers, result.checkpoint / "adapter"
        site.http.close()


@proves("serve")
def test_a_trained_run_chats_as_peft_would_and_the_base_stays_itself(
    base: BaseModel, site: tuple[Site, dict[str, str], Path], reference: Callable[[Path | None], Any]
) -> None:
    client, headers, adapter = site
    messages = [{"role": "system", "content": "Sums."}, {"role": "user", "content": "3+3???"}]
    body = {"model": base.name, "messages": messages, "temperature": 0, "max_tokens": 8}
    renderer = ChatRenderer(base.tokenizer)
    answers = {}
    for folder in (None, adapter):
        answer = client.http.post("/v1/chat/completions", json=body, headers=headers if folder else None)
        assert answer.status_code == 200, answer.text
        answers[folder] = answer.json()["choices"][0]["message"]["content"]
        assert answers[folder] == greedy_text(base, reference(folder), renderer.render_prompt(messages), 8)
        assert answer.json()["usage"]["prompt_tokens"] == len(renderer.render_prompt(messages))
    assert answers[None] != answers[adapter]


@proves("serve", "thinking")
def test_a_reasoning_trace_is_told_apart_where_it_is_asked_for(
    base: BaseModel, site: tuple[Site, dict[str, str], Path], reference: Callable[[Path | None], Any]
) -> None:
    client, headers, adapter = site
    messages = [{"role": "user", "content": "5+5?"}]
    body = {
        "model": base.name, "messages": messages, "temperature": 0, "max_tokens": 6,
        "chat_template_kwargs": {"enable_thinking": True},
    }  # fmt: skip
    answer = client.http.post("/v1/chat/completions", json=body, headers=headers).json()["choices"][0]["message"]
    renderer = ChatRenderer(base.tokenizer, thinking=True)
    text = greedy_text(base, reference(adapter), renderer.render_prompt(messages), 6)
    thinking, said = renderer.split_thinking(text)
    assert (answer.get("reasoning_content") or "").strip("\n") == thinking
    assert (answer["content"] or "").strip("\n") == said.strip("\n")


def greedy_text(base: BaseModel, model: Any, prompt: list[int], most: int) -> str:
    tokens: list[int] = []
    while len(tokens) < most and (not tokens or tokens[-1] not in base.stop_ids):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([prompt + tokens])).logits[0, -1].argmax()))
    return ChatRenderer(base.tokenizer).answer_text(tokens, base.stop_ids)
