"""Whose turn it is: fair shares, turns, priorities; first single situations, then any."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from flash.control_plane.queueing import fair_level
from flash.control_plane.reconciler import AttemptSnapshot, RunSnapshot, Snapshot, StartAttempt, decide
from flash.control_plane.settings import ServerSettings
from flash.launching.launcher import Probe
from flash.records import AttemptState, Phase, RunState
from flash.storage.shares import Standing

SETTINGS = ServerSettings(home=Path("/nowhere"))
HOLDING = AttemptSnapshot(
    epoch=1, state=AttemptState.RUNNING, device="", handle="h", probe=Probe.ALIVE, phase=Phase.TRAINING
)


def queued(org: str, count: int, *, since: float = 0.0, priority: int = 0) -> list[RunSnapshot]:
    return [
        RunSnapshot(
            f"{org}{priority:+}/{since + n:g}", RunState.QUEUED, "run", org=org, priority=priority,
            created_at=since + n,
        )
        for n in range(count)
    ]  # fmt: skip


def holding(org: str, devices: list[str]) -> list[RunSnapshot]:
    return [
        RunSnapshot(f"{org} on {device}", RunState.RUNNING, "run", (replace(HOLDING, device=device),), org=org)
        for device in devices
    ]


def started(runs: list[RunSnapshot], devices: int, **orgs: Standing) -> list[str]:
    names = tuple(f"cuda:{n}" for n in range(devices))
    actions = decide(Snapshot(tuple(runs), names, orgs=orgs), 0.0, SETTINGS)
    return [action.run_id for action in actions if isinstance(action, StartAttempt)]


def by_org(run_ids: list[str]) -> Counter[str]:
    return Counter(run_id[0] for run_id in run_ids)


# --- single situations --------------------------------------------------------------------------------


def test_an_org_that_comes_late_has_its_turn_at_once():
    runs = [*queued("a", 1000), *queued("b", 3, since=5000)]
    assert by_org(started(runs, 4)) == {"a": 2, "b": 2}
    assert started([*holding("a", ["cuda:0"]), *runs], 2) == ["b+0/5000"]


def test_what_one_org_does_not_want_goes_to_the_others():
    assert by_org(started([*queued("a", 9), *queued("b", 1), *queued("c", 9)], 9)) == {"a": 4, "b": 1, "c": 4}
    assert by_org(started(queued("a", 9), 4)) == {"a": 4}


def test_shares_weigh():
    runs = [*queued("a", 20), *queued("b", 20)]
    assert by_org(started(runs, 8, a=Standing(3.0), b=Standing(1.0))) == {"a": 6, "b": 2}
    crowd = [run for org in "bcdefghijk" for run in queued(org, 2)]
    # The whole part of a's share is owed to it; what is left goes round among those whose share is a part of a device.
    assert by_org(started([*crowd, *queued("a", 20)], 10, a=Standing(10.0)))["a"] == 5


def test_priority_counts_within_an_org_and_nowhere_else():
    mine = [*queued("a", 2), *queued("a", 1, since=10, priority=1), *queued("a", 1, priority=-1)]
    assert started(mine, 4) == ["a+1/10", "a+0/0", "a+0/1", "a-1/0"]
    assert by_org(started([*mine, *queued("b", 4, priority=-1)], 4)) == {"a": 2, "b": 2}


def test_a_single_device_goes_round_by_the_shares():
    """Turns, as `storage.shares.take_turn` keeps them, over 120 runs one after the other."""
    orgs = {"a": Standing(1.0), "b": Standing(3.0), "c": Standing(2.0)}
    runs = [run for org in orgs for run in queued(org, 200)]
    order = []
    for _ in range(120):
        [run_id] = started(runs, 1, **orgs)
        runs = [run for run in runs if run.run_id != run_id]
        org = run_id[0]
        order.append(org)
        begun = max(orgs[org].turn, *(each.turn - 1 / each.share for each in orgs.values()))
        orgs[org] = replace(orgs[org], turn=begun + 1 / orgs[org].share)
    assert Counter(order) == {"a": 20, "b": 60, "c": 40}
    for org, weight in (("a", 1), ("b", 3), ("c", 2)):
        gaps = [after - before for before, after in pairwise(n for n, each in enumerate(order) if each == org)]
        assert max(gaps) <= 2 * 6 / weight, (org, gaps)
    idle = started([*runs, *queued("d", 5, since=9000)], 1, **orgs)
    assert by_org(idle) == {"d": 1}, "who was idle has its turn at once"
    orgs["d"] = replace(Standing(), turn=max(each.turn - 1 / each.share for each in orgs.values()) + 1)
    assert "d" not in by_org(started([*runs, *queued("d", 5, since=9000)], 1, **orgs)), "and saved up none"


# --- any situation ------------------------------------------------------------------------------------


@st.composite
def situations(draw: st.DrawFn) -> tuple[Snapshot, bool]:
    """Runs of some orgs that hold some devices and want more; and whether nobody holds any."""
    orgs = draw(st.lists(st.sampled_from("abcdefg"), min_size=1, unique=True))
    devices = [f"cuda:{n}" for n in range(draw(st.integers(0, 12)))]
    empty = draw(st.booleans())
    runs: list[RunSnapshot] = []
    for device in [] if empty else devices:
        org = draw(st.sampled_from([None, *orgs]))
        runs += holding(org, [device]) if org else []
    for org in orgs:
        for number in range(draw(st.integers(0, 8))):
            runs.append(
                RunSnapshot(
                    f"{org}/{number}", RunState.QUEUED, "run", org=org, priority=draw(st.integers(-1, 1)),
                    created_at=draw(st.sampled_from([0.0, 1.0, 2.0])),
                )
            )  # fmt: skip
    standings = {
        org: Standing(draw(st.sampled_from([0.01, 0.5, 1.0, 1.0, 3.0, 100.0])), draw(st.floats(0, 50))) for org in orgs
    }
    return Snapshot(tuple(draw(st.permutations(runs))), tuple(devices), orgs=standings), empty


@settings(max_examples=400)
@given(situations())
def test_no_device_idles_and_shares_are_fair_and_order_is_kept(situation: tuple[Snapshot, bool]):
    snapshot, empty = situation
    actions = decide(snapshot, 0.0, SETTINGS)
    placed = {action.run_id for action in actions if isinstance(action, StartAttempt)}
    held = Counter(run.org for run in snapshot.runs if run.attempts)
    waiting = [run for run in snapshot.runs if not run.attempts]
    left = [run for run in waiting if run.run_id not in placed]
    assert len(placed) == min(len(waiting), len(snapshot.devices) - held.total()), "a device idles, or has two"

    wanted = held + Counter(run.org for run in waiting)
    level = fair_level(wanted, snapshot.orgs, len(snapshot.devices))
    fair = {org: min(wanted[org], level * snapshot.orgs[org].share) for org in wanted}
    assert sum(fair.values()) <= len(snapshot.devices) + 1e-6
    after = held + Counter(run.org for run in waiting if run.run_id in placed)
    for org in wanted:
        if after[org] > held[org]:
            assert after[org] < fair[org] + 1 - 1e-9, f"{org} was given more than its share"
        if empty:
            assert abs(after[org] - fair[org]) < 1, f"{org} has {after[org]}, its share is {fair[org]}"
    for behind in left:
        for ahead in waiting:
            if ahead.org == behind.org and ahead.run_id in placed:
                assert (-ahead.priority, ahead.created_at) <= (-behind.priority, behind.created_at)
