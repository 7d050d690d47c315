"""The bucket is away for ten seconds in the middle of a run: nothing is lost, and nothing is claimed meanwhile."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.team.servers import Servers
from torture.bucket import Bucket
from torture.machine import SETTINGS, wait_for

pytestmark = pytest.mark.slow

AWAY_S = 10.0
TRAIN: dict[str, Any] = {
    "epochs": 1000, "max_steps": 120, "save_every": 10, "batch_size": 2, "max_length": 64, "lora_rank": 4,
    "learning_rate": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module", params=["signed", "keys"])
def servers(request, tmp_path_factory, team_backing) -> Iterator[Servers]:
    """One server, whose workers reach the bucket by signed addresses, or with its keys."""
    backing = {**team_backing, "FLASH_SERVER_WORKER_STORE": request.param}
    worker = json.dumps({**json.loads(SETTINGS["FLASH_WORKER_SETTINGS"]), "upload_part_bytes": 50_000})
    found = Servers(
        tmp_path_factory.mktemp(request.param) / "home", backing, FLASH_SERVER_LEASE_S="60",
        FLASH_WORKER_SETTINGS=worker,
    )  # fmt: skip
    try:
        found.start()
        if request.param == "signed":
            found.push()  # the keys' server is the next on the same database
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def adapters() -> dict[str, str]:
    """The adapter of a run that nothing happened to, once there is one."""
    return {}


def ready(servers: Servers) -> tuple[int, str]:
    with servers.http() as http:
        answer = http.get("/api/ready")
    return answer.status_code, answer.json()["parts"]["store"]


@pytest.mark.parametrize("silently", [False, True], ids=["gone", "silent"])
def test_a_run_ends_with_the_adapter_it_would_have_had(
    servers: Servers, team_bucket: Bucket, adapters: dict[str, str], silently: bool
):
    if not adapters:
        run_id = servers.submit(TRAIN)
        assert servers.ended(run_id)["state"] == "done"
        adapters["whole"] = servers.adapter(run_id)
    run_id = servers.begun(TRAIN)
    with team_bucket.away(silently=silently):
        servers.go_on()
        began = time.monotonic()
        status, said = wait_for(lambda: found if (found := ready(servers))[0] != 200 else None, 60)
        assert (status, said) == (503, "does not answer" if silently else "can't be reached")
        before = servers.status(run_id)
        time.sleep(max(0.0, AWAY_S - (time.monotonic() - began)))
        meanwhile = servers.status(run_id)
        assert before is not None and meanwhile is not None
        assert meanwhile["state"] == "running" and meanwhile["checkpoints"] == before["checkpoints"]
    wait_for(lambda: ready(servers)[0] == 200, 60)
    status = servers.ended(run_id)
    assert (status["state"], len(status["attempts"])) == ("done", 1), status["summary"]
    assert servers.adapter(run_id) == adapters["whole"]
    files = servers.call("GET", f"/api/runs/{run_id}/adapter")["files"]
    assert max(len(file["parts"]) for file in files) > 1, "its weights went in parts"
    seqs = [event["seq"] for event in servers.events(run_id)]
    assert seqs == list(range(1, len(seqs) + 1))
