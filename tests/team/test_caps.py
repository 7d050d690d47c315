"""What a key may use: refused at submit, in one line, and welcome again when there is room."""

from __future__ import annotations

import threading

from tests.team.worlds import Team

from flash.launching.hardware import Device
from flash.storage import runs


def problem(answer) -> str:
    body = answer.json()["error"]
    assert "\n" not in body["message"] and body["remedy"]
    return str(body["message"])


def cancel(team: Team, key: str, run_id: str) -> None:
    assert team.call(key, "POST", f"/api/runs/{run_id}/cancel").status_code == 200
    team.settle()


def test_so_many_runs_at_once(team: Team):
    key, free = team.key("acme", max_runs=2), team.key("acme", name="free")
    team.push(key, "acme")
    first, _ = team.run(key, "acme"), team.run(key, "acme")
    team.run(free, "acme")
    refused = team.submit(key, "acme")
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "cap_reached"
    assert "may have 2 run(s) under way and has 2" in problem(refused)
    cancel(team, key, first)
    team.run(key, "acme")


def test_however_many_submit_at_once_no_more_than_the_cap_come_in(team: Team):
    key = team.key("acme", max_runs=3)
    team.push(key, "acme")
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(team.submit(key, "acme").status_code)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [201] * 3 + [429] * 5


def test_so_many_gpus_at_once(open_team):
    team: Team = open_team(devices=("cuda:0", "cuda:1"))
    key = team.key("acme", max_gpus=1)
    team.push(key, "acme")
    first = team.run(key, "acme")
    refused = team.submit(key, "acme")
    assert refused.status_code == 429 and "1 GPU(s); its runs use 1, this one needs 1" in problem(refused)
    cancel(team, key, first)
    team.run(key, "acme")


def test_a_cluster_that_is_not_there_lifts_no_cap_and_spends_no_budget(open_team):
    team: Team = open_team(devices=())
    team.launcher.described = []
    capped, priced, free = (
        team.key("acme", name=str(caps), **caps) for caps in ({"max_gpus": 1}, {"max_usd": 1e6}, {})
    )
    team.push(free, "acme")
    for key in (capped, priced):
        refused = team.submit(key, "acme")
        assert refused.status_code == 503 and "what this run would take can't be told" in problem(refused)
    team.run(free, "acme")
    team.launcher.described = [Device("cuda:3f2a.0", "NVIDIA L4", 24 * 10**9)]  # a node that gets no worker just now
    team.run(capped, "acme")
    assert "1 GPU(s); its runs use 1, this one needs 1" in problem(team.submit(capped, "acme"))
    team.run(priced, "acme")


def test_processors_are_no_gpus(open_team):
    team: Team = open_team(devices=("cpu",))
    key = team.key("acme", max_gpus=0)
    team.push(key, "acme")
    team.run(key, "acme")


def test_a_budget_holds_estimates_of_open_runs_and_costs_of_ended_ones(open_team):
    team: Team = open_team(devices=("cpu",), usd_per_hour={"cpu": 3600.0})
    probe = team.key("acme", name="probe")
    team.push(probe, "acme")
    run_id = team.run(probe, "acme", max_steps=5)
    status = team.call(probe, "GET", f"/api/runs/{run_id}").json()
    usd = status["estimated_cost_usd"]
    assert usd > 0 and abs(usd - status["managed"]["estimated_s"]) < 0.01 * usd, "a dollar a second"
    cancel(team, probe, run_id)

    key = team.key("acme", max_usd=2.5 * usd)
    first, second = team.run(key, "acme", max_steps=5), team.run(key, "acme", max_steps=5)
    refused = team.submit(key, "acme", max_steps=5)
    assert refused.status_code == 402 and refused.json()["error"]["code"] == "budget_spent"
    assert f"may cost ${2.5 * usd:,.2f} in all" in problem(refused)
    cancel(team, key, second)  # it cost nothing: it never began
    team.settle()
    for times, status in ((1.6, 402), (1.4, 201)):  # and the first took longer than was thought
        with team.plane.database.write() as connection:
            assert runs.get_run(connection, first).state.value != "cancelled"
            took = runs.schema.runs.update().where(runs.schema.runs.c.id == first).values(active_s=times * usd)
            connection.execute(took)
        assert team.submit(key, "acme", max_steps=5).status_code == status


def test_a_retry_is_held_to_the_caps_too_and_leaves_nothing_when_refused(team: Team):
    key = team.key("acme", max_runs=1)
    team.push(key, "acme")
    first = team.run(key, "acme")
    cancel(team, key, first)
    team.run(key, "acme")
    refused = team.call(key, "POST", f"/api/runs/{first}/retry", json={})
    assert refused.status_code == 429
    assert len(team.call(key, "GET", "/api/runs").json()["runs"]) == 2
    assert set(team.plane.store.folders("runs")) == set()
