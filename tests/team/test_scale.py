"""Many runs and many followers: pages stay quick, and a log is read once for all who follow it."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from sqlalchemy import event, insert
from tests.team.worlds import Team

from flash.records import RunState
from flash.storage import runs, schema

RUNS = 100_000
LIMIT_S = 0.05
STATES = [RunState.DONE] * 90 + [RunState.FAILED] * 6 + [RunState.CANCELLED] * 3 + [RunState.QUEUED]


def fill(team: Team, orgs: list[str]) -> list[str]:
    """Rows as submits and reconciler leave them, but by the thousand."""
    chance = random.Random(1)
    spec = {"model": "flash/nano", "algorithm": "sft", "train": {f"key_{n}": n for n in range(40)}, "text": "x" * 1500}
    ids = []
    for start in range(0, RUNS, 2000):
        rows = []
        for number in range(start, start + 2000):
            now = 1_700_000_000.0 + number // 2  # two in each second
            state = chance.choice(STATES)
            run_id = f"flash-{int(now)}-{chance.getrandbits(32):08x}"
            ids.append(run_id)
            rows.append(
                {
                    "id": run_id, "org_id": orgs[number % len(orgs)], "created_at": now, "updated_at": now,
                    "finished_at": now if state.terminal else None, "config": spec, "spec": spec, "seed": 0,
                    "environment_namespace": "acme", "environment_name": "e", "environment_sha256": "a" * 64,
                    "desired": "run", "state": state.value, "step": 5, "metrics": {"loss": 1.0}, "warnings": [],
                    "last_seq": 9, "active_s": 60.0, "fruitless": 0, "micro_batch_divisor": 1,
                    "cleaned_at": now if state.terminal else None,
                }
            )  # fmt: skip
        with team.plane.database.write() as connection:
            connection.execute(insert(schema.runs), rows)
    if team.plane.database.shared:
        with team.plane.database.write() as connection:
            connection.exec_driver_sql("ANALYZE")
    return ids


def quickest(ask, times: int = 7) -> float:
    """Seconds; the least of several, since other programs run too."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        ask()
        found.append(time.perf_counter() - began)
    return min(found)


@pytest.mark.slow
def test_a_page_of_a_hundred_thousand_runs_lists_at_once(open_team, capsys):
    team: Team = open_team()
    key = team.key("acme")
    team.key("other")
    ids = fill(team, ["acme", "acme", "acme", "other"])
    mine = [run_id for number, run_id in enumerate(ids) if number % 4 != 3]
    queued = next(
        run["run_id"] for run in team.call(key, "GET", "/api/runs", params={"limit": 1000}).json()["runs"]
        if run["state"] == "queued"
    )  # fmt: skip

    def page(before: str | None = None):
        answer = team.call(key, "GET", "/api/runs", params={"limit": 50} | ({"before": before} if before else {}))
        assert answer.status_code == 200 and len(answer.json()["runs"]) == 50
        return answer.json()["runs"]

    took = {
        "first page": quickest(page),
        "a page from the middle": quickest(lambda: page(mine[len(mine) // 2])),
        "the last page": quickest(lambda: page(mine[60])),
        "one queued run": quickest(lambda: team.call(key, "GET", f"/api/runs/{queued}")),
        "/metrics": quickest(lambda: team.call(key, "GET", "/metrics")),
        "one look of the reconciler": quickest(team.reconciler.look, 3),
    }
    with capsys.disabled():
        print("", *(f"{what}: {seconds * 1000:.1f} ms" for what, seconds in took.items()), sep="\n  ")
    for what in ("first page", "a page from the middle", "the last page", "one queued run"):
        assert took[what] < LIMIT_S, f"{what}: {took[what]:.3f} s"
    newest = [run["run_id"] for run in page()]
    assert newest == sorted(newest, key=lambda run_id: (run_id.split("-")[1], run_id), reverse=True)
    with team.plane.database.read() as connection:
        assert runs.count_everyones(connection).keys() >= {("acme", "done"), ("other", "done")}


@pytest.fixture
def served(open_team) -> Iterator[tuple[Team, str]]:
    """A team's plane behind a real socket."""
    team: Team = open_team(devices=("cpu",), stream_poll_s=5.0)
    config = uvicorn.Config(team.app, host="127.0.0.1", port=0, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield team, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    team.plane.followers.close()
    server.should_exit = True
    thread.join(20)


FOLLOWERS, BATCHES = 200, 20


def test_two_hundred_followers_cost_one_read_of_the_log(served):
    team, url = served
    key = team.key("acme")
    team.push(key, "acme")
    run_id = team.run(key, "acme")
    team.settle()
    worker = {"Authorization": f"Bearer {team.launcher.requests[f'{run_id}.1'].token}"}
    base = f"/worker/attempts/{run_id}.1"
    assert team.http.post(f"{base}/claim", json={"pid": 7}, headers=worker).status_code == 200
    reads: list[str] = []

    @event.listens_for(team.plane.database._reader, "before_cursor_execute")
    def count(_connection, _cursor, statement, *_) -> None:
        if "FROM events" in statement:
            reads.append(statement)

    heard: list[list[int]] = []

    async def follow(client: httpx.AsyncClient, begun: asyncio.Semaphore) -> None:
        seqs: list[int] = []
        heard.append(seqs)
        async with client.stream("GET", f"{url}/api/runs/{run_id}/events/stream", timeout=None) as stream:
            async for line in stream.aiter_lines():
                if line.startswith("data:"):
                    told = json.loads(line.removeprefix("data:"))
                    seqs.append(told["seq"])
                    begun.release()
                    if told["kind"] == "state" and told["data"]["to"] == "cancelled":
                        return

    def tell(n: int) -> None:
        body = {"n": n, "time": 1.0, "kind": "log", "data": {"stream": "trainer", "text": f"line {n}"}}
        answer = team.http.post(f"{base}/events", json={"epoch": 1, "events": [body]}, headers=worker)
        assert answer.status_code == 200, answer.text

    def end() -> None:
        assert team.call(key, "POST", f"/api/runs/{run_id}/cancel").status_code == 200
        assert team.http.post(f"{base}/finish", json={"epoch": 1, "outcome": "cancelled"}, headers=worker).is_success
        team.launcher.die(f"{run_id}.1")
        team.settle()

    async def all_of_it() -> None:
        begun = asyncio.Semaphore(0)
        limits = httpx.Limits(max_connections=None)
        headers = {"Authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(headers=headers, trust_env=False, limits=limits) as client:
            tasks = [asyncio.create_task(follow(client, begun)) for _ in range(FOLLOWERS)]
            for _ in range(FOLLOWERS):  # everybody has heard something
                await begun.acquire()
            for n in range(1, BATCHES + 1):
                await asyncio.to_thread(tell, n)
            await asyncio.to_thread(end)
            await asyncio.wait_for(asyncio.gather(*tasks), 100)

    asyncio.run(all_of_it())
    last = heard[0][-1]
    assert heard == [list(range(1, last + 1))] * FOLLOWERS and last > BATCHES
    # At most two reads a commit (one may be under way while the next commit comes), however many follow.
    assert len(reads) <= 2 * (last + 5), f"{len(reads)} reads for {FOLLOWERS} followers"
