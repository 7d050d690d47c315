"""TRL's SFTTrainer as the oracle: the same rows, the same adapter, the same tokens, log-probabilities,
loss and gradients within 1e-5."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from flash.inference.chat import ChatRenderer
from flash.inference.loading import BaseModel
from flash.inference.lora import save_adapter
from flash.training.batches import TokenRows, collate
from flash.training.fitting import MicroBatches
from flash.training.policy import Policy, build_policy
from flash.training.reporter import RecordingReporter
from flash.training.sft import _accumulate_gradients

CHATS = [
    {
        "prompt": [{"role": "user", "content": "say " + "a" * n}],
        "completion": [{"role": "assistant", "content": "b" * (1 + 3 * n % 11)}],
    }
    for n in range(6)
] + [
    {
        "prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        "completion": [
            {"role": "assistant", "content": "and?"},
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": "no"},
        ],
    }
]


@pytest.fixture
def policy(base: BaseModel, tmp_path: Path) -> Policy:
    """An adapter that changes the model, saved under `adapter` for PEFT."""
    policy = build_policy(base, rank=4, alpha=8, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for pair in policy.adapter.pairs.values():
            pair.B.normal_(std=0.05, generator=generator)
    save_adapter(policy.adapter, tmp_path / "adapter", base_model="tiny")
    return policy


@pytest.fixture
def rows(base: BaseModel, tmp_path: Path) -> TokenRows:
    renderer = ChatRenderer(base.tokenizer)
    targets = [renderer.render_target(chat["prompt"], chat["completion"]) for chat in CHATS]
    return TokenRows.write(tmp_path / "rows.tokens", targets)


@pytest.fixture
def trainer(tiny_folder: Path, policy: Policy, tmp_path: Path):
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32),
        tmp_path / "adapter",
        is_trainable=True,
    )
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to="none", max_length=256,
            gradient_checkpointing=False, per_device_train_batch_size=len(CHATS),
        ),
        train_dataset=Dataset.from_list(CHATS),
        processing_class=AutoTokenizer.from_pretrained(tiny_folder),
    )


def test_tokens_log_probabilities_loss_and_gradients_are_trls(policy, rows, trainer) -> None:
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(CHATS))])
    for number, (theirs, labels, mask) in enumerate(
        zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    ):
        ours = rows[number]
        assert tuple(theirs[mask.bool()].tolist()) == ours.tokens
        assert (labels[mask.bool()] != -100).tolist() == list(ours.trained)

    labels = batch["labels"][:, 1:]
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    with torch.no_grad():
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        theirs = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0][labels != -100]

    order = np.arange(len(rows))
    examples = [rows[number] for number in range(len(rows))]
    whole = collate(
        [example.tokens for example in examples],
        [example.trained for example in examples],
        pad_id=policy.base.pad_id,
        device=policy.base.device,
    )
    assert torch.allclose(policy.logprobs(whole).detach(), theirs, atol=1e-5)

    for budget in (1 << 20, 64):  # one micro-batch, and one for each row
        for parameter in policy.parameters():
            parameter.grad = None
        ours_loss = _accumulate_gradients(policy, rows, order, MicroBatches(budget), RecordingReporter())
        assert ours_loss == pytest.approx(loss.item(), abs=1e-5)
        assert_same_gradients(policy, trainer.model)


def assert_same_gradients(policy: Policy, peft_model: PeftModel) -> None:
    theirs = {name.replace(".default", ""): weight.grad for name, weight in peft_model.named_parameters()}
    for path, pair in policy.adapter.pairs.items():
        for part, weight in (("lora_A", pair.A), ("lora_B", pair.B)):
            assert torch.allclose(weight.grad, theirs[f"base_model.model.{path}.{part}.weight"], atol=1e-5), path
    assert max(pair.B.grad.abs().max() for pair in policy.adapter.pairs.values()) > 1e-3


def test_a_whole_run_of_updates_stays_with_trl(policy, rows, trainer) -> None:
    """Five AdamW updates with clipping, on the same batches, give the same adapter."""
    from flash.training.optimizer import optimizer_step

    ours = torch.optim.AdamW(policy.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    theirs_parameters = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    theirs = torch.optim.AdamW(theirs_parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(5):
        chosen = np.asarray([(step + k) % len(CHATS) for k in range(3)])
        _accumulate_gradients(policy, rows, chosen, MicroBatches(1 << 20), RecordingReporter())
        optimizer_step(ours, policy.parameters(), rate=1e-3, max_grad_norm=1.0, step=step)
        batch = trainer.data_collator([trainer.train_dataset[int(i)] for i in chosen])
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        torch.nn.utils.clip_grad_norm_(theirs_parameters, 1.0)
        theirs.step()
        theirs.zero_grad()
    weights = {name.replace(".default", ""): weight for name, weight in trainer.model.named_parameters()}
    for path, pair in policy.adapter.pairs.items():
        assert torch.allclose(pair.B, weights[f"base_model.model.{path}.lora_B.weight"], atol=1e-4), path
