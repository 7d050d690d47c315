"""Whatever stands in a config: a RunConfig that resolves, or a ConfigError whose every line names a key."""

from __future__ import annotations

import copy
import datetime
import json
import random
import re
import string

from hypothesis import given, settings
from hypothesis import strategies as st

from flash.catalog.catalog import load_catalog
from flash.config.load import load_config, parse_config
from flash.config.overrides import apply_override
from flash.config.problems import known_keys
from flash.config.recipes import dry_run_document, resolve
from flash.config.reference import starter_toml
from flash.config.run import RunSpec
from flash.errors import ConfigError

CATALOG = load_catalog()
PART = r'([A-Za-z0-9_-]+|"[^\n]*"|\(hidden\))'
KEY_FIRST = re.compile(rf"^(--set .*|{PART}(\.{PART})*)( = .+)?: \S")
NAMES = sorted({part for key in known_keys() for part in key.split(".")})


def check(tables):
    """Parses; returns whether it was valid."""
    try:
        config, warnings = parse_config(tables, catalog=CATALOG)
    except ConfigError as error:
        assert error.problems
        for line in error.problems:
            assert KEY_FIRST.match(line), line
            assert len(line.splitlines()) == 1 and line.isprintable(), line
            assert "pydantic" not in line and "Input should" not in line, line
        return False
    spec = resolve(config, catalog=CATALOG)
    assert RunSpec.model_validate(json.loads(json.dumps(spec.model_dump(mode="json"), allow_nan=False))) == spec
    json.dumps(dry_run_document(spec, warnings), allow_nan=False).encode()
    again, _ = parse_config(json.loads(json.dumps(config.document(), allow_nan=False)), catalog=CATALOG)
    assert again == config and again.given() == config.given()
    return True


scalars = (
    st.none() | st.booleans() | st.integers() | st.integers(-3, 3) | st.floats() | st.text() | st.just("") | st.dates()
    | st.times() | st.datetimes()
    | st.sampled_from(["sft", "grpo", "flash/nano", "a/b", "x" * 500, 2**200])
)  # fmt: skip
names = st.sampled_from(NAMES) | st.text()
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=5), max_leaves=20
)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(names, trees, max_size=6))
def test_any_tree(tables):
    check(tables)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(known_keys()) | st.text(), st.text())
def test_any_override(key, value):
    try:
        tables = apply_override({"model": "flash/nano", "environment": {"id": "a/b"}}, f"{key}={value}")
    except ValueError as error:
        assert KEY_FIRST.match(str(error)) and len(str(error).splitlines()) == 1
        return
    check(tables)


FULL = {
    "model": "flash/nano",
    "algorithm": "grpo",
    "thinking": True,
    "environment": {"id": "acme/arith", "params": {"split": "train", "n": [1, {"x": 2.5}]}, "pip": ["x>=1"],
                    "secrets": ["KEY"]},
    "train": {"lora_rank": 8, "lora_alpha": 16, "learning_rate": 1e-3, "batch_size": 4, "max_length": 300,
              "save_every": 5, "init_from_adapter": "flash-1-00000000", "epochs": 1, "max_steps": 0,
              "max_examples": 0, "steps": 3, "group_size": 4, "temperature": 1.0, "max_tokens": 20,
              "kl_penalty_coef": 0.0, "advantage_clip": 1.0, "thinking_length_penalty_coef": 0.5,
              "stop_sequences": ["</a>"]},
    "worker_env": {"FLAG": "on"},
    "wandb": {"project": "p", "run_name": "r"},
}  # fmt: skip


def places(tree, path=()):
    yield path
    if isinstance(tree, (dict, list)):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield from places(tree[key], (*path, key))


def strange(dice):
    return dice.choice(
        [None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 0.0, -0.0, 1e308, 5e-324, float("nan"),
         float("inf"), "", " ", "\0", "\n", "\u2028", "\ud800", "a" * 1000, "${HOME}", "../..", "sk-" + "x1Y" * 12, [],
         [[]], {}, {"": {}}, {"a.b": 1}, {"\n": 1}, [None], datetime.date(2020, 1, 1),
         datetime.datetime(2020, 1, 1, 12), b"bytes", {1: 2}, object(), "".join(dice.choices(string.printable, k=12))]
    )  # fmt: skip


def mutate(dice):
    """The full config with one to four places replaced, removed, renamed, added or swapped."""
    tree = copy.deepcopy(FULL)
    for _ in range(dice.randint(1, 4)):
        path = dice.choice([place for place in places(tree) if place])
        holder = tree
        for part in path[:-1]:
            holder = holder[part]
        action = dice.choice(["replace", "remove", "rename", "add", "move"])
        if action == "replace":
            holder[path[-1]] = strange(dice)
        elif action == "remove":
            del holder[path[-1]]
        elif isinstance(holder, dict) and action == "rename":
            name = path[-1]
            middle = len(name) // 2
            holder[name[:middle] + dice.choice(["", "_", "x", "é", "\n"]) + name[middle + 1 :]] = holder.pop(name)
        elif isinstance(holder, dict) and action == "add":
            holder[dice.choice([*NAMES, "", "x.y", "é"])] = strange(dice)
        else:
            tree[dice.choice(NAMES)] = holder[path[-1]]
    return tree


def test_a_thousand_mutated_configs():
    assert check(FULL)
    valid = sum(check(mutate(random.Random(seed))) for seed in range(1000))
    assert 20 < valid < 500, f"{valid} of 1,000 stayed valid: the mutations no longer bite"


def damage(dice, text):
    """The file's bytes with one to three of them replaced, removed, doubled or swapped for a strange piece."""
    data = bytearray(text.encode())
    for _ in range(dice.randint(1, 3)):
        start = dice.randrange(len(data))
        stop = start + dice.choice([0, 1, 1, 5])
        data[start:stop] = dice.choice(
            [b"", b'"', b"=", b"[", b"]", b"\n", b"\x00", b"\xff", b"'", b"\\", b".", b"9", b"nan", b"#"]
        )
    return bytes(data)


def test_damaged_files(tmp_path):
    text = starter_toml("acme/arith", algorithm="grpo").replace("\n# ", "\n")
    text = "\n".join(line for line in text.split("\n") if " = " in line or line.startswith("["))
    path = tmp_path / "config.toml"
    outcomes = set()
    for seed in range(300):
        path.write_bytes(damage(random.Random(seed), text))
        try:
            load_config(path, catalog=CATALOG)
            outcomes.add("valid")
        except ConfigError as error:
            for line in error.problems:
                in_file = line.startswith(f"{path}: ")
                outcomes.add("unreadable" if in_file else "refused")
                assert in_file or KEY_FIRST.match(line), line
                assert line.isprintable(), line
    assert outcomes == {"valid", "unreadable", "refused"}
