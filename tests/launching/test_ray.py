"""The Ray launcher against a real cluster, with a control plane played by a few lines of HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.launching.plane import TOKEN, Plane
from tests.team.cluster import Cluster, free_port
from torture.machine import wait_for

from flash.errors import Unauthorized, Unavailable
from flash.launching.launcher import LaunchRequest, LaunchUnsure, Probe
from flash.launching.local import MARK
from flash.launching.ray import NODE_GONE, TICKET, RayLauncher
from flash.launching.ray_entry import worker_environment

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(FLASH_WORKER_SETTINGS=json.dumps({"claim_patience_s": 600})) as cluster:
        cluster.add_node()
        yield cluster


@pytest.fixture
def plane() -> Iterator[Plane]:
    plane = Plane()
    yield plane
    plane.close()


def launcher_of(cluster: Cluster, **options: Any) -> RayLauncher:
    given = {"owner": "one", "ticket": lambda worker, token: f"sealed-for-{worker}", "cpus": 1, "lost_s": 1.0}
    return RayLauncher(cluster.address, options.pop("token", cluster.token), **{**given, **options})


def request(plane: Plane, attempt_id: str, device: str) -> LaunchRequest:
    return LaunchRequest(attempt_id, plane.url, TOKEN, "/nowhere/on/the/node", device)


def workers(attempt_id: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == attempt_id:
                found.append(process)
    return found


@slow
def test_slots_are_those_of_living_nodes_and_are_described(cluster: Cluster):
    ray = launcher_of(cluster)
    [node] = [node for node in cluster.living() if not node["is_head_node"]]
    names = [f"cpu:{node['node_id'][:8]}.{number}" for number in range(2)]
    assert ray.devices() == names == launcher_of(cluster, kinds=["cpu"]).devices()
    assert launcher_of(cluster, cpus=2).devices() == names[:1]
    assert launcher_of(cluster, cpus=3).devices() == launcher_of(cluster, kinds=["cuda"]).devices() == []
    described = ray.describe()
    assert [device.name for device in described] == names
    assert {device.cores for device in described} == {1}
    assert sum(device.memory for device in described) <= node["resources_total"]["memory"]


@slow
def test_a_worker_is_launched_once_found_again_and_killed_with_all_it_started(cluster: Cluster, plane: Plane):
    ray = launcher_of(cluster)
    attempt = "flash-1-00000000.1"
    device = ray.devices()[1]
    handle = ray.launch(request(plane, attempt, device))
    assert ray.probe(handle) is Probe.ALIVE
    assert ray.launch(request(plane, attempt, device)) == handle, "a repeat is the same worker"
    wait_for(lambda: plane.claims)
    assert set(plane.tickets) == {f"sealed-for-{attempt}"} and set(plane.claims) == {TOKEN}

    later = launcher_of(cluster)
    assert later.list() == {attempt: handle} and later.probe(handle) is Probe.ALIVE
    assert launcher_of(cluster, owner="another").list() == {}, "another server's workers are none of ours"

    [supervisor] = [found for found in workers(attempt) if "flash.worker.supervisor" in found.cmdline()]
    variables = supervisor.environ()
    assert not [name for name in variables if name.startswith("RAY_")] and TICKET not in variables
    assert variables["CUDA_VISIBLE_DEVICES"] == "" and json.loads(variables["FLASH_WORKER_SETTINGS"])["threads"] == 1
    assert Path(supervisor.cwd()) == cluster.home(1) / "work" / attempt
    commands = [each.info["cmdline"] for each in psutil.process_iter(["cmdline"])]
    told = json.dumps([cluster.jobs(), commands])
    assert TOKEN not in told and cluster.token not in json.dumps(variables)

    later.kill(handle)
    wait_for(lambda: later.probe(handle) is Probe.DEAD)
    assert not workers(attempt) and not (cluster.home(1) / "work" / attempt).exists()
    later.kill(handle)
    assert later.list() == {} and later.probe(handle) is Probe.DEAD


@slow
def test_a_job_that_nobody_knows_is_dead_only_after_a_while(cluster: Cluster):
    ray = launcher_of(cluster, lost_s=1.0)
    assert ray.probe("flash-1-00000009.1") is Probe.UNKNOWN
    ray.kill("flash-1-00000009.1")
    wait_for(lambda: ray.probe("flash-1-00000009.1") is Probe.DEAD)


@slow
def test_a_wrong_token_is_one_line(cluster: Cluster):
    for token in ("b" * 64, "short", None):
        ray = launcher_of(cluster, token=token)
        for ask in (ray.list, ray.devices):
            with pytest.raises(Unauthorized) as refused:
                ask()
            assert "refuses the server's token" in str(refused.value) and "\n" not in str(refused.value)
        assert ray.probe("x") is Probe.UNKNOWN


@slow
def test_a_node_that_dies_takes_its_workers_and_slots_with_it(cluster: Cluster, plane: Plane):
    node = cluster.add_node(cpus=1)
    ray = launcher_of(cluster)
    attempt = "flash-1-00000001.1"
    found = next(each for each in cluster.living() if each["node_ip"].endswith(f".{node + 2}"))
    device = f"cpu:{found['node_id'][:8]}.0"
    handle = ray.launch(request(plane, attempt, device))
    wait_for(lambda: plane.claims)
    cluster.kill_node(node)
    wait_for(lambda: ray.probe(handle) is Probe.DEAD)
    assert not workers(attempt), "dead means that nothing of it lives"
    wait_for(lambda: device not in ray.devices())
    with pytest.raises(Unavailable, match="is gone"):
        ray.launch(request(plane, "flash-1-00000001.2", device))


class Head:
    """A head in a few lines, for what no cluster on this machine has: GPUs, and jobs of yesterday."""

    def __init__(self, nodes: dict[str, dict[str, float]], jobs: list[dict[str, Any]]) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        self.silent: set[str] = set()  # methods of requests that get no answer
        self.jobs = jobs
        self.accepts = True
        head = self
        listed = [{"node_id": name, "state": "ALIVE", "resources_total": has} for name, has in nodes.items()]
        gpu = {"name": "NVIDIA L4", "memoryTotal": 23034}
        told = [{"raylet": {"nodeId": name}, "gpus": [gpu] * int(has.get("GPU", 0))} for name, has in nodes.items()]
        self.nodes, self.told = listed, told
        answers = {
            "/api/jobs/": jobs,
            "/api/v0/nodes": {"data": {"result": {"result": listed}}},
            "/nodes": {"data": {"summary": told}},
        }

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                head.asked.append((self.command, self.path, body))
                path = self.path.partition("?")[0]
                if self.command == "POST" and path == "/api/jobs/" and head.accepts:
                    jobs.append(job(body["submission_id"], "PENDING"))
                if self.command in head.silent:
                    self.close_connection = True
                    return
                known = path in answers or path.rpartition("/")[2] in {each["submission_id"] for each in jobs}
                data = json.dumps(answers.get(path, {})).encode()
                self.send_response(200 if known else 404)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = answer

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def launcher(self, **options: Any) -> RayLauncher:
        return RayLauncher(self.address, "x", owner="one", ticket=lambda worker, token: "t", **options)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def job(name: str, status: str, *, owner: str = "one", **more: Any) -> dict[str, Any]:
    about = {"flash_owner": owner, "flash_worker": name}
    return {"submission_id": name, "status": status, "metadata": about, **more}


NODES = {"bb" * 28: {"GPU": 2, "CPU": 16, "memory": 1e11}, "aa" * 28: {"CPU": 9, "memory": 8e9}}


@pytest.fixture
def head() -> Iterator[Any]:
    opened: list[Head] = []

    def make(*jobs: dict[str, Any]) -> Head:
        opened.append(Head(NODES, list(jobs)))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def test_gpus_come_before_cpus_and_a_job_asks_for_its_node_and_device(head: Any):
    there = head()
    ray = there.launcher()
    gpus, cpus = ["cuda:bbbbbbbb.0", "cuda:bbbbbbbb.1"], ["cpu:aaaaaaaa.0", "cpu:aaaaaaaa.1"]
    assert ray.devices() == gpus
    assert [(found.kind, found.memory >> 20) for found in ray.describe()] == [("NVIDIA L4", 23034)] * 2
    both = there.launcher(kinds=("cpu", "cuda"), pip=("flash-lora",))
    assert both.devices() == [*cpus, *gpus]
    assert [(found.cores, found.memory) for found in both.describe()[:2]] == [(4, 4 * 10**9)] * 2
    for device in (gpus[0], cpus[0]):
        both.launch(LaunchRequest(f"flash-1-{device[:2]}000000.1", "http://plane", TOKEN, "/", device))
    on_gpu, on_cpu = [body for method, _, body in there.asked if method == "POST"]
    assert on_gpu["entrypoint_num_gpus"] == 1 and "entrypoint_num_cpus" not in on_gpu and "--cpus" not in str(on_gpu)
    assert on_cpu["entrypoint_num_cpus"] == 4 and on_cpu["entrypoint"].endswith("--cpus 4")
    assert on_gpu["entrypoint_label_selector"] == {"ray.io/node-id": "bb" * 28}
    assert on_gpu["runtime_env"]["pip"] == ["flash-lora"] and on_gpu["runtime_env"]["env_vars"][TICKET] == "t"
    assert TOKEN not in str(there.asked)


def test_a_node_that_lost_a_job_gets_none_for_a_while(head: Any):
    for code in (None, NODE_GONE):
        there = head()
        ray = there.launcher(kinds=["cpu"])
        assert ray.list() == {} and len(ray.devices()) == 2
        there.jobs.append(job("flash-1-00000000.1", "FAILED", driver_exit_code=code, driver_node_id="aa" * 28))
        assert ray.list() == {} and ray.devices() == []
        assert len(ray.describe()) == 2, "it is planned with all the same"
        later = there.launcher(kinds=["cpu"])
        assert later.list() == {} and len(later.devices()) == 2, "when it was lost, a server that comes can't tell"
    failed = job("flash-1-00000000.1", "FAILED", driver_exit_code=3, driver_node_id="aa" * 28)
    there = head()
    ray = there.launcher(kinds=["cpu"])
    assert ray.list() == {}
    there.jobs.append(failed)
    assert ray.list() == {} and len(ray.devices()) == 2


def test_what_there_was_is_planned_with_while_no_node_is_there_or_the_head_is_away(head: Any):
    there = head()
    ray = there.launcher()
    seen = ray.describe()
    assert len(seen) == 2
    there.nodes.clear()
    wait_for(lambda: ray.devices() == [])
    assert ray.describe() == seen
    there.silent.add("GET")
    wait_for(lambda: _raises(Unavailable, ray.devices))
    assert ray.describe() == seen
    assert _raises(Unavailable, there.launcher().describe), "who never saw them has nothing to say"


def _raises(kind: type[Exception], call: Any) -> bool:
    try:
        call()
    except kind:
        return True
    return False


def test_a_node_that_has_just_come_is_described_at_once(head: Any):
    there = head()
    ray = there.launcher()
    assert len(ray.describe()) == 2
    there.nodes.append({"node_id": "cc" * 28, "state": "ALIVE", "resources_total": {"GPU": 1}})
    there.told.append({"raylet": {"nodeId": "cc" * 28}, "gpus": [{"name": "NVIDIA H100", "memoryTotal": 81559}]})
    wait_for(lambda: "cuda:cccccccc.0" in ray.devices())
    wait_for(lambda: ("NVIDIA H100", 81559) in [(found.kind, found.memory >> 20) for found in ray.describe()], 30)


def test_a_launch_whose_answer_is_lost_is_asked_for_and_else_told_as_such(head: Any):
    there = head()
    ray = there.launcher()
    there.silent.add("POST")
    first, second = (
        LaunchRequest(f"flash-1-0000000{number}.1", "http://plane", TOKEN, "/", device)
        for number, device in enumerate(ray.devices())
    )
    assert ray.launch(first) == first.attempt_id
    there.accepts = False
    with pytest.raises(LaunchUnsure):
        ray.launch(second)
    there.silent.add("GET")
    with pytest.raises(Unavailable):
        ray.launch(first)


def test_own_jobs_that_ended_long_ago_are_removed_from_ray(head: Any):
    hour_ago, now = (time.time() - 4000) * 1000, time.time() * 1000
    there = head(
        job("old", "SUCCEEDED", end_time=hour_ago), job("new", "FAILED", end_time=now), job("live", "RUNNING"),
        job("theirs", "SUCCEEDED", owner="two", end_time=hour_ago), {"submission_id": "x", "status": "STOPPED"},
        {"submission_id": None, "status": "RUNNING"},
    )  # fmt: skip
    assert there.launcher().list() == {"live": "live"}
    assert [path for method, path, _ in there.asked if method == "DELETE"] == ["/api/jobs/old"]


def test_a_look_takes_away_a_few_old_jobs_at_once_and_does_not_fail_for_one(head: Any):
    hour_ago = (time.time() - 4000) * 1000
    old = [job(f"old-{number}", "SUCCEEDED", end_time=hour_ago) for number in range(50)]
    there = head(*old, job("live", "RUNNING"))
    ray = there.launcher()
    assert ray.list() == {"live": "live"}
    few = len([method for method, _, _ in there.asked if method == "DELETE"])
    assert 0 < few < 10
    there.silent.add("DELETE")
    assert ray.list() == {"live": "live"}
    assert len([method for method, _, _ in there.asked if method == "DELETE"]) == few + 1, "the next look tries again"


def test_a_head_that_is_not_there_is_unknown_and_costs_little():
    ray = RayLauncher(f"http://127.0.0.1:{free_port('127.0.0.1')}", "x", owner="o", ticket=lambda worker, token: "t")
    with pytest.raises(Unavailable, match="can't be reached"):
        ray.list()
    assert ray.probe("anything") is Probe.UNKNOWN
    with pytest.raises(Unavailable):
        ray.kill("anything")


def test_a_head_that_hangs_costs_one_time_limit_for_all_workers():
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        ray = RayLauncher(address, "x", owner="o", ticket=lambda worker, token: "t", timeout_s=0.5)
        began = time.monotonic()
        with pytest.raises(Unavailable):
            ray.list()
        asked = time.monotonic() - began
        assert {ray.probe(f"worker-{number}") for number in range(200)} == {Probe.UNKNOWN}
        with pytest.raises(Unavailable):
            ray.kill("worker-1")
        assert time.monotonic() - began < asked + 2


def test_a_worker_inherits_nothing_of_rays():
    inherited = {**os.environ, "RAY_AUTH_TOKEN": "secret", "RAY_ADDRESS": "x", "OMP_NUM_THREADS": "4", TICKET: "t"}
    found = worker_environment({**inherited, "CUDA_VISIBLE_DEVICES": "3"}, "flash-1-00000000.1", None)
    assert not [name for name in found if name.startswith("RAY_")] and "OMP_NUM_THREADS" not in found
    assert (found["CUDA_VISIBLE_DEVICES"], found[MARK]) == ("3", "flash-1-00000000.1") and TICKET not in found
    on_cpu = worker_environment({**inherited, "FLASH_WORKER_SETTINGS": '{"threads": 3}'}, "x", 2)
    assert on_cpu["CUDA_VISIBLE_DEVICES"] == "" and json.loads(on_cpu["FLASH_WORKER_SETTINGS"]) == {"threads": 3}
