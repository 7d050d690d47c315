"""The shipped weights: small enough to ship, able enough to learn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nano.evaluate import BOUNDS, accuracy, faults, held_out_tasks, pass_at_8
from peft import LoraConfig, get_peft_model


def card_figures(folder: Path) -> dict[str, float]:
    """The JSON block of the model card."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    figures: dict[str, float] = json.loads(card.split("```json\n")[1].split("```")[0])
    return figures


def test_it_is_a_qwen3_of_about_a_million_parameters_in_bf16(nano_folder: Path, model: Any) -> None:
    config = json.loads((nano_folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["max_position_embeddings"] >= 2048
    assert 700_000 < model.num_parameters() < 1_100_000
    assert (nano_folder / "model.safetensors").stat().st_size <= 2_000_000


def test_the_head_covers_the_tokenizer(model: Any, tokenizer: Any) -> None:
    assert model.get_output_embeddings().weight.shape[0] == len(tokenizer)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]


def test_a_fresh_adapter_on_all_linear_layers_changes_nothing(nano_folder: Path, model: Any, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_pretrained(nano_folder, dtype=torch.float32)
    adapted = get_peft_model(fresh, LoraConfig(r=32, lora_alpha=64, target_modules="all-linear")).eval()
    assert len([name for name, _ in adapted.named_parameters() if "lora_A" in name]) == 7 * 4
    ids = tokenizer("What is 47 + 38?", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, model(ids).logits)


def test_the_full_context_runs(model: Any) -> None:
    length = model.config.max_position_embeddings
    with torch.no_grad():
        logits = model(torch.randint(0, 600, (1, length)), logits_to_keep=1).logits
    assert torch.isfinite(logits).all()


def test_the_card_keeps_the_bounds(nano_folder: Path) -> None:
    assert faults(card_figures(nano_folder)) == []


@pytest.mark.parametrize("kind", ["addition", "string", "json"])
def test_the_card_tells_the_truth(nano_folder: Path, model: Any, tokenizer: Any, kind: str) -> None:
    tasks = held_out_tasks(kind, 500)[:150]
    low, high = BOUNDS[kind]
    assert low - 0.03 <= (measured := accuracy(model, tokenizer, tasks)) <= high + 0.03
    assert abs(measured - card_figures(nano_folder)[kind]) < 0.12


def test_thinking_helps(model: Any, tokenizer: Any) -> None:
    tasks = held_out_tasks("addition", 100)
    assert accuracy(model, tokenizer, tasks, thinking=True) > accuracy(model, tokenizer, tasks) + 0.1


def test_eight_samples_find_what_greedy_misses(model: Any, tokenizer: Any) -> None:
    assert pass_at_8(model, tokenizer, held_out_tasks("addition", 64)) >= 0.8
