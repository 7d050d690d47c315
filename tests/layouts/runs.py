"""What the layouts are trained on: an environment, and settings for short runs of either algorithm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flash.config.recipes import resolve
from flash.config.run import RunConfig, RunSpec
from flash.training.reporter import RecordingReporter
from flash.training.sft import TrainResult

ENVIRONMENT = '''
from freesolo.environments import *

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def score(text):
    """A third of all characters are good: something that any model finds by chance."""
    return sum(ord(c) % 3 == 0 for c in text) / max(len(text), 1)


class OneTurn(EnvironmentSingleTurn):
    def build_prompt_messages(self, example, prompt_text):
        return [{"role": "system", "content": "Sums."}, {"role": "user", "content": example.input}]

    def score_response(self, example, response_text):
        return RewardResult(score=score(response_text))


class TwoTurns(EnvironmentMultiTurn):
    def start_episode(self, example, prompt_text):
        return [{"role": "user", "content": example.input}]

    def max_episode_turns(self, example):
        return 2

    def step_episode(self, example, messages, assistant_response):
        return EnvironmentStepResult(done=False, messages=({"role": "user", "content": "again"},))

    def score_episode(self, example, episode):
        return RewardResult(score=score(episode.response_text))


def load_environment(turns=1):
    return OneTurn() if turns == 1 else TwoTurns()
'''


def sft_spec(model: str, *, thinking: bool = False, **train: Any) -> RunSpec:
    settings = {"lora_rank": 8, "lora_alpha": 16, "batch_size": 4, "learning_rate": 1e-2, "epochs": 2} | train
    return _resolved(model, "sft", thinking, settings)


def grpo_spec(model: str, *, thinking: bool = False, **train: Any) -> RunSpec:
    settings = {
        "lora_rank": 8, "lora_alpha": 16, "learning_rate": 2e-2, "batch_size": 2, "group_size": 4, "steps": 3,
        "max_tokens": 8, "max_length": 256,
    } | train  # fmt: skip
    return _resolved(model, "grpo", thinking, settings)


def _resolved(model: str, algorithm: str, thinking: bool, settings: dict[str, Any]) -> RunSpec:
    config = RunConfig.model_validate(
        {"model": model, "algorithm": algorithm, "thinking": thinking, "environment": {"id": "org/sums"},
         "train": {"save_every": 1000, **settings}}
    )  # fmt: skip
    return resolve(config, seed=0)


Run = Callable[..., tuple[TrainResult, RecordingReporter]]
