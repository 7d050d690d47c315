"""The GRPO update against TRL's GRPOTrainer, on frozen rollouts: same loss, same gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from flash.config.run import RunSpec
from flash.environments.protocol import EpisodeStart, Score
from flash.inference.loading import BaseModel
from flash.inference.lora import save_adapter
from flash.training.fitting import MicroBatches
from flash.training.policy import Policy, build_policy
from flash.training.rollouts import Episode, Group, Prompt
from flash.training.updating import Updater

MAX_TOKENS = 9


def grpo_spec(spec: Callable[..., RunSpec], *, recipe: dict[str, Any] | None = None, **train: Any) -> RunSpec:
    """A resolved GRPO spec with a plain gradient step, so that what the optimizer adds is the gradient."""
    made = spec(lora_rank=4)
    settings = {
        "steps": 1, "group_size": 4, "max_tokens": MAX_TOKENS, "temperature": 1.0, "kl_penalty_coef": 0.0,
        "thinking_length_penalty_coef": 0.0, "stop_sequences": (), "learning_rate": 1.0,
    } | train  # fmt: skip
    values = {"clip_epsilon": 0.2, "importance_cap": 2.0, "max_grad_norm": 1e9, "lr_schedule": "constant",
              "warmup_ratio": 0.0} | (recipe or {})  # fmt: skip
    return made.model_copy(
        update={
            "algorithm": "grpo",
            "train": made.train.model_copy(update=settings),
            "recipe": made.recipe.model_copy(update=values),
        }
    )


def trained_policy(base: BaseModel) -> Policy:
    """An adapter whose B is not zero, so that it differs from its base."""
    policy = build_policy(base, rank=4, alpha=8, seed=5)
    generator = torch.Generator().manual_seed(6)
    for pair in policy.adapter.pairs.values():
        pair.B.data.normal_(0, 0.1, generator=generator)
    return policy


def frozen_groups(policy: Policy, *, noise: float, turns: bool) -> list[Group]:
    """Two groups of random episodes. The sampler's log-probs are the policy's own plus noise; with `turns`,
    tokens of an environment lie between sampled ones."""
    generator = torch.Generator().manual_seed(7)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, 256, (count,), generator=generator).tolist()

    groups = []
    for prompt_length, rewards in ((5, [1.0, 0.0, 0.5, 0.0]), (11, [2.0, -1.0, 0.25, 0.25])):
        prompt = Prompt(0, 0, EpisodeStart([], 1), tuple(tokens(prompt_length)))
        group = Group(prompt, [Episode.opened(prompt) for _ in rewards], [Score(r) for r in rewards])
        for number, episode in enumerate(group.episodes):
            spans = [(3 + number, True), (2, False), (2, True)] if turns else [(3 + 2 * number, True)]
            for count, sampled in spans:
                episode.tokens += tokens(count)
                episode.sampled += [sampled] * count
            with policy.base.adapters.active(policy.name), torch.no_grad():
                logits = policy.base.model(torch.tensor([episode.tokens])).logits[0, :-1]
            own = logits.log_softmax(-1).gather(1, torch.tensor(episode.tokens)[1:, None])[:, 0]
            shaken = own + noise * torch.randn(own.shape, generator=generator)
            episode.logprobs = [
                value if mask else 0.0 for value, mask in zip([0.0, *shaken.tolist()], episode.sampled, strict=True)
            ]
        groups.append(group)
    return groups


def our_update(
    spec: RunSpec, policy: Policy, groups: list[Group], divisor: int = 1
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    before = {name: tensor.clone() for name, tensor in policy.adapter.tensors().items()}
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    micro = MicroBatches(spec.recipe.micro_batch_tokens // divisor)
    updater = Updater(spec, policy, optimizer, micro_batches=micro, mismatch_limit=10.0)
    metrics = updater.update(groups, step=1)
    return metrics, {name: before[name] - tensor for name, tensor in policy.adapter.tensors().items()}


@pytest.fixture(scope="module")
def oracle(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's trainer on the same base and step-0 adapter."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from flash.inference.loading import load_base

    folder = tmp_path_factory.mktemp("oracle")
    policy = trained_policy(load_base(tiny_folder, device="cpu"))
    save_adapter(policy.adapter, folder / "adapter", base_model="tiny")
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    trainer = GRPOTrainer(
        model=PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=str(folder), loss_type="dr_grpo", max_completion_length=MAX_TOKENS, num_generations=4,
            per_device_train_batch_size=4, use_cpu=True, report_to=[], scale_rewards="none", beta=0.1,
            gradient_checkpointing=False, bf16=False, use_bias_correction_kl=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}),
        processing_class=AutoTokenizer.from_pretrained(tiny_folder),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def their_update(
    oracle: Any, groups: list[Group], reference: Any, *, delta: float, beta: float
) -> tuple[float, dict[str, torch.Tensor]]:
    episodes = [episode for group in groups for episode in group.episodes]
    rewards = torch.tensor([group.rewards for group in groups])
    advantages = (rewards - rewards.mean(dim=1, keepdim=True)).flatten()
    widest = max(episode.prompt_length for episode in episodes)
    longest = max(len(episode.tokens) - episode.prompt_length for episode in episodes)

    def left(values: list[int], fill: int = 0) -> list[int]:
        return [fill] * (widest - len(values)) + values

    def right(values: list[Any], fill: Any = 0) -> list[Any]:
        return values + [fill] * (longest - len(values))

    parts = [(e.tokens[: e.prompt_length], e.tokens[e.prompt_length :], e) for e in episodes]
    inputs = {
        "prompt_ids": torch.tensor([left(p) for p, _, _ in parts]),
        "prompt_mask": torch.tensor([left([1] * len(p)) for p, _, _ in parts]),
        "completion_ids": torch.tensor([right(c) for _, c, _ in parts]),
        "completion_mask": torch.tensor([right([1] * len(c)) for _, c, _ in parts]),
        "tool_mask": torch.tensor([right([int(m) for m in e.sampled[e.prompt_length :]]) for _, _, e in parts]),
        "advantages": advantages,
        "old_per_token_logps": torch.tensor([right(e.logprobs[e.prompt_length :], 0.0) for _, _, e in parts]),
        "ref_per_token_logps": torch.tensor([right(reference(e), 0.0) for _, _, e in parts]),
    }
    oracle.beta, oracle.args.delta = beta, delta
    oracle.model.zero_grad()
    loss = oracle._compute_loss(oracle.model, inputs)
    loss.backward()
    gradients = {
        name.replace(".default", ""): parameter.grad.clone()
        for name, parameter in oracle.model.named_parameters()
        if parameter.grad is not None
    }
    return loss.item(), gradients


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize(("noise", "beta"), [(0.0, 0.0), (0.6, 0.0), (0.6, 0.3)])
def test_loss_and_gradients_are_those_of_trl(
    turns: bool, noise: float, beta: float, oracle: Any, base: BaseModel, spec: Callable[..., RunSpec]
) -> None:
    policy = trained_policy(base)
    groups = frozen_groups(policy, noise=noise, turns=turns)

    def reference(episode: Episode) -> list[float]:
        with base.adapters.active(None), torch.no_grad():
            logits = base.model(torch.tensor([episode.tokens])).logits[0, episode.prompt_length - 1 : -1]
        wanted = torch.tensor(episode.tokens[episode.prompt_length :])
        return logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].tolist()

    loss, theirs = their_update(oracle, groups, reference, delta=2.0, beta=beta)
    metrics, ours = our_update(grpo_spec(spec, kl_penalty_coef=beta), policy, groups)
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
    assert set(ours) == set(theirs)
    assert max(gradient.abs().max() for gradient in theirs.values()) > 1e-3
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], atol=1e-5), name
    assert (metrics["clipped"] > 0) == (noise > 0)


@pytest.mark.parametrize("divisor", [400, 10**6])
def test_no_split_into_micro_batches_changes_the_gradient(
    divisor: int, base: BaseModel, spec: Callable[..., RunSpec]
) -> None:
    made = grpo_spec(spec, kl_penalty_coef=0.1)
    policy = trained_policy(base)
    groups = frozen_groups(policy, noise=0.3, turns=True)
    start = copy.deepcopy(policy.adapter.tensors())
    whole, one = our_update(made, policy, groups)
    for name, tensor in policy.adapter.tensors().items():
        tensor.copy_(start[name])
    split, many = our_update(made, policy, groups, divisor)
    assert split["loss"] == pytest.approx(whole["loss"], abs=1e-5)
    assert all(torch.allclose(one[name], many[name], atol=1e-5) for name in one)


def test_environment_tokens_carry_no_gradient(base: BaseModel, spec: Callable[..., RunSpec]) -> None:
    """The last token of an episode influences nothing but its own loss term, so it shows the mask."""
    gradients = []
    for last in (3, 4):
        policy = trained_policy(base)
        groups = frozen_groups(policy, noise=0.0, turns=True)
        for episode in (episode for group in groups for episode in group.episodes):
            episode.tokens.append(last)
            episode.sampled.append(False)
            episode.logprobs.append(0.0)
        gradients.append(our_update(grpo_spec(spec), policy, groups)[1])
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_the_temperature_of_the_rollouts_is_that_of_the_update(base: BaseModel, spec: Callable[..., RunSpec]) -> None:
    policy = trained_policy(base)
    groups = frozen_groups(policy, noise=0.0, turns=False)
    plain, _ = our_update(grpo_spec(spec), policy, groups)
    assert plain["mismatch_kl"] == pytest.approx(0, abs=1e-6)
    warm, _ = our_update(grpo_spec(spec, temperature=1.7), trained_policy(base), groups)
    assert warm["mismatch_kl"] > 1e-3
