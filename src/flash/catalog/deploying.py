"""What of an adapter can be served, and by what: known before anything is trained.

Pure: facts about a model and a rank in, sentences out. Flash's own engine serves whatever Flash trains; vLLM has rules.
"""

from __future__ import annotations

from flash.catalog.catalog import ModelEntry
from flash.catalog.shapes import LAYOUTS, expert_rank

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM makes room for adapters up to one of these


def deployment_notes(entry: ModelEntry, rank: int) -> list[str]:
    """What to know of deploying an adapter of this rank: limits, and what is adapted otherwise than asked."""
    notes = []
    if entry.layout not in LAYOUTS:
        notes.append(
            f"model = {entry.id}: its layout, {entry.layout}, is none that Flash has tried ({', '.join(LAYOUTS)}): "
            "an adapter will be served by Flash's own engine; whether vLLM takes it is not known"
        )
    if rank > VLLM_RANKS[-1]:
        notes.append(
            f"train.lora_rank = {rank}: vLLM takes adapters up to rank {VLLM_RANKS[-1]}; only Flash's own engine will "
            "serve this one"
        )
    if entry.experts is not None:
        notes.append(
            f"train.lora_rank = {rank}: each of the {entry.experts.count} routed experts gets rank "
            f"{expert_rank(entry, rank)}, a share of it for each of the {entry.experts.active} at work on a token; "
            "attention and the shared expert get all of it, the router none"
        )
    return notes
