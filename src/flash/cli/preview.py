"""Rendered examples for `flash env check`, asked of a process that may import a tokenizer's libraries."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

from flash.catalog.catalog import ModelEntry
from flash.errors import InvalidInput, ModelError, from_wire

Message = dict[str, Any]


class Preview:
    """A running `flash.inference.preview`; `render` is what `flash.environments.checking.check` takes."""

    def __init__(self, entry: ModelEntry, *, thinking: bool, max_length: int | None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "flash.inference.preview"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.truncated = 0  # examples cut at max_length
        job = {"model": str(entry.source), "revision": entry.revision, "thinking": thinking, "max_length": max_length}
        self._write(job)

    def render(self, prompt: list[Message], completion: list[Message]) -> str:
        """The example's text with its trained part between ⟦ and ⟧.

        Raises what a run would: InvalidInput for messages that the template refuses or that leave nothing to train.
        """
        self._write({"prompt": prompt, "completion": completion})
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise ModelError("the tokenizer's process ended early", remedy="is `flash-lora[train]` installed?")
        answer = json.loads(line)
        if "error" in answer:
            raise from_wire(answer["error"])
        if answer["trained"] <= 0:
            raise InvalidInput(
                f"a row of {answer['tokens'] + answer['truncated']} tokens leaves nothing to train on",
                remedy="give it an output, or raise train.max_length",
            )
        self.truncated += answer["truncated"] > 0
        return str(answer["text"])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _write(self, message: Any) -> None:
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it is gone; reading its answer says so


def can_preview() -> bool:
    """Whether the libraries of the `train` extra are here; looks without importing them."""
    return importlib.util.find_spec("transformers") is not None
