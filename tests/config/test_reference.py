"""The generated reference against the documented one, key by key; schema, page and starter."""

from __future__ import annotations

from pathlib import Path

import pytest

from flash.config import reference
from flash.config.load import load_config, parse_config
from flash.config.recipes import train_defaults
from flash.config.run import ALGORITHMS, keys_of

ROOT = Path(__file__).resolve().parents[2]

# The configuration as its users were promised it: key, type, default. "recipe" is the recipe's business,
# "-" is no default. `steps` has its default in words there.
PROMISED = """
model                               string        required
algorithm                           string        sft
thinking                            bool          false
environment.id                      string        required
environment.params                  table         {}
environment.pip                     list[string]  []
environment.secrets                 list[string]  []
train.lora_rank                     int           32
train.lora_alpha                    int           64
train.learning_rate                 float         recipe
train.batch_size                    int           recipe
train.max_length                    int           recipe
train.save_every                    int           recipe
train.init_from_adapter             string        -
train.epochs                        int           recipe
train.max_steps                     int           0
train.max_examples                  int           0
train.steps                         int           150
train.group_size                    int           recipe
train.temperature                   float         recipe
train.max_tokens                    int           recipe
train.kl_penalty_coef               float         recipe
train.advantage_clip                float         -
train.thinking_length_penalty_coef  float         recipe
train.stop_sequences                list[string]  recipe
worker_env                          table         {}
wandb.project                       string        -
wandb.run_name                      string        -
"""
PROMISED_ROWS = [tuple(line.split()) for line in PROMISED.split("\n") if line]
SFT_ONLY = {"epochs", "max_steps", "max_examples"}
GRPO_ONLY = {"steps", "group_size", "temperature", "max_tokens", "kl_penalty_coef", "advantage_clip",
             "thinking_length_penalty_coef", "stop_sequences"}  # fmt: skip
KEYS = {key.dotted: key for key in reference.all_keys()}


def test_no_key_is_missing_and_none_is_extra():
    assert set(KEYS) == {name for name, _, _ in PROMISED_ROWS}


@pytest.mark.parametrize(("name", "type_", "default"), PROMISED_ROWS)
def test_type_and_default(name, type_, default):
    key = KEYS[name]
    assert key.type == type_
    assert key.required == (default == "required")
    if default in ("required", "-"):
        assert key.default is None
    elif key.default is not None:
        shown = {"sft": '"sft"'}.get(default, default)
        assert reference._default_cell(key) == f"`{shown}`"
    else:
        filled = train_defaults(key.algorithm or "sft", "", False)[key.name]
        assert filled is not None
        assert default == "recipe" or str(filled) == default


def test_keys_belong_to_their_algorithm():
    assert keys_of("sft") == SFT_ONLY and keys_of("grpo") == GRPO_ONLY


def test_every_key_has_a_sentence_and_the_page_shows_it():
    page = reference.markdown()
    for key in KEYS.values():
        assert key.text.endswith(".") and len(key.text) > 10
        assert f"| `{key.name}` | {key.type} |" in page and key.text in page


def test_the_page_in_docs_is_fresh():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == reference.markdown(), "stale: run `make docs`"


def test_the_schema_names_every_key_and_nothing_else():
    schema = reference.json_schema()
    found = set()
    for name, below in schema["properties"].items():
        assert below["description"]
        if "properties" in below:
            assert below["additionalProperties"] is False
            found |= {f"{name}.{inner}" for inner in below["properties"]}
        else:
            found.add(name)
    assert found == set(KEYS)
    assert schema["required"] == ["model", "environment"] and schema["additionalProperties"] is False
    train = schema["properties"]["train"]["properties"]
    assert train["lora_rank"]["type"] == "integer" and train["lora_rank"]["minimum"] == 1
    assert train["learning_rate"]["exclusiveMinimum"] == 0
    assert train["thinking_length_penalty_coef"]["maximum"] == 1
    assert {each["type"] for each in train["stop_sequences"]["anyOf"]} == {"string", "array"}
    assert "null" not in str(schema)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_starter_is_valid_with_and_without_its_comments(algorithm, write):
    text = reference.starter_toml("acme/arithmetic", algorithm=algorithm)
    plain = load_config(write(text))
    assert plain.warnings == [] and plain.config.algorithm == algorithm
    lines = [line.removeprefix("# ") if " = " in line or line.startswith("# [") else line for line in text.split("\n")]
    full = load_config(write("\n".join(lines)))
    defaults = train_defaults(algorithm, "flash/nano", False)
    assert full.warnings == []
    assert full.config.given() >= {f"train.{key}" for key in defaults}
    assert {key: getattr(full.config.train, key) for key in defaults} == defaults


def test_the_brief_starter_is_the_least_that_works():
    import tomllib

    assert tomllib.loads(reference.starter_toml("a/b", brief=True)) == {
        "model": "flash/nano", "algorithm": "sft", "environment": {"id": "a/b"},
    }  # fmt: skip
    parse_config(tomllib.loads(reference.starter_toml("a/b", brief=True)))
