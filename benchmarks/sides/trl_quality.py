"""The peer's side of `quality`: TRL's trainers over the same rows, at the settings of the other benchmarks.

Reads a job (JSON on stdin), prints one JSON line. Runs in `.venv-peers`; knows nothing of Flash.
"""

import json
import sys
import tempfile
import time

import torch
from datasets import Dataset
from exact_match import reward
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer


class Curve(TrainerCallback):
    """(seconds on a clock of its own, score) of each step."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        score = logs["reward"] if "reward" in logs else -logs["loss"] if "loss" in logs else None
        if score is not None:
            self.points.append((time.perf_counter(), score))


def exact_match(completions, output, **_):
    return [reward(each[0]["content"], gold) for each, gold in zip(completions, output, strict=True)]


def trainer(job, output, curve):
    train, grpo = job["train"], job["algorithm"] == "grpo"
    rows = [{"prompt": [{"role": "user", "content": row["input"]}], "output": row["output"]} for row in job["rows"]]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    common = {
        "output_dir": output, "max_steps": job["steps"], "learning_rate": train["learning_rate"],
        "lr_scheduler_type": job["schedule"], "warmup_steps": job["warmup"], "adam_beta1": 0.9, "adam_beta2": 0.95,
        "max_grad_norm": 1.0, "weight_decay": 0.0, "optim": "adamw_torch_fused", "gradient_checkpointing": False,
        "bf16": False, "dataloader_num_workers": 0, "save_strategy": "no", "logging_steps": 1, "report_to": "none",
        "use_cpu": True, "seed": job["seed"], "disable_tqdm": True,
    }  # fmt: skip
    shared = {
        "model": model, "processing_class": AutoTokenizer.from_pretrained(job["model"]), "callbacks": [curve],
        "peft_config": LoraConfig(
            r=train["lora_rank"], lora_alpha=train["lora_alpha"], lora_dropout=0.0, target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    }  # fmt: skip
    if grpo:
        return GRPOTrainer(
            **shared,
            train_dataset=Dataset.from_list(rows),
            reward_funcs=exact_match,
            args=GRPOConfig(
                **common, per_device_train_batch_size=train["batch_size"] * train["group_size"],
                num_generations=train["group_size"], max_completion_length=train["max_tokens"], temperature=1.0,
                loss_type="dr_grpo", scale_rewards="none", beta=0.0,
                chat_template_kwargs={"enable_thinking": job["thinking"]},
            ),
        )  # fmt: skip
    return SFTTrainer(
        **shared,
        train_dataset=Dataset.from_list(job["tokens"]),
        args=SFTConfig(
            **common, per_device_train_batch_size=train["batch_size"], max_length=train["max_length"],
            train_sampling_strategy="group_by_length", completion_only_loss=True,
        ),
    )  # fmt: skip


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    curve = Curve()
    with tempfile.TemporaryDirectory() as output:
        trainer(job, output, curve).train()
    print(json.dumps({"curve": curve.points}))


if __name__ == "__main__":
    main()
