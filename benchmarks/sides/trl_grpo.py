"""The peer's side of `grpo_cpu`: TRL's GRPOTrainer over the same prompts, at its best settings here.

Reads a job (JSON on stdin), prints one JSON line. Runs in `.venv-peers`; knows nothing of Flash.
"""

import json
import sys
import tempfile
import time

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

# One batch a step without accumulation, no reference model, no gradient checkpointing, fused AdamW, no logging and no
# saving in the loop. Generation is transformers': vLLM has no place on two cores of a CPU.
SETTINGS = {
    "loss_type": "dr_grpo",
    "scale_rewards": "none",
    "beta": 0.0,
    "optim": "adamw_torch_fused",
    "gradient_checkpointing": False,
    "bf16": False,
    "dataloader_num_workers": 0,
}


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())


def made_up_reward(completions, **_):
    return [float(len(completion[0]["content"]) % 7) for completion in completions]


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in job["inputs"]])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    lora = LoraConfig(
        r=job["lora_rank"], lora_alpha=job["lora_alpha"], lora_dropout=0.0, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=made_up_reward,
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
            train_dataset=rows,
            peft_config=lora,
            callbacks=[clock],
            args=GRPOConfig(
                output_dir=output, max_steps=job["warmup_steps"] + job["steps"],
                per_device_train_batch_size=job["prompts"] * job["group_size"], num_generations=job["group_size"],
                max_completion_length=job["max_tokens"], generation_kwargs={"min_new_tokens": job["max_tokens"]},
                temperature=1.0, learning_rate=job["learning_rate"], lr_scheduler_type="constant",
                adam_beta1=0.9, adam_beta2=0.95, max_grad_norm=1.0, weight_decay=0.0,
                save_strategy="no", logging_strategy="no", report_to="none", use_cpu=True, seed=0,
                disable_tqdm=True, **SETTINGS,
            ),
        )  # fmt: skip
        trainer.train()
    seconds = clock.ends[-1] - clock.ends[job["warmup_steps"] - 1]
    print(json.dumps({"seconds_per_step": seconds / job["steps"], "settings": SETTINGS}))


if __name__ == "__main__":
    main()
