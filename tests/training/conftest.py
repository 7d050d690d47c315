"""A tiny random Qwen3 with a byte-level chat tokenizer, and an arithmetic environment in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from flash.config.recipes import resolve
from flash.config.run import RunConfig, RunSpec
from flash.environments.loading import LocalEnvironment
from flash.inference.loading import BaseModel, load_base

torch.set_num_threads(1)

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Qwen3's manner: with thinking off, generation prompt and targets open with an empty trace.
TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' -%}
{%- if '<think>' in message.content -%}{{ message.content }}
{%- else -%}{{ '<think>\n\n</think>\n\n' + message.content }}{%- endif -%}
{%- else -%}{{ message.content }}{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% if not enable_thinking -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}{%- endif -%}"""

ENVIRONMENT = '''
from freesolo.environments import EnvironmentSingleTurn, RewardResult

class Sums(EnvironmentSingleTurn):
    def build_prompt_messages(self, example, prompt_text=None):
        return [{"role": "user", "content": example.input}]

    def score_response(self, example, response_text):
        if example.metadata and example.metadata.get("broken"):
            raise ValueError("no reward for this row")
        return RewardResult(score=1.0 if response_text.strip() == example.output else 0.0)

def load_environment():
    return Sums()
'''


def save_tiny(folder: Path) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(fast), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=512, tie_word_embeddings=True,
        eos_token_id=[fast.eos_token_id, fast.pad_token_id], initializer_range=0.2,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def base(tiny_folder: Path) -> BaseModel:
    return load_base(tiny_folder, name="flash/nano", device="cpu")


def write_package(
    folder: Path,
    *,
    rows: int = 0,
    eval_rows: int = 0,
    broken_eval_rows: int = 0,
    lines: list[str] | None = None,
    eval_lines: list[str] | None = None,
) -> Path:
    """An arithmetic package; `lines` replace the generated rows, "broken" rows have no reward."""

    def line(i: int, **metadata: bool) -> str:
        text = f"What is {i}+{i * i}{' please' * (i % 4)}?"
        return json.dumps({"input": text, "output": str(i + i * i), "metadata": metadata})

    (folder / "dataset").mkdir(parents=True)
    (folder / "environment.py").write_text(ENVIRONMENT)
    train = [line(i) for i in range(rows)] if lines is None else lines
    (folder / "dataset" / "train.jsonl").write_text("\n".join(train) + "\n")
    held_out = [line(100 + i, broken=i < broken_eval_rows) for i in range(eval_rows)]
    if held_out := held_out if eval_lines is None else eval_lines:
        (folder / "dataset" / "eval.jsonl").write_text("\n".join(held_out) + "\n")
    return folder


@pytest.fixture
def make_environment(tmp_path: Path) -> Callable[..., LocalEnvironment]:
    """make_environment(name, rows=…, eval_rows=…, lines=…): a package, opened in this process."""

    def make(name: str, **content: Any) -> LocalEnvironment:
        work_dir = tmp_path / f"{name}-rows"
        work_dir.mkdir()
        return LocalEnvironment(write_package(tmp_path / name, **content), {}, work_dir)

    return make


@pytest.fixture
def environment(make_environment: Callable[..., LocalEnvironment]) -> LocalEnvironment:
    """21 training rows of different lengths."""
    return make_environment("package", rows=21)


def sft_spec(*, thinking: bool = False, seed: int = 0, **train: object) -> RunSpec:
    settings = {"lora_rank": 4, "lora_alpha": 8, "batch_size": 4, "learning_rate": 1e-2, "epochs": 1} | train
    config = RunConfig.model_validate(
        {"model": "flash/nano", "thinking": thinking, "environment": {"id": "org/sums"}, "train": settings}
    )
    return resolve(config, seed=seed)


@pytest.fixture
def spec() -> Callable[..., RunSpec]:
    return sft_spec
