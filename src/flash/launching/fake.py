"""A launcher in memory: its "workers" are entries that tests (or a simulation) end when they like.

A full member of the family: idempotent by attempt id, handles never reused, kills that take effect at once or
only when told (`stubborn`), a cluster that can be out of reach (`reachable = False`), and launches whose answer is lost
(`unsure`).
"""

from __future__ import annotations

import itertools

from flash.errors import Unavailable
from flash.launching.hardware import Device
from flash.launching.launcher import LaunchRequest, LaunchUnsure, Probe


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
        self.unsure: list[bool] = []  # of the next launches, whose answers are lost: whether they were carried out
        self.described: list[Device] | None = None

    def devices(self) -> list[str]:
        return list(self._devices)

    def describe(self) -> list[Device] | None:
        return self.described

    def launch(self, request: LaunchRequest) -> str:
        if self.refusal is not None:
            raise self.refusal
        if not self.reachable:
            raise Unavailable("the launcher is out of reach")
        for handle, attempt in self._alive.items():
            if attempt == request.attempt_id:
                return handle
        lost = self.unsure.pop(0) if self.unsure else None
        if lost is not False:
            handle = f"fake:{next(self._numbers)}"
            self._alive[handle] = request.attempt_id
            self.requests[request.attempt_id] = request
        if lost is not None:
            raise LaunchUnsure("the launcher's answer was lost")
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
