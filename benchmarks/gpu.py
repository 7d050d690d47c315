"""Our side of the GPU rows: SFT and GRPO on true shapes with made-up weights, in bf16. Nothing is downloaded.

    python benchmarks/gpu.py                         # Qwen3-0.6B and 4B on cuda, into results/gpu.json
    python benchmarks/gpu.py --device cpu --shapes tiny    # tries the script itself, and writes nothing

SFT: rows of full length, the trainer's own pass, head and optimizer. GRPO: 16 prompts, 8 samples of 256 tokens each by
the trainer's own sampler, and an update on them. The peers' side of these rows is not written yet.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from benchmarks.measure import write_result
from transformers import AutoModelForCausalLM, Qwen3Config

from flash.config.recipes import resolve
from flash.config.run import RunConfig, RunSpec
from flash.environments.protocol import EpisodeStart, Score
from flash.inference.engine import Request, Sampling
from flash.inference.loading import BaseModel
from flash.inference.lora import Adapters
from flash.inference.torch_engine import TorchEngine
from flash.training.batches import collate, micro_batches
from flash.training.losses import negative_log_likelihood
from flash.training.optimizer import Gradients, build_optimizer, optimizer_step
from flash.training.policy import Policy, build_policy
from flash.training.rollouts import Episode, Group, Prompt
from flash.training.updating import Updater

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, as the makers say


@dataclass(frozen=True)
class Job:
    """Sizes of the model, and of the work on it."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int = 151_936
    rows: int = 32
    length: int = 2048
    prompts: int = 16
    samples: int = 8
    prompt_length: int = 256
    new_tokens: int = 256
    steps: int = 5


JOBS = {
    "qwen3-0.6b": Job(28, 1024, 3072, 16, 8),
    "qwen3-4b": Job(36, 2560, 9728, 32, 8),
    "tiny": Job(
        2, 64, 128, 4, 2, vocab=1000, rows=4, length=64, prompts=2, samples=2, prompt_length=8, new_tokens=8, steps=2
    ),
}


def made_up(job: Job, device: torch.device) -> BaseModel:
    config = Qwen3Config(
        vocab_size=job.vocab, hidden_size=job.hidden, intermediate_size=job.ffn, num_hidden_layers=job.layers,
        num_attention_heads=job.heads, num_key_value_heads=job.kv_heads, head_dim=128, tie_word_embeddings=True,
        max_position_embeddings=40_960,
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return BaseModel(
        "made up", None, model.eval(), None, Adapters(model), (0,), 0, 40_960, device, torch.bfloat16
    )


def spec_of(algorithm: str, job: Job) -> RunSpec:
    train: dict[str, Any] = {"lora_rank": 32, "lora_alpha": 64}
    if algorithm == "grpo":
        train |= {"batch_size": job.prompts, "group_size": job.samples, "max_tokens": job.new_tokens}
    else:
        train |= {"batch_size": job.rows, "max_length": job.length}
    document = {"model": "flash/nano", "algorithm": algorithm, "environment": {"id": "local/bench"}, "train": train}
    return resolve(RunConfig.model_validate(document), seed=0)


def seconds_of(device: torch.device, work: Any) -> tuple[float, Any]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, result


def sft(job: Job, policy: Policy) -> dict[str, float]:
    """Tokens a second over whole optimizer steps, the first left out."""
    spec, parameters = spec_of("sft", job), policy.parameters()
    optimizer = build_optimizer(parameters, spec.recipe, learning_rate=1e-4)
    rows = torch.randint(1, job.vocab, (job.rows, job.length)).tolist()
    budget = spec.recipe.micro_batch_tokens

    def step(number: int) -> None:
        gradients = Gradients(parameters)
        for chosen in micro_batches([job.length] * job.rows, token_budget=budget, overhead_tokens=2048):
            picked = [rows[int(place)] for place in chosen]
            masks = [[True] * job.length] * len(picked)
            batch = collate(picked, masks, pad_id=0, device=policy.base.device)
            with policy.base.adapters.active(policy.name):
                loss = negative_log_likelihood(policy.logprobs(batch), normaliser=job.rows * job.length)
                gradients.add(loss)
        gradients.apply()
        optimizer_step(optimizer, parameters, rate=1e-4, max_grad_norm=1.0, step=number)

    step(1)
    taken = [seconds_of(policy.base.device, lambda n=n: step(n))[0] for n in range(2, job.steps + 2)]
    seconds = statistics.median(taken)
    # forward, and backward to the activations: 2 each for every weight and token; frozen weights get no gradient
    weights = sum(weight.numel() for weight in policy.base.model.parameters())
    tokens = job.rows * job.length / seconds
    return {"tokens_per_s": tokens, "seconds_per_step": seconds, "flops": 4.0 * weights * tokens}


def grpo(job: Job, policy: Policy) -> dict[str, float]:
    """Seconds of sampling and of one update."""
    spec = spec_of("grpo", job)
    optimizer = build_optimizer(policy.parameters(), spec.recipe, learning_rate=1e-5)
    engine = TorchEngine(policy.base, ignore_stop_ids=True)
    updater = Updater(spec, policy, optimizer, mismatch_limit=float("inf"))
    prompts = [
        Prompt(row, row, EpisodeStart([], 1), tuple(torch.randint(1, job.vocab, (job.prompt_length,)).tolist()))
        for row in range(job.prompts)
    ]
    sampling = Sampling(job.new_tokens, temperature=1.0, seed=1)
    requests = [Request(p.tokens, sampling, n=job.samples, adapter=policy.name) for p in prompts]
    found: list[dict[str, float]] = []
    for number in range(1, job.steps + 2):
        sampled, completions = seconds_of(policy.base.device, lambda: engine.generate(requests))
        groups = []
        for prompt, group in zip(prompts, completions, strict=True):
            episodes = [Episode.opened(prompt) for _ in group]
            for episode, completion in zip(episodes, group, strict=True):
                episode.act(completion)
            groups.append(Group(prompt, episodes, [Score(float(n % 2)) for n in range(len(group))]))
        updated, told = seconds_of(policy.base.device, lambda g=groups, n=number: updater.update(g, step=n))
        found.append({"sampling": sampled, "update": updated, "mismatch_kl": told["mismatch_kl"]})
    whole = {name: statistics.median(each[name] for each in found[1:]) for name in found[0]}
    tokens = job.prompts * job.samples * job.new_tokens
    seconds = whole["sampling"] + whole["update"]
    return {"seconds_per_step": seconds, **whole, "sampled_tokens_per_s": tokens / whole["sampling"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=JOBS, default=["qwen3-0.6b", "qwen3-4b"])
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: there is no CUDA device (--device cpu --shapes tiny tries the script)")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in gpu), None)
    results: dict[str, Any] = {}
    for shape in chosen.shapes:
        job, measured = JOBS[shape], {}
        for work in (sft, grpo):
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            told = work(job, build_policy(made_up(job, device), rank=32, alpha=64, seed=0))
            if peak is not None and "flops" in told:
                told["share_of_peak"] = told["flops"] / peak
            if device.type == "cuda":
                told["peak_memory_bytes"] = float(torch.cuda.max_memory_reserved(device))
            measured[work.__name__] = told
        results[shape] = {"job": vars(job), **measured}
        print(json.dumps({shape: measured}))
    if device.type == "cuda":
        settings = {"precision": "bf16 base, fp32 adapter", "lora_rank": 32, "attention": "sdpa", "packing": False}
        print(write_result("gpu", {"gpu": gpu, "settings": settings, "shapes": results}))


if __name__ == "__main__":
    main()
