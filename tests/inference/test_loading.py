"""Loading bases: folders as they should be, and each way they can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flash.catalog.catalog import load_catalog
from flash.errors import ModelError
from flash.inference.loading import BaseModel, gap_to_cpu, load_base, load_checked

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


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_wrong_folders_are_one_clear_line(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        load_base(tmp_path / "nowhere", device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="empty"):
        load_base(tmp_path / "empty", device="cpu")


@pytest.mark.parametrize(
    "fault", ["no weights", "torn weights", "unknown type", "no template", "pickled weights", "a layer short"]
)
def test_a_broken_model_is_one_clear_line(fault: str, copy: Path) -> None:
    weights = copy / "model.safetensors"
    if fault == "no weights":
        weights.unlink()
    elif fault == "torn weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif fault == "unknown type":
        edit(copy / "config.json", model_type="martian", architectures=["Martian"])
    elif fault == "a layer short":
        tensors = load_file(weights)
        del tensors["model.layers.0.self_attn.q_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif fault == "no template":
        (copy / "chat_template.jinja").unlink()
    else:
        weights.unlink()
        torch.save({"anything": torch.zeros(1)}, copy / "pytorch_model.bin")
    with pytest.raises(ModelError) as caught:
        load_base(copy, name="my/model", device="cpu")
    assert str(caught.value).startswith("my/model: ") and "\n" not in str(caught.value)


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
