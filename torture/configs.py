"""Whatever stands in a config: a run that resolves, or an error whose every line names a key. Never a traceback.

Four ways to a config: any tree of values, any override, a full config with places replaced, renamed or moved, and a
file with bytes that were damaged.
"""

from __future__ import annotations

import copy
import datetime
import json
import random
import re
import string
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from flash.catalog.catalog import load_catalog
from flash.config.load import load_config, parse_config
from flash.config.overrides import apply_override
from flash.config.problems import known_keys
from flash.config.recipes import dry_run_document, resolve
from flash.config.reference import starter_toml
from flash.config.run import RunSpec
from flash.errors import ConfigError
from torture.tally import Tally

CATALOG = load_catalog()
_PART = r'([A-Za-z0-9_-]+|"[^\n]*"|\(hidden\))'
KEY_FIRST = re.compile(rf"^(--set .*|{_PART}(\.{_PART})*)( = .+)?: \S")
NAMES = sorted({part for key in known_keys() for part in key.split(".")})


def check(tables: dict[str, Any]) -> bool:
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


# --- any tree, any override ---------------------------------------------------------------------------

_SCALARS = (
    st.none() | st.booleans() | st.integers() | st.integers(-3, 3) | st.floats() | st.text() | st.just("") | st.dates()
    | st.times() | st.datetimes()
    | st.sampled_from(["sft", "grpo", "flash/nano", "a/b", "x" * 500, 2**200])
)  # fmt: skip
_KEYS = st.sampled_from(NAMES) | st.text()
_VALUES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=5), max_leaves=20
)
TREES = st.dictionaries(_KEYS, _VALUES, max_size=6)
OVERRIDES = st.tuples(st.sampled_from(known_keys()) | st.text(), st.text())


def check_override(override: tuple[str, str]) -> bool:
    key, value = override
    try:
        tables = apply_override({"model": "flash/nano", "environment": {"id": "a/b"}}, f"{key}={value}")
    except ValueError as error:
        assert KEY_FIRST.match(str(error)) and len(str(error).splitlines()) == 1, str(error)
        return False
    return check(tables)


# --- a full config, with something wrong --------------------------------------------------------------

FULL: dict[str, Any] = {
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


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield from _places(tree[key], (*path, key))


def _strange(dice: random.Random) -> Any:
    return dice.choice(
        [None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 0.0, -0.0, 1e308, 5e-324, float("nan"),
         float("inf"), "", " ", "\0", "\n", "\u2028", "\ud800", "a" * 1000, "${HOME}", "../..", "sk-" + "x1Y" * 12, [],
         [[]], {}, {"": {}}, {"a.b": 1}, {"\n": 1}, [None], datetime.date(2020, 1, 1),
         datetime.datetime(2020, 1, 1, 12), b"bytes", {1: 2}, object(), "".join(dice.choices(string.printable, k=12))]
    )  # fmt: skip


def mutate(dice: random.Random) -> dict[str, Any]:
    """The full config with one to four places replaced, removed, renamed, added or swapped."""
    tree = copy.deepcopy(FULL)
    for _ in range(dice.randint(1, 4)):
        path = dice.choice([place for place in _places(tree) if place])
        holder: Any = tree
        for part in path[:-1]:
            holder = holder[part]
        action = dice.choice(["replace", "remove", "rename", "add", "move"])
        if action == "replace":
            holder[path[-1]] = _strange(dice)
        elif action == "remove":
            del holder[path[-1]]
        elif isinstance(holder, dict) and action == "rename":
            name = str(path[-1])  # which an earlier change may have made a number
            middle = len(name) // 2
            holder[name[:middle] + dice.choice(["", "_", "x", "é", "\n"]) + name[middle + 1 :]] = holder.pop(path[-1])
        elif isinstance(holder, dict) and action == "add":
            holder[dice.choice([*NAMES, "", "x.y", "é"])] = _strange(dice)
        else:
            tree[dice.choice(NAMES)] = holder[path[-1]]
    return tree


# --- a damaged file -----------------------------------------------------------------------------------


def starter() -> str:
    """A file with every key of GRPO set."""
    text = starter_toml("acme/arith", algorithm="grpo").replace("\n# ", "\n")
    return "\n".join(line for line in text.split("\n") if " = " in line or line.startswith("["))


def damage(dice: random.Random, text: str) -> bytes:
    """The file's bytes with one to three of them replaced, removed, doubled or swapped for a strange piece."""
    data = bytearray(text.encode())
    for _ in range(dice.randint(1, 3)):
        start = dice.randrange(len(data))
        stop = start + dice.choice([0, 1, 1, 5])
        data[start:stop] = dice.choice(
            [b"", b'"', b"=", b"[", b"]", b"\n", b"\x00", b"\xff", b"'", b"\\", b".", b"9", b"nan", b"#"]
        )
    return bytes(data)


def check_file(path: Path) -> str:
    """Reads it; says whether it was valid, refused by its keys, or unreadable."""
    try:
        load_config(path, catalog=CATALOG)
    except ConfigError as error:
        unreadable = False
        for line in error.problems:
            in_file = line.startswith(f"{path}: ")
            unreadable |= in_file
            assert in_file or KEY_FIRST.match(line), line
            assert line.isprintable(), line
        return "unreadable" if unreadable else "refused"
    return "valid"


# --- the row ------------------------------------------------------------------------------------------


def configs(count: int, seed_: int) -> Tally:
    chance = random.Random(seed_)
    tally = Tally()
    valid = 0

    def one(judge: Callable[[], Any], what: Callable[[], str]) -> None:
        nonlocal valid
        try:
            valid += judge() in (True, "valid")
            tally.count(True)
        except Exception as error:
            tally.count(False, f"{what()}: {type(error).__name__}: {error}"[:500])

    _each(TREES, count // 4, chance, lambda tree: one(lambda: check(tree), lambda: repr(tree)))
    _each(OVERRIDES, count // 4, chance, lambda pair: one(lambda: check_override(pair), lambda: repr(pair)))
    for _ in range(count // 4):
        tree = mutate(chance)
        one(lambda tree=tree: check(tree), lambda tree=tree: repr(tree))  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        path, text = Path(folder) / "config.toml", starter()
        for _ in range(count // 4):
            path.write_bytes(damage(chance, text))
            one(lambda: check_file(path), lambda: repr(path.read_bytes()))
    tally.counts = {"of them valid": valid}
    return tally


def _each(strategy: st.SearchStrategy[Any], count: int, chance: random.Random, judge: Callable[[Any], None]) -> None:
    @seed(chance.getrandbits(64))
    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def run(value: Any) -> None:
        judge(value)

    run()
