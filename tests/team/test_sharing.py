"""Orgs that share devices: shares and priorities by the API, and a thousand runs that end in fair order."""

from __future__ import annotations

import gc
import time
from collections import Counter, defaultdict
from pathlib import Path

import psutil
import pytest
from tests.team.worlds import Team

from flash.artifacts.manifests import write_checkpoint
from flash.control_plane.queueing import fair_level
from flash.records import AttemptState, RunState
from flash.storage import runs, shares
from flash.storage.identity import Role
from flash.storage.shares import Standing


def started(team: Team, known: set[str]) -> list[str]:
    """Runs that were launched since, in order."""
    new = [attempt for attempt in team.launcher.requests if attempt not in known]
    known.update(new)
    return [attempt.rpartition(".")[0] for attempt in new]


def end(team: Team, run_id: str) -> None:
    with team.plane.database.write() as connection:
        runs.request_cancel(connection, run_id, now=1.0)
    team.launcher.die(f"{run_id}.1")
    team.settle()


def test_priorities_are_kept_shown_and_changed_while_a_run_waits(open_team):
    team: Team = open_team(devices=("cpu",))
    key, stranger, reader = team.key("acme"), team.key("beta"), team.key("acme", Role.READ_ONLY)
    team.push(key, "acme")
    config = {"model": "flash/nano", "environment": {"id": "acme/echo"}}
    ids = {}
    for priority in ("low", "normal", "high"):
        asked = {"config": config, "priority": priority}
        again = [team.call(key, "POST", "/api/runs", json=asked, headers={"Idempotency-Key": priority}) for _ in "ab"]
        assert [answer.status_code for answer in again] == [201, 200] and again[0].json()["priority"] == priority
        ids[priority] = again[0].json()["run_id"]
    other = {"config": config, "priority": "low"}
    assert team.call(key, "POST", "/api/runs", json=other, headers={"Idempotency-Key": "high"}).status_code == 409
    assert team.call(key, "POST", "/api/runs", json={"config": config, "priority": "urgent"}).status_code == 422

    def behind(run_id: str) -> str:
        return str(team.call(key, "GET", f"/api/runs/{run_id}").json()["next"])

    assert "behind 2 other" in behind(ids["low"]) and "for a free device" in behind(ids["high"])
    path = f"/api/runs/{ids['low']}/priority"
    assert team.call(stranger, "POST", path, json={"priority": "high"}).status_code == 404
    assert team.call(reader, "POST", path, json={"priority": "high"}).status_code == 403
    for _ in range(2):
        assert team.call(key, "POST", path, json={"priority": "high"}).json()["priority"] == "high"
    assert "behind 2 other" in behind(ids["normal"]) and "behind 1 other" in behind(ids["high"])
    told = team.audited()[-1]
    assert (told.action, told.object) == ("POST /api/runs/{run_id}/priority", f"run_id={ids['low']} priority=high")
    events = team.call(key, "GET", f"/api/runs/{ids['low']}/events").json()["events"]
    assert [event["data"]["reason"] for event in events if event["kind"] == "state"] == [
        "submitted", "its priority is high now",
    ]  # fmt: skip
    known: set[str] = set()
    for expected in ("low", "high", "normal"):  # low is high now, and the oldest of them
        team.settle()
        [run_id] = started(team, known)
        assert run_id == ids[expected]
        end(team, run_id)
    assert team.call(key, "POST", path, json={"priority": "low"}).status_code == 409


def test_an_orgs_share_is_the_owners_to_set_and_counts_at_once(open_team):
    team: Team = open_team(devices=tuple(f"cpu:{n}" for n in range(4)))
    keys = {org: team.key(org, Role.ADMIN) for org in ("acme", "beta")}
    for org, key in keys.items():
        team.push(key, org)
        for _ in range(4):
            team.run(key, org)
    assert team.call(keys["acme"], "PATCH", "/api/orgs/acme", json={"share": 3}).status_code == 403
    for wrong in (0, -1, 101, "much", None):
        assert team.call(team.owner, "PATCH", "/api/orgs/acme", json={"share": wrong}).status_code == 422
    assert team.call(team.owner, "PATCH", "/api/orgs/nobody", json={"share": 3}).status_code == 404
    assert team.call(team.owner, "PATCH", "/api/orgs/acme", json={"share": 3}).json()["share"] == 3
    assert team.audited()[-1].object == "org=acme share=3"
    assert {org["name"]: org["share"] for org in team.call(team.owner, "GET", "/api/orgs").json()["orgs"]} == {
        "acme": 3, "beta": 1, "local": 1,
    }  # fmt: skip
    team.settle()
    with team.plane.database.read() as connection:
        held = Counter(runs.get_run(connection, run_id).org_id for run_id in started(team, set()))
    assert held == {"acme": 3, "beta": 1}


# --- a thousand runs ----------------------------------------------------------------------------------

DEVICES = 40
COUNTS = {"first": 500, "second": 300, "double": 180, "late": 20}  # in the order of submission
MOST_BYTES = 30 << 20  # of growth after the first runs, which fill caches


def finish(team: Team, live: list[str], saved: Path) -> None:
    """What workers say of these runs, in short and all at once: the protocol has tests of its own."""
    store, now, said = team.plane.store, team.plane.clock(), []
    for run_id in live:
        (saved / "adapter").mkdir(parents=True, exist_ok=True)
        (saved / "adapter" / "weights").write_text(run_id)
        manifest, sha256 = write_checkpoint(store, run_id, 3, saved, True, {})
        said.append((run_id, manifest, sha256))
    with team.plane.database.write() as connection:
        for run_id, manifest, sha256 in said:
            assert runs.claim(connection, runs.get_attempt(connection, run_id, 1), pid=7, now=now)
            runs.record_checkpoint(connection, manifest, epoch=1, manifest_sha256=sha256, now=now)
            running, ending = [AttemptState.RUNNING], AttemptState.ENDING
            runs.change_attempt(connection, run_id, 1, source=running, target=ending, now=now, outcome="done")
    for run_id in live:
        team.launcher.die(f"{run_id}.1")


@pytest.mark.slow
def test_a_thousand_runs_of_several_orgs_end_in_fair_order_with_flat_memory(open_team, tmp_path, capsys):
    team: Team = open_team(devices=tuple(f"cpu:{n}" for n in range(DEVICES)))
    began = time.monotonic()
    org_of: dict[str, str] = {}
    patterns: dict[str, runs.RunRow] = {}  # for each org one run, cancelled, to make others from
    for org in COUNTS:
        key = team.key(org)
        team.push(key, org)
        run_id = team.run(key, org)
        with team.plane.database.write() as connection:
            patterns[org] = runs.get_run(connection, run_id)
            runs.request_cancel(connection, run_id, now=1.0)
    with team.plane.database.write() as connection:
        shares.set_share(connection, "double", 2.0)

    def submit(org: str, count: int) -> None:
        row = patterns[org]
        with team.plane.database.write() as connection:
            for _ in range(count):
                new = runs.NewRun(
                    org=org, config=row.config, spec=row.spec, seed=0, environment_namespace=org,
                    environment_name="echo", environment_sha256=row.environment_sha256, priority=len(org_of) % 3 - 1,
                )  # fmt: skip
                org_of[runs.insert_run(connection, new, now=1000.0 + len(org_of))] = org

    for org in ("first", "second", "double"):
        submit(org, COUNTS[org])
    known, waiting = set(), Counter(COUNTS) - Counter(late=20)
    order, ended, grown, least = [], 0, 0, 0
    while ended < 1000:
        team.settle()
        new = started(team, known)
        order += new
        waiting -= Counter(org_of[run_id] for run_id in new)
        live = [attempt.rpartition(".")[0] for attempt in team.launcher.list()]
        held = Counter(org_of[run_id] for run_id in live)
        wanted = held + waiting
        standings = {org: Standing(2.0 if org == "double" else 1.0) for org in wanted}
        level = fair_level(wanted, standings, DEVICES)
        assert len(live) == min(DEVICES, wanted.total()), "a device idles"
        for org in wanted:
            assert abs(held[org] - min(wanted[org], level * standings[org].share)) < 1, (ended, org, held)
        finish(team, live, tmp_path / "saved")
        ended += len(live)
        if ended == 400:
            submit("late", COUNTS["late"])
            waiting += Counter(late=COUNTS["late"])
        gc.collect()
        bytes_ = psutil.Process().memory_info().rss
        least = bytes_ if ended <= 200 else least
        grown = max(grown, bytes_ - least) if ended > 200 else 0
    team.settle()
    with capsys.disabled():
        print(f"\n  1,000 runs in {time.monotonic() - began:.1f} s, {grown / 2**20:.1f} MiB grown")
    assert grown < MOST_BYTES
    with team.plane.database.read() as connection:
        assert [runs.get_run(connection, run_id).state for run_id in org_of] == [RunState.DONE] * 1000
        of_each = defaultdict(list)
        for run_id in order:
            row = runs.get_run(connection, run_id)
            of_each[row.org_id].append((-row.priority, row.created_at))
    assert all(each == sorted(each) for each in of_each.values()), "by priority and age within an org"
    late = [place for place, run_id in enumerate(order) if org_of[run_id] == "late"]
    assert late[-1] < 400 + 3 * DEVICES, "an org that comes late waits for none of the others' backlog"
