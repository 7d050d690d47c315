"""What the control plane and an engine host say to each other: the shapes, the headers, an adapter's name.

Owns both directions' vocabulary and nothing else. Free of torch and of HTTP, since the plane imports it.
Times are seconds, sizes bytes.

An engine host is `python -P -m flash.serving.host` with one `EngineHello` as a line of JSON on standard input.
It posts an `EngineHeartbeat` to `{plane_url}/worker/engines/{engine_id}/heartbeat` every `heartbeat_s` and gets
an `EngineAnswer`; 401, 404 and 409 mean that it is no longer wanted. Where its bucket's addresses are `signed`, it gets
them for an `AddressRequest` to `.../urls`. It serves OpenAI's API at `url`. Every request in either direction carries
`Authorization: Bearer {token}`.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from pydantic import Field

from flash.records import Manifest, Record

MODEL_HEADER = "X-Flash-Model"
"""The model's name as the user gave it; shown in answers. Percent-encoded UTF-8."""
ADAPTER_HEADER = "X-Flash-Adapter"
"""The adapter's digest (`adapter_digest`); absent for the bare base."""
MANIFEST_HEADER = "X-Flash-Adapter-Manifest"
"""The store key of the manifest that names the adapter's files; goes with `ADAPTER_HEADER`."""
SCOPE_HEADER = "X-Flash-Scope"
"""The org: cached prefixes are shared within it only."""

EngineState = Literal["loading", "ready", "failed", "leaving"]


class EngineHello(Record):
    """Everything an engine host needs to know."""

    engine_id: str
    plane_url: str
    token: str = Field(repr=False)  # good for this engine alone, in both directions
    model: str                      # the catalog's id
    source: str                     # what `flash.inference.loading.load_base` takes
    revision: str | None = None
    device: str
    work_dir: str
    bind: str = "127.0.0.1"         # the address of its machine that it serves on
    store_url: str
    store_options: dict[str, str] = Field(default_factory=dict, repr=False)  # a bucket's settings, keys included
    signed: bool = False            # adapters are read by addresses that the plane signs; there are no options then
    cache_dir: str                  # adapters' files, shared by every host of this machine
    heartbeat_s: float = Field(gt=0)
    lease_s: float = Field(gt=0)    # without an answer for this long, the host ends
    idle_s: float = Field(ge=0)     # without a request for this long, the host drains by itself; 0: never
    max_rows: int = Field(ge=1)     # samples decoding at once
    max_waiting: int = Field(ge=0)  # requests waiting for a row; one more gets 429
    cache_bytes: int = Field(ge=0)  # of cached prefixes
    max_adapters: int = Field(ge=1)             # adapters in one batch, their weights beside the base's
    max_loaded_adapters: int = Field(default=64, ge=1)  # adapters in memory, ready to join one
    adapter_disk_bytes: int = Field(default=16 << 30, ge=0)  # of adapters' files below `cache_dir`
    vllm_python: str | None = None  # the interpreter of vLLM's own virtual environment; None: the built-in engine.
    # On its way to a node of a cluster "auto" or "vllm": there is one there, or not.
    threads: int = Field(default=0, ge=0)       # of torch on a CPU; 0 leaves it to torch
    unread_tokens: int = Field(default=16_384, ge=1)  # of one answer, for a slow reader, before it is cancelled
    stalled_s: float = Field(default=60.0, gt=0)      # a reader that takes nothing for so long is dropped


class EngineHeartbeat(Record):
    """`failed` and `leaving` are said once more at the end; the process exits after the answer."""

    state: EngineState
    pid: int
    url: str | None = None                # where it serves, from `ready` on
    error: dict[str, Any] | None = None   # with `failed`: `FlashError.to_wire()`
    stats: dict[str, float] = Field(default_factory=dict)
    idle_s: float = 0.0                   # since the last request began or ended; 0 while one is in flight
    in_flight: int = 0                    # requests


class EngineAnswer(Record):
    desired: Literal["serve", "drain"]    # drain: finish what is in flight, refuse what is new, exit 0


class AddressRequest(Record):
    """Addresses to read by: of manifests, and of adapters' files, on the engine's own base. A `SignAnswer` answers."""

    keys: tuple[str, ...] = Field(min_length=1, max_length=100)


def adapter_digest(manifest: Manifest) -> str:
    """An adapter's identity: SHA-256 over the paths and digests of its files, whatever checkpoint holds them."""
    lines = sorted(f"{file.path} {file.sha256}\n" for file in manifest.files if file.path.startswith("adapter/"))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
