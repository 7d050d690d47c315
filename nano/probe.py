"""Asks whether a `flash/nano` base can learn, before its weights are frozen.

    python -m nano.probe sft|grpo [--model FOLDER] [--seed N] ...

Plain loops over PEFT on the rows and the reward of `examples/arithmetic`: what they need, the recipe
row of `flash/nano` needs. The product's own training lives in `flash.training`.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import time
from pathlib import Path
from typing import Any

import torch
from freesolo.datasets import TaskExample, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from nano.evaluate import SHIPPED
from nano.sampling import sample
from nano.train import loss_of

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "arithmetic"
EVALUATED_ROWS = 200
MAX_TOKENS = {False: 8, True: 48}


def load_example_environment(folder: Path = EXAMPLE) -> Any:
    """The example's environment, imported from its folder as a user's would be."""
    spec = importlib.util.spec_from_file_location("arithmetic_environment", folder / "environment.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"no environment.py in {folder}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_environment()


class Probe:
    """A base with a fresh adapter, an environment, and ways to prompt and score."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.thinking: bool = options.thinking
        self.generator = torch.Generator().manual_seed(options.seed)
        self.rng = random.Random(options.seed)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
        base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        lora = LoraConfig(r=options.rank, lora_alpha=64, lora_dropout=0.0, target_modules="all-linear")
        self.model: Any = get_peft_model(base, lora)
        self.environment = load_example_environment()
        self.rows = load_dataset(EXAMPLE / "dataset" / "train.jsonl").examples
        self.held_out = load_dataset(EXAMPLE / "dataset" / "eval.jsonl").examples[:EVALUATED_ROWS]
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=options.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )

    def prompt(self, row: TaskExample) -> str:
        """The rendered prompt of a row."""
        return str(
            self.tokenizer.apply_chat_template(
                self.environment.start_episode(row, ""),
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=self.thinking,
            )
        )

    def encoded(self, row: TaskExample) -> tuple[list[int], int]:
        """Tokens of prompt and gold completion, and the prompt's length."""
        prompt = self.prompt(row)
        messages = [*self.environment.start_episode(row, ""), *self.environment.sft_completion(row)]
        whole = str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        head = self.ids(prompt)
        return head + self.ids(whole[len(prompt) :]), len(head)

    def ids(self, text: str) -> list[int]:
        """Token ids, nothing added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def sampled(self, prompts: list[list[int]], temperature: float) -> list[list[int]]:
        """Completions of token prompts, in evaluation mode."""
        return sample(
            self.model,
            prompts,
            stop_ids=[self.tokenizer.eos_token_id],
            pad_id=self.tokenizer.pad_token_id,
            max_tokens=MAX_TOKENS[self.thinking],
            temperature=temperature,
            generator=self.generator,
        )

    def rewards(self, rows: list[TaskExample], completions: list[list[int]]) -> list[float]:
        """The environment's reward of each completion; an unfinished thought is an empty answer."""
        scores = []
        for row, tokens in zip(rows, completions, strict=True):
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            _, closed, answer = text.rpartition("</think>")
            answer = answer.strip() if closed or not self.thinking else ""
            scores.append(float(self.environment.score_response(row, answer).score))
        return scores

    def held_out_reward(self) -> float:
        """Mean greedy reward on the first held-out rows."""
        completions = self.sampled([self.ids(self.prompt(row)) for row in self.held_out], 0.0)
        return sum(self.rewards(self.held_out, completions)) / len(self.held_out)

    def step(self, learning_rate: float) -> None:
        """One clipped optimizer step on the gradients that have gathered."""
        self.optimizer.param_groups[0]["lr"] = learning_rate
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def sft(probe: Probe, options: argparse.Namespace) -> None:
    """Supervised: the recipe's linear decay with 3% warm-up, length-sorted batches."""
    data = [probe.encoded(row) for row in probe.rows]
    per_epoch = -(-len(data) // options.batch_size)
    total = per_epoch * options.epochs
    step = 0
    for _ in range(options.epochs):
        probe.rng.shuffle(data)
        for start in range(0, len(data), options.batch_size):
            loss_of(
                probe.model.base_model.model, data[start : start + options.batch_size], probe.tokenizer.pad_token_id
            ).backward()
            warm = max(1, round(0.03 * total))
            scale = (step + 1) / warm if step < warm else (total - step) / max(1, total - warm)
            probe.step(options.learning_rate * scale)
            step += 1
            if step % options.watch_every == 0:
                report(probe, options, step, total)


def grpo(probe: Probe, options: argparse.Namespace) -> None:
    """Dr. GRPO: group-mean advantages, constant normaliser, one update a batch, constant rate."""
    for step in range(options.steps):
        rows = [row for row in probe.rng.sample(probe.rows, options.batch_size) for _ in range(options.group_size)]
        prompts = [probe.ids(probe.prompt(row)) for row in rows]
        completions = probe.sampled(prompts, 1.0)
        rewards = torch.tensor(probe.rewards(rows, completions)).view(options.batch_size, options.group_size)
        advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()
        kept = [index for index in range(len(rows)) if advantages[index] != 0]
        if kept:
            loss = _policy_loss(
                probe,
                [(prompts[index], completions[index]) for index in kept],
                advantages[kept],
                normaliser=len(rows) * MAX_TOKENS[probe.thinking],
            )
            loss.backward()
            probe.step(options.learning_rate)
        if (step + 1) % options.watch_every == 0:
            print(f"reward {rewards.mean():.2f} groups {len(kept) / len(rows):.2f}", end=" ")
            report(probe, options, step + 1, options.steps)


def _policy_loss(
    probe: Probe, pairs: list[tuple[list[int], list[int]]], advantages: torch.Tensor, *, normaliser: int
) -> torch.Tensor:
    width = max(len(prompt) + len(completion) for prompt, completion in pairs)
    ids = torch.full((len(pairs), width), probe.tokenizer.pad_token_id)
    sampled = torch.zeros(len(pairs), width, dtype=torch.bool)
    for index, (prompt, completion) in enumerate(pairs):
        end = len(prompt) + len(completion)
        ids[index, :end] = torch.tensor(prompt + completion)
        sampled[index, len(prompt) : end] = True
    causal = probe.model.base_model.model
    hidden = causal.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    trained = sampled[:, 1:]
    log_probs = causal.lm_head(hidden[trained]).log_softmax(-1)
    chosen = log_probs.gather(-1, ids[:, 1:][trained][:, None])[:, 0]
    weights = advantages[:, None].expand(-1, width - 1)[trained]
    # On-policy, one update: the ratio is one and its gradient is that of the log-probability.
    ratio = (chosen - chosen.detach()).exp()
    loss: torch.Tensor = -(ratio * weights).sum() / normaliser
    return loss


STARTED = time.process_time()
WALL = time.perf_counter()


def report(probe: Probe, options: argparse.Namespace, step: int, total: int) -> None:
    """One line: where the probe stands, and what it has cost."""
    spent = f"cpu {time.process_time() - STARTED:.0f}s wall {time.perf_counter() - WALL:.0f}s"
    print(f"step {step}/{total} held-out {probe.held_out_reward():.3f} {spent}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("algorithm", choices=["sft", "grpo"])
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--thinking", action="store_true")
    parser.add_argument("--learning-rate", type=float, help="default: 1.5e-3 for sft, 5e-4 for grpo")
    parser.add_argument("--batch-size", type=int, help="default: 32 rows for sft, 8 prompts for grpo")
    parser.add_argument("--epochs", type=int, default=3, help="sft")
    parser.add_argument("--steps", type=int, default=300, help="grpo")
    parser.add_argument("--group-size", type=int, default=8, help="grpo")
    parser.add_argument("--watch-every", type=int, default=50)
    options = parser.parse_args()
    supervised = options.algorithm == "sft"
    options.learning_rate = options.learning_rate or (1.5e-3 if supervised else 5e-4)
    options.batch_size = options.batch_size or (32 if supervised else 8)
    torch.set_num_threads(options.threads)
    probe = Probe(options)
    report(probe, options, 0, 0)
    (sft if supervised else grpo)(probe, options)


if __name__ == "__main__":
    main()
