"""Where a worker runs: launch, probe, kill, list. One protocol for child processes and for a cluster.

A launcher keeps no state that it could lose: handles are strings that the database keeps, and a restarted
server probes them again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol


@dataclass(frozen=True)
class LaunchRequest:
    """One attempt to start. The token is handed over a pipe, never in argv or the environment."""

    attempt_id: str           # "<run-id>.<epoch>"
    api_url: str              # the control plane, as the worker reaches it
    token: str = field(repr=False)
    work_dir: str
    device: str               # "cpu", "cuda:0"


class Probe(StrEnum):
    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"  # can't tell now (cluster unreachable); the device is not free


class Launcher(Protocol):
    def devices(self) -> list[str]:
        """What this launcher can place attempts on, one attempt each, e.g. ["cpu"] or ["cuda:0", "cuda:1"]."""

    def launch(self, request: LaunchRequest) -> str:
        """Starts a supervisor and returns its handle. Idempotent by attempt id."""

    def probe(self, handle: str) -> Probe: ...

    def kill(self, handle: str) -> None:
        """Kills the supervisor and all its descendants; returns without waiting. Probe tells when it is dead."""

    def list(self) -> dict[str, str]:
        """Handles of every live attempt found, by attempt id (orphan clean-up)."""
