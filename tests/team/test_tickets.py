"""A launch's ticket, where a worker's token may not be written down: whose it is, what it gives, when it is spent."""

from __future__ import annotations

from typing import Any

from tests.team.worlds import Team

from flash.control_plane.tickets import seal_ticket


def exchange(team: Team, worker_id: str, ticket: str) -> Any:
    headers = {"Authorization": f"Bearer {ticket}"}
    return team.http.post(f"/worker/launches/{worker_id}/hello", headers=headers)


def launched(team: Team, key: str) -> tuple[str, str, str]:
    """An attempt, its token and its ticket."""
    attempt = f"{team.run(key, 'acme')}.1"
    team.settle()
    token = team.launcher.requests[attempt].token
    return attempt, token, seal_ticket(team.plane.vault, attempt, token)


def test_a_ticket_gives_its_own_worker_the_start_line_until_the_claim(open_team):
    team: Team = open_team(devices=("cpu:3f2a.0", "cpu:3f2a.1"))
    key = team.key("acme")
    team.push(key, "acme")
    attempt, token, ticket = launched(team, key)
    assert token not in ticket
    told = exchange(team, attempt, ticket)
    assert told.status_code == 200, told.text
    assert {name: told.json()[name] for name in ("attempt_id", "token", "device")} == {
        "attempt_id": attempt, "token": token, "device": "cpu",
    }  # fmt: skip

    other, _, others = launched(team, key)
    for worker, wrong in ((attempt, others), (other, ticket), (attempt, token), (attempt, "x"), (attempt, "===")):
        assert exchange(team, worker, wrong).status_code == 401, wrong
    stale = seal_ticket(team.plane.vault, attempt, "fslw_of-a-launch-before")
    assert exchange(team, attempt, stale).status_code == 409
    headers = {"Authorization": f"Bearer {ticket}"}
    assert team.http.post(f"/worker/attempts/{attempt}/claim", json={"pid": 7}, headers=headers).status_code == 401

    headers = {"Authorization": f"Bearer {token}"}
    assert team.http.post(f"/worker/attempts/{attempt}/claim", json={"pid": 7}, headers=headers).status_code == 200
    assert exchange(team, attempt, ticket).status_code == 409, "it is spent"


def test_an_engines_ticket_gives_its_hello_until_it_is_heard_of(open_team):
    team: Team = open_team(devices=("cpu:3f2a.0",), engine_wait_s=0.0)
    key = team.key("acme")
    asked = {"model": "flash/nano", "messages": [{"role": "user", "content": "x"}]}
    team.call(key, "POST", "/v1/chat/completions", json=asked)
    team.settle()
    [engine] = team.launcher.requests
    token = team.launcher.requests[engine].token
    ticket = seal_ticket(team.plane.vault, engine, token)
    told = exchange(team, engine, ticket)
    assert told.status_code == 200, told.text
    hello = told.json()
    assert (hello["engine_id"], hello["token"], hello["device"], hello["model"]) == (engine, token, "cpu", "flash/nano")
    beat = {"state": "loading", "pid": 7}
    headers = {"Authorization": f"Bearer {token}"}
    assert team.http.post(f"/worker/engines/{engine}/heartbeat", json=beat, headers=headers).status_code == 200
    assert exchange(team, engine, ticket).status_code == 409
