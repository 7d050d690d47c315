"""vLLM as an engine, for real: a tiny model and two adapters through its CPU build, beside PEFT's tokens."""

import queue
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import flash.catalog
from flash.client.engines import InstalledEngine, install_vllm
from flash.errors import InvalidInput, ModelError, Unavailable
from flash.inference.engine import Failed, Prefilled, Request, Sampled, Sampling
from flash.inference.loading import load_base
from flash.inference.lora import save_adapter
from flash.inference.structured import compile_schema
from flash.inference.vllm_engine import VllmEngine, VllmSettings

NANO = Path(flash.catalog.__file__).parent / "nano"
HOME = Path(__file__).parents[2] / ".venv-vllm"  # kept between runs: it takes minutes and gigabytes
PROMPTS = [(5, 6, 7, 8, 9, 10), (40, 41, 42), (100, 7, 200, 9)]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def installed() -> InstalledEngine:
    return install_vllm(HOME, cpu=True)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = load_base(NANO)
    folders = []
    for number in range(2):
        adapter = base.adapters.create(f"a{number}", rank=8, alpha=16, seed=number)
        generator = torch.Generator().manual_seed(number)
        for pair in adapter.pairs.values():
            pair.B.data = torch.randn(pair.B.shape, generator=generator) * 0.05
        folders.append(tmp_path_factory.mktemp("adapters") / f"a{number}")
        save_adapter(adapter, folders[-1], base_model="flash/nano")
    return folders


def settings(python: Path, **changes: Any) -> VllmSettings:
    return VllmSettings(
        python=python, model=NANO, dtype="float32", context_length=512, vocabulary=640, max_rows=8, max_adapters=4,
        **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine(
    installed: InstalledEngine, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmEngine]:
    engine = VllmEngine(settings(installed.python), work_dir=tmp_path_factory.mktemp("vllm"))
    started = psutil.Process(engine.pid).children(recursive=True)
    try:
        for number, folder in enumerate(adapters):
            engine.load_adapter(f"a{number}", folder)
        yield engine
    finally:
        engine.close()
    assert not psutil.wait_procs(started, timeout=20)[1]  # nothing stays behind


def news_of(engine: VllmEngine, request: Request) -> list[Prefilled | Sampled]:
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
    engine.submit(request, heard.put)
    found: list[Prefilled | Sampled] = []
    ended = 0 if request.sampling.max_tokens else request.n
    while not found or ended < request.n:
        news = heard.get(timeout=300)
        if isinstance(news, Failed):
            raise news.error
        found.append(news)
        ended += isinstance(news, Sampled) and news.finish_reason is not None
    return found


def tokens_of(news: list[Prefilled | Sampled], sample: int = 0) -> list[int]:
    return [each.scored.token for each in news if isinstance(each, Sampled) and each.sample == sample]


def peft_logprobs(folder: Path | None, tokens: list[int]) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32).eval()
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)


def test_greedy_tokens_of_two_adapters_and_the_base_are_pefts(engine: VllmEngine, adapters: list[Path]) -> None:
    answers = set()
    for prompt in PROMPTS:
        for name, folder in ((None, None), ("a0", adapters[0]), ("a1", adapters[1])):
            sampling = Sampling(max_tokens=12, temperature=0.0, top_logprobs=2)
            news = news_of(engine, Request(prompt, sampling, adapter=name))
            assert news[0] == Prefilled(0)
            drawn = tokens_of(news)
            answers.add((prompt, tuple(drawn)))
            expected = peft_logprobs(folder, [*prompt, *drawn])
            for place, each in enumerate(news[1:]):
                assert isinstance(each, Sampled)
                row = expected[len(prompt) - 1 + place]
                best = row.topk(2).values
                assert each.scored.token == row.argmax() or best[0] - best[1] < 1e-4
                assert each.scored.logprob == pytest.approx(row[each.scored.token].item(), abs=2e-3)
                assert len(each.scored.top) == 2
    assert len(answers) > len(PROMPTS)  # the adapters change what is said


def test_samples_limits_stops_and_prompt_scores(engine: VllmEngine) -> None:
    news = news_of(engine, Request(PROMPTS[0], Sampling(max_tokens=5, temperature=1.0, seed=3), n=3, adapter="a0"))
    assert all(1 <= len(tokens_of(news, sample)) <= 5 for sample in range(3))
    again = news_of(engine, Request(PROMPTS[0], Sampling(max_tokens=5, temperature=1.0, seed=3), n=3, adapter="a0"))
    assert [tokens_of(news, sample) for sample in range(3)] == [tokens_of(again, sample) for sample in range(3)]
    sampling = Sampling(max_tokens=0, temperature=0.0, top_logprobs=1)
    (only,) = news_of(engine, Request(PROMPTS[0], sampling, prompt_logprobs=True))
    assert isinstance(only, Prefilled) and only.prompt is not None
    expected = peft_logprobs(None, list(PROMPTS[0]))
    assert [each.token for each in only.prompt] == list(PROMPTS[0][1:])
    for place, each in enumerate(only.prompt):
        assert each.logprob == pytest.approx(expected[place, each.token].item(), abs=2e-3)
        assert len(each.top) == 1


def test_a_schema_binds_what_is_drawn(engine: VllmEngine) -> None:
    base = load_base(NANO)
    grammar = compile_schema({"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
                              "additionalProperties": False})  # fmt: skip
    news = news_of(engine, Request(PROMPTS[1], Sampling(max_tokens=40, temperature=0.0, grammar=grammar)))
    text = base.tokenizer.decode(tokens_of(news), skip_special_tokens=True)
    assert text in ('{"a":1}', '{"a":2}', '{"a": 1}', '{"a": 2}')


def test_what_can_not_be_served_is_refused_in_one_line(engine: VllmEngine) -> None:
    with pytest.raises(ModelError, match="no adapter named 'zz'"):
        engine.submit(Request((1,), Sampling(max_tokens=1), adapter="zz"), print)
    with pytest.raises(InvalidInput, match="exceed the 512 tokens"):
        engine.submit(Request((1,) * 500, Sampling(max_tokens=100)), print)
    with pytest.raises(ModelError, match="vLLM refuses the adapter"):
        engine.load_adapter("broken", Path("/nonexistent"))


def test_an_unloaded_adapter_is_gone_and_one_loaded_again_is_new(engine: VllmEngine, adapters: list[Path]) -> None:
    request = Request(PROMPTS[0], Sampling(max_tokens=8, temperature=0.0), adapter="swapped")
    engine.load_adapter("swapped", adapters[0])
    first = tokens_of(news_of(engine, request))
    engine.load_adapter("swapped", adapters[1])
    second = tokens_of(news_of(engine, request))
    direct = [tokens_of(news_of(engine, replace(request, adapter=name))) for name in ("a0", "a1")]
    assert [first, second] == direct and first != second
    engine.unload_adapter("swapped")
    with pytest.raises(ModelError):
        engine.submit(request, print)


def test_a_cancelled_request_says_no_more(engine: VllmEngine) -> None:
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
    ticket = engine.submit(Request(PROMPTS[0], Sampling(max_tokens=400, temperature=1.0, seed=1)), heard.put)
    heard.get(timeout=300)
    ticket.cancel()
    engine.unload_adapter("none")  # returns: nothing waits for it
    said = 0
    while not heard.empty():
        said += 1
        heard.get()
    news_of(engine, Request(PROMPTS[1], Sampling(max_tokens=2, temperature=0.0)))  # it goes on serving
    assert heard.qsize() <= 1 and said < 400


def test_without_an_installation_it_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="flash engine install vllm"):
        VllmEngine(settings(tmp_path / "no-python"), work_dir=tmp_path)


def test_an_engine_that_ends_while_it_starts_is_told_with_its_log(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho no memory for vllm >&2\nexit 3\n")
    script.chmod(0o755)
    with pytest.raises(Unavailable, match="vLLM ended while it started") as caught:
        VllmEngine(settings(script), work_dir=tmp_path)
    assert "no memory for vllm" in (caught.value.detail or "")


def test_the_key_is_not_in_the_arguments(engine: VllmEngine) -> None:
    ours = psutil.Process(engine.pid)
    shown = [" ".join(each.cmdline()) for each in (ours, *ours.children(recursive=True))]
    assert any("vllm.entrypoints" in line for line in shown)
    assert not any("api-key" in line.lower() or "api_key" in line.lower() for line in shown)
