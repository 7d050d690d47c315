"""What docs/models.md may tick: tests say which cell they prove, and a run of theirs writes down what passed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FEATURES = (
    "SFT", "GRPO", "multi-turn", "thinking", "resume", "warm start", "serve", "PEFT", "vLLM naming", "rows apart",
)  # fmt: skip
RESULTS_VARIABLE = "FLASH_LAYOUT_RESULTS"  # names the file that passes are written to, one JSON object a line


def proves(*features: str) -> Callable[[Any], Any]:
    """Marks a test that takes `layout`: while it passes, these cells of the layout's row are ticked."""
    assert set(features) <= set(FEATURES), features

    def mark(test: Any) -> Any:
        test.proves = features
        return test

    return mark
