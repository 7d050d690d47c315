"""Engines and the worker API: their token, their states, their end; hosts are played by the test."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from flash.records import EngineState
from flash.storage import engines

pytestmark = pytest.mark.parametrize("world", [{"engine_idle_s": 50.0}], indirect=True)


def deployed(world: Any) -> str:
    """A deployed run; its engine is wanted, and started as far as a launcher goes."""
    run_id, worker = world.started()
    worker.save(4, final=True)
    worker.finish("done")
    world.launcher.die(worker.attempt_id)
    world.settle()
    answer = world.call("POST", "/api/deployments", json={"run_id": run_id, "verify": False})
    assert answer.status_code == 201, answer.text
    world.settle()
    return str(run_id)


def the_engine(world: Any) -> engines.EngineRow:
    with world.plane.database.read() as connection:
        [found] = engines.live(connection)
    return found


def beat(
    world: Any, engine_id: str, state: str = "ready", *, token: str | None = None, **fields: Any
) -> httpx.Response:
    body = {"state": state, "pid": 77, "url": "http://127.0.0.1:9", "idle_s": 99.0, **fields}
    token = token or world.launcher.requests[engine_id].token
    headers = {"Authorization": f"Bearer {token}"}
    return world.http.post(f"/worker/engines/{engine_id}/heartbeat", json=body, headers=headers)


def row(world: Any, engine_id: str) -> engines.EngineRow:
    with world.plane.database.read() as connection:
        return engines.get(connection, engine_id)


def test_an_engine_is_wanted_launched_and_ready(world):
    deployed(world)
    engine = the_engine(world)
    assert (engine.state, engine.device, engine.model) == (EngineState.LAUNCHING, "cpu", "flash/nano")
    request = world.launcher.requests[engine.id]
    told = request.engine
    assert (told["engine_id"], told["model"], told["device"]) == (engine.id, "flash/nano", "cpu")
    assert told["token"] == request.token and told["source"].endswith("nano")
    assert beat(world, engine.id, "loading", url=None).json() == {"desired": "serve"}
    assert row(world, engine.id).state is EngineState.LOADING
    assert beat(world, engine.id, stats={"tokens_total": 5.0, "odd": float(10**30)}).json() == {"desired": "serve"}
    ready = row(world, engine.id)
    assert (ready.state, ready.url, ready.pid) == (EngineState.READY, "http://127.0.0.1:9", 77)
    assert ready.stats["tokens_total"] == 5.0


def test_a_token_is_good_for_its_engine_alone_and_kept_sealed(world):
    deployed(world)
    engine = the_engine(world)
    token = world.launcher.requests[engine.id].token
    for wrong in (world.token, "fslw_wrong"):
        assert beat(world, engine.id, token=wrong).status_code == 401
    assert beat(world, "engine-1-00000000", token=token).status_code == 404
    headers = {"Authorization": f"Bearer {token}"}
    assert world.http.get("/api/runs", headers=headers).status_code == 401
    assert world.http.get("/v1/models", headers=headers).status_code == 401
    files = b"".join(path.read_bytes() for path in world.home.rglob("*") if path.is_file())
    assert token.encode() not in files


def test_an_idle_engine_is_asked_to_leave_and_its_device_is_free_when_it_is_dead(world):
    deployed(world)
    engine = the_engine(world)
    beat(world, engine.id)
    world.clock.now += 49
    beat(world, engine.id, in_flight=1, idle_s=0.0)
    world.settle()
    world.clock.now += 20  # one server forgets the time of another's requests by their host's word
    beat(world, engine.id, in_flight=0, idle_s=20.0)
    world.settle()
    assert row(world, engine.id).state is EngineState.READY
    world.clock.now += 29
    beat(world, engine.id)
    world.clock.now += 2
    world.settle()
    assert beat(world, engine.id).json() == {"desired": "drain"}
    assert beat(world, engine.id, "leaving").json() == {"desired": "drain"}
    world.launcher.die(engine.id)
    world.settle()
    ended = row(world, engine.id)
    assert (ended.state, ended.sealed_token, ended.error) == (EngineState.ENDED, None, None)
    assert beat(world, engine.id).status_code == 409
    world.clock.now += 10**6
    with world.plane.database.read() as connection:
        assert engines.ended(connection, before=world.plane.clock())[0].id == engine.id


def test_a_host_that_fails_says_why_and_is_seen_off(world):
    deployed(world)
    engine = the_engine(world)
    error = {"code": "model", "message": "no such weights", "remedy": None, "detail": None}
    beat(world, engine.id, "failed", url=None, error=error)
    world.launcher.die(engine.id)
    world.settle()
    assert (row(world, engine.id).state, row(world, engine.id).error) == (EngineState.ENDED, error)


def test_a_silent_engine_is_fenced_off_and_killed(world):
    deployed(world)
    engine = the_engine(world)
    beat(world, engine.id)
    world.launcher.stubborn = True
    world.settle()
    world.clock.now += world.plane.settings.lease_s
    world.settle()
    assert row(world, engine.id).state is EngineState.ENDING
    assert beat(world, engine.id).status_code == 409
    assert world.launcher.kills
    world.launcher.die(engine.id)
    world.settle()
    assert "no sign of the engine" in row(world, engine.id).error["message"]


def test_a_restarted_server_takes_its_engines_up_again(world, restart):
    deployed(world)
    engine = the_engine(world)
    beat(world, engine.id)
    later = restart(world)
    later.settle()
    assert not later.launcher.kills and later.launcher.list() == {engine.id: row(later, engine.id).handle}
    assert beat(later, engine.id).json() == {"desired": "serve"}
    assert later.reconciler.tick() == []


def test_a_host_that_no_engine_owns_is_killed_after_a_grace(world):
    deployed(world)
    engine = the_engine(world)
    beat(world, engine.id)
    world.launcher.die(engine.id)
    world.settle()
    world.launcher.launch(world.launcher.requests[engine.id])  # it comes back from somewhere
    world.settle()
    assert engine.id in world.launcher.list()
    world.clock.now += world.plane.settings.orphan_grace_s
    world.settle()
    assert world.launcher.list() == {}


def test_a_launch_that_fails_ends_the_engine(world):
    world.launcher.refusal = None
    run_id, worker = world.started()
    worker.save(4, final=True)
    worker.finish("done")
    world.launcher.die(worker.attempt_id)
    world.settle()
    world.launcher.refusal = OSError("no more processes")
    world.call("POST", "/api/deployments", json={"run_id": run_id, "verify": False})
    engine = the_engine(world)
    world.settle()
    assert "no more processes" in row(world, engine.id).error["message"]


def test_strange_heartbeats_do_no_harm(world):
    deployed(world)
    engine = the_engine(world)
    token = world.launcher.requests[engine.id].token
    for fields in (
        {"pid": -5}, {"pid": 10**30}, {"in_flight": -1}, {"in_flight": 10**30}, {"url": None},
        {"url": "x" * 10_000}, {"stats": {"\ud800": 1e308, "n": -1.0}}, {"error": {"message": ["x"]}},
    ):  # fmt: skip
        for state in ("loading", "ready"):
            answer = world.http.post(
                f"/worker/engines/{engine.id}/heartbeat",
                content=json.dumps({"state": state, "pid": 7, **fields}).encode(),
                headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
            )
            assert answer.status_code < 500, answer.text
    assert world.call("GET", "/metrics").status_code == 200
    assert world.call("GET", "/api/deployments").status_code == 200
