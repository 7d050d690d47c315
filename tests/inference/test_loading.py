"""Loading bases: folders as they should be, and each way they can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flash.catalog.catalog import load_catalog
from flash.errors import ModelError
from flash.inference.loading import BaseModel, best_device, dtype_for, gap_to_cpu, load_base, load_checked

NANO = Path(load_catalog().get("flash/nano").source)


@pytest.fixture(scope="module")
def nano() -> BaseModel:
    return load_base(NANO, name="flash/nano", device="cpu")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(NANO, tmp_path / "model"))


def test_a_folder_loads_frozen_in_fp32_with_all_its_stop_tokens(nano: BaseModel) -> None:
    assert nano.name == "flash/nano" and nano.dtype == torch.float32
    assert not nano.model.training and not any(weight.requires_grad for weight in nano.model.parameters())
    generation = json.loads((NANO / "generation_config.json").read_text())["eos_token_id"]
    listed = [generation] if isinstance(generation, int) else generation
    assert set(nano.stop_ids) >= {nano.tokenizer.eos_token_id, *listed}
    assert nano.context_length >= 2048
    tokens = torch.tensor([[5, 6, 7]])
    hidden = nano.backbone(input_ids=tokens).last_hidden_state
    assert torch.allclose(hidden @ nano.head.t(), nano.model(input_ids=tokens).logits, atol=1e-5)


def test_every_place_that_lists_an_end_token_counts(copy: Path) -> None:
    path = copy / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [7, 9]}))
    base = load_base(copy, device="cpu")
    assert base.stop_ids[0] == base.tokenizer.eos_token_id
    assert {7, 9} <= set(base.stop_ids)


def test_a_dtype_can_be_asked_for() -> None:
    assert load_base(NANO, device="cpu", dtype=torch.bfloat16).head.dtype == torch.bfloat16


def test_the_device_decides_on_the_dtype() -> None:
    kinds = {name: dtype_for(torch.device(name)) for name in ("cpu", "cuda", "cuda:1", "mps")}
    assert kinds == {"cpu": torch.float32, "cuda": torch.bfloat16, "cuda:1": torch.bfloat16, "mps": torch.bfloat16}
    assert best_device() == ("cuda" if torch.cuda.is_available() else "cpu")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_wrong_folders_are_one_clear_line(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        load_base(tmp_path / "nowhere", device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="empty"):
        load_base(tmp_path / "empty", device="cpu")


def no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()


def torn_weights(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def torn_header(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def not_weights(copy: Path) -> None:
    (copy / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def a_missing_shard(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    save_file(tensors, copy / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def pickled_weights(copy: Path) -> None:
    no_weights(copy)
    torch.save({"anything": torch.zeros(1)}, copy / "pytorch_model.bin")


def a_weight_short(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})


def unknown_type(copy: Path) -> None:
    edit(copy / "config.json", model_type="martian", architectures=["MartianForCausalLM"])


def a_translator(copy: Path) -> None:
    edit(copy / "config.json", model_type="t5", architectures=["T5ForConditionalGeneration"])


def a_reward_model(copy: Path) -> None:
    edit(copy / "config.json", architectures=["Qwen3ForSequenceClassification"])


def quantised(copy: Path) -> None:
    edit(copy / "config.json", quantization_config={"quant_method": "fp8"})


def broken_config(copy: Path) -> None:
    (copy / "config.json").write_text('{"model_type": ')


def broken_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")


def no_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()


def no_template(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()


def broken_template(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("{% if %}")


def small_vocabulary(copy: Path) -> None:
    edit(copy / "config.json", vocab_size=500)


def anothers_width(copy: Path) -> None:
    edit(copy / "config.json", intermediate_size=100)


def fewer_layers(copy: Path) -> None:
    edit(copy / "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3)


def more_layers(copy: Path) -> None:
    edit(copy / "config.json", num_hidden_layers=5, layer_types=["full_attention"] * 5)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (no_weights, "it has no safetensors weights (choose"),
        (torn_weights, "model.safetensors is damaged: it is"),
        (torn_header, "model.safetensors is damaged: it is cut short, or no safetensors file"),
        (not_weights, "model.safetensors is damaged: it is cut short, or no safetensors file"),
        (a_missing_shard, "model-00002-of-00002.safetensors is damaged: it is missing"),
        (pickled_weights, "it has no safetensors weights (it has pytorch_model.bin)"),
        (a_weight_short, "its weights are incomplete: model.layers.0.self_attn.q_proj.weight is missing"),
        (unknown_type, "it is not a causal language model that this version of transformers knows"),
        (a_translator, "it is not a causal language model that this version of transformers knows"),
        (a_reward_model, "it is a Qwen3ForSequenceClassification, not a causal language model"),
        (quantised, "its weights are quantised (fp8)"),
        (broken_config, "config.json can't be read: "),
        (broken_tokenizer, "it can't be loaded: "),
        (no_tokenizer, "it can't be loaded: "),
        (no_template, "its tokenizer has no chat template"),
        (broken_template, "its chat template is broken: "),
        (small_vocabulary, "its tokenizer and its weights don't belong together: the tokenizer uses token 633"),
        (anothers_width, "its weights have other sizes than config.json says: model.layers.0.mlp.down_proj.weight is "),
        (fewer_layers, "config.json leaves out weights that are there: model.layers.3."),
        (more_layers, "its weights are incomplete: model.layers.4.input_layernorm.weight and 10 more are missing"),
    ],
)
def test_a_wrong_model_is_one_clear_line(fault: Callable[[Path], None], words: str, copy: Path) -> None:
    fault(copy)
    with pytest.raises(ModelError) as caught:
        load_base(copy, name="my/model", device="cpu")
    said = str(caught.value)
    assert said.startswith(f"my/model: {words}"), said
    assert "\n" not in said and len(said) < 400


def test_added_tokens_beyond_the_embedding_do_not_matter(copy: Path) -> None:
    """Published text models have some, for images that they never see."""
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    image = {**tokenizer["added_tokens"][-1], "id": 640, "content": "<image_soft_token>"}
    tokenizer["added_tokens"].append(image)
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert len(load_base(copy, device="cpu").tokenizer) == 641


def test_code_from_a_models_folder_never_runs(copy: Path) -> None:
    (copy / "evil.py").write_text(f"open({str(copy / 'ran')!r}, 'w')\nclass C: pass\n")
    own = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}
    edit(copy / "config.json", model_type="martian", auto_map=own)
    with pytest.raises(ModelError, match="my/model"):
        load_base(copy, name="my/model", device="cpu")
    assert not (copy / "ran").exists()


def test_an_id_that_the_hub_can_not_give_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FLASH_HOME", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        load_base("nobody/nothing-here", device="cpu")
    assert "HF_HUB_OFFLINE" in str(caught.value) and "\n" not in str(caught.value)


def test_a_device_is_trusted_by_its_numbers() -> None:
    """The check that decides on an Apple GPU: nought for equal numbers, more than its bound for a device that errs."""
    base = load_base(NANO, device="cpu")
    assert gap_to_cpu(base) == 0.0
    rounded = load_base(NANO, device="cpu", dtype=torch.bfloat16)
    assert gap_to_cpu(rounded) > 1e-3
    chosen, reason = load_checked(NANO, device="cpu")
    assert chosen.device.type == "cpu" and reason is None


def test_an_apple_gpu_that_is_not_used_means_the_cpu_and_a_reason() -> None:
    chosen, reason = load_checked(NANO, device="mps")
    if chosen.device.type == "mps":
        assert reason is None
    else:
        assert chosen.device.type == "cpu" and reason is not None and "Apple GPU is not used" in reason
