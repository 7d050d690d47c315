"""Where a worker runs: launch, probe, kill, list. One protocol for child processes and for a cluster.

A launcher keeps no state that it could lose: handles are strings that the database keeps, and a restarted
server probes them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from flash.errors import Unavailable
from flash.launching.hardware import Device


@dataclass(frozen=True)
class LaunchRequest:
    """One worker to start: an attempt's supervisor, or an engine's host.

    The token is handed over a pipe, never in argv or the environment.
    """

    attempt_id: str           # "<run-id>.<epoch>", or the engine's id: what the worker is known by
    api_url: str              # the control plane, as the worker reaches it
    token: str = field(repr=False)
    work_dir: str
    device: str               # "cpu", "cuda:0"
    engine: Mapping[str, Any] | None = field(default=None, repr=False)  # an engine host's hello; None: a supervisor

    def hello(self, device: str) -> dict[str, Any]:
        """The one line of JSON that the worker reads; `device` is the name by which it sees its own."""
        if self.engine is not None:
            return {**self.engine, "device": device}
        names = ("attempt_id", "api_url", "token", "work_dir")
        return {**{name: getattr(self, name) for name in names}, "device": device}


class Probe(StrEnum):
    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"  # can't tell now (cluster unreachable); the device is not free


class LaunchUnsure(Unavailable):
    """The worker may have been started and may yet be: `list` will tell."""


class Launcher(Protocol):
    def devices(self) -> list[str]:
        """What this launcher can place workers on, e.g. ["cpu"] or ["cuda:0", "cuda:1"]; who may share one is
        the control plane's to say."""

    def describe(self) -> list[Device] | None:
        """What is known of its devices, those of which nothing is left out. None: they are this machine's.

        For planning: also devices that get no worker just now are among them.
        """

    def launch(self, request: LaunchRequest) -> str:
        """Starts a worker and returns its handle. Idempotent by its id. Raises LaunchUnsure where it can't tell
        whether it did; after any other error there is no worker."""

    def probe(self, handle: str) -> Probe: ...

    def kill(self, handle: str) -> None:
        """Kills the worker's process and all its descendants; returns without waiting. Probe tells when it is dead."""

    def list(self) -> dict[str, str]:
        """Handles of every live worker found, by its id (orphan clean-up)."""
