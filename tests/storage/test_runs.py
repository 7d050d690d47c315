"""Runs, attempts and their history: compare-and-set, fencing marks, numbering, secrets."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, select

from flash.errors import Conflict, InternalError, NotFound
from flash.records import AttemptState, EventKind, Heartbeat, Manifest, ManifestFile, Phase, RunState, WorkerEvent
from flash.storage import environments, events, identity, runs, schema, vault
from flash.storage.database import Database
from flash.storage.identity import Role
from flash.storage.vault import Vault


def new_run(connection: Connection, *, org: str = "local", now: float = 1000.0) -> str:
    new = runs.NewRun(
        org=org,
        config={},
        spec={"model": "flash/nano", "train": {}},
        seed=0,
        environment_namespace=org,
        environment_name="env",
        environment_sha256="0" * 64,
    )
    return runs.insert_run(connection, new, now=now)


def running_attempt(database: Database, run_id: str) -> runs.AttemptRow:
    with database.write() as connection:
        runs.insert_attempt(connection, run_id, 1, device="cpu", work_dir="/w", now=1001.0)
        assert runs.claim(connection, runs.get_attempt(connection, run_id, 1), pid=7, now=1002.0)
        assert runs.get_run(connection, run_id).state is RunState.RUNNING
        return runs.get_attempt(connection, run_id, 1)


def log(n: int, text: str = "x") -> WorkerEvent:
    return WorkerEvent(n=n, time=1.0, kind=EventKind.LOG, data={"stream": "trainer", "text": text})


def settle(database: Database, run_id: str, target: RunState, **values: Any) -> bool:
    source = [state for state in RunState if not state.terminal]
    with database.write() as connection:
        return runs.transition(
            connection, run_id, source=source, target=target, reason="because", now=2000.0, **values
        )


def test_a_submit_is_a_queued_run_with_its_first_event(database: Database):
    with database.write() as connection:
        run_id = new_run(connection)
        run = runs.get_run(connection, run_id)
        history = events.read(connection, run_id)
    assert (run.state, run.desired, run.last_seq) == (RunState.QUEUED, "run", 1)
    assert [(event.seq, event.data["to"]) for event in history] == [(1, "queued")]


def test_a_transition_from_another_state_changes_nothing(database: Database):
    with database.write() as connection:
        run_id = new_run(connection)
    with database.write() as connection:
        moved = runs.transition(
            connection, run_id, source=[RunState.RUNNING], target=RunState.DONE, reason="", now=1.0
        )
        assert not moved
        assert runs.get_run(connection, run_id).state is RunState.QUEUED
        assert events.last_seq(connection, run_id) == 1


def test_terminal_states_are_sticky_and_end_the_history(database: Database):
    with database.write() as connection:
        run_id = new_run(connection)
    assert settle(database, run_id, RunState.CANCELLED)
    assert not settle(database, run_id, RunState.DONE)
    with database.write() as connection:
        run = runs.get_run(connection, run_id)
        assert (run.state, run.finished_at, run.phase) == (RunState.CANCELLED, 2000.0, Phase.FINISHED)
        assert events.read(connection, run_id)[-1].data == {"from": "queued", "to": "cancelled", "reason": "because"}
        assert not runs.request_cancel(connection, run_id, now=1.0)
        with pytest.raises(Conflict, match="has ended"):
            events.append(connection, run_id, [events.NewEvent(EventKind.LOG, {}, 1.0)], now=1.0)


def test_a_cancel_is_a_wish_told_once(database: Database):
    with database.write() as connection:
        run_id = new_run(connection)
        assert runs.request_cancel(connection, run_id, now=1.0)
        assert not runs.request_cancel(connection, run_id, now=2.0)
        run = runs.get_run(connection, run_id)
    assert (run.state, run.desired, run.last_seq) == (RunState.QUEUED, "cancel", 2)


def test_an_attempt_is_made_only_for_a_queued_run(database: Database):
    with database.write() as connection:
        run_id = new_run(connection)
        assert runs.insert_attempt(connection, run_id, 1, device="cpu", work_dir="/w", now=1.0)
        assert not runs.insert_attempt(connection, run_id, 2, device="cpu", work_dir="/w", now=1.0)
        assert [attempt.epoch for attempt in runs.attempts_of(connection, [run_id])[run_id]] == [1]


def test_a_claim_is_taken_once_and_again_only_by_the_same_process_before_it_beats(database: Database):
    with database.write() as connection:
        run_id = new_run(connection)
    attempt = running_attempt(database, run_id)
    with database.write() as connection:
        assert runs.claim(connection, attempt, pid=7, now=1.0)
        assert not runs.claim(connection, attempt, pid=8, now=1.0)
        beat = Heartbeat(epoch=1, phase=Phase.TRAINING, step=10**30, progress=-1)
        runs.record_heartbeat(connection, attempt, beat, active_s=2.5, now=5.0)
        after = runs.get_attempt(connection, run_id, 1)
        assert not runs.claim(connection, after, pid=7, now=1.0)
        assert (after.phase, after.step, after.progress) == (Phase.TRAINING, 2**53, 0)
        assert runs.get_run(connection, run_id).active_s == 2.5


def test_a_token_is_issued_only_before_the_launch(database: Database):
    with database.write() as connection:
        run_id = new_run(connection)
        runs.insert_attempt(connection, run_id, 1, device="cpu", work_dir="/w", now=1.0)
        assert runs.issue_token(connection, run_id, 1, token_sha256="a")
        assert runs.issue_token(connection, run_id, 1, token_sha256="b")  # the server died before it launched
        runs.record_handle(connection, run_id, 1, "handle")
        assert not runs.issue_token(connection, run_id, 1, token_sha256="c")


def test_an_attempts_end_is_told_while_the_run_is_open_and_not_after(database: Database):
    with database.write() as connection:
        run_id = new_run(connection)
    running_attempt(database, run_id)
    end = {"source": [AttemptState.RUNNING, AttemptState.ENDING], "now": 9.0}
    with database.write() as connection:
        ending = AttemptState.ENDING
        assert runs.change_attempt(connection, run_id, 1, target=ending, failure="stall", message="stuck", **end)
        told = events.read(connection, run_id)[-1]
    assert told.data == {"epoch": 1, "state": "ending", "failure": "stall", "message": "stuck"}
    settle(database, run_id, RunState.FAILED)
    with database.write() as connection:
        assert runs.change_attempt(connection, run_id, 1, target=AttemptState.ENDED, **end)
        assert not runs.change_attempt(connection, run_id, 1, target=AttemptState.ENDED, **end)
        assert events.read(connection, run_id)[-1].kind is EventKind.STATE


# --- history ----------------------------------------------------------------------------------------


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_however_batches_are_cut_repeated_and_shuffled_history_is_whole_and_in_order(database: Database, data):
    with database.write() as connection:  # each example has a run of its own in the shared database
        run_id = new_run(connection)
    running_attempt(database, run_id)
    total, acknowledged = data.draw(st.integers(1, 12)), 0
    for _ in range(60):
        if acknowledged == total:
            break
        start = data.draw(st.integers(max(1, acknowledged - 2), min(total, acknowledged + 2)))
        batch = [log(n, str(n)) for n in range(start, data.draw(st.integers(start, total)) + 1)]
        with database.write() as connection:
            attempt = runs.get_attempt(connection, run_id, 1)
            shuffled = data.draw(st.permutations(batch))
            acknowledged = runs.record_events(connection, attempt, shuffled, now=1.0)
            seen = runs.get_attempt(connection, run_id, 1).acknowledged
            assert seen == acknowledged >= attempt.acknowledged
    with database.read() as connection:
        history = events.read(connection, run_id)
    logged = [event.data["text"] for event in history if event.kind is EventKind.LOG]
    assert logged == [str(n) for n in range(1, acknowledged + 1)]
    assert [event.seq for event in history] == list(range(1, len(history) + 1))


def test_writers_on_many_threads_number_without_gaps(database: Database):
    with database.write() as connection:
        run_id = new_run(connection)

    def add() -> None:
        for _ in range(10):
            with database.write() as connection:
                new = [events.NewEvent(EventKind.LOG, {}, 1.0)] * 3
                events.append(connection, run_id, new, now=1.0)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as connection:
        assert [event.seq for event in events.read(connection, run_id)] == list(range(1, 122))
        assert events.last_seq(connection, run_id) == 121


def test_a_gap_is_left_to_be_sent_again(database: Database):
    with database.write() as connection:
        run_id = new_run(connection)
    attempt = running_attempt(database, run_id)
    with database.write() as connection:
        assert runs.record_events(connection, attempt, [log(1), log(3)], now=1.0) == 1


def test_a_workers_claims_about_what_only_the_plane_sees_are_acknowledged_and_dropped(database: Database):
    with database.write() as connection:
        run_id = new_run(connection)
    attempt = running_attempt(database, run_id)
    forged = WorkerEvent(n=1, time=1.0, kind=EventKind.STATE, data={"from": "running", "to": "done"})
    with database.write() as connection:
        assert runs.record_events(connection, attempt, [forged, log(2)], now=1.0) == 2
        history = events.read(connection, run_id, kinds=["state"])
        assert "done" not in [event.data["to"] for event in history]
        assert len(events.read(connection, run_id, kinds=["log"])) == 1


def test_the_latest_values_are_kept_beside_the_history(database: Database):
    with database.write() as connection:
        run_id = new_run(connection)
    attempt = running_attempt(database, run_id)
    told = [
        (EventKind.PHASE, {"phase": "training", "total_steps": 40}),
        (EventKind.METRICS, {"step": 3, "total_steps": 40, "values": {"loss": 2.0, "lr": 0.1}}),
        (EventKind.METRICS, {"step": 4, "total_steps": 40, "values": {"loss": 1.5}}),
        (EventKind.WARNING, {"code": "a", "text": "careful"}),
        (EventKind.WARNING, {"code": "a", "text": "careful"}),
        (EventKind.EVAL, {"base": 0.2, "adapter": 0.9, "n": 50}),
        (EventKind.PHASE, {"phase": ["not", "a", "phase"], "total_steps": -1}),
        (EventKind.METRICS, {"step": "four", "values": None}),
    ]
    batch = [WorkerEvent(n=n, time=float("nan"), kind=kind, data=data) for n, (kind, data) in enumerate(told, 1)]
    with database.write() as connection:
        runs.record_events(connection, attempt, batch, now=77.0)
        run = runs.get_run(connection, run_id)
        assert {event.time for event in events.read(connection, run_id, after=5)} == {77.0}
    assert (run.phase, run.step, run.total_steps) == (Phase.TRAINING, 4, 40)
    assert run.metrics == {"loss": 1.5, "lr": 0.1}
    assert (run.eval, run.warnings) == ({"base": 0.2, "adapter": 0.9, "n": 50}, ["careful"])


# --- checkpoints and submissions --------------------------------------------------------------------


def manifest(run_id: str, step: int, *, final: bool = False) -> Manifest:
    files = (
        ManifestFile(path="adapter/a", sha256="a" * 64, size=1),
        ManifestFile(path="state/o", sha256="b" * 64, size=1),
    )
    return Manifest(run_id=run_id, step=step, final=final, created_at=1.0, files=files)


def test_a_step_is_recorded_once_and_may_only_become_final(database: Database):
    with database.write() as connection:
        run_id = new_run(connection)

        def record(found: Manifest, sha256: str) -> None:
            runs.record_checkpoint(connection, found, epoch=1, manifest_sha256=sha256, now=1.0)

        record(manifest(run_id, 5), "one")
        record(manifest(run_id, 5), "one")
        assert len(events.read(connection, run_id, kinds=["checkpoint"])) == 1
        with pytest.raises(Conflict, match="another manifest"):
            record(manifest(run_id, 5), "two")
        record(manifest(run_id, 5, final=True), "three")
        with pytest.raises(Conflict):
            record(manifest(run_id, 5, final=True), "four")
        (known,) = runs.checkpoints_of(connection, run_id)
    assert (known.final, known.manifest_sha256, known.has_state) == (True, "three", True)


def test_a_key_with_another_body_is_a_conflict_and_keys_belong_to_orgs(database: Database):
    with database.write() as connection:
        run_id = new_run(connection)
        runs.record_submission(connection, org="local", key="k", body_mac="m", run_id=run_id, now=1.0)
        assert runs.find_submission(connection, org="local", key="k", body_mac="m") == run_id
        assert runs.find_submission(connection, org="other", key="k", body_mac="x") is None
        with pytest.raises(Conflict, match="Idempotency-Key"):
            runs.find_submission(connection, org="local", key="k", body_mac="x")


def test_runs_are_listed_newest_first_page_by_page_and_by_org(database: Database):
    with database.write() as connection:
        ids = [new_run(connection, now=1000.0 + number // 2) for number in range(6)]
        new_run(connection, org="other")
        listed: list[str] = []
        while page := runs.list_runs(connection, org="local", limit=2, before=listed[-1] if listed else None):
            listed += [run.id for run in page]
        assert sorted(listed) == sorted(ids) and len(set(listed)) == 6
        assert listed == sorted(ids, key=lambda run_id: (run_id.split("-")[1], run_id), reverse=True)
        with pytest.raises(NotFound):
            runs.get_run(connection, ids[0], org="other")


# --- secrets and identity ---------------------------------------------------------------------------


def test_secrets_are_sealed_bound_and_gone_with_the_run(database: Database, tmp_path: Path):
    kept = Vault.open(tmp_path / "vault.key")
    with database.write() as connection:
        run_id, other = new_run(connection), new_run(connection)
        kept.store(connection, run_id, {"API": "canary-value-42", "LEER": ""})
        assert kept.open_all(connection, run_id) == {"API": "canary-value-42", "LEER": ""}
    assert b"canary-value-42" not in b"".join(path.read_bytes() for path in tmp_path.glob("flash.db*"))
    with database.write() as connection:  # moved to another run, it does not open
        table = schema.secrets
        connection.execute(table.update().where(table.c.name == "API").values(run_id=other))
        with pytest.raises(InternalError, match=r"vault\.key"):
            kept.open_all(connection, other)
    settle(database, other, RunState.FAILED)
    with database.read() as connection:
        assert connection.execute(select(schema.secrets.c.name)).scalars().all() == ["LEER"]


def test_another_key_does_not_open_and_the_key_file_is_private_and_kept(database: Database, tmp_path: Path):
    with database.write() as connection:
        run_id = new_run(connection)
        Vault.open(tmp_path / "a").store(connection, run_id, {"S": "value"})
        assert Vault.open(tmp_path / "a").open_all(connection, run_id) == {"S": "value"}
        with pytest.raises(InternalError):
            Vault.open(tmp_path / "b").open_all(connection, run_id)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.glob("[ab]*")) == ["a", "b"]
    (tmp_path / "a").write_bytes(b"short")
    with pytest.raises(InternalError, match="5 bytes"):
        Vault.open(tmp_path / "a")


def test_forgetting_is_for_one_run(database: Database, tmp_path: Path):
    kept = Vault.open(tmp_path / "key")
    with database.write() as connection:
        one, two = new_run(connection), new_run(connection)
        kept.store(connection, one, {"S": "1"})
        kept.store(connection, two, {"S": "2"})
        vault.forget(connection, one)
        assert (kept.open_all(connection, one), kept.open_all(connection, two)) == ({}, {"S": "2"})


def test_keys_are_hashed_found_and_revoked(database: Database):
    token, newer = identity.new_token(), identity.new_token()
    assert token.startswith("fslo_") and len(token) >= 43 + 5
    with database.write() as connection:
        identity.add_key(connection, org="local", token=token, name="laptop")
        identity.add_key(connection, org="local", token=token, name="laptop")
        found = identity.find_caller(connection, token)
        assert found is not None and (found.org, found.role, found.name) == ("local", Role.OWNER, "laptop")
        assert identity.find_caller(connection, token + "x") is None
        stored = connection.execute(select(schema.api_keys)).all()
        assert len(stored) == 1 and token not in str(stored)
        identity.add_key(connection, org="local", token=newer, name="laptop")
        identity.revoke_keys(connection, org="local", name="laptop", keep=newer)
        assert identity.find_caller(connection, token) is None
        assert identity.find_caller(connection, newer) is not None


# --- the hub ----------------------------------------------------------------------------------------


def push(connection, sha256: str, *, name: str = "env", org: str = "local", now: float = 1.0):
    return environments.push(
        connection, org=org, namespace=org, name=name, sha256=sha256, size=3, files=["environment.py"], now=now
    )


def test_the_current_version_is_the_last_pushed_and_old_ones_stay(database: Database):
    one, two = "a" * 64, "ab" * 32
    with database.write() as connection:
        first = push(connection, one, now=1.0)
        push(connection, two, now=2.0)
        assert environments.resolve(connection, org="local", namespace="local", name="env").sha256 == two
        assert push(connection, one, now=3.0) == first  # the same version, now current again
        (current,) = environments.current(connection, org="local")
        assert current == first

        def at(prefix: str):
            return environments.resolve(connection, org="local", namespace="local", name="env", version=prefix)

        assert (at("aaaa").sha256, at("ABAB").sha256) == (one, two)
        with pytest.raises(Exception, match="fits 2 versions"):
            at("a")
        with pytest.raises(NotFound, match="no version"):
            at("ffff")


def test_a_deleted_name_is_gone_from_the_hub_but_not_from_runs(database: Database):
    sha256 = "a" * 64
    with database.write() as connection:
        push(connection, sha256)
        push(connection, sha256, org="other")
        environments.delete(connection, org="local", namespace="local", name="env", now=5.0)
        assert environments.current(connection, org="local") == []
        assert len(environments.current(connection, org="other")) == 1
        with pytest.raises(NotFound):
            environments.delete(connection, org="local", namespace="local", name="env", now=5.0)
        assert environments.pinned(connection, namespace="local", name="env", sha256=sha256).sha256 == sha256
        push(connection, sha256)
        assert len(environments.current(connection, org="local")) == 1
