"""Every key of [train], one at a time: what changes when it alone changes, and that inert keys change no byte."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from flash.config.recipes import resolve
from flash.config.run import RunConfig
from flash.environments.loading import LocalEnvironment
from flash.inference.loading import BaseModel
from flash.training import grpo, sft
from flash.training.reporter import RecordingReporter

ENVIRONMENT = """
from freesolo.environments import EnvironmentSingleTurn, RewardResult

class Digits(EnvironmentSingleTurn):
    def build_prompt_messages(self, example, prompt_text):
        return [{"role": "user", "content": example.input}]

    def score_response(self, example, text):
        return RewardResult(score=len([c for c in text if c in "0123456789abcdefgh"]) / (len(text) + 1))

def load_environment():
    return Digits()
"""
SFT = {"batch_size": 4, "max_steps": 2, "epochs": 1, "max_length": 200}
GRPO = {"batch_size": 2, "group_size": 3, "steps": 2, "max_tokens": 12, "max_length": 200}
BOTH = {"lora_rank": 4, "lora_alpha": 8, "learning_rate": 1e-2, "save_every": 100}

Observed = dict[str, Any]
Observe = Callable[..., Observed]
_baselines: dict[str, Observed] = {}


@pytest.fixture
def observe(base: BaseModel, tmp_path: Path) -> Observe:
    """observe("sft", key=value): a tiny run's adapter, saves, steps and what it showed of its rows."""

    def look(algorithm: str, *, thinking: bool = False, **changed: Any) -> Observed:
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        (folder / "package" / "dataset").mkdir(parents=True)
        (folder / "package" / "environment.py").write_text(ENVIRONMENT)
        rows = [{"input": f"say {i}", "output": f"{i}" * (i % 5 + 1)} for i in range(16)]
        (folder / "package" / "dataset" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = BOTH | (SFT if algorithm == "sft" else GRPO) | changed
        config = RunConfig.model_validate(
            {"model": "flash/nano", "algorithm": algorithm, "thinking": thinking,
             "environment": {"id": "org/digits"}, "train": settings}
        )  # fmt: skip
        environment, reporter = LocalEnvironment(folder / "package", {}, folder), RecordingReporter()
        train = sft.train if algorithm == "sft" else grpo.train
        try:
            result = train(resolve(config), base, environment, reporter, work_dir=folder)
        finally:
            environment.close()
        assert result.checkpoint is not None
        weights = result.checkpoint / "adapter" / "adapter_model.safetensors"
        with safe_open(weights, "pt") as file:
            shapes = {tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
        values = [data["values"] for data in reporter.of("metrics")]
        return {
            "bytes": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "shapes": shapes,
            "config": json.loads((weights.parent / "adapter_config.json").read_text()),
            "steps": result.step,
            "saves": [data["step"] for data in reporter.of("checkpoint")],
            "losses": [v["loss"] for v in values],
            "tokens": [v.get("tokens") for v in values],
            "rates": [v["learning_rate"] for v in values],
            "rewards": [v.get("reward") for v in values],
            "entropy": [v.get("entropy") for v in values],
            "kl": [v.get("kl") for v in values],
            "dropped": [v.get("prompts_dropped") for v in values],
            "length": [v.get("length") for v in values],
            "epoch": [v.get("epoch") for v in values],
            "samples": [data["sample"] for data in reporter.of("sample")],
            "shown": [data["text"] for data in reporter.of("log")],
            "warned": {data["code"] for data in reporter.of("warning")},
        }

    return look


@pytest.fixture
def baseline(observe: Observe) -> Callable[[str], Observed]:
    """The same run with no key changed; made once, since runs are deterministic."""

    def made(algorithm: str) -> Observed:
        if algorithm not in _baselines:
            _baselines[algorithm] = observe(algorithm)
        return _baselines[algorithm]

    return made


@pytest.mark.parametrize(
    ("key", "value", "seen"),
    [
        ("lora_rank", 2, "shapes"),
        ("lora_alpha", 64, "losses"),
        ("learning_rate", 1e-3, "rates"),
        ("batch_size", 3, "losses"),
        ("max_length", 45, "tokens"),
        ("save_every", 1, "saves"),
        ("max_steps", 1, "steps"),
        ("max_steps", 0, "steps"),
        ("max_examples", 5, "epoch"),
    ],
)
def test_each_sft_key_alone_changes_what_it_is_for(observe, baseline, key: str, value: object, seen: str) -> None:
    before, after = baseline("sft"), observe("sft", **{key: value})
    assert before[seen] != after[seen]
    if key != "save_every":
        assert before["bytes"] != after["bytes"]


def test_epochs_repeat_the_rows(observe) -> None:
    once, twice = (observe("sft", max_steps=0, epochs=epochs) for epochs in (1, 2))
    assert (once["steps"], twice["steps"]) == (4, 8)
    assert once["bytes"] != twice["bytes"]


@pytest.mark.parametrize(
    ("key", "value", "seen"),
    [
        ("lora_rank", 2, "shapes"),
        ("lora_alpha", 64, "kl"),
        ("learning_rate", 1e-3, "rates"),
        ("batch_size", 3, "rewards"),
        ("max_length", 55, "dropped"),
        ("save_every", 1, "saves"),
        ("steps", 3, "steps"),
        ("group_size", 4, "rewards"),
        ("temperature", 0.5, "entropy"),
        ("max_tokens", 4, "length"),
        ("kl_penalty_coef", 5.0, "bytes"),
        ("stop_sequences", ["e", "0"], "length"),
    ],
)
def test_each_grpo_key_alone_changes_what_it_is_for(observe, baseline, key: str, value: object, seen: str) -> None:
    before, after = baseline("grpo"), observe("grpo", **{key: value})
    assert before[seen] != after[seen]
    if key not in ("save_every", "max_length"):
        assert before["bytes"] != after["bytes"]


def test_the_length_penalty_takes_from_rewards_while_thinking(observe, base) -> None:
    # A template that opens the trace itself: whatever the model says first is thinking.
    base.tokenizer.chat_template = base.tokenizer.chat_template.replace(
        "assistant\n{% if not", "assistant\n{% if enable_thinking -%}{{ '<think>\n' }}{%- endif -%}{% if not"
    )
    free, dear = (observe("grpo", thinking=True, thinking_length_penalty_coef=coef) for coef in (0.0, 1.0))
    assert dear["rewards"][0] < free["rewards"][0]


@pytest.mark.parametrize("algorithm", ["sft", "grpo"])
def test_thinking_changes_the_prompt(observe, baseline, algorithm: str) -> None:
    before, after = baseline(algorithm), observe(algorithm, thinking=True)
    assert before["bytes"] != after["bytes"]
    if algorithm == "sft":  # with thinking off, the template's empty trace is part of the prompt, and of no other
        prompts = [seen["shown"][0].rpartition("⟦")[0] for seen in (before, after)]
        assert "</think>" in prompts[0] and "</think>" not in prompts[1]


@pytest.mark.parametrize(
    ("algorithm", "inert"),
    [
        ("grpo", {"advantage_clip": 0.01}),
        ("grpo", {"epochs": 7, "max_steps": 1, "max_examples": 1}),
        (
            "sft",
            {"steps": 1, "group_size": 1, "temperature": 0.0, "max_tokens": 1, "kl_penalty_coef": 9.0,
             "advantage_clip": 0.0, "thinking_length_penalty_coef": 1.0, "stop_sequences": ["s"]},
        ),
    ],
)  # fmt: skip
def test_keys_said_to_have_no_effect_have_none(observe, baseline, algorithm: str, inert: dict[str, object]) -> None:
    before, after = baseline(algorithm), observe(algorithm, **inert)
    for name in ("bytes", "config", "steps", "saves", "losses", "samples"):
        assert before[name] == after[name], name
