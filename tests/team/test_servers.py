"""Several servers on one Postgres and one bucket, while leader, Postgres and a stopped leader come and go."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.team.postgres import Postgres
from tests.team.servers import Servers, follow
from torture.machine import wait_for

pytestmark = pytest.mark.slow

TRAIN: dict[str, Any] = {
    "epochs": 1000, "max_steps": 200, "save_every": 20, "batch_size": 2, "max_length": 64, "lora_rank": 4,
    "learning_rate": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def servers(tmp_path_factory, team_backing) -> Iterator[Servers]:
    found = Servers(tmp_path_factory.mktemp("team") / "home", team_backing, FLASH_SERVER_LEASE_S="60")
    try:
        found.start()
        found.start()
        found.push()
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def expected(servers: Servers) -> str:
    """The adapter of a run that nothing happened to."""
    run_id = servers.submit(TRAIN)
    assert servers.ended(run_id)["state"] == "done"
    return servers.adapter(run_id)


def whole(servers: Servers, run_id: str) -> None:
    seqs = [event["seq"] for event in servers.events(run_id)]
    assert seqs == list(range(1, len(seqs) + 1))


def test_one_of_them_leads_and_all_of_them_answer(servers: Servers, expected: str):
    leader = servers.wait_for_leader()
    other = 1 - leader
    run_id = servers.call("POST", "/api/runs", other, json={
        "config": {"model": "flash/nano", "environment": {"id": "local/echo"}, "train": {**TRAIN, "max_steps": 20}}
    })["run_id"]  # fmt: skip
    heard: list[list[int]] = [[], []]
    threads = [
        threading.Thread(target=follow, args=(servers.http(number), run_id, heard[number])) for number in (0, 1)
    ]
    for thread in threads:
        thread.start()
    assert servers.ended(run_id)["state"] == "done"
    for thread in threads:
        thread.join(60)
    assert heard[0] == heard[1] == list(range(1, len(heard[0]) + 1)) and len(heard[0]) > 10
    assert servers.leader() == leader
    adapter = [servers.call("GET", f"/api/runs/{run_id}/adapter", number) for number in (0, 1)]
    assert adapter[0] == adapter[1]


def test_the_leader_is_killed_in_mid_run_and_nothing_is_lost(servers: Servers, expected: str):
    leader = servers.wait_for_leader()
    run_id = servers.begun(TRAIN)
    began = time.monotonic()
    servers.kill(leader)
    servers.go_on()
    servers.wait_for_leader(other_than=leader)
    assert time.monotonic() - began < 60
    status = servers.ended(run_id)
    assert (status["state"], len(status["attempts"])) == ("done", 1), "the worker was taken up, not replaced"
    assert servers.adapter(run_id) == expected
    whole(servers, run_id)
    servers.start()


def test_postgres_is_away_for_ten_seconds_in_mid_run(servers: Servers, expected: str, postgres: Postgres):
    run_id = servers.begun(TRAIN)
    postgres.stop("immediate")
    servers.go_on()
    began = time.monotonic()
    with servers.http() as http:
        answer = http.get("/api/ready")
        assert (answer.status_code, answer.json()["parts"]["database"]) == (503, "can't be reached")
        refused = http.get("/api/runs")
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "unavailable"
    time.sleep(max(0.0, 10 - (time.monotonic() - began)))
    postgres.start()
    status = servers.ended(run_id)
    assert status["state"] == "done", status["summary"]
    assert servers.adapter(run_id) == expected
    whole(servers, run_id)
    servers.wait_for_leader()


def test_a_leader_that_hangs_loses_the_lead_and_does_no_harm_when_it_is_back(servers: Servers, expected: str):
    leader = servers.wait_for_leader()
    run_id = servers.begun(TRAIN)
    servers.processes[leader].send_signal(signal.SIGSTOP)
    servers.forwarder.ports.remove(servers.ports[leader])
    servers.go_on()
    second = servers.wait_for_leader(other_than=leader)
    servers.processes[leader].send_signal(signal.SIGCONT)
    servers.forwarder.ports.append(servers.ports[leader])
    status = servers.ended(run_id)
    assert status["state"] == "done", status["summary"]
    assert servers.adapter(run_id) == expected
    whole(servers, run_id)
    assert servers.leader() == second, "who comes back only follows"


def test_they_end_in_good_order(servers: Servers, expected: str):
    for process in servers.processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in servers.processes:
        assert wait_for(lambda process=process: process.poll() is not None, 60)
    assert {process.returncode for process in servers.processes} <= {0, -signal.SIGKILL}
    assert "Traceback" not in (servers.home / "server.out").read_text()
