"""Which device a run gets: one that it fits, the smallest of them, and in the end every run one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flash.catalog.hardware import HardwareClass
from flash.control_plane.engines import DrainEngine, EngineSnapshot, NoteWait, StartEngine
from flash.control_plane.reconciler import AttemptSnapshot, RunSnapshot, Snapshot, StartAttempt, decide
from flash.control_plane.settings import ServerSettings
from flash.errors import Unavailable
from flash.launching.fake import FakeLauncher
from flash.launching.hardware import Device
from flash.launching.launcher import Probe
from flash.records import AttemptState, EngineState, Phase, RunState
from flash.storage.shares import Standing

GB = 10**9
SETTINGS = ServerSettings(home=Path("/nowhere"), launcher="ray", ray_address="http://head", worker_url="http://here")
SMALL, LARGE, CPU = "cuda:aa.0", "cuda:bb.0", "cpu:00.0"
DEVICES = (CPU, LARGE, SMALL)
HARDWARE = {
    SMALL: HardwareClass("NVIDIA L4", "gpu", 24 * GB, 1e14, 1e12),
    LARGE: HardwareClass("NVIDIA H100", "gpu", 80 * GB, 1e15, 1e12),
    CPU: HardwareClass("CPU", "cpu", 16 * GB, 1e10, 1e10),
}
WORKING = AttemptSnapshot(
    epoch=1, state=AttemptState.RUNNING, device="", handle="h", probe=Probe.ALIVE, phase=Phase.TRAINING
)


def queued(run_id: str, gigabytes: int | None, *, gpus: int = 1, **values: Any) -> RunSnapshot:
    needs = {} if gigabytes is None else {"gpu": gigabytes * GB, "cpu": 2 * gigabytes * GB}
    return RunSnapshot(run_id, RunState.QUEUED, "run", gpus=gpus, needs=needs, **values)


def on(device: str, run: RunSnapshot) -> RunSnapshot:
    return replace(run, state=RunState.RUNNING, attempts=(replace(WORKING, device=device),))


def placed(*runs: RunSnapshot, devices: tuple[str, ...] = DEVICES, **seen: Any) -> dict[str, str]:
    actions = decide(Snapshot(runs, devices, hardware=HARDWARE, **seen), 0.0, SETTINGS)
    return {action.run_id: action.device for action in actions if isinstance(action, StartAttempt)}


def test_a_run_gets_the_smallest_device_that_it_fits():
    assert placed(queued("tiny", 2)) == {"tiny": SMALL}, "a GPU, as it was planned for"
    assert placed(queued("large", 40)) == {"large": LARGE}
    assert placed(queued("a", 2), queued("b", 2), queued("c", 2)) == {"a": SMALL, "b": LARGE, "c": CPU}
    assert placed(queued("a", 20), queued("b", 20), queued("c", 20)) == {"a": SMALL, "b": LARGE}
    assert placed(queued("a", 2, gpus=0)) == {"a": CPU}


def test_what_is_not_known_is_in_nobodys_way():
    assert placed(queued("a", None, gpus=0)) == {"a": CPU}, "the first"
    assert placed(queued("a", None)) == {"a": LARGE}, "the first GPU"
    assert placed(queued("a", 900), devices=("cuda:cc.0",)) == {"a": "cuda:cc.0"}


def test_a_run_that_fits_no_free_device_waits_and_holds_no_one_up():
    busy = on(LARGE, queued("old", 60))
    assert placed(busy, queued("large", 40), queued("tiny", 2)) == {"tiny": SMALL}
    assert placed(queued("huge", 200), queued("tiny", 2)) == {"tiny": SMALL}


def test_an_orgs_small_runs_wait_with_its_large_one_only_where_it_was_overtaken():
    large, tiny = queued("large", 40, org="a", created_at=1.0), queued("tiny", 2, org="a", created_at=2.0)
    older, younger = (on(LARGE, queued("b", 60, org="b", created_at=at)) for at in (0.0, 3.0))
    assert placed(older, large, tiny) == {"tiny": SMALL}
    assert placed(younger, large, tiny) == {}
    assert placed(younger, tiny) == {"tiny": SMALL}
    assert placed(younger, large, replace(tiny, org="c")) == {"tiny": SMALL}
    own = on("cuda:bb.1", queued("mine", 60, org="a"))
    hardware = {**HARDWARE, "cuda:bb.1": HARDWARE[LARGE]}
    seen = Snapshot((younger, own, large, tiny), (*DEVICES, "cuda:bb.1"), hardware=hardware)
    assert decide(seen, 0.0, SETTINGS) == [StartAttempt("tiny", 1, SMALL)], "its org has its share of the large ones"


@pytest.mark.parametrize("device", [SMALL, LARGE])
def test_only_an_engine_that_is_in_a_runs_way_yields_to_it(device: str):
    idle = EngineSnapshot(
        "e", "base", EngineState.READY, device=device, handle="h", probe=Probe.ALIVE, unused_s=SETTINGS.engine_yield_s
    )
    actions = decide(Snapshot((queued("large", 40),), (device,), engines=(idle,), hardware=HARDWARE), 0.0, SETTINGS)
    assert [type(action) for action in actions] == ([DrainEngine] if device == LARGE else [])


def test_an_engine_gets_a_device_that_holds_its_base():
    engine = EngineSnapshot("e", "base", EngineState.WAITING, needs={"gpu": 40 * GB, "cpu": 80 * GB})
    seen = Snapshot((), DEVICES, engines=(engine,), hardware=HARDWARE)
    assert decide(seen, 0.0, SETTINGS) == [StartEngine("e", LARGE)]
    small = replace(engine, needs={"gpu": GB, "cpu": 2 * GB})
    assert decide(replace(seen, engines=(small,)), 0.0, SETTINGS) == [StartEngine("e", CPU)], "the first"
    busy = replace(seen, runs=(on(LARGE, queued("r", 60)),))
    assert decide(busy, 0.0, SETTINGS) == [NoteWait("e", f"waiting for a free device: {LARGE} trains a run")]


def test_no_run_waits_for_good_while_its_orgs_small_ones_and_anothers_large_ones_start():
    """a's first run fits one device of three; a has small runs without end, of which one goes on whenever a large one
    ends, and b has large ones."""
    devices = (SMALL, "cuda:aa.1", LARGE)
    hardware = {**HARDWARE, "cuda:aa.1": HARDWARE[SMALL]}
    orgs = {"a": Standing(), "b": Standing()}
    mine = [queued("a large", 40, org="a", created_at=1.0)]
    mine += [queued(f"a {n}", 2, org="a", created_at=2.0 + n) for n in range(60)]
    others = [queued("b first", 40, org="b", created_at=0.0)]
    others += [queued(f"b {n}", 40, org="b", created_at=2.5 + n) for n in range(60)]
    runs = {run.run_id: run for run in (*mine, *others)}
    ends: dict[str, int] = {}
    order: list[str] = []
    for time in range(40):
        for run_id in [run_id for run_id, at in ends.items() if at == time]:
            del ends[run_id], runs[run_id]
        snapshot = Snapshot(tuple(runs.values()), devices, orgs=orgs, hardware=hardware)
        for action in decide(snapshot, 0.0, SETTINGS):
            assert isinstance(action, StartAttempt)
            run = runs[action.run_id] = on(action.device, runs[action.run_id])
            ends[run.run_id] = time + (2 + len(order) % 2 if run.org == "a" else 2)
            order.append(run.run_id)
            begun = max(orgs[run.org].turn, *(each.turn - 1 for each in orgs.values()))
            orgs[run.org] = replace(orgs[run.org], turn=begun + 1)
        if "a large" in order:
            break
    assert "a large" in order, order


# --- through the whole control plane ------------------------------------------------------------------


def test_a_submit_is_placed_by_its_estimate(world):
    world.launcher._devices = (SMALL, LARGE)
    world.launcher.described = [
        Device(SMALL, "NVIDIA L4", 24 * GB), Device(LARGE, "NVIDIA H100 80GB HBM3", 80 * GB),
    ]  # fmt: skip
    config = {"environment": {"id": "local/arith"}}
    larger = {**config, "model": "Qwen/Qwen3.5-9B", "train": {"max_length": 2048}}
    smaller = {**config, "model": "flash/nano"}
    found = []
    for each in (larger, smaller):
        answer = world.call("POST", "/api/runs", json={"config": each})
        assert answer.status_code == 201, answer.text
        found.append(answer.json()["run_id"])
    world.settle()
    assert [world.status(run_id)["attempts"][0]["device"] for run_id in found] == [LARGE, SMALL]


class Away(FakeLauncher):
    """A cluster's launcher: it may place nothing just now, or know nothing."""

    def devices(self) -> list[str]:
        if not self.reachable:
            raise Unavailable("the cluster is away")
        return super().devices()

    def describe(self) -> list[Device] | None:
        if not self.reachable and not self.described:
            raise Unavailable("the cluster is away")
        return self.described


@pytest.mark.parametrize("reachable", [True, False])
def test_what_gets_no_worker_just_now_is_planned_with(world, reachable: bool):
    world.plane.launcher = launcher = Away(())  # every node is suspect
    launcher.described, launcher.reachable = [Device(LARGE, "NVIDIA H100 80GB HBM3", 80 * GB)], reachable
    config = {"environment": {"id": "local/arith"}, "model": "Qwen/Qwen3.5-9B"}
    status = world.call("POST", "/api/runs", json={"config": config}).json()
    assert status["state"] == "queued" and status["managed"]["estimated_s"] > 0
    refused = world.call("POST", "/api/runs", json={"config": {**config, "model": "Qwen/Qwen3.6-35B-A3B"}})
    assert refused.status_code == 422 and "has 80 GB" in refused.json()["error"]["message"]


@pytest.mark.parametrize("wish", ["auto", "vllm", "flash"])
@pytest.mark.parametrize("world", [{"engine_wait_s": 0.0}], indirect=True)
def test_whether_vllm_is_there_is_a_nodes_to_say(world, wish: str):
    world.plane.settings = world.plane.settings.model_copy(update={"engine": wish, "launcher": "ray"})
    world.launcher._devices = (LARGE,)
    asked = {"model": "flash/nano", "messages": [{"role": "user", "content": "x"}]}
    world.call("POST", "/v1/chat/completions", json=asked)
    world.settle()
    [request] = world.launcher.requests.values()
    assert request.engine["vllm_python"] == (None if wish == "flash" else wish)
