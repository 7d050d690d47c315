"""A database that is locked or full: refused in words, nothing half done, and all goes on afterwards."""

from __future__ import annotations

import sqlite3

import pytest
from sqlalchemy import Connection

ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def pragma(connection: Connection, text: str) -> None:
    connection.exec_driver_sql(f"PRAGMA {text}")


@ON_SQLITE
def test_a_locked_database_is_unavailable_and_loses_nothing(world):
    run_id, worker = world.started()
    with world.plane.database.write() as connection:
        pragma(connection, "busy_timeout = 50")
    other = sqlite3.connect(world.home / "flash.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")  # a backup, or a person with a shell
    try:
        answer = world.call("POST", "/api/runs", json={"config": world.config()})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert worker.beat(step=1).status_code == 503
        assert worker.post("events", {"epoch": 1, "events": []}).status_code == 503
        assert worker.finish("done").status_code == 503
        assert world.status(run_id)["state"] == "running", "reading goes on"
        world.reconciler.tick()
    finally:
        other.execute("ROLLBACK")
        other.close()
    assert worker.beat(step=1).status_code == 200
    assert worker.tell("log", stream="trainer", text="still here") == 1
    assert world.status(run_id)["state"] == "running"
    assert len(world.call("GET", "/api/runs").json()["runs"]) == 1, "the refused submit left nothing"


@ON_SQLITE
@pytest.mark.parametrize("kind", ["submit", "events", "finish"])
def test_a_full_disk_under_the_database_refuses_whole_requests(world, kind: str):
    run_id, worker = world.started()
    worker.save(1, final=True)
    with world.plane.database.write() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        pragma(connection, f"max_page_count = {pages}")  # what SQLite says is what a full disk makes it say
    before = world.events(run_id)
    large = "x" * 200_000
    batch = [{"n": n, "time": 0.0, "kind": "log", "data": {"stream": "trainer", "text": large}} for n in (1, 2, 3)]
    if kind == "submit":
        config = {**world.config(), "worker_env": {"NOTE": "word " * 40_000}}
        answer = world.call("POST", "/api/runs", json={"config": config})
    elif kind == "events":
        answer = worker.post("events", {"epoch": 1, "events": batch})
    else:
        error = {"code": "internal", "message": "m", "remedy": None, "detail": large * 3}
        answer = worker.post("finish", {"epoch": 1, "outcome": "failed", "failure": "internal", "error": error})
    assert answer.status_code == 503, answer.text
    assert world.status(run_id)["state"] == "running", "neither done nor failed for it"
    assert world.events(run_id) == before
    with world.plane.database.write() as connection:
        pragma(connection, "max_page_count = 1000000")
    assert worker.post("events", {"epoch": 1, "events": batch}).json() == {"acknowledged": 3}
    assert worker.finish("done").status_code == 204
    world.settle()
    assert world.status(run_id)["state"] == "done"
    seqs = [event["seq"] for event in world.events(run_id)]
    assert seqs == list(range(1, len(seqs) + 1))
