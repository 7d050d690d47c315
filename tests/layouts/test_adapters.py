"""What a run leaves on every layout: PEFT loads it with equal logits, and it keeps to vLLM's rules."""

from __future__ import annotations

import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from tests.layouts.checkpoints import LAYOUTS, Layout
from tests.layouts.proofs import proves
from tests.layouts.runs import Run, sft_spec
from transformers import AutoModelForCausalLM

from flash.catalog.catalog import load_catalog
from flash.catalog.deploying import VLLM_RANKS
from flash.catalog.shapes import LAYOUTS as KNOWN_LAYOUTS
from flash.client.engines import install_vllm
from flash.errors import InvalidInput
from flash.inference.loading import BaseModel, load_base
from flash.inference.lora import CONFIG_FILE, WEIGHTS_FILE, save_adapter
from flash.inference.vllm_adapters import is_wrapped, room_for, served_form

ROOT = Path(__file__).parents[2]
TOKENS = torch.arange(3, 63).view(2, 30)
# What vLLM wraps with adapters in each layout's model; packed modules by the parts that checkpoints name.
DENSE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
DELTA = {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"}
SERVABLE = {
    "qwen3": DENSE, "llama": DENSE, "qwen3_5": DENSE | DELTA,
    "qwen3_5_moe": DENSE | DELTA | {"shared_expert_gate", "experts"},
}  # fmt: skip


@pytest.fixture
def adapter(base: BaseModel, train: Run) -> Path:
    """The adapter folder of a short run."""
    result, _ = train(sft_spec(base.name, max_steps=3))
    assert result.checkpoint is not None
    return result.checkpoint / "adapter"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def layer_of(key: str) -> str:
    """The module that a tensor of an adapter file belongs to, as the checkpoint names it."""
    return re.sub(r"(\.base_layer)?\.lora_[AB]\.weight$", "", key.removeprefix("base_model.model."))


@proves("PEFT")
def test_peft_loads_what_a_run_saved_with_equal_logits(base: BaseModel, folder: Path, adapter: Path) -> None:
    with base.adapters.active("policy"):
        ours = logits(base.model)
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = logits(PeftModel.from_pretrained(own, adapter).eval())
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=2e-5)
    assert (ours - logits(base.model)).abs().max() > 0.01


@proves("PEFT")
def test_the_adapted_layers_are_pefts_all_linear_and_the_routed_experts(
    layout: Layout, base: BaseModel, folder: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    linear = get_peft_model(own, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    expected = {layer_of(name) for name, _ in linear.named_parameters() if "lora_A" in name}
    expected = {name.removesuffix(".lora_A.default.weight") for name in expected}
    adapted = base.adapters.create("a", rank=4, alpha=4, seed=0)
    assert {path for path, pair in adapted.pairs.items() if pair.A.dim() == 2} == expected
    stacks = {path for path, pair in adapted.pairs.items() if pair.A.dim() == 3}
    of_layer = {re.sub(r"\d+", "N", path) for path in stacks}
    experts = {f"model.layers.N.mlp.experts.{name}_proj" for name in ("gate_up", "down")}
    assert of_layer == (experts if layout.layout == "qwen3_5_moe" else set())


def test_no_vision_tower_router_prediction_layer_or_head_is_adapted(adapter: Path) -> None:
    with safe_open(adapter / WEIGHTS_FILE, "pt") as file:
        names = list(file.keys())
    assert names and all(name.startswith("base_model.model.model.layers.") for name in names)
    assert not [name for name in names if re.search(r"visual|mtp|lm_head|embed|mlp\.gate\.|router|norm|conv1d", name)]


@proves("vLLM naming")
def test_every_layer_has_the_name_of_a_weight_in_the_checkpoint(
    layout: Layout, folder: Path, adapter: Path, tmp_path: Path
) -> None:
    """vLLM maps a checkpoint's names and an adapter's by one table: what it loads the one by, it finds the other by."""
    weights = set()
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            weights.update(file.keys())
    assert is_wrapped(folder) == layout.wrapped
    served = served_form(adapter, folder, tmp_path / "copies")
    assert (served == adapter) == (not layout.wrapped)
    layers = {layer_of(name) for name in load_file(served / WEIGHTS_FILE)}
    assert {layer.rsplit(".", 1)[1] for layer in layers} == SERVABLE[layout.layout]
    for layer in layers:
        if layer.endswith(".experts"):
            assert f"{layer}.0.gate_proj.weight" in weights or f"{layer}.gate_up_proj" in weights
        else:
            assert f"{layer}.weight" in weights
    with safe_open(adapter / WEIGHTS_FILE, "pt") as ours, safe_open(served / WEIGHTS_FILE, "pt") as theirs:
        assert len(list(ours.keys())) == len(list(theirs.keys()))


@proves("vLLM naming")
def test_ranks_and_scales_are_what_vllm_can_hold(layout: Layout, adapter: Path) -> None:
    config = json.loads((adapter / CONFIG_FILE).read_text())
    assert config["bias"] == "none" and not config["modules_to_save"] and not config["use_dora"]
    assert max([config["r"], *config["rank_pattern"].values()]) == config["r"] <= room_for(config["r"]) == 8
    scale = config["lora_alpha"] / config["r"]
    for name, rank in config["rank_pattern"].items():
        assert math.isclose(config["alpha_pattern"][name] / rank, scale)  # older ones know one scale for all
    tensors = load_file(adapter / WEIGHTS_FILE)
    experts = 8  # of the tiny mixture, two of which work on a token: half the rank
    for name, tensor in tensors.items():
        rows = tensor.shape[0 if "lora_A" in name else 1]
        assert rows == (experts * 4 if ".experts." in name else 8)


def test_every_models_cap_fits_into_vllm() -> None:
    for entry in load_catalog(Path("/nowhere")):
        assert room_for(entry.rank_cap) == entry.rank_cap
    assert [room_for(rank) for rank in (1, 8, 9, 65, 512)] == [8, 8, 16, 128, 512]
    with pytest.raises(InvalidInput, match="up to rank 512"):
        room_for(VLLM_RANKS[-1] + 1)


def test_the_table_has_a_row_for_every_layout_and_model_of_the_catalog() -> None:
    assert {layout.layout for layout in LAYOUTS.values()} == set(KNOWN_LAYOUTS)
    entries = {entry.id: entry.layout for entry in load_catalog(Path("/nowhere"))}
    assert {model: layout.layout for layout in LAYOUTS.values() for model in layout.models} == entries


@pytest.fixture(scope="session")
def read_by_vllm(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """For each layout an adapter folder, and what vLLM's loader makes of the form that it is served in."""
    installed = install_vllm(ROOT / ".venv-vllm", cpu=True)
    adapters, asked = {}, {}
    for name, folder in checkpoints.items():
        adapters[name] = tmp_path_factory.mktemp("adapter")
        adapter = load_base(folder, device="cpu").adapters.create("a", rank=8, alpha=16, seed=0)
        save_adapter(adapter, adapters[name], base_model=name)
        served = served_form(adapters[name], folder, adapters[name] / "copies")
        asked[name] = {"folder": str(served), "rank": 8, "expected": sorted(SERVABLE[LAYOUTS[name].layout])}
    answer = subprocess.run(
        [str(installed.python), str(Path(__file__).with_name("vllm_reads.py"))],
        input=json.dumps(asked), capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    found = json.loads(answer.stdout.splitlines()[-1])
    return {name: (folder, found[name]) for name, folder in adapters.items()}


@pytest.mark.slow
@proves("vLLM naming")
def test_vllms_own_loader_finds_every_layer(
    layout: Layout, read_by_vllm: dict[str, tuple[Path, dict[str, Any]]]
) -> None:
    adapter, found = read_by_vllm[layout.name]
    prefix = "language_model.model.layers." if layout.wrapped else "model.layers."
    ours = load_file(adapter / WEIGHTS_FILE)
    assert len(found) == len(ours) / 2
    for name, lora in found.items():
        assert name.startswith(prefix)
        assert lora["scaling"] == 2.0 and lora["rank"] == (4 if ".experts" in name else 8)
        stem = f"base_model.model.model.layers.{name.removeprefix(prefix)}"
        assert lora["A"] == list(ours[f"{stem}.lora_A.weight"].shape)
