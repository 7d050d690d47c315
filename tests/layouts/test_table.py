"""docs/models.md claims nothing of a layout that no test stands behind, and leaves out nothing that is tested."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.layouts.checkpoints import LAYOUTS
from tests.layouts.conftest import slug
from tests.layouts.proofs import FEATURES

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "docs" / "layouts.json").read_text(encoding="utf-8"))


def proofs() -> Iterator[tuple[str, str]]:
    """(test, feature) for every test in this folder that says what it proves."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        spec = importlib.util.spec_from_file_location(f"read_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        if path != Path(__file__):
            module: Any = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            for name, test in vars(module).items():
                for feature in getattr(test, "proves", ()):
                    yield f"tests/layouts/{path.name}::{name}", feature


def test_every_tick_has_a_test_and_every_test_its_tick() -> None:
    known = set(proofs())
    remedy = "run `make layouts`"
    assert RECORD["features"] == list(FEATURES), remedy
    assert set(RECORD["layouts"]) == set(LAYOUTS), remedy
    for name, row in RECORD["layouts"].items():
        assert row["models"] == list(LAYOUTS[name].models), remedy
        claimed = {(test, feature) for feature, tests in row["tests"].items() for test in tests}
        for test, feature in claimed:
            function, _, parameters = test.removesuffix("]").partition("[")
            assert (function, feature) in known, f"{name}: {feature} is claimed by {test}, which is no such test"
            assert parameters.startswith(slug(LAYOUTS[name])) or f"-{slug(LAYOUTS[name])}" in parameters, test
        proved = {(test.partition("[")[0], feature) for test, feature in claimed}
        assert known <= proved, f"{name}: docs/layouts.json lacks {sorted(known - proved)[:1]}: {remedy}"


def test_the_page_shows_a_tick_for_just_these_cells() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    header = next(line for line in page.splitlines() if line.startswith("| layout | models | "))
    assert [cell.strip() for cell in header.strip("|").split("|")][2:] == list(FEATURES)
    for name, row in RECORD["layouts"].items():
        line = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
        ticks = [cell.strip() == "✓" for cell in line.strip("|").split("|")][2:]
        assert ticks == [bool(row["tests"][feature]) for feature in FEATURES]
