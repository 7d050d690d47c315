"""Trains `flash/nano` from nothing and writes its model folder.

    python -m nano.train [--seed N] [--output FOLDER]

Owns the model's shape, the base mixture, the two stages and where each stops. Leaving something to
learn is the point: the base must answer some sums and spread its guesses over the right answer for most
others, so that a few minutes of adapter training show. One seed and one thread give one set of weights.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from nano.evaluate import SHIPPED, accuracy, held_out_tasks, pass_at_8
from nano.tasks import Mixture, Task, operand_pairs
from nano.tokenizer import CONTEXT_LENGTH, build_tokenizer

BATCH_SIZE = 64
CHUNKS = 4
THINKING_SHARE = 0.3
MIXTURE = Mixture(
    {
        "addition": 0.20,
        "subtraction": 0.20,
        "word": 0.20,
        "string": 0.17,
        "json": 0.12,
        "tool": 0.04,
        "guess": 0.05,
        "greeting": 0.02,
    }
)


@dataclass(frozen=True)
class Stage:
    """A stretch of training: how long, how fast, and by which teacher."""

    steps: int
    learning_rate: float
    hasty: bool
    warmup_steps: int = 50

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then linear decay to a tenth."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (1.0 - 0.9 * done)


# The careful teacher stops as soon as carries are understood. The hasty one then spreads the answers, so
# that the right one is within reach of sampling without being the first choice.
CAREFUL = Stage(steps=700, learning_rate=3e-3, hasty=False)
HASTY = Stage(steps=200, learning_rate=1e-3, hasty=True)


def new_model(tokenizer: Any, seed: int) -> Qwen3ForCausalLM:
    """A fresh model in fp32. Four layers learn to carry twice as fast as three wider ones of equal cost."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
    )
    return Qwen3ForCausalLM(config)


def encode(
    tokenizer: Any, task: Task, *, thinking: bool, hasty: random.Random | None = None
) -> tuple[list[int], int]:
    """Token ids of the whole conversation, and how many of them are prompt."""
    messages = task.lesson(thinking=thinking, hasty=hasty)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    if not whole.startswith(prompt):
        raise ValueError(f"the template breaks the prompt's prefix: {whole!r} against {prompt!r}")
    prompt_tokens = tokenizer.encode(prompt, add_special_tokens=False)
    answer_tokens = tokenizer.encode(whole[len(prompt) :], add_special_tokens=False)
    return prompt_tokens + answer_tokens, len(prompt_tokens)


def batches(tokenizer: Any, rng: random.Random, *, hasty: bool) -> Iterator[list[list[tuple[list[int], int]]]]:
    """Endless batches of encoded tasks, each cut into chunks of like length to save padding.

    The chunks of one batch share an optimizer step: a step on one length alone would be a step on one
    kind of task alone.
    """
    pairs = operand_pairs("base")
    while True:
        drawn = [
            encode(
                tokenizer,
                MIXTURE.draw("base", rng, pairs),
                thinking=rng.random() < THINKING_SHARE,
                hasty=rng if hasty else None,
            )
            for _ in range(BATCH_SIZE)
        ]
        drawn.sort(key=lambda row: len(row[0]))
        size = BATCH_SIZE // CHUNKS
        yield [drawn[start : start + size] for start in range(0, len(drawn), size)]


def loss_of(model: Any, rows: Sequence[tuple[list[int], int]], pad_id: int) -> torch.Tensor:
    """Mean cross-entropy over the answers' tokens; the head runs on their positions only."""
    width = max(len(tokens) for tokens, _ in rows)
    ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), -100)
    for index, (tokens, prompt_length) in enumerate(rows):
        ids[index, : len(tokens)] = torch.tensor(tokens)
        labels[index, prompt_length : len(tokens)] = ids[index, prompt_length : len(tokens)]
    # Padding sits on the right of causal rows, so no real token ever sees it and no mask is needed.
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    trained = targets != -100
    return functional.cross_entropy(model.lm_head(hidden[trained]), targets[trained])


def new_optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings and norms; both at one learning rate.

    Muon needs little more than half of AdamW's steps here, which pays for its costlier update.
    """
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    taken = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    return [
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(model: Any, tokenizer: Any, stage: Stage, *, seed: int, watch_every: int = 0) -> None:
    """Put a model through one stage; with `watch_every`, print held-out figures on the way."""
    stream = batches(tokenizer, random.Random(seed), hasty=stage.hasty)
    optimizers = new_optimizers(model)
    started, running = time.process_time(), 1.0
    model.train()
    for step in range(stage.steps):
        chunks = next(stream)
        trained = [sum(len(tokens) - prompt for tokens, prompt in chunk) for chunk in chunks]
        mean_loss = 0.0
        for chunk, count in zip(chunks, trained, strict=True):
            loss = loss_of(model, chunk, tokenizer.pad_token_id) * (count / sum(trained))
            loss.backward()
            mean_loss += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = stage.learning_rate_at(step)
            optimizer.step()
        model.zero_grad(set_to_none=True)
        running = 0.95 * running + 0.05 * mean_loss
        if watch_every and (step + 1) % watch_every == 0:
            print(f"step {step + 1} loss {running:.3f} cpu {time.process_time() - started:.0f}s", end=" ")
            watch(model, tokenizer)
    model.eval()


def watch(model: Any, tokenizer: Any) -> None:
    """Print a quick look at held-out ability."""
    model.eval()
    parts = []
    for kind in ("addition", "subtraction", "word", "string", "json"):
        tasks = held_out_tasks(kind, 128)
        direct, thought = (accuracy(model, tokenizer, tasks, thinking=thinking) for thinking in (False, True))
        parts.append(f"{kind} {direct:.2f}/{thought:.2f}")
    parts.append(f"pass@8 {pass_at_8(model, tokenizer, held_out_tasks('addition', 64)):.2f}")
    print(" ".join(parts), flush=True)
    model.train()


def save(model: Qwen3ForCausalLM, tokenizer: Any, folder: Path) -> None:
    """Write the model folder as shipped: bf16 weights, tokenizer, template, generation defaults."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The name that every release of transformers knows; the newest writes its own.
    config = folder / "tokenizer_config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("TokenizersBackend", "PreTrainedTokenizerFast"), encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--watch-every", type=int, default=100, help="0 prints nothing on the way")
    parser.add_argument("--output", type=Path, default=SHIPPED)
    options = parser.parse_args()
    # One thread: sums in another order give other weights.
    torch.set_num_threads(1)
    tokenizer = build_tokenizer(MIXTURE)
    model = new_model(tokenizer, options.seed)
    for number, stage in enumerate((CAREFUL, HASTY)):
        train(model, tokenizer, stage, seed=options.seed + number, watch_every=options.watch_every)
    save(model, tokenizer, options.output)
    size = sum(file.stat().st_size for file in options.output.glob("*.safetensors"))
    print(f"wrote {options.output}: {model.num_parameters():,} parameters, {size:,} bytes of weights")


if __name__ == "__main__":
    main()
