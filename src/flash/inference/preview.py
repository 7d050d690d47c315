"""Renders examples for `flash env check`, as a process of its own: the command line itself stays free of torch.

`python -m flash.inference.preview` reads JSON lines. The first is `{"model": folder or hub id, "revision",
"thinking", "max_length"}`; each further one, `{"prompt": [...], "completion": [...]}`, is answered by
`{"text", "tokens", "trained", "truncated"}` or `{"error": ...}` in the errors' wire form.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from transformers import AutoTokenizer

from flash.errors import FlashError, InternalError, ModelError
from flash.inference.chat import ChatRenderer
from flash.inference.fetching import locate


def render(renderer: ChatRenderer, example: dict[str, Any], max_length: int | None) -> dict[str, Any]:
    """One example as training would see it; its trained part stands between ⟦ and ⟧."""
    whole = renderer.render_target(example["prompt"], example["completion"], where="this row")
    kept = whole.truncated(max_length) if max_length else whole
    return {
        "text": renderer.marked(kept),
        "tokens": len(kept.tokens),
        "trained": len(kept.tokens) - kept.trained_from,
        "truncated": len(whole.tokens) - len(kept.tokens),
    }


def main() -> None:
    job = json.loads(sys.stdin.readline())
    try:
        found = locate(job["model"], revision=job.get("revision"), weights=False)
        tokenizer = AutoTokenizer.from_pretrained(found.folder, trust_remote_code=False, local_files_only=True)
    except FlashError as error:
        print(json.dumps({"error": error.to_wire()}), flush=True)
        return
    except (OSError, ValueError) as error:
        reason = ModelError(f"the tokenizer of {job['model']} can't be loaded: {str(error).splitlines()[0]}")
        print(json.dumps({"error": reason.to_wire()}), flush=True)
        return
    renderer = ChatRenderer(tokenizer, thinking=bool(job.get("thinking")))
    for line in sys.stdin:
        try:
            answer = render(renderer, json.loads(line), job.get("max_length"))
        except FlashError as error:
            answer = {"error": error.to_wire()}
        except Exception as error:
            answer = {"error": InternalError(f"rendering failed: {type(error).__name__}: {error}").to_wire()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
