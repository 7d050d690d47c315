"""docs/gpu.md's table of what fits where is what the estimate says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flash.catalog.catalog import load_catalog
from flash.catalog.fit import choose, fitted, gigabytes
from flash.catalog.hardware import gpu_classes
from flash.config.recipes import resolve
from flash.config.run import RunConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"
CASES = (("sft", False), ("grpo", False), ("grpo", True))


@pytest.mark.parametrize("entry", load_catalog(Path("/nowhere")), ids=lambda entry: entry.id)
def test_each_recipe_fits_the_class_that_the_page_names(entry):
    [row] = re.findall(rf"^\| {re.escape(entry.id)} \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    cells = []
    for algorithm, thinking in CASES:
        config = {"model": entry.id, "algorithm": algorithm, "thinking": thinking, "environment": {"id": "org/task"}}
        spec = resolve(RunConfig.model_validate(config), seed=0)
        chosen = choose(spec, entry, [gpu.hardware for gpu in gpu_classes()])
        found = fitted(spec, entry, chosen)
        assert found.total <= chosen.memory
        cells.append(f"{chosen.name}, {gigabytes(found.total)}, {found.micro_batch_tokens:,}")
    assert row.split(" | ") == cells
