"""One SFT step of a random model in a process of its own: prints its peak memory and the estimate as JSON.

`one_step.py ENTRY TOKENS RANK`: ENTRY is a catalog entry as JSON, TOKENS the length of the one row.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, __file__.rpartition("/")[0])

from flash.catalog.catalog import ModelEntry
from flash.catalog.fit import memory_needed
from flash.inference.loading import BaseModel
from flash.inference.lora import Adapters
from flash.training.batches import collate
from flash.training.losses import negative_log_likelihood
from flash.training.optimizer import build_optimizer, optimizer_step
from flash.training.policy import NAME, Policy, lean_forward, model_forward
from flash.worker.trainer import peak_memory
from layouts import config_of, spec_of

torch.set_num_threads(1)
entry, tokens, rank = ModelEntry.model_validate_json(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
spec = spec_of(entry, "sft", max_length=tokens, batch_size=1, lora_rank=rank)
# as a checkpoint is loaded: without drawing random numbers for every weight
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config_of(entry), attn_implementation="sdpa")
model = model.to_empty(device="cpu").eval()
model.tie_weights()  # to_empty gives tied weights memory of their own
for name, value in [*model.named_parameters(), *model.named_buffers()]:
    value.data.fill_(1.0 if "norm" in name else 0.01) if value.is_floating_point() else None
base = BaseModel("x", None, model, None, Adapters(model), (0,), 0, tokens, torch.device("cpu"), torch.float32)
adapter = base.adapters.create(NAME, rank=rank, alpha=rank, seed=0)
lean = lean_forward(base)
policy = Policy(base, adapter, lean or model_forward(base))
optimizer = build_optimizer(policy.parameters(), spec.recipe, learning_rate=1e-4)
row = list(range(3, 3 + tokens))
batch = collate([row], [[False] * 8 + [True] * (tokens - 8)], pad_id=0, device=base.device)
before = peak_memory("cpu")
negative_log_likelihood(policy.logprobs(batch), normaliser=tokens).backward()
optimizer_step(optimizer, policy.parameters(), rate=1e-4, max_grad_norm=1.0, step=1)
peak = peak_memory("cpu")
estimate = memory_needed(spec, entry, "cpu")
print(json.dumps({"peak": peak, "before": before, "estimate": estimate.total, "parts": estimate.parts}))
