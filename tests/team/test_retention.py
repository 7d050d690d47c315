"""What goes when its time is over, and that nothing goes which somebody needs: by property, on real stores."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import insert, select, update
from tests.team.worlds import Team
from torture.machine import ENVIRONMENT, archive

from flash.artifacts.manifests import environment_key, manifest_key, object_key, verify, write_checkpoint
from flash.artifacts.store import Store
from flash.control_plane.cleaning import Cleaner
from flash.errors import Unavailable
from flash.records import EventKind, Manifest, RunState
from flash.storage import audit, environments, events, identity, retention, runs, schema
from flash.storage.retention import DAY_S

DAYS = {"keep_state_days": 2.0, "keep_files_days": 5.0, "keep_events_days": 7.0, "keep_audit_days": 3.0}
NOW = 1_800_000_000.0
SPEC = {"model": "flash/nano", "train": {"lora_rank": 16, "lora_alpha": 32}}
_numbers = itertools.count(1)


@dataclass
class Made:
    """A run as it was put there."""

    run_id: str
    state: RunState
    age_days: float
    environment: str
    checkpoints: list[Manifest] = field(default_factory=list)
    source: Made | None = None
    pinned: bool = False
    ttl_days: float | None = None
    deployed: bool = False

    @property
    def kept_days(self) -> float:
        return DAYS["keep_files_days"] if self.ttl_days is None else self.ttl_days


class World:
    """Runs of every kind and age, with real files; the clock stands at NOW."""

    def __init__(self, team: Team) -> None:
        self.team, self.plane = team, team.plane
        self.plane.clock = lambda: NOW
        self.runs: list[Made] = []
        with self.plane.database.write() as connection:
            identity.ensure_org(connection, "acme")

    def environment(self, text: str, *, deleted_days: float | None) -> str:
        body = text.encode()
        sha256 = hashlib.sha256(body).hexdigest()
        self.plane.store.put_bytes(environment_key(sha256), body)
        with self.plane.database.write() as connection:
            name = f"e{next(_numbers)}"
            environments.push(
                connection, org="acme", namespace="acme", name=name, sha256=sha256, size=len(body),
                files=["environment.py"], now=0.0,
            )  # fmt: skip
            if deleted_days is not None:
                gone = NOW - deleted_days * DAY_S
                environments.delete(connection, org="acme", namespace="acme", name=name, now=gone)
        return sha256

    def add(self, made: Made, steps: int) -> None:
        now = NOW - made.age_days * DAY_S
        new = runs.NewRun(
            org="acme", config={}, spec=SPEC, seed=0, environment_namespace="acme",
            environment_name="e", environment_sha256=made.environment,
            init_run_id=made.source.run_id if made.source else None,
            init_step=made.source.checkpoints[-1].step if made.source else None,
        )  # fmt: skip
        with self.plane.database.write() as connection:
            runs.insert_run(connection, new, now=now, run_id=made.run_id)
        for step in range(1, steps + 1):
            with tempfile.TemporaryDirectory() as folder:
                for name in ("adapter/weights", "adapter/shared", "state/optimizer"):
                    path = Path(folder, name)
                    path.parent.mkdir(exist_ok=True)
                    path.write_text("shared" if name.endswith("shared") else f"{made.run_id} {step} {name}")
                final = step == steps and made.state is RunState.DONE
                manifest, sha256 = write_checkpoint(self.plane.store, made.run_id, step, Path(folder), final, {})
            with self.plane.database.write() as connection:
                runs.record_checkpoint(connection, manifest, epoch=1, manifest_sha256=sha256, now=now)
            made.checkpoints.append(manifest)
        with self.plane.database.write() as connection:
            if made.state.terminal:
                source = [state for state in RunState if not state.terminal]
                runs.transition(connection, made.run_id, source=source, target=made.state, reason="x", now=now)
            values: dict[str, Any] = {"pinned": made.pinned, "state": made.state.value}
            values["ttl_s"] = None if made.ttl_days is None else made.ttl_days * DAY_S
            values["cleaned_at"] = now if made.state.terminal else None
            connection.execute(update(schema.runs).where(schema.runs.c.id == made.run_id).values(**values))
            if made.deployed:
                connection.execute(
                    insert(schema.deployments).values(
                        run_id=made.run_id, org_id="acme", version=1, step=made.checkpoints[-1].step,
                        adapter_sha256="a" * 64, created_at=now, updated_at=now,
                    )
                )  # fmt: skip
        self.runs.append(made)

    def rounds(self) -> None:
        """As often as it takes until nothing more goes."""
        cleaner = Cleaner(self.plane)
        for _ in range(6):
            cleaner.clean()
            cleaner._last = None

    def whole(self, manifest: Manifest, **only: Any) -> bool:
        try:
            verify(self.plane.store, manifest, digests=True, **only)
        except Exception:
            return False
        return True


def name() -> str:
    return f"flash-1700000000-{next(_numbers):08x}"


@st.composite
def plans(draw: st.DrawFn) -> list[dict[str, Any]]:
    """What to build: each run may start from an earlier done one."""
    found = []
    for index in range(draw(st.integers(1, 6))):
        sources = [place for place, plan in enumerate(found) if plan["state"] is RunState.DONE]
        found.append(
            {
                "state": draw(st.sampled_from([RunState.DONE, RunState.DONE, RunState.FAILED, RunState.CANCELLED,
                                               RunState.QUEUED, RunState.RUNNING])),
                "age": draw(st.sampled_from([0.0, 1.0, 3.0, 6.0, 9.0])),
                "pinned": draw(st.booleans()) and draw(st.booleans()),
                "ttl": draw(st.sampled_from([None, None, 0.5, 20.0])),
                "deployed": draw(st.booleans()),
                "source": draw(st.sampled_from([None, *sources])),
                "environment": draw(st.integers(0, 2)),
                "steps": draw(st.integers(1, 3)),
                "index": index,
            }
        )  # fmt: skip
    return found


@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(plan=plans(), deleted=st.lists(st.sampled_from([None, 1.0, 9.0]), min_size=3, max_size=3))
def test_what_is_needed_stays_and_what_is_not_goes(tmp_path_factory: pytest.TempPathFactory, plan, deleted):
    with Team(tmp_path_factory.mktemp("kept"), **DAYS, clean_interval_s=0.0, work_grace_s=0.0) as team:
        world = World(team)
        names = [world.environment(f"environment {next(_numbers)}", deleted_days=days) for days in deleted]
        for each in plan:
            made = Made(
                run_id=name(), state=each["state"], age_days=each["age"], environment=names[each["environment"]],
                source=None if each["source"] is None else world.runs[each["source"]], pinned=each["pinned"],
                ttl_days=each["ttl"], deployed=each["deployed"] and each["state"] is RunState.DONE,
            )  # fmt: skip
            world.add(made, each["steps"])
        world.rounds()
        judge(world, names, deleted)


def judge(world: World, names: list[str], deleted: list[float | None]) -> None:
    # A run's files stay while it is open, young, pinned, deployed, or needed by one that is not done and whose own
    # files are there still; that goes from the newest to the oldest.
    stays: dict[str, bool] = {}
    for made in reversed(world.runs):
        later = [other for other in world.runs if other.source is made and other.state is not RunState.DONE]
        needed = any(stays[other.run_id] for other in later)
        young = made.age_days < made.kept_days
        stays[made.run_id] = not made.state.terminal or young or made.pinned or made.deployed or needed
    store = world.plane.store
    with world.plane.database.read() as connection:
        for made in world.runs:
            run = runs.get_run(connection, made.run_id)
            assert run.state is made.state
            known = {found.step: found for found in runs.checkpoints_of(connection, made.run_id)}
            assert (run.collected_at is None) == stays[made.run_id]
            assert set(known) == ({one.step for one in made.checkpoints} if stays[made.run_id] else set())
            with_state = not made.state.terminal or made.pinned or made.age_days < DAYS["keep_state_days"]
            expected = set()
            for manifest in made.checkpoints if stays[made.run_id] else []:
                assert world.whole(manifest, only="adapter")
                assert known[manifest.step].has_state == with_state
                assert world.whole(manifest) == with_state
                files = [file for file in manifest.files if with_state or file.path.startswith("adapter/")]
                expected |= {manifest_key(made.run_id, manifest.step)}
                expected |= {object_key(made.run_id, file.sha256) for file in files}
            assert set(store.list(f"runs/{made.run_id}")) == expected
            heard = not made.state.terminal or made.pinned or made.age_days < DAYS["keep_events_days"]
            assert bool(events.read(connection, made.run_id)) == heard
        for sha256, days in zip(names, deleted, strict=True):
            users = [made for made in world.runs if made.environment == sha256 and made.state is not RunState.DONE]
            needed = any(stays[made.run_id] for made in users)
            listed = days is None or days < DAYS["keep_files_days"]
            assert (store.size(environment_key(sha256)) is not None) == (listed or needed)
            table = schema.environment_versions
            row = connection.execute(select(table).where(table.c.sha256 == sha256)).first()
            assert (row is not None) == (listed or needed)


def test_nothing_goes_unless_the_operator_says_so(open_team):
    team: Team = open_team(clean_interval_s=0.0, work_grace_s=0.0)
    world = World(team)
    old = Made(name(), RunState.DONE, 5000.0, world.environment("e", deleted_days=5000.0))
    world.add(old, 3)
    world.rounds()
    with team.plane.database.read() as connection:
        assert len(runs.checkpoints_of(connection, old.run_id)) == 3
        assert events.read(connection, old.run_id)
    assert all(world.whole(manifest) for manifest in old.checkpoints)


def test_keeping_is_a_members_wish_and_shows(open_team):
    team: Team = open_team(**DAYS, clean_interval_s=0.0, work_grace_s=0.0)
    world = World(team)
    key, reader = team.key("acme2"), team.key("acme2", identity.Role.READ_ONLY)
    with team.plane.database.write() as connection:
        connection.execute(update(schema.api_keys).values(org_id="acme"))
    old = Made(name(), RunState.DONE, 100.0, world.environment("e", deleted_days=None))
    world.add(old, 1)
    path = f"/api/runs/{old.run_id}/keep"
    assert team.call(reader, "POST", path, json={"pinned": True}).status_code == 403
    kept = team.call(key, "POST", path, json={"pinned": True}).json()
    assert kept["managed"]["pinned"] is True and kept["managed"]["kept_until"] is None
    world.rounds()
    assert team.call(key, "GET", f"/api/runs/{old.run_id}/adapter").status_code == 200
    told = team.call(key, "POST", path, json={"days": 101}).json()["managed"]
    assert (told["pinned"], told["kept_until"]) == (False, pytest.approx(NOW + DAY_S))
    world.rounds()
    assert team.call(key, "GET", f"/api/runs/{old.run_id}/adapter").status_code == 200
    team.call(key, "POST", path, json={})
    world.rounds()
    gone = team.call(key, "GET", f"/api/runs/{old.run_id}").json()
    assert gone["managed"]["files_removed_at"] == NOW and gone["checkpoints"] == []
    late = team.call(key, "POST", path, json={"pinned": True})
    assert late.status_code == 409 and "keep_files_days" in late.json()["error"]["message"]
    assert team.call(key, "GET", f"/api/runs/{old.run_id}/adapter").status_code == 404
    warm = {"model": "flash/nano", "environment": {"id": "acme/none"}, "train": {"init_from_adapter": old.run_id}}
    assert team.call(key, "POST", "/api/runs", json={"config": warm}).status_code == 422
    assert team.call(key, "POST", "/api/deployments", json={"run_id": old.run_id}).status_code == 422
    entries = {(found.action, found.status) for found in team.audited()}
    assert ("POST /api/runs/{run_id}/keep", 200) in entries and ("POST /api/runs/{run_id}/keep", 403) in entries


def test_a_push_of_what_went_brings_it_back(open_team):
    team: Team = open_team(**DAYS, clean_interval_s=0.0)
    world = World(team)
    key = team.key("beta")
    body = archive({"environment.py": ENVIRONMENT})  # its bytes name the second in which it was made
    assert team.call(key, "POST", "/api/environments/beta/echo", content=body).status_code == 201
    with team.plane.database.write() as connection:
        [version] = environments.current(connection, org="beta")
        environments.delete(connection, org="beta", namespace="beta", name="echo", now=NOW - 100 * DAY_S)
    world.rounds()
    assert team.plane.store.size(environment_key(version.sha256)) is None
    assert team.call(key, "POST", "/api/environments/beta/echo", content=body).status_code == 201
    assert team.plane.store.size(environment_key(version.sha256)) == version.size
    team.run(key, "beta")


# --- while others work ------------------------------------------------------------------------------------


class Watched(Store):
    """A folder that tells of each delete, before and after it."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.deleted: list[str] = []
        self.before: Callable[[str], object] = str
        self.after: Callable[[str], object] = str

    def delete(self, key: str) -> None:
        self.before(key)
        super().delete(key)
        self.deleted.append(key)
        self.after(key)


def watched(team: Team) -> Watched:
    team.plane.store = store = Watched(team.plane.store.url)
    return store


def recorded(world: World) -> set[str]:
    """Digests that somebody could still come to need."""
    table = schema.environment_versions
    with world.plane.database.read() as connection:
        return set(connection.execute(select(table.c.sha256).where(table.c.push != environments.LEAVING)).scalars())


def test_a_bucket_that_hangs_holds_up_no_write(open_team):
    world = World(open_team(**DAYS, clean_interval_s=0.0))
    world.environment("old", deleted_days=100.0)
    store, asked, answered = watched(world.team), threading.Event(), threading.Event()

    def hang(key: str) -> None:
        asked.set()
        assert answered.wait(60)

    store.before = hang
    cleaning = threading.Thread(target=Cleaner(world.plane).clean)
    cleaning.start()
    try:
        assert asked.wait(60)
        written = threading.Event()

        def write() -> None:
            with world.plane.database.write() as connection:
                identity.ensure_org(connection, "beta")
            written.set()

        threading.Thread(target=write, daemon=True).start()
        assert written.wait(20), "it waits for the bucket"
    finally:
        answered.set()
        cleaning.join(60)
    assert recorded(world) == set() and store.deleted


def test_a_bucket_that_fails_half_way_leaves_no_version_without_its_archive(open_team):
    world = World(open_team(**DAYS, clean_interval_s=0.0))
    for number in range(5):
        world.environment(f"old {number}", deleted_days=100.0)
    kept = world.environment("kept", deleted_days=None)
    store = watched(world.team)

    def fail(key: str) -> None:
        if len(store.deleted) == 2:
            raise Unavailable("the bucket is away")

    store.before = fail
    world.rounds()
    assert len(store.deleted) == 2
    assert all(store.size(environment_key(sha256)) for sha256 in recorded(world))
    store.before = str
    world.rounds()
    assert recorded(world) == {kept}
    assert store.list("environments") == [environment_key(kept)]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_push_while_the_same_archive_goes_is_refused_and_then_works(open_team, moment: str):
    team: Team = open_team(**DAYS, clean_interval_s=0.0)
    world = World(team)
    key = team.key("beta")
    body = archive({"environment.py": ENVIRONMENT})
    assert team.call(key, "POST", "/api/environments/beta/echo", content=body).status_code == 201
    with team.plane.database.write() as connection:
        [version] = environments.current(connection, org="beta")
        environments.delete(connection, org="beta", namespace="beta", name="echo", now=NOW - 100 * DAY_S)
    store = watched(team)
    answers: list[int] = []

    def push(_key: str = "") -> int:
        """Under another name too: what is the same is the archive."""
        path = f"/api/environments/beta/echo{len(answers)}"
        answers.append(team.call(key, "POST", path, content=body).status_code)
        return answers[-1]

    setattr(store, moment, push)
    Cleaner(team.plane).clean()
    assert store.deleted and answers == [503]
    setattr(store, moment, str)
    assert push() == 201
    world.rounds()
    assert store.size(environment_key(version.sha256)) == version.size


def test_an_archive_that_another_name_has_too_stays(open_team):
    world = World(open_team(**DAYS, clean_interval_s=0.0))
    for days in (100.0, None, 100.0):
        sha256 = world.environment("the same", deleted_days=days)
    store = watched(world.team)
    world.rounds()
    assert store.deleted == [] and recorded(world) == {sha256}


def test_events_go_a_part_at_a_time_and_count_as_gone_at_last(open_team):
    world = World(open_team(**DAYS))
    environment = world.environment("e", deleted_days=None)
    long, short = (Made(name(), RunState.DONE, days, environment) for days in (9.0, 8.0))
    world.add(long, 1)
    world.add(short, 1)
    many = [events.NewEvent(EventKind.LOG, {"text": str(n)}, NOW) for n in range(1700)]
    with world.plane.database.write() as connection:
        events.append(connection, long.run_id, many, now=NOW, closing=True)

    def left() -> tuple[int, bool]:
        with world.plane.database.read() as connection:
            count = len(events.read(connection, long.run_id, limit=10_000))
            return count, runs.get_run(connection, long.run_id).silenced_at is not None

    counts = [left()[0]]
    while counts[-1]:
        with world.plane.database.write() as connection:
            assert long.run_id in retention.expire_events(connection, world.plane.settings.times, now=NOW)
        count, silenced = left()
        assert 0 < counts[-1] - count <= 500 and (count == 0 or not silenced)
        counts.append(count)
    assert len(counts) > 4
    world.rounds()
    with world.plane.database.read() as connection:
        assert all(runs.get_run(connection, made.run_id).silenced_at == NOW for made in (long, short))
        assert events.read(connection, short.run_id) == []


def test_a_long_audit_log_is_forgotten_a_part_at_a_time(open_team):
    world = World(open_team(**DAYS, clean_interval_s=0.0))
    times = [NOW - 100 * DAY_S] * 2500 + [NOW] * 3
    rows = [{"time": time, "actor": "server", "action": "x", "status": 200} for time in times]
    with world.plane.database.write() as connection:
        connection.execute(insert(schema.audit), rows)
        assert len(audit.older(connection, before=NOW - DAY_S)) < 2500
    world.rounds()
    assert [entry.time for entry in world.team.audited()] == [NOW] * 3


def test_a_round_over_its_budget_goes_on_with_the_next_call(open_team):
    """Here a call may take no time at all: it takes one step."""
    world = World(open_team(**DAYS, clean_interval_s=3600.0, clean_budget_s=0.0, work_grace_s=0.0))
    environment = world.environment("e", deleted_days=None)
    for _ in range(4):
        world.add(Made(name(), RunState.DONE, 100.0, environment), 3)
    store, cleaner = watched(world.team), Cleaner(world.plane)
    calls = 0
    while store.list("runs"):
        before, calls = len(store.deleted), calls + 1
        cleaner.clean()
        assert len(store.deleted) - before <= 1
        assert calls < 1000
    assert calls > 4 * 3 * 2
    for _ in range(20):  # to the round's end
        cleaner.clean()
    world.add(Made(name(), RunState.DONE, 100.0, environment), 1)
    for _ in range(100):
        cleaner.clean()
    assert store.list("runs"), "a round that is whole is followed when it is time"
