"""A real server on Postgres and a bucket that trains and serves on a real Ray cluster; nodes and head come and go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.team.cluster import Cluster
from tests.team.servers import Servers, holding
from tests.team.test_servers import whole
from torture.machine import wait_for

pytestmark = pytest.mark.slow

TRAIN: dict[str, Any] = {
    "epochs": 1000, "max_steps": 120, "save_every": 20, "batch_size": 2, "max_length": 64, "lora_rank": 4,
    "learning_rate": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return Path(tmp_path_factory.mktemp("on-ray") / "home")


@pytest.fixture(scope="module")
def cluster(home: Path) -> Iterator[Cluster]:
    with Cluster(OMP_NUM_THREADS="1", **holding(home)) as cluster:
        cluster.add_node()
        cluster.add_node()
        yield cluster


@pytest.fixture(scope="module")
def servers(home: Path, team_backing, cluster: Cluster) -> Iterator[Servers]:
    found = Servers(home, team_backing, FLASH_SERVER_LEASE_S="20", **cluster.settings)
    try:
        found.start()
        found.push()
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def expected(servers: Servers) -> str:
    """The adapter of a run that nothing happened to."""
    run_id = servers.submit(TRAIN)
    status = servers.ended(run_id)
    assert (status["state"], len(status["attempts"])) == ("done", 1), status["summary"]
    assert status["attempts"][0]["device"].startswith("cpu:")
    return servers.adapter(run_id)


def node_of(cluster: Cluster, status: dict[str, Any]) -> int:
    """The number of the node that a run's newest attempt is on."""
    device = status["attempts"][-1]["device"]
    [node] = [node for node in cluster.living() if device.startswith(f"cpu:{node['node_id'][:8]}")]
    return int(node["node_ip"].rpartition(".")[2]) - 2


def test_a_run_is_a_job_and_no_token_of_it_is_in_ray(servers: Servers, cluster: Cluster, expected: str):
    wait_for(lambda: any(job["status"] == "SUCCEEDED" for job in cluster.jobs()))  # soon after its run is done
    assert "fslw_" not in json.dumps(cluster.jobs())
    left = [path for node in (1, 2) for path in cluster.home(node).glob("work/*")]
    assert not left, left


def test_a_node_dies_in_mid_run_and_nothing_is_lost(servers: Servers, cluster: Cluster, expected: str):
    run_id = servers.begun(TRAIN)
    cluster.kill_node(node_of(cluster, servers.status(run_id) or {}))
    status = servers.ended(run_id)
    servers.go_on()
    assert (status["state"], len(status["attempts"])) == ("done", 2), status["summary"]
    assert servers.adapter(run_id) == expected
    whole(servers, run_id)
    cluster.add_node()


def test_the_head_dies_in_mid_run_and_another_one_starts(servers: Servers, cluster: Cluster, expected: str):
    run_id = servers.begun(TRAIN)
    cluster.kill_head()
    cluster.start_head()
    cluster.add_node()
    cluster.add_node()
    status = servers.ended(run_id)
    servers.go_on()
    assert status["state"] == "done" and len(status["attempts"]) > 1, status["summary"]
    assert servers.adapter(run_id) == expected
    whole(servers, run_id)


def test_an_engine_serves_from_a_node(servers: Servers, cluster: Cluster):
    body = {"model": "flash/nano", "messages": [{"role": "user", "content": "Say red."}], "max_tokens": 4}
    answer = servers.call("POST", "/v1/chat/completions", json=body)
    assert answer["usage"]["completion_tokens"] >= 1
    assert any(job["submission_id"].startswith("engine-") for job in cluster.jobs())


def test_fifty_short_runs_end_in_the_order_of_their_submission(servers: Servers, cluster: Cluster, capsys):
    cluster.kill_nodes()
    cluster.add_node(cpus=4, entry=Path(__file__).with_name("quick_entry.py"))
    server = psutil.Process(servers.processes[0].pid)
    before, began = server.memory_info().rss, time.monotonic()
    submitted = [servers.submit(TRAIN) for _ in range(50)]
    wait_for(lambda: (servers.status(submitted[-1]) or {}).get("finished_at"), 600)
    found = [servers.ended(run_id) for run_id in submitted]
    with capsys.disabled():
        grown = (server.memory_info().rss - before) >> 20
        print(f"\n  50 runs as Ray jobs: {time.monotonic() - began:.0f} s, the server grew by {grown} MiB")
    assert {status["state"] for status in found} == {"failed"}, "by script"
    assert {len(status["attempts"]) for status in found} == {1}
    assert len({status["attempts"][0]["device"] for status in found}) == 4, "every place had its share"
    begun = [next(each["time"] for each in servers.events(run_id) if _begins(each)) for run_id in submitted]
    assert begun == sorted(begun), "first come, first served"
    assert grown < 50


def _begins(event: dict[str, Any]) -> bool:
    return event["kind"] == "state" and event["data"]["to"] == "provisioning"


def test_a_wrong_token_is_one_line_and_no_server(cluster: Cluster, tmp_path):
    (tmp_path / "server.toml").write_text('home = "."\n')
    command = [sys.executable, "-m", "flash.cli.main", "server", "start", "--config", str(tmp_path / "server.toml")]
    variables = {**os.environ, **cluster.settings, "FLASH_SERVER_RAY_TOKEN": "b" * 64}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    told = [line for line in done.stderr.splitlines() if "refuses the server's token" in line]
    assert done.returncode == 1 and len(told) == 1 and "Traceback" not in done.stderr, done.stderr
