"""LoRA layers and their files, held against PEFT on tiny random models."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flash.errors import ModelError
from flash.inference.lora import CONFIG_FILE, WEIGHTS_FILE, Adapter, Adapters, LoraPair, save_adapter

LAYOUTS = ["qwen3", "llama", "qwen3_5", "qwen3_5_moe"]
TOKENS = torch.arange(3, 23).view(2, 10)


def tiny(layout: str = "qwen3") -> torch.nn.Module:
    torch.manual_seed(0)
    common = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128,
    }
    if layout == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**common)).eval()
    if layout == "llama":
        return LlamaForCausalLM(LlamaConfig(**common, tie_word_embeddings=False)).eval()
    common |= {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    }
    if layout == "qwen3_5":
        return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**common)).eval()
    common |= {
        "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2,
        "initializer_range": 0.2,
    }
    return Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**common)).eval()


def stir(adapter: Adapter, seed: int = 1) -> None:
    """Gives B values, so that the adapter changes what the model says."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for pair in adapter.pairs.values():
            pair.B.normal_(std=0.1, generator=generator)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_peft_loads_the_files_and_gives_the_same_logits(layout: str, tmp_path: Path) -> None:
    model = tiny(layout)
    adapters = Adapters(model)
    stir(adapters.create("run", rank=4, alpha=6, seed=0))
    save_adapter(adapters["run"], tmp_path, base_model="tiny")
    with adapters.active("run"):
        ours = logits(model)

    theirs = logits(PeftModel.from_pretrained(tiny(layout), tmp_path))

    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours - logits(model)).abs().max() > 0.01


@pytest.mark.parametrize("layout", ["qwen3", "qwen3_5_moe"])
def test_a_folder_that_peft_saved_loads_here_and_is_saved_as_it_was(layout: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    # PEFT's own default: experts with the linear layers' rank
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if layout == "qwen3_5_moe" else None
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", target_parameters=stacks,
                        init_lora_weights=False, use_rslora=True, task_type="CAUSAL_LM")
    peft_model = get_peft_model(tiny(layout), config).eval()
    peft_model.save_pretrained(tmp_path / "theirs")

    model = tiny(layout)
    adapters = Adapters(model)
    adapters.load("theirs", tmp_path / "theirs")
    with adapters.active("theirs"):
        assert torch.allclose(logits(model), logits(peft_model), rtol=1e-5, atol=1e-5)
    save_adapter(adapters["theirs"], tmp_path / "ours", base_model="tiny")
    again = PeftModel.from_pretrained(tiny(layout), tmp_path / "ours")
    assert torch.allclose(logits(again), logits(peft_model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("qwen3", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
        ("llama", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
        ("qwen3_5", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj "
                    "in_proj_qkv in_proj_z in_proj_b in_proj_a out_proj"),
        ("qwen3_5_moe", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj shared_expert_gate "
                        "in_proj_qkv in_proj_z in_proj_b in_proj_a out_proj"),
    ],
)
def test_every_linear_layer_of_the_language_model_is_adapted_and_no_other(layout: str, names: str) -> None:
    adapter = Adapters(tiny(layout)).create("a", rank=2, alpha=2, seed=0)
    assert adapter.target_modules() == sorted(names.split())
    assert not [path for path in adapter.pairs if "lm_head" in path or "embed" in path or path.endswith("mlp.gate")]
    stacks = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert adapter.target_parameters() == (stacks if layout == "qwen3_5_moe" else [])


@pytest.mark.parametrize(("rank", "of_experts"), [(8, 4), (5, 2), (1, 1)])
def test_experts_get_the_rank_divided_by_those_at_work_and_the_same_scale(rank: int, of_experts: int) -> None:
    adapter = Adapters(tiny("qwen3_5_moe")).create("a", rank=rank, alpha=6, seed=0)
    ranks = {path: pair.A.shape[-2] for path, pair in adapter.pairs.items()}
    assert {rank for path, rank in ranks.items() if ".experts." in path} == {of_experts}
    assert {rank for path, rank in ranks.items() if ".experts." not in path} == {rank}
    assert {pair.scaling for pair in adapter.pairs.values()} == {6 / rank}


def test_experts_without_an_adapter_are_the_models_own() -> None:
    """As near as the model's own fp32 experts come to its result in fp64; how near that is differs by processor."""
    model, exact = tiny("qwen3_5_moe"), tiny("qwen3_5_moe").double()
    exact.set_experts_implementation("eager")  # the grouped product knows no fp64
    rounding = (logits(model) - logits(exact)).abs().max()
    assert rounding < 1e-4
    Adapters(model)
    assert (logits(model) - logits(exact)).abs().max() < 2 * rounding


def test_a_new_adapter_changes_nothing_until_trained_and_a_seed_fixes_it() -> None:
    model = tiny()
    before = logits(model)
    adapters = Adapters(model)
    first = adapters.create("first", rank=4, alpha=8, seed=7)
    again = adapters.create("again", rank=4, alpha=8, seed=7)
    other = adapters.create("other", rank=4, alpha=8, seed=8)
    with adapters.active("first"):
        assert torch.equal(logits(model), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.parameters()[0], other.parameters()[0])


def test_adapters_switch_and_nest_and_the_base_is_never_written_to() -> None:
    model = tiny()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    base = logits(model)
    adapters = Adapters(model)
    stir(adapters.create("one", rank=4, alpha=8, seed=0), seed=1)
    stir(adapters.create("two", rank=2, alpha=8, seed=0), seed=2)
    with adapters.active("one"):
        one = logits(model)
        with adapters.active("two"):
            two = logits(model)
        with adapters.active(None):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), one)
    assert not torch.equal(one, two)
    assert torch.equal(logits(model), base)
    adapters.remove("one")
    with pytest.raises(ModelError, match="one"), adapters.active("one"):
        pass
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_adapter_has_gradients_and_they_are_those_of_peft(layout: str, tmp_path: Path) -> None:
    model = tiny(layout)
    adapters = Adapters(model)
    stir(adapters.create("run", rank=4, alpha=8, seed=0))
    save_adapter(adapters["run"], tmp_path, base_model="tiny")
    with adapters.active("run"):
        model(TOKENS).logits.square().sum().backward()
    peft_model = PeftModel.from_pretrained(tiny(layout), tmp_path, is_trainable=True)
    peft_model(TOKENS).logits.square().sum().backward()
    theirs = {name.replace(".default", ""): weight.grad for name, weight in peft_model.named_parameters()}
    ours = Adapter(adapters["run"].shape, {
        path: LoraPair(pair.A.grad, pair.B.grad, pair.scaling) for path, pair in adapters["run"].pairs.items()
    })  # fmt: skip
    for name, grad in ours.tensors().items():
        assert torch.allclose(grad, theirs[name], rtol=1e-4, atol=1e-4), name
    assert all(weight.grad is None for weight in model.parameters())


def test_saving_twice_gives_the_same_bytes_and_loading_the_same_weights(tmp_path: Path) -> None:
    adapters = Adapters(tiny())
    stir(adapters.create("run", rank=4, alpha=8, seed=0))
    digests = set()
    for folder in (tmp_path / "a", tmp_path / "b"):
        save_adapter(adapters["run"], folder, base_model="tiny", revision="abc")
        digests.add(hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest())
    assert len(digests) == 1
    loaded = adapters.load("again", tmp_path / "a")
    pairs = zip(loaded.parameters(), adapters["run"].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(weight.requires_grad for weight in loaded.parameters())


def test_bf16_bases_keep_their_dtype_and_fp32_adapters() -> None:
    model = tiny().to(torch.bfloat16)
    adapters = Adapters(model)
    stir(adapters.create("run", rank=4, alpha=8, seed=0))
    with adapters.active("run"):
        out = model(TOKENS).logits
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert {weight.grad.dtype for weight in adapters["run"].parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 8}, "does not fit"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": None}, "valid r"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"target_parameters": ["embed_tokens.weight"]}, "embed_tokens"),
        ({"target_parameters": ["mlp.experts.down_proj"], "rank_pattern": {"mlp.experts.down_proj": 2}}, "scales"),
    ],
)
def test_files_that_are_no_plain_lora_for_this_base_are_refused(
    change: dict, message: str, tmp_path: Path
) -> None:
    adapters = Adapters(tiny())
    save_adapter(adapters.create("run", rank=4, alpha=8, seed=0), tmp_path, base_model="tiny")
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=message):
        adapters.load("again", tmp_path)


def test_another_base_and_broken_files_are_refused(tmp_path: Path) -> None:
    adapters = Adapters(tiny("qwen3_5"))
    save_adapter(adapters.create("run", rank=4, alpha=8, seed=0), tmp_path, base_model="tiny")
    with pytest.raises(ModelError, match=r"another base|does not fit"):
        Adapters(tiny()).load("a", tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"torn")
    with pytest.raises(ModelError, match="can't be read"):
        adapters.load("a", tmp_path)
    with pytest.raises(ModelError, match="not an adapter folder"):
        adapters.load("a", tmp_path / "nowhere")
