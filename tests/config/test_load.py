"""Reading a config: precedence, strict types, ranges, hints, and every problem in one go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flash.config.load import load_config, parse_config

BASE = {"model": "flash/nano", "environment": {"id": "acme/arithmetic"}}


def with_key(dotted, value):
    tables = json.loads(json.dumps(BASE))
    *sections, name = dotted.split(".")
    table = tables
    for section in sections:
        table = table.setdefault(section, {})
    table[name] = value
    return tables


def train(config, key):
    return getattr(config.train, key)


def test_only_model_and_environment_are_required(write):
    loaded = load_config(write())
    assert (loaded.config.model, loaded.config.algorithm, loaded.config.thinking) == ("flash/nano", "sft", False)
    assert loaded.config.environment.id == "acme/arithmetic"
    assert loaded.warnings == []


def test_missing_required_keys_are_named_together(problems):
    lines = problems(lambda: parse_config({}))
    assert [line.split(":")[0] for line in lines] == ["model", "environment"]
    assert problems(lambda: parse_config({"model": "flash/nano", "environment": {}}))[0].startswith("environment.id: ")


@pytest.mark.parametrize(
    ("key", "low"),
    [(key, 1) for key in ("lora_rank", "lora_alpha", "batch_size", "max_length", "save_every", "epochs", "steps",
                          "group_size", "max_tokens")]
    + [(key, 0) for key in ("max_steps", "max_examples", "temperature", "kl_penalty_coef", "advantage_clip")]
    + [("thinking_length_penalty_coef", 0)],
)  # fmt: skip
def test_lower_bounds(key, low, problems):
    config, _ = parse_config(with_key(f"train.{key}", low))
    assert train(config, key) == low
    [line] = problems(lambda: parse_config(with_key(f"train.{key}", low - 1)))
    assert line.startswith(f"train.{key} = {low - 1}: must be at least {low}; ")


def test_learning_rate_is_above_zero(problems):
    assert problems(lambda: parse_config(with_key("train.learning_rate", 0)))[0].startswith(
        "train.learning_rate = 0: must be above 0; leave it out to use the recipe's 0.0015"
    )
    assert parse_config(with_key("train.learning_rate", 1))[0].train.learning_rate == 1.0


def test_length_penalty_is_at_most_one(problems):
    key = "train.thinking_length_penalty_coef"
    assert parse_config(with_key(key, 1))[0].train.thinking_length_penalty_coef == 1.0
    assert problems(lambda: parse_config(with_key(key, 1.01)))[0].startswith(f"{key} = 1.01: must be at most 1; ")


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("train.lora_rank", True, "must be a whole number"),
        ("train.lora_rank", "16", "must be a whole number"),
        ("train.lora_rank", 16.5, "must be a whole number"),
        ("train.lora_rank", float("nan"), "must be a whole number"),
        ("train.lora_rank", 10**400, "must be at most"),
        ("train.learning_rate", False, "must be a number"),
        ("train.learning_rate", "1e-4", "must be a number"),
        ("train.learning_rate", float("nan"), "must be a finite number"),
        ("train.learning_rate", float("inf"), "must be a finite number"),
        ("train.learning_rate", 10**400, "must be a finite number"),
        ("train.temperature", [], "must be a number"),
        ("thinking", 1, "must be true or false"),
        ("thinking", "true", "must be true or false"),
        ("model", 3, "must be a string"),
        ("model", "  ", "must not be blank"),
        ("model", "a\0b", "must not contain a NUL"),
        ("algorithm", "dpo", 'must be "sft" or "grpo"'),
        ("train", 5, "must be a table; write [train]"),
        ("wandb", "x", "must be a table; write [wandb]"),
        ("worker_env", ["A"], "must be a table; write [worker_env]"),
        ("worker_env.A", 1, "must be a string"),
        ("environment.pip", "openai", "must be a list of strings"),
        ("environment.secrets", "KEY", "must be a list of strings"),
        ("environment.pip", [1], "must hold strings only"),
        ("environment.params", [], "must be a table"),
        ("wandb.project", " ", "must not be blank"),
        ("wandb.run_name", 7, "must be a string"),
        ("train.stop_sequences", 3, "must be a list of strings"),
        ("train.stop_sequences", [3], "must hold strings only"),
    ],
)
def test_types_are_strict(key, value, rule, problems):
    [line] = problems(lambda: parse_config(with_key(key, value)))
    assert line.startswith((f"{key} = ", f"{key}: "))
    assert rule in line
    assert ";" in line, "a remedy follows the rule"


def test_an_environment_written_as_a_string_is_explained(problems):
    [line] = problems(lambda: parse_config({"model": "flash/nano", "environment": "acme/arithmetic"}))
    assert line.startswith('environment = "acme/arithmetic": must be a table; write [environment] with id =')


def test_a_whole_float_is_an_int():
    rank = parse_config(with_key("train.lora_rank", 16.0))[0].train.lora_rank
    assert rank == 16 and isinstance(rank, int)


def test_algorithm_in_any_case_and_empty():
    assert parse_config(with_key("algorithm", "GRPO"))[0].algorithm == "grpo"
    assert parse_config(with_key("algorithm", ""))[0].algorithm == "sft"


def test_stops():
    key = "train.stop_sequences"
    assert parse_config(with_key(key, "</a>"))[0].train.stop_sequences == ("</a>",)
    assert parse_config(with_key(key, ["", "x", " "]))[0].train.stop_sequences == ("x", " ")
    assert parse_config(with_key(key, ""))[0].train.stop_sequences == ()


def test_labels_are_trimmed():
    assert parse_config(with_key("wandb.project", "  p "))[0].wandb.project == "p"


def test_all_problems_come_together(write, problems):
    path = write(
        'model = "flash/nano"\nfoo = 1\nthinking = "yes"\n[environment]\nid = "./here"\nparms = {}\n'
        "[train]\nlora_rank = 100000\nepochs = 0\nlora_rnk = 3\n[sft]\nepochs = 1\n"
    )
    lines = problems(lambda: load_config(path, overrides=["wandb.project=", "model.x=1", "nonsense"]))
    heads = [line.split(":")[0].split(" = ")[0] for line in lines]
    assert sorted(heads) == sorted(
        ["foo", "thinking", "environment.id", "environment.parms", "train.lora_rank", "train.epochs",
         "train.lora_rnk", "sft", "wandb.project", "model.x", "--set 'nonsense'"]
    )  # fmt: skip
    assert any("the deployable cap of flash/nano" in line for line in lines)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("modle", "did you mean model?"),
        ("lora_rank", "did you mean train.lora_rank?"),
        ("train.lora_rnk", "did you mean train.lora_rank?"),
        ("train.learning-rate", "did you mean train.learning_rate?"),
        ("train.pip", "did you mean environment.pip?"),
        ("train.secrets", "did you mean environment.secrets?"),
        ("environment.parms", "did you mean environment.params?"),
        ("environment.param", "did you mean environment.params?"),
        ("wandb.name", "did you mean wandb.run_name?"),
        ("sft.epochs", "move its keys to [train]"),
        ("grpo.steps", "move its keys to [train]"),
        ("seed", "flash train --seed N"),
        ("train.seed", "flash train --seed N"),
        ("train.gpu", "Flash chooses this itself"),
        ("wandb.zzz", "the keys here are project, run_name"),
    ],
)
def test_unknown_keys_get_a_hint(key, hint, problems):
    [line] = problems(lambda: parse_config(with_key(key, 1)))
    unknown = key if not key.startswith(("sft", "grpo")) else key.split(".")[0]
    assert line.startswith((f"{unknown}: unknown key; ", f"{unknown} = 1: unknown key; "))
    assert hint in line


def test_a_key_may_be_called_as_validation_calls_keys(problems):
    """Overrides of any text came upon it."""
    tables = {**with_key("train.epochs", 1), "[key]": 1}
    tables["environment"] = {**tables["environment"], "[key]": 2}
    tables["worker_env"] = {"[key]": 3, "A B": "c"}
    found = problems(lambda: parse_config(tables))
    assert {line.partition(": ")[0] for line in found} == {
        'environment."[key]" = 2', 'worker_env."[key]"', 'worker_env."[key]" = 3', 'worker_env."A B"', '"[key]" = 1',
    }  # fmt: skip


def test_an_unknown_model_is_refused_with_the_nearest(problems):
    [line] = problems(lambda: parse_config({**BASE, "model": "qwen/qwen3.5-4b"}))
    assert line.startswith('model = "qwen/qwen3.5-4b": is not in the catalog; did you mean Qwen/Qwen3.5-4B?')
    assert "`flash models`" in line
    config, _ = parse_config({**BASE, "model": "team/own"}, check_model=False)
    assert config.model == "team/own"


def test_a_rank_above_the_cap_names_the_cap(problems):
    tables = with_key("train.lora_rank", 65) | {"model": "Qwen/Qwen3.5-9B"}
    [line] = problems(lambda: parse_config(tables))
    assert line.startswith("train.lora_rank = 65: must be at most 64, the deployable cap of Qwen/Qwen3.5-9B; ")


def test_thinking_needs_a_model_that_can(home, problems):
    (home / "models.toml").write_text(
        '[[model]]\nid = "plain"\nparams = 1\nlayout = "llama"\ncontext = 512\nrank_cap = 8\n', encoding="utf-8"
    )
    [line] = problems(lambda: parse_config({**BASE, "model": "plain", "thinking": True}))
    assert line.startswith("thinking = true: plain has no reasoning mode; ")


# --- composition --------------------------------------------------------------------------------------


def test_file_then_overlays_then_overrides(write):
    base = write('model = "flash/nano"\n[environment]\nid = "a/b"\npip = ["x"]\nparams = {deep = {one = 1, two = 2}}\n'
                 "[train]\nepochs = 1\nlora_rank = 4\nbatch_size = 2\n")  # fmt: skip
    first = write('[environment]\npip = ["y", "z"]\nparams = {deep = {two = 3}}\n[train]\nepochs = 2\n', "o1.toml")
    second = write("[train]\nepochs = 3\nlora_rank = 5\n", "o2.toml")
    config = load_config(base, [first, second], ["train.lora_rank=6", "train.lora_rank = 7"]).config
    assert (config.train.epochs, config.train.lora_rank, config.train.batch_size) == (3, 7, 2)
    assert config.environment.pip == ("y", "z")
    assert config.environment.params == {"deep": {"one": 1, "two": 3}}


def test_an_overlay_may_complete_a_partial_file(write):
    loaded = load_config(write('model = "flash/nano"\n'), [write('[environment]\nid = "a/b"\n', "o.toml")])
    assert loaded.config.environment.id == "a/b"


def test_a_config_travels_as_its_document():
    tables = with_key("train.lora_rank", 16) | {"thinking": True, "worker_env": {"A": "b"}, "wandb": {"project": "p"}}
    tables["environment"]["params"] = {"split": "train", "n": 3, "deep": {"x": [1.5, None]}}
    tables["train"]["stop_sequences"] = "x"
    config, _ = parse_config(tables)
    again, _ = parse_config(json.loads(json.dumps(config.document())))
    assert again == config
    assert again.given() == config.given() == {
        "model", "thinking", "environment", "train", "worker_env", "wandb", "train.lora_rank", "train.stop_sequences"
    }  # fmt: skip


# --- files that can't be read -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'model = "x\n', ["not valid TOML", "line 1", "column"]),
        (b'a = 1\nmodel = "x', ["not valid TOML", "line 2", "column 11"]),
        (b"a = 1\na = 2\n", ["not valid TOML", "line 2", "column"]),
        ("x = 'é'".encode("latin-1"), ["not UTF-8"]),
        (bytes(range(256)), ["not UTF-8"]),
        (b"\x00", ["not valid TOML", "line 1"]),
        (b"a = " + b"[" * 5000, ["nested too deeply"]),
        (b"a = " + b"9" * 5000, ["not valid TOML"]),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, content, words, problems):
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    [line] = problems(lambda: load_config(path))
    assert line.startswith(f"{path}: ")
    assert all(word in line for word in words)


def test_every_unreadable_file_is_named(tmp_path, write, problems):
    missing, folder = tmp_path / "missing.toml", tmp_path / "folder"
    folder.mkdir()
    lines = problems(lambda: load_config(missing, [folder, write("= 1", "bad.toml")]))
    assert lines[0] == f"{missing}: no such file; `flash env setup` writes one to start from"
    assert "is a folder" in lines[1] and "bad.toml: is not valid TOML" in lines[2]


def test_a_byte_order_mark_is_no_fault(tmp_path):
    path = tmp_path / "bom.toml"
    path.write_bytes(b'\xef\xbb\xbfmodel = "flash/nano"\r\n[environment]\r\nid = "a/b"\r\n')
    assert load_config(path).config.model == "flash/nano"


# --- warnings -----------------------------------------------------------------------------------------


def test_keys_of_the_other_algorithm_warn():
    tables = with_key("train.steps", 3)
    tables["train"]["epochs"] = 2
    _, warnings = parse_config(tables)
    [warning] = warnings
    assert warning.startswith("train.steps: has no effect") and "grpo" in warning
    _, [warning] = parse_config(tables | {"algorithm": "grpo"})
    assert warning.startswith("train.epochs: has no effect")


@pytest.mark.parametrize(
    ("key", "value"),
    [("advantage_clip", 5.0), ("group_size", 1), ("temperature", 0.0), ("thinking_length_penalty_coef", 0.5),
     ("max_length", 32)],
)  # fmt: skip
def test_grpo_warnings(key, value):
    _, [warning] = parse_config(with_key(f"train.{key}", value) | {"algorithm": "grpo"})
    assert warning.startswith(f"train.{key}")


def test_values_that_work_do_not_warn():
    tables = with_key("train.thinking_length_penalty_coef", 0.5) | {"algorithm": "grpo", "thinking": True}
    tables["train"] |= {"group_size": 2, "temperature": 0.1, "max_length": 500, "max_tokens": 100}
    assert parse_config(tables)[1] == []


# --- weight -------------------------------------------------------------------------------------------


def test_a_dry_run_loads_nothing_heavy(write):
    code = (
        "import sys, json\n"
        "from pathlib import Path\n"
        "from flash.config.load import load_config\n"
        "from flash.config.recipes import resolve, dry_run_document\n"
        "import flash.config.secrets, flash.catalog.hardware\n"
        f"loaded = load_config({str(write())!r})\n"
        "json.dumps(dry_run_document(resolve(loaded.config), loaded.warnings))\n"
        "heavy = {'torch', 'transformers', 'numpy', 'fastapi', 'sqlalchemy', 'httpx', 'rich', 'typer', 'obstore',\n"
        "         'freesolo', 'asyncio'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.strip() == "[]"


def test_every_config_in_the_repository_is_valid():
    root = Path(__file__).resolve().parents[2]
    found = [
        path
        for top in ("examples", "src", "benchmarks", "docs")
        for path in (root / top).rglob("*.toml")
        if "[environment]" in path.read_text(encoding="utf-8")
    ]
    for path in found:
        load_config(path)
