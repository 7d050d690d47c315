"""Whose run gets the next device: a fair share for each org, priorities and age within one.

Pure arithmetic over a snapshot's runs, for `reconciler.decide`; it knows no devices by name, no engines and no
database. Nothing is ever taken from a run that has a device: what is unfair now heals as runs end.

Each org that holds or wants devices has a fair share of them, by its weight; what one does not want goes to the
others (max-min fairness). The next device goes to

1. an org that holds less than the whole part of its share, before any that has that already;
2. among those, the one that holds least for its weight;
3. among those, the one whose turn it is: turns are start tags (start-time fair queueing; Goyal, Vin, Cheng 1996), so
   that orgs share even a single device by their weights, and one that was idle has its turn at once but saves
   up none;
4. the one whose next run is oldest.

By 1, what orgs come to hold of devices that all become free is within one of their shares; by 3, none starves.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from typing import Protocol, TypeVar

from flash.storage.shares import Standing


class Waiting(Protocol):
    """A run that could start if there was a device."""

    @property
    def run_id(self) -> str: ...
    @property
    def org(self) -> str: ...
    @property
    def priority(self) -> int: ...  # the higher the sooner, within its org
    @property
    def created_at(self) -> float: ...


W = TypeVar("W", bound=Waiting)


def fair_order(
    waiting: Iterable[W], held: Mapping[str, int], orgs: Mapping[str, Standing], devices: int
) -> list[W]:
    """The order in which these runs start as devices become free. `held`: devices that each org has now;
    `devices`: those that runs may have, free ones and held ones together."""
    queues: dict[str, deque[W]] = defaultdict(deque)
    for run in sorted(waiting, key=lambda run: (-run.priority, run.created_at)):  # stable: as they were given
        queues[run.org].append(run)
    standing = {org: orgs.get(org, Standing()) for org in {*queues, *held}}
    wanted = {org: held.get(org, 0) + len(queues.get(org, ())) for org in standing}
    level = fair_level(wanted, standing, devices)
    now = max((each.turn - 1 / each.share for each in orgs.values()), default=0.0)

    def place(org: str, has: int, turn: float) -> tuple[bool, float, float, float, str, int]:
        weight = standing[org].share
        owed = has + 1 <= level * weight + _ROUNDING
        return not owed, has / weight, turn, queues[org][0].created_at, org, has

    heap = [place(org, held.get(org, 0), max(now, standing[org].turn)) for org in queues]
    heapq.heapify(heap)
    order: list[W] = []
    while heap:
        _, _, turn, _, org, has = heapq.heappop(heap)
        order.append(queues[org].popleft())
        if queues[org]:
            heapq.heappush(heap, place(org, has + 1, turn + 1 / standing[org].share))
    return order


_ROUNDING = 1e-9  # of a device: what sums of fractions may be off


def fair_level(wanted: Mapping[str, int], orgs: Mapping[str, Standing], devices: int) -> float:
    """Devices per unit of weight, such that orgs together get all devices and none more than it wants."""
    weight = sum(orgs[org].share for org in wanted)
    left: float = devices
    for per_weight, org in sorted((wanted[org] / orgs[org].share, org) for org in wanted):
        if weight * per_weight > left:
            return left / weight
        left -= wanted[org]
        weight -= orgs[org].share
    return float("inf")  # there is enough for everybody
