"""The peer's side of `sft_cpu` and `waits`: TRL's SFTTrainer over the same pre-tokenised rows, at its best settings.

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
from trl import SFTConfig, SFTTrainer

# What was tried on two cores and kept: grouping by length beats random order (less padding), fused AdamW beats
# the default, no gradient checkpointing, loss on the completion only, no logging and no saving in the loop.
SETTINGS = {
    "train_sampling_strategy": "group_by_length",
    "optim": "adamw_torch_fused",
    "gradient_checkpointing": False,
    "completion_only_loss": True,
    "bf16": False,
    "dataloader_num_workers": 0,
}


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.time())  # as the process that started this one reads it too


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    rows = Dataset.from_list(job["rows"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    lora = LoraConfig(
        r=job["lora_rank"], lora_alpha=job["lora_alpha"], lora_dropout=0.0, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model=model,
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
            train_dataset=rows,
            peft_config=lora,
            callbacks=[clock],
            args=SFTConfig(
                output_dir=output, max_steps=job["warmup_steps"] + job["steps"],
                per_device_train_batch_size=job["batch_size"], max_length=job["max_length"],
                learning_rate=job["learning_rate"], lr_scheduler_type="linear", warmup_steps=1,
                adam_beta1=0.9, adam_beta2=0.95, max_grad_norm=1.0, weight_decay=0.0,
                save_strategy="no", logging_strategy="no", report_to="none", use_cpu=True, seed=0,
                disable_tqdm=True, **SETTINGS,
            ),
        )
        trainer.train()
    seconds = clock.ends[-1] - clock.ends[job["warmup_steps"] - 1]
    print(json.dumps({
        "rows_per_s": job["steps"] * job["batch_size"] / seconds,
        "seconds_per_step": seconds / job["steps"],
        "first_step_ended_at": clock.ends[0],
        "settings": SETTINGS,
    }))


if __name__ == "__main__":
    main()
