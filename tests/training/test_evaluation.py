"""Base against adapter, with a scripted engine for what each says and the environment's own reward."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flash.inference.chat import ChatRenderer
from flash.inference.engine import Completion, Request
from flash.inference.torch_engine import TorchEngine
from flash.records import Phase
from flash.training.evaluation import evaluate
from flash.training.reporter import RecordingReporter
from flash.training.sft import train


class Parrot:
    """An engine whose adapter knows every sum and whose base says nothing but 0."""

    def __init__(self, base) -> None:
        self.tokenizer = base.tokenizer
        self.loaded: list[str] = []
        self.requests: list[Request] = []

    def load_adapter(self, name: str, folder: Path) -> None:
        self.loaded.append(name)

    def unload_adapter(self, name: str) -> None:
        self.loaded.remove(name)

    def generate(self, requests):
        self.requests.extend(requests)
        return [[self.completion(request)] for request in requests]

    def completion(self, request: Request) -> Completion:
        question = self.tokenizer.decode(request.prompt).split("What is ")[1].split("?")[0].removesuffix(" please")
        a, b = question.replace(" please", "").split("+")
        text = str(int(a) + int(b)) if request.adapter in self.loaded else "0"
        tokens = (*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id)
        return Completion(tokens, (0.0,) * len(tokens), "stop")

    def close(self) -> None: ...


def check(spec, base, engine, environment, tmp_path):
    reporter = RecordingReporter()
    return evaluate(spec, base, engine, environment, reporter, tmp_path, step=6), reporter


def test_both_are_scored_by_the_environment(spec, base, make_environment, tmp_path) -> None:
    environment = make_environment("sums", rows=3, eval_rows=5)
    engine = Parrot(base)
    report, reporter = check(spec(), base, engine, environment, tmp_path)
    assert (report.base, report.adapter, report.n) == (0.0, 1.0, 5)
    assert reporter.of("evaluation") == [{"report": report}]
    assert reporter.of("phase")[0]["phase"] == Phase.EVALUATING
    assert engine.loaded == []
    assert {request.sampling.temperature for request in engine.requests} == {0.0}
    sample = reporter.of("sample")[0]["sample"]
    assert sample["adapter_reward"] == 1.0 and sample["base"] == "0"


def test_at_most_200_rows_are_asked(spec, base, make_environment, tmp_path) -> None:
    report, _ = check(spec(), base, Parrot(base), make_environment("many", rows=1, eval_rows=230), tmp_path)
    assert report.n == 200


def test_without_an_eval_split_there_is_nothing_to_compare(spec, base, make_environment, tmp_path) -> None:
    report, reporter = check(spec(), base, Parrot(base), make_environment("plain", rows=3), tmp_path)
    assert report is None and reporter.reports == []


def test_rows_that_can_not_be_scored_are_left_out_and_said(spec, base, make_environment, tmp_path) -> None:
    environment = make_environment("faulty", rows=3, eval_rows=4, broken_eval_rows=2)
    report, reporter = check(spec(), base, Parrot(base), environment, tmp_path)
    assert (report.adapter, report.n) == (1.0, 2)
    (warning,) = reporter.of("warning")
    assert "2 of 4 held-out rows" in warning["text"] and "no reward for this row" in warning["text"]


def test_a_failure_is_a_warning(spec, base, make_environment, tmp_path) -> None:
    all_broken = make_environment("broken", rows=3, eval_rows=2, broken_eval_rows=2)
    report, reporter = check(spec(), base, Parrot(base), all_broken, tmp_path)
    assert report is None and "no held-out row could be scored" in reporter.of("warning")[-1]["text"]

    report, reporter = check(
        spec(), base, TorchEngine(base), make_environment("fine", rows=3, eval_rows=2), tmp_path / "no-adapter"
    )
    assert report is None and "could not be compared" in reporter.of("warning")[0]["text"]


def test_a_trained_adapter_is_played_by_the_real_engine(spec, base, make_environment, tmp_path) -> None:
    """The held-out rows equal the training rows here: after enough steps the adapter knows them by heart."""
    rows = [json.dumps({"input": f"say {letter}", "output": letter}) for letter in "ab"]
    environment = make_environment("letters", lines=rows, eval_lines=rows)
    settings = spec(lora_rank=8, lora_alpha=16, epochs=60, batch_size=2, learning_rate=2e-2)
    result = train(settings, base, environment, RecordingReporter(), work_dir=tmp_path)
    report, _ = check(settings, base, TorchEngine(base), environment, result.checkpoint / "adapter")
    assert (report.base, report.adapter, report.n) == (0.0, 1.0, 2)


def test_the_answer_and_not_the_trace_is_scored(spec, base, make_environment, tmp_path) -> None:
    class Thinker(Parrot):
        def completion(self, request: Request) -> Completion:
            plain = super().completion(request)
            trace = tuple(self.tokenizer("<think>\nsum\n</think>\n\n")["input_ids"])
            return Completion(trace + plain.tokens, (0.0,) * (len(trace) + len(plain.tokens)), "stop")

    environment = make_environment("traces", rows=3, eval_rows=2)
    report, _ = check(spec(thinking=True), base, Thinker(base), environment, tmp_path)
    assert report.adapter == 1.0


@pytest.mark.parametrize("thinking", [False, True])
def test_prompts_are_the_rendered_opening(thinking: bool, spec, base, make_environment, tmp_path) -> None:
    engine = Parrot(base)
    check(spec(thinking=thinking), base, engine, make_environment("prompts", rows=1, eval_rows=1), tmp_path)
    prompt = ChatRenderer(base.tokenizer, thinking=thinking).render_prompt(
        [{"role": "user", "content": "What is 100+10000?"}]
    )
    assert {request.prompt for request in engine.requests} == {tuple(prompt)}
