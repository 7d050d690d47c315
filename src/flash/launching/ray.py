"""Workers as jobs of a Ray cluster: Ray places a process on a node and tells whether it lives, and nothing else.

Owns the cluster's slots and Ray's Jobs API; queue, retries, states and logs are the control plane's. A slot is a GPU,
or some CPUs of a node that has no GPU, and is named by its node's id (`cuda:1f0c2a9b.0`): it goes with its node, its
name is never another node's, and a job is pinned to the node of its slot, so two runs never wait for the same one.

Ray is spoken to over HTTP, as its own client does, but with time limits of ours: a head whose GCS died keeps a request
open for a minute. So the server needs no Ray installed. A failed request is remembered for a moment, so that a dead
head costs one look one time limit and not one for each worker.

A job's id is the worker's, so a launch is done at most once. The worker's token is not in the job: Ray shows a job's
command and variables to everyone with the cluster's token. The job carries a ticket, which `ray_entry` exchanges at the
control plane before the worker begins, and which is worth nothing afterwards.

A job that the head does not know (it was restarted without a store of its own) is dead only after `lost_s`: meanwhile
its worker has ended with its node's raylet, or has been told by the control plane that it is over.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx

from flash.errors import FlashError, NotFound, Unauthorized, Unavailable
from flash.launching.hardware import Device
from flash.launching.launcher import LaunchRequest, LaunchUnsure, Probe

log = logging.getLogger("flash.ray")

ENTRY = "flash.launching.ray_entry"
TICKET = "FLASH_LAUNCH_TICKET"
NODE_GONE = 75  # exit status of an entry that saw its raylet end; no worker's
_SETTINGS = "FLASH_WORKER_SETTINGS"  # the operator's, which workers of one's own machine inherit
_TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")
_OWNER, _WORKER = "flash_owner", "flash_worker"  # a job's metadata
_NODE_ID = "ray.io/node-id"  # the label that Ray gives each node
_FRESH_S = 1.0  # how old an answer may be
_REFUSED_S = 2.0  # how long a failure stands for the next requests
_SUSPECT_S = 30.0  # how long a node gets no worker after it lost one; Ray's own limit for its death is less
_HARDWARE_S = 60.0  # GPUs do not change while their node lives
_DESCRIBED_S = 3600.0  # how long what was there is planned with while the head is away, or no node is there
_CHECK_S = 2.0  # for asking after a launch whose answer is lost
_KEPT_S = 3600.0  # how long Ray keeps a job that has ended, for whoever wants to read its log
_SWEPT = 5  # ended jobs removed at once
_MIB = 1 << 20

T = TypeVar("T")


class RayLauncher:
    """`ticket(worker id, token)` seals a token; `owner` marks the jobs of one control plane, all its servers alike.

    `kinds`: "cuda", "cpu" or both; None is GPUs where there are any, else CPUs. `pip` are packages that Ray installs
    for the job on its node.
    """

    def __init__(
        self,
        address: str,
        token: str | None,
        *,
        owner: str,
        ticket: Callable[[str, str], str],
        cpus: int = 4,
        kinds: Sequence[str] | None = None,
        pip: Sequence[str] = (),
        timeout_s: float = 5.0,
        lost_s: float = 15.0,
    ) -> None:
        self._address = address.rstrip("/")
        self._owner = owner
        self._ticket = ticket
        self._cpus = cpus
        self._kinds = None if kinds is None else frozenset(kinds)
        self._pip = list(pip)
        self._lost_s = lost_s
        self._http = httpx.Client(
            base_url=self._address,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=timeout_s,
            trust_env=False,  # a cluster's head is no address for the world's proxy
        )
        self._jobs = _Answer(self._ask_jobs)
        self._nodes = _Answer(self._ask_nodes)
        self._gpus = _Answer(self._ask_gpus)
        self._described: tuple[float, list[Device]] = (0.0, [])  # when there were devices last, and which
        self._lost: frozenset[str] | None = None  # jobs whose process on the node vanished; None: not asked yet
        self._lost_on: dict[str, float] = {}  # by node: when one was seen to have, of late
        self._missed: dict[str, float] = {}  # handles that the head did not know: since when

    def devices(self) -> list[str]:
        """Without those of nodes on which a job was just lost: Ray tells that before it calls the node dead."""
        return [slot.name for slot in self._open_slots()]

    def describe(self) -> list[Device]:
        """Of all living nodes. Where there is none, or the head is away, what there was within the last hour."""
        now = time.monotonic()
        seen, before = self._described
        kept = before if now - seen < _DESCRIBED_S else []
        try:
            found = self._describe()
        except FlashError:
            if kept:
                return kept
            raise
        if found:
            self._described = (now, found)
        return found or kept

    def _describe(self) -> list[Device]:
        slots = self._slots()
        gpus = self._gpus.get(_HARDWARE_S) if any(slot.gpu for slot in slots) else {}
        if any(slot.gpu and slot.node not in gpus for slot in slots):  # a node that has just come
            gpus = self._gpus.get(_FRESH_S)
        found = []
        for slot in slots:
            if not slot.gpu:
                found.append(Device(slot.name, "CPU", slot.memory, cores=self._cpus))
            elif gpus.get(slot.node):
                found.append(Device(slot.name, *gpus[slot.node]))
        return found

    def launch(self, request: LaunchRequest) -> str:
        slot = next((slot for slot in self._open_slots() if slot.name == request.device), None)
        if slot is None:
            raise Unavailable(f"the node of {request.device} is gone")
        handle = request.attempt_id
        try:
            answer = self._send("POST", "/api/jobs/", json=self._job(request, slot))
        except Unavailable as error:
            if self._has(handle):
                return handle
            raise LaunchUnsure(error.message, remedy=error.remedy) from None
        finally:
            self._jobs.forget()  # what was heard before does not know this one
        if answer.is_success or "already exists" in answer.text:
            return handle
        if answer.status_code >= 500 and self._has(handle):
            return handle
        raise self._refusal(answer)

    def _has(self, handle: str) -> bool:
        """Whether the head says that it has this job; a head that does not answer in time says no."""
        try:
            return self._send("GET", f"/api/jobs/{handle}", timeout=_CHECK_S).is_success
        except Unavailable:
            return False

    def probe(self, handle: str) -> Probe:
        try:
            job = self._jobs.get(_FRESH_S).get(handle)
        except FlashError:
            return Probe.UNKNOWN
        if job is not None:
            self._missed.pop(handle, None)
            return Probe.DEAD if job["status"] in _TERMINAL else Probe.ALIVE
        since = self._missed.setdefault(handle, time.monotonic())
        if time.monotonic() - since < self._lost_s:
            return Probe.UNKNOWN
        self._missed.pop(handle, None)
        return Probe.DEAD

    def kill(self, handle: str) -> None:
        """Ray signals the job's whole tree with SIGTERM and, after three seconds, with SIGKILL."""
        self._jobs.fail_early()
        answer = self._send("POST", f"/api/jobs/{handle}/stop")
        self._jobs.forget()
        if not answer.is_success and answer.status_code != 404:
            raise self._refusal(answer)

    def list(self) -> dict[str, str]:
        jobs = self._jobs.get(0.0)
        mine = {handle: job for handle, job in jobs.items() if job["owner"] == self._owner}
        self._sweep(mine)
        before = time.monotonic() - self._lost_s - _KEPT_S  # nobody asks for these any more
        self._missed = {handle: since for handle, since in self._missed.items() if since > before}
        return {job["worker"]: handle for handle, job in mine.items() if job["status"] not in _TERMINAL}

    # --- what is asked for ---------------------------------------------------------------------------------

    def _job(self, request: LaunchRequest, slot: _Slot) -> dict[str, Any]:
        kind = "engine" if request.engine is not None else "attempt"
        options = ["--kind", kind, "--id", request.attempt_id, "--plane", request.api_url]
        options += [] if slot.gpu else ["--cpus", str(self._cpus)]
        variables = {TICKET: self._ticket(request.attempt_id, request.token)}
        if _SETTINGS in os.environ:
            variables[_SETTINGS] = os.environ[_SETTINGS]
        environment: dict[str, Any] = {"env_vars": variables}
        if self._pip:
            environment["pip"] = self._pip
        return {
            "submission_id": request.attempt_id,
            "entrypoint": shlex.join(["python", "-P", "-m", ENTRY, *options]),
            "metadata": {_OWNER: self._owner, _WORKER: request.attempt_id},
            "runtime_env": environment,
            "entrypoint_label_selector": {_NODE_ID: slot.node},
            **({"entrypoint_num_gpus": 1} if slot.gpu else {"entrypoint_num_cpus": self._cpus}),
        }

    def _slots(self) -> Sequence[_Slot]:
        slots = [slot for node in self._nodes.get(_FRESH_S) for slot in _slots_of(node, self._cpus)]
        if self._kinds is None:
            return [slot for slot in slots if slot.gpu] or slots
        return [slot for slot in slots if ("cuda" if slot.gpu else "cpu") in self._kinds]

    def _open_slots(self) -> Sequence[_Slot]:
        """A job for a node that is dying would wait until Ray has called it dead, and its run with it."""
        after = time.monotonic() - _SUSPECT_S
        return [slot for slot in self._slots() if self._lost_on.get(slot.node, after) <= after]

    # --- what Ray says ---------------------------------------------------------------------------------------

    def _ask_jobs(self) -> dict[str, dict[str, Any]]:
        """By submission id. Jobs of others are among them, and drivers that were not submitted are not."""
        found: dict[str, dict[str, Any]] = {}
        lost = {}
        for job in self._read("/api/jobs/"):
            if job.get("submission_id"):
                gone = job.get("status") == "FAILED" and job.get("driver_exit_code") in (None, NODE_GONE)
                if gone and job.get("driver_node_id"):
                    lost[str(job["submission_id"])] = str(job["driver_node_id"])
                about = job.get("metadata") or {}
                found[str(job["submission_id"])] = {
                    "status": str(job.get("status")),
                    "owner": about.get(_OWNER),
                    "worker": str(about.get(_WORKER)),
                    "ended": (job.get("end_time") or 0) / 1000,
                }
        now = time.monotonic()
        known = frozenset(lost) if self._lost is None else self._lost  # at first: when they were lost, nobody can tell
        late = {node: now for handle, node in lost.items() if handle not in known}
        self._lost_on = {node: then for node, then in self._lost_on.items() if now - then < _SUSPECT_S} | late
        self._lost = frozenset(lost)
        return found

    def _ask_nodes(self) -> Sequence[dict[str, Any]]:
        """Living nodes, in an order of their own that lasts."""
        answer = self._read("/api/v0/nodes", detail="1", limit="10000")
        nodes = [node for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"]
        return sorted(nodes, key=lambda node: str(node["node_id"]))

    def _ask_gpus(self) -> dict[str, tuple[str, int]]:
        """By node: its GPU's name and memory in bytes; of several kinds the one with the least."""
        found = {}
        for node in self._read("/nodes", view="summary")["data"]["summary"]:
            gpus = [(str(gpu["name"]), int(gpu["memoryTotal"]) * _MIB) for gpu in node.get("gpus") or ()]
            if gpus:
                found[str(node["raylet"]["nodeId"])] = min(gpus, key=lambda gpu: gpu[1])
        return found

    def _sweep(self, jobs: dict[str, dict[str, Any]]) -> None:
        """Ray keeps ended jobs for good; ours go after a while, a few with each look, and no look fails for it."""
        before = time.time() - _KEPT_S
        old = [name for name, job in jobs.items() if job["status"] in _TERMINAL and 0 < job["ended"] < before]
        with contextlib.suppress(FlashError):
            for handle in old[:_SWEPT]:
                self._send("DELETE", f"/api/jobs/{handle}")

    # --- HTTP --------------------------------------------------------------------------------------------------

    def _read(self, path: str, **params: str) -> Any:
        answer = self._send("GET", path, params=params)
        if not answer.is_success:
            raise self._refusal(answer)
        try:
            return answer.json()
        except ValueError:
            raise Unavailable(f"what answers at {self._address} is not Ray", remedy="check ray_address") from None

    def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **request)
        except httpx.TransportError as error:
            said = str(error) or type(error).__name__
            raise Unavailable(f"Ray can't be reached at {self._address}: {said}") from None

    def _refusal(self, answer: httpx.Response) -> FlashError:
        if answer.status_code in (401, 403):
            return Unauthorized(
                f"Ray at {self._address} refuses the server's token ({answer.status_code})",
                remedy="give the server the cluster's RAY_AUTH_TOKEN as ray_token",
            )
        lines = answer.text.strip().splitlines() or [""]
        if answer.status_code == 404:
            return NotFound(f"Ray at {self._address}: {lines[-1]:.300}")
        return Unavailable(f"Ray at {self._address} answered {answer.status_code}: {lines[-1]:.300}")


@dataclass(frozen=True)
class _Slot:
    name: str
    node: str  # Ray's id of it
    gpu: bool
    memory: int  # bytes; of a CPU slot


def _slots_of(node: dict[str, Any], cpus: int) -> list[_Slot]:
    has = node["resources_total"]
    gpus = int(has.get("GPU", 0))
    count = gpus or int(has.get("CPU", 0)) // cpus
    kind = "cuda" if gpus else "cpu"
    memory = int(has.get("memory", 0)) // max(1, count)
    name = f"{kind}:{str(node['node_id'])[:8]}"
    return [_Slot(f"{name}.{number}", str(node["node_id"]), gpus > 0, memory) for number in range(count)]


class _Answer(Generic[T]):
    """What was last heard, or the failure to hear it. Safe from several threads, of which one asks."""

    def __init__(self, ask: Callable[[], T]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._heard: tuple[float, T] | None = None
        self._failed: tuple[float, FlashError] | None = None

    def get(self, most_s: float) -> T:
        """At most so old. Raises the failure, without asking again, while it is young."""
        with self._lock:
            if self._heard is not None and time.monotonic() - self._heard[0] < most_s:
                return self._heard[1]
            self._raise_young()
            try:
                value = self._ask()
            except FlashError as error:
                self._failed = (time.monotonic(), error)
                raise
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                strange = Unavailable(f"Ray's answer is not what this version of Flash reads: {error!r}")
                self._failed = (time.monotonic(), strange)
                raise strange from None
            self._heard, self._failed = (time.monotonic(), value), None
            return value

    def forget(self) -> None:
        with self._lock:
            self._heard = None

    def fail_early(self) -> None:
        """Raises a young failure."""
        with self._lock:
            self._raise_young()

    def _raise_young(self) -> None:
        if self._failed is not None and time.monotonic() - self._failed[0] < _REFUSED_S:
            raise self._failed[1]
