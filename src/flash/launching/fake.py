"""A launcher in memory: its "workers" are entries that tests (or a simulation) end when they like.

A full member of the family: idempotent by attempt id, handles never reused, kills that take effect at once or
only when told (`stubborn`), and a cluster that can be out of reach (`reachable = False`).
"""

from __future__ import annotations

import itertools

from flash.errors import Unavailable
from flash.launching.launcher import LaunchRequest, Probe


class FakeLauncher:
    def __init__(self, devices: tuple[str, ...] = ("cpu",), *, stubborn: bool = False) -> None:
        self._devices = devices
        self._numbers = itertools.count(1)
        self._alive: dict[str, str] = {}  # handle -> attempt id
        self.requests: dict[str, LaunchRequest] = {}  # by attempt id
        self.kills: list[str] = []
        self.stubborn = stubborn
        self.reachable = True
        self.refusal: Exception | None = None  # raised by the next launches

    def devices(self) -> list[str]:
        return list(self._devices)

    def describe(self) -> None:
        return None

    def launch(self, request: LaunchRequest) -> str:
        if self.refusal is not None:
            raise self.refusal
        if not self.reachable:
            raise Unavailable("the launcher is out of reach")
        for handle, attempt in self._alive.items():
            if attempt == request.attempt_id:
                return handle
        handle = f"fake:{next(self._numbers)}"
        self._alive[handle] = request.attempt_id
        self.requests[request.attempt_id] = request
        return handle

    def probe(self, handle: str) -> Probe:
        if not self.reachable:
            return Probe.UNKNOWN
        return Probe.ALIVE if handle in self._alive else Probe.DEAD

    def kill(self, handle: str) -> None:
        self.kills.append(handle)
        if self.reachable and not self.stubborn:
            self._alive.pop(handle, None)

    def list(self) -> dict[str, str]:
        return {attempt: handle for handle, attempt in self._alive.items()} if self.reachable else {}

    # --- the simulation's own levers ------------------------------------------------------------------

    def die(self, attempt_id: str) -> None:
        """The worker's process ends, however it came to that."""
        self._alive = {handle: attempt for handle, attempt in self._alive.items() if attempt != attempt_id}
