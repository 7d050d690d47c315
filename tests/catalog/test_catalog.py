"""The model catalog and the hardware list."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flash.catalog.catalog import flash_home, load_catalog
from flash.catalog.hardware import gpu_classes
from flash.errors import InvalidInput, ModelError

SHIPPED = {
    "flash/nano": 128,
    "Qwen/Qwen3.5-0.8B": 128,
    "openbmb/MiniCPM5-1B": 128,
    "Qwen/Qwen3.5-2B": 128,
    "Qwen/Qwen3.5-4B": 64,
    "Qwen/Qwen3.5-9B": 64,
    "Qwen/Qwen3.6-35B-A3B": 64,
}


@pytest.fixture
def home(tmp_path):
    return tmp_path


def test_the_promised_models_ship_with_their_caps(home):
    catalog = load_catalog(home)
    assert {entry.id: entry.rank_cap for entry in catalog} == SHIPPED
    assert all(entry.thinking and entry.shape and entry.chat.stop_ids for entry in catalog)
    assert [entry.size for entry in catalog][1:] == ["0.9B", "1.2B", "2.3B", "4.7B", "9.7B", "35B, 3B active"]


def parameters(entry):
    """Parameters of a dense transformer with this shape; layers of linear attention are not counted here."""
    s = entry.shape
    attention = s.hidden * s.head_dim * (2 * s.heads + 2 * s.kv_heads)
    layer = attention + 3 * s.hidden * s.ffn + 2 * s.hidden
    if entry.layout == "qwen3":
        layer += 2 * s.head_dim
    return s.layers * layer + s.hidden + s.vocab * s.hidden * (1 if s.tied else 2)


@pytest.mark.parametrize("model", ["flash/nano", "openbmb/MiniCPM5-1B"])
def test_dense_shapes_give_the_stated_parameters(home, model):
    entry = load_catalog(home).get(model)
    assert parameters(entry) == entry.params


def test_nano_lives_in_the_package_and_its_facts_are_its_files(home):
    entry = load_catalog(home).get("flash/nano")
    folder = Path(entry.source)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = entry.shape
    assert config["model_type"] == entry.layout
    assert config["max_position_embeddings"] == entry.context >= 2048
    assert (shape.hidden, shape.ffn, shape.layers) == (
        config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"],
    )  # fmt: skip
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (
        config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"],
    )  # fmt: skip
    assert (shape.vocab, shape.tied) == (config["vocab_size"], config["tie_word_embeddings"])
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert list(entry.chat.stop_ids) == generation["eos_token_id"]


def test_a_hub_model_is_its_own_source(home):
    assert load_catalog(home).get("Qwen/Qwen3.5-4B").source == "Qwen/Qwen3.5-4B"


@pytest.mark.parametrize(
    ("asked", "meant"),
    [("qwen/qwen3.5-4b", "Qwen/Qwen3.5-4B"), ("Qwen3.5-9B", "Qwen/Qwen3.5-9B"), ("flash/nana", "flash/nano")],
)
def test_an_unknown_id_names_the_nearest(home, asked, meant):
    with pytest.raises(ModelError) as caught:
        load_catalog(home).get(asked)
    assert f"did you mean {meant}?" in str(caught.value) and "`flash models`" in str(caught.value)


def test_an_id_like_none_gets_no_false_hint(home):
    with pytest.raises(ModelError) as caught:
        load_catalog(home).get("zzzzzz")
    assert "did you mean" not in str(caught.value)


def operator(home, text):
    (home / "models.toml").write_text(text, encoding="utf-8")
    return load_catalog(home)


ENTRY = '[[model]]\nid = "{id}"\nparams = 5_000_000\nlayout = "llama"\ncontext = 1024\n'


def test_an_operator_adds_and_replaces(home):
    catalog = operator(home, ENTRY.format(id="team/own") + 'path = "weights/own"\n' + ENTRY.format(id="flash/nano"))
    assert len(catalog.models) == len(SHIPPED) + 1
    own = catalog.get("team/own")
    assert own.source == str(home / "weights" / "own") and own.size == "5.0M" and not own.thinking
    assert catalog.get("flash/nano").context == 1024


def test_home_comes_from_the_environment(home, monkeypatch):
    monkeypatch.setenv("FLASH_HOME", str(home))
    assert "team/own" in operator(home, ENTRY.format(id="team/own"))
    assert "team/own" in load_catalog()
    assert flash_home({}) == Path.home() / ".flash"


SHAPE = (
    "shape = {{ hidden = 8, ffn = 8, layers = 2, full_layers = {full}, heads = 4, kv_heads = {kv}, head_dim = 2, "
    "vocab = 9, tied = true }}\n"
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("= 1", "models.toml: "),
        ("x = 1", "x: only [[model]] tables may stand here"),
        ("model = 3", "model: only [[model]] tables may stand here"),
        ("model = [3]", "model number 1: must be a table"),
        ('[[model]]\nid = "a"\n', "model a: params: is required and missing"),
        ("[[model]]\nparams = 1\n", "model number 1: id: is required and missing"),
        (ENTRY.format(id="a") + "colour = 1\n", "model a: colour: unknown key (docs"),
        (ENTRY.format(id="a") + "revison = 'x'\n", "model a: revison: unknown key; did you mean revision?"),
        (ENTRY.format(id="a") + "shape = { hiden = 1 }\n", "model a: shape.hidden: is required and missing"),
        (ENTRY.format(id="a") + "chat = { stop_id = [1] }\n", "chat.stop_id: unknown key; did you mean stop_ids?"),
        (ENTRY.format(id="a") + "rank_cap = 0\n", "model a: rank_cap = 0: input should be greater than or equal to 1"),
        (ENTRY.format(id="a") + "thinking = 'maybe'\n", "model a: thinking = 'maybe': "),
        (ENTRY.format(id="a b"), "id = 'a b': without a path it must be a Hugging Face id"),
        (ENTRY.format(id="a") + "path = 'x'\nrevision = 'y'\n", "model a: revision: a folder has none"),
        (ENTRY.format(id="a") + SHAPE.format(full=3, kv=2), "shape.full_layers = 3: must be at most shape.layers, 2"),
        (ENTRY.format(id="a") + SHAPE.format(full=2, kv=3), "shape.kv_heads = 3: must divide shape.heads, 4"),
        (ENTRY.format(id="a") + "experts = { count = 2, active = 3 }\n", "experts.active = 3: must be at most"),
        (ENTRY.format(id="a") + ENTRY.format(id="a"), "model a: stands there twice"),
        (ENTRY.format(id="a") + "facts = { source = 'me', date = '2026' }\n", "model a: facts.date = '2026': "),
    ],
)
def test_a_faulty_file_is_one_line(home, text, words):
    with pytest.raises(InvalidInput) as caught:
        operator(home, text)
    assert words in str(caught.value) and str(caught.value).startswith(str(home / "models.toml"))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(home))


def test_every_shipped_fact_says_where_it_comes_from(home):
    for entry in load_catalog(home):
        assert entry.facts is not None and entry.facts.source and entry.facts.date >= "2026-01", entry.id
    for gpu in gpu_classes():
        assert gpu.facts.source and gpu.facts.date >= "2026-01", gpu.name
        assert gpu.rough == ("memory" in gpu.facts.source)
        assert all(price.source and price.date for price in gpu.prices)


def test_gpu_classes_are_sorted_by_price_and_dated():
    classes = gpu_classes()
    assert [gpu.name for gpu in classes][-1] == "B200"
    assert [gpu.usd_per_hour for gpu in classes] == sorted(gpu.usd_per_hour for gpu in classes)
    h100 = next(gpu for gpu in classes if gpu.name == "H100 SXM")
    assert (h100.memory_gb, h100.bf16_tflops, h100.usd_per_hour) == (80, 989, 2.95)
    assert all(price.date >= "2026-03" for gpu in classes for price in gpu.prices)
