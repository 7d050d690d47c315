"""Deployments and engines as rows: names that move by compare-and-set, engines that are wanted once."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import Connection, select
from tests.storage.test_runs import new_run

from flash.errors import Conflict, NotFound
from flash.records import EngineState, Revision
from flash.storage import deployments, engines, schema
from flash.storage.database import Database
from flash.storage.deployments import DeploymentRow


def revision(run_id: str, step: int, digest: str = "ab") -> Revision:
    return Revision(run_id=run_id, step=step, adapter_sha256=digest * 32, model="flash/nano")


def move(connection: Connection, to: Revision, expected: int, *, org: str = "local") -> int:
    key = f"runs/{to.run_id}/checkpoints/step-{to.step}.json"
    return deployments.move(
        connection, to, org=org, manifest_key=key, expected=expected, verified=True, now=10.0 + expected
    )


def find(database: Database, run_id: str) -> DeploymentRow | None:
    with database.read() as connection:
        return deployments.find(connection, run_id)


def test_a_name_moves_and_is_taken_back_and_remembers(database: Database):
    with database.write() as connection:
        run_id = new_run(connection)
        assert deployments.find(connection, run_id) is None
        assert move(connection, revision(run_id, 2), 0) == 1
        assert move(connection, revision(run_id, 4), 1) == 2
    found = find(database, run_id)
    assert found is not None and found.revision == revision(run_id, 4)
    assert (found.version, found.org, found.updated_at) == (2, "local", 11.0)
    assert found.manifest_key is not None and found.manifest_key.endswith("/step-4.json")
    with database.write() as connection:
        assert deployments.remove(connection, run_id, org="local", expected=2, now=20.0) == 3
        assert deployments.list_live(connection, org="local") == [] and deployments.count_live(connection) == 0
        assert move(connection, revision(run_id, 2), 3) == 4
        moves = deployments.history(connection, run_id)
    assert [(each["action"], each["from_step"], each["to_step"]) for each in moves] == [
        ("deploy", None, 2), ("deploy", 2, 4), ("undeploy", 4, None), ("deploy", None, 2),
    ]  # fmt: skip


def test_who_saw_an_older_name_is_refused(database: Database):
    with database.write() as connection:
        run_id = new_run(connection)
        move(connection, revision(run_id, 2), 0)
    for expected in (0, 2):
        with pytest.raises(Conflict, match="meanwhile"), database.write() as connection:
            move(connection, revision(run_id, 4), expected)
    with pytest.raises(Conflict), database.write() as connection:
        deployments.remove(connection, run_id, org="local", expected=0, now=1.0)
    found = find(database, run_id)
    assert found is not None and (found.version, found.revision) == (1, revision(run_id, 2))


def test_of_two_moves_at_once_one_is_made(database: Database):
    with database.write() as connection:
        run_id = new_run(connection)
    outcomes: list[str] = []
    start = threading.Barrier(4)

    def one(step: int) -> None:
        start.wait()
        try:
            with database.write() as connection:
                move(connection, revision(run_id, step), 0)
            outcomes.append("moved")
        except Conflict:
            outcomes.append("refused")

    threads = [threading.Thread(target=one, args=(step,)) for step in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["moved", "refused", "refused", "refused"]


def test_a_revision_is_written_once_and_each_adapter_of_a_step_has_its_own(database: Database):
    with database.write() as connection:
        run_id = new_run(connection)
        for number, digest in enumerate(["ab", "cd", "ab"]):
            move(connection, revision(run_id, 2, digest), number)
        table = schema.revisions
        kept = connection.execute(select(table.c.adapter_sha256).where(table.c.run_id == run_id)).scalars().all()
    assert sorted(kept) == ["ab" * 32, "cd" * 32]


def test_an_org_sees_its_own_names_newest_first(database: Database):
    with database.write() as connection:
        mine, later, theirs = new_run(connection), new_run(connection), new_run(connection, org="other")
        move(connection, revision(mine, 2), 0)
        move(connection, revision(later, 2), 0)
        move(connection, revision(mine, 4), 1)
        move(connection, revision(theirs, 2), 0, org="other")
        listed = [each.run_id for each in deployments.list_live(connection, org="local")]
        assert listed == [mine, later]
        assert deployments.count_live(connection) == 3


# --- engines ------------------------------------------------------------------------------------------


def test_an_engine_is_wanted_once_and_again_when_it_is_over(database: Database):
    with database.write() as connection:
        first = engines.want(connection, "flash/nano", work_root="/w", now=1.0)
        assert (first.state, first.work_dir) == (EngineState.WAITING, f"/w/{first.id}")
        assert engines.want(connection, "flash/nano", work_root="/w", now=2.0).id == first.id
        assert engines.get(connection, first.id).heartbeat_at == 2.0, "it is still waited for"
        other = engines.want(connection, "other/base", work_root="/w", now=2.0)
        assert engines.change(
            connection, first.id, source=engines.LIVE, target=EngineState.DRAINING, now=3.0, reason="idle"
        )
        assert [engine.id for engine in engines.live(connection)] == [first.id, other.id]
        second = engines.want(connection, "flash/nano", work_root="/w", now=4.0)
        assert second.id != first.id
        assert not engines.change(connection, first.id, source=[EngineState.READY], target=EngineState.ENDED, now=5.0)
        assert engines.change(connection, first.id, source=engines.LIVE, target=EngineState.ENDED, now=5.0)
        assert engines.usable(connection, "flash/nano") == second
        assert [engine.id for engine in engines.ended(connection, before=5.0)] == [first.id]
        engines.forget(connection, first.id)
        with pytest.raises(NotFound):
            engines.get(connection, first.id)


def test_a_token_is_for_an_engine_that_was_not_launched_and_goes_with_it(database: Database):
    with database.write() as connection:
        engine = engines.want(connection, "flash/nano", work_root="/w", now=1.0)
        assert not engines.issue_token(connection, engine.id, sha256="a" * 64, sealed=b"x")
        waiting = [EngineState.WAITING]
        engines.change(connection, engine.id, source=waiting, target=EngineState.LAUNCHING, now=2.0, device="cpu")
        assert engines.issue_token(connection, engine.id, sha256="a" * 64, sealed=b"x")
        engines.change(connection, engine.id, source=engines.LIVE, now=3.0, handle="h")
        assert not engines.issue_token(connection, engine.id, sha256="b" * 64, sealed=b"y")
        assert engines.get(connection, engine.id).sealed_token == b"x"
        engines.change(connection, engine.id, source=engines.LIVE, target=EngineState.ENDED, now=4.0)
        assert engines.get(connection, engine.id).sealed_token is None


def test_who_waits_for_an_engine_is_told_of_its_changes_and_not_of_its_heartbeats(database: Database):
    told: list[set[str]] = []
    with database.write() as connection:
        engine = engines.want(connection, "flash/nano", work_root="/w", now=1.0)
    database.on_commit(told.append)
    with database.write() as connection:
        engines.record_heartbeat(connection, engine.id, in_flight=1, stats={"tokens": 2.0}, now=2.0)
    assert told == []
    with database.write() as connection:
        engines.change(connection, engine.id, source=engines.LIVE, now=2.0, reason="because")
    assert told == [{engine.id}]
