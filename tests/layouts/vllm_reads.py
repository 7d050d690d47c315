"""Run by vLLM's own interpreter: reads adapter folders with vLLM's own loader and prints what it found.

Takes a JSON object on standard input: {name: {"folder", "rank", "expected"}}, where `expected` are the modules that the
model offers. The names are mapped as vLLM's class for Qwen3.5's vision-language checkpoints maps them; importing that
class needs image libraries that its CPU build does without.
"""

import json
import sys

from vllm.config.lora import LoRAConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.models.utils import WeightsMapper

mapper = WeightsMapper(orig_to_new_prefix={"model.language_model.": "language_model.model."})
answer = {}
for name, asked in json.load(sys.stdin).items():
    helper = PEFTHelper.from_local_dir(asked["folder"], max_position_embeddings=4096)
    helper.validate_legal(LoRAConfig(max_lora_rank=asked["rank"]))
    found = LoRAModel.from_local_checkpoint(
        asked["folder"], set(asked["expected"]), helper, lora_model_id=1, device="cpu", weights_mapper=mapper,
        skip_prefixes=["mtp."],
    )  # fmt: skip
    answer[name] = {
        layer: {"rank": lora.rank, "scaling": lora.scaling, "A": list(lora.lora_a.shape), "B": list(lora.lora_b.shape)}
        for layer, lora in found.loras.items()
    }
print(json.dumps(answer))
