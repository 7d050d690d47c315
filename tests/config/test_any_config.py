"""Whatever stands in a config: a RunConfig that resolves, or a ConfigError whose every line names a key."""

from __future__ import annotations

import random

from hypothesis import given, settings
from torture.configs import FULL, OVERRIDES, TREES, check, check_file, check_override, damage, mutate, starter


@settings(max_examples=80)
@given(TREES)
def test_any_tree(tables):
    check(tables)


@settings(max_examples=300)
@given(OVERRIDES)
def test_any_override(override):
    check_override(override)


def test_a_thousand_mutated_configs():
    assert check(FULL)
    valid = sum(check(mutate(random.Random(seed))) for seed in range(1000))
    assert 20 < valid < 500, f"{valid} of 1,000 stayed valid: the mutations no longer bite"


def test_damaged_files(tmp_path):
    path, text = tmp_path / "config.toml", starter()
    outcomes = set()
    for seed in range(300):
        path.write_bytes(damage(random.Random(seed), text))
        outcomes.add(check_file(path))
    assert outcomes == {"valid", "unreadable", "refused"}
