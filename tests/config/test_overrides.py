"""`--set KEY=VALUE`: how keys are walked and values are read."""

from __future__ import annotations

import pytest

from flash.config.load import load_config
from flash.config.overrides import apply_override, merge, read_value, split_override


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("wandb.run_name", "123", "123"),
        ("wandb.project", "true", "true"),
        ("model", '"quoted"', '"quoted"'),
        ("algorithm", "grpo", "grpo"),
        ("environment.id", "[a,b]", "[a,b]"),
        ("train.init_from_adapter", "1", "1"),
        ("worker_env.FLAG", "1", "1"),
        ("worker_env.FLAG", "TRUE", "TRUE"),
        ("train.steps", "300", 300),
        ("train.steps", "1_000", 1000),
        ("train.learning_rate", "1e-4", 1e-4),
        ("thinking", "True", True),
        ("thinking", "FALSE", False),
        ("environment.pip", "[a,b]", ["a", "b"]),
        ("environment.pip", "[openai>=1.0, 'x y']", ["openai>=1.0", "x y"]),
        ("environment.pip", '["a", "b"]', ["a", "b"]),
        ("environment.pip", "[]", []),
        ("train.stop_sequences", "</answer>", "</answer>"),
        ("train.stop_sequences", '"</answer>"', "</answer>"),
        ("environment.params.n", "3", 3),
        ("environment.params.flag", "tRuE", True),
        ("environment.params.t", "{a = 1, b = 'x'}", {"a": 1, "b": "x"}),
        ("environment.params.s", "hello world", "hello world"),
        ("environment.params.day", "2024-01-02", "2024-01-02"),
        ("environment.params.s", "1 # not a comment\nx = 2", "1 # not a comment\nx = 2"),
        ("environment.params.s", "", ""),
        ("environment.params.deep", "[" * 3000, "[" * 3000),
        ("train.nonsense", "x", "x"),
    ],
)
def test_values(key, text, value):
    found = read_value(tuple(key.split(".")), text)
    assert found == value and type(found) is type(value)


def test_the_first_equals_sign_splits_and_both_sides_are_trimmed():
    assert split_override(" environment.params.q = a=b ") == (("environment", "params", "q"), "a=b")


def test_missing_tables_are_created_and_the_base_is_left_alone():
    base = {"train": {"epochs": 1}}
    assert apply_override(base, "environment.params.a.b=1") == base | {"environment": {"params": {"a": {"b": 1}}}}
    assert apply_override(base, "train.epochs=2") == {"train": {"epochs": 2}}
    assert base == {"train": {"epochs": 1}}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.name=x", "model.name: can't be set, as model is not a table"),
        ("train.epochs.x=1", "train.epochs.x: can't be set, as train.epochs is not a table"),
        ("train.steps", "must be KEY=VALUE"),
        ("=3", "has an empty key"),
        ("train..steps=3", "has an empty key"),
    ],
)
def test_what_can_not_be_set(write, problems, override, words):
    path = write('model = "flash/nano"\n[environment]\nid = "a/b"\n[train]\nepochs = 1\n')
    [line] = problems(lambda: load_config(path, overrides=[override]))
    assert words in line


def test_set_reaches_the_config(write):
    config = load_config(
        write(),
        overrides=["train.steps=300", "train.lora_rank=16", "algorithm=GRPO", "wandb.run_name=123",
                   "train.stop_sequences=</a>", "environment.params.split=dev", "worker_env.N=5"],
    ).config  # fmt: skip
    assert (config.train.steps, config.train.lora_rank, config.algorithm) == (300, 16, "grpo")
    assert config.wandb.run_name == "123"
    assert config.train.stop_sequences == ("</a>",)
    assert config.environment.params == {"split": "dev"}
    assert config.worker_env == {"N": "5"}


def test_an_empty_algorithm_is_sft(write):
    assert load_config(write(), overrides=["algorithm="]).config.algorithm == "sft"


def test_merging_is_deep_for_tables_only():
    assert merge({"a": {"b": 1, "c": [1]}, "d": 1}, {"a": {"c": [2]}, "d": {"e": 1}}) == {
        "a": {"b": 1, "c": [2]},
        "d": {"e": 1},
    }
