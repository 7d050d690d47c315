"""Clients against a deployed run, through the whole service: a trained adapter, the real command, OpenAI's clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from tests.end_to_end.test_walking_path import Machine
from tests.serving.clients import lm_eval, typescript

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Deployed:
    """A trained run that is live on a machine of its own."""

    run_id: str
    base_url: str
    token: str
    adapter: Path  # the engine host's own copy

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.base_url, api_key=self.token, max_retries=0, timeout=120)


def patiently(machine: Machine, *arguments: str) -> None:
    process = machine.begin(*arguments)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said


@pytest.fixture(scope="module")
def deployed(tmp_path_factory) -> Iterator[Deployed]:
    machine = Machine(tmp_path_factory.mktemp("deployed"))
    try:
        machine.flash("env", "push", "--name", "echo", "echo")
        submitted = machine.flash("train", "echo.toml", "--background", "--json", "--set", "train.max_steps=4")
        run_id = json.loads(submitted)["run_id"]
        patiently(machine, "status", run_id, "-f")
        patiently(machine, "deploy", run_id)
        [live] = json.loads(machine.flash("deployments", "--json"))["deployments"]
        token = Path(live["token_file"]).read_text().strip()
        yield Deployed(
            run_id, live["base_url"], token, machine.home / "cache" / "adapters" / live["adapter_sha256"] / "adapter"
        )
    finally:
        machine.flash("server", "stop")
        for process in machine.processes():
            process.kill()


def ask(deployed: Deployed, **more: Any) -> Any:
    messages = [{"role": "user", "content": "What is 12 + 30?"}]
    return deployed.openai().chat.completions.create(
        **{"model": deployed.run_id, "messages": messages, "temperature": 0, "max_tokens": 24, **more}
    )


def test_openais_python_client(deployed):
    whole = ask(deployed)
    assert whole.model == deployed.run_id
    chunks = list(ask(deployed, model=f"{deployed.run_id}/step-4", stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert {deployed.run_id, "flash/nano"} <= {model.id for model in deployed.openai().models.list()}
    with pytest.raises(openai.NotFoundError):
        ask(deployed, model="flash-1700000000-00000000")
    with pytest.raises(openai.BadRequestError) as refused:
        ask(deployed, logit_bias={"5": 1})
    assert refused.value.param == "logit_bias"


def test_openais_typescript_client(deployed):
    seen = typescript(deployed.base_url, deployed.token, deployed.run_id, {})
    own = ask(deployed)
    assert seen["text"] == seen["streamed"] == seen["accumulated"] == own.choices[0].message.content
    assert seen["refused"] == {"status": 400, "code": "context_length_exceeded", "param": "messages"}
    assert list(seen["structured"]) == ["sum"]


def test_lm_eval(deployed, base, tmp_path):
    samples = lm_eval(
        deployed.base_url, deployed.token, deployed.run_id, str(base.tokenizer.name_or_path), tmp_path
    )
    base.adapters.load("deployed", deployed.adapter)
    for sample in samples["sums"]:
        question, choices = sample["doc"]["question"], sample["doc"]["choices"]
        for choice, [[likelihood, greedy]] in zip(choices, sample["resps"], strict=True):
            wanted, likeliest = score(base, question, f" {choice}")
            assert float(likelihood) == pytest.approx(wanted, abs=1e-3)
            assert (str(greedy) == "True") == likeliest
    for sample in samples["writing"]:
        answer = deployed.openai().completions.create(
            model=deployed.run_id, prompt=sample["doc"]["question"], temperature=0, max_tokens=8, stop="\n"
        )
        assert sample["resps"] == [[answer.choices[0].text]]


def score(base, question: str, choice: str) -> tuple[float, bool]:
    """The choice's log-likelihood after the question, and whether it is what greedy decoding says."""
    before = base.tokenizer(question, add_special_tokens=False)["input_ids"]
    tokens = base.tokenizer(question + choice, add_special_tokens=False)["input_ids"]
    with torch.inference_mode(), base.adapters.active("deployed"):
        logprobs = base.model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)[len(before) - 1 : -1]
    wanted = torch.tensor(tokens[len(before) :])
    own = logprobs.gather(1, wanted[:, None]).sum().item()
    return own, bool((logprobs.argmax(dim=-1) == wanted).all())
