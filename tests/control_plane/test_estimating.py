"""Submits meet the hardware: what can never fit is refused, the rest carries its estimate and a fair limit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from flash.control_plane import estimating
from flash.control_plane.estimating import cost_usd, reachable
from flash.launching.hardware import Device, cpu_device
from flash.records import RunState
from flash.storage import runs

KINDS = {"cpu": "CPU", "mps": "Apple GPU"}
ENVIRONMENT = "def load_environment():\n    ...\n"


@pytest.fixture
def machine(monkeypatch):
    """`machine(name=bytes)`: what the driver and the system would report."""

    def have(**memory: int) -> None:
        devices = {
            name.replace("_", ":"): Device(name.replace("_", ":"), KINDS.get(name, "NVIDIA L40S"), size)
            for name, size in memory.items()
        }
        monkeypatch.setattr(estimating, "_local_devices", lambda: devices)

    return have


def stored(world, run_id):
    with world.plane.database.read() as connection:
        return runs.get_run(connection, run_id)


def post(world, **config):
    body = {"config": {"model": "flash/nano", "environment": {"id": "local/arith"}, **config}, "seed": 0, "secrets": {}}
    return world.call("POST", "/api/runs", json=body)


def test_what_no_reachable_device_can_hold_is_refused_with_need_have_and_key(world, machine):
    machine(cpu=16 * 10**9)
    answer = post(world, model="Qwen/Qwen3.5-0.8B", train={"max_length": 8192})
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["message"].startswith("train.max_length = 8192: sft on Qwen/Qwen3.5-0.8B needs ")
    assert "the roomiest hardware, CPU, has 16 GB" in error["message"]
    assert error["remedy"].startswith("lower train.max_length to ")
    smaller = int(error["remedy"].split()[3])
    assert post(world, model="Qwen/Qwen3.5-0.8B", train={"max_length": smaller}).status_code == 201


def test_the_roomiest_device_decides(world, machine):
    world.launcher._devices = ("cpu", "cuda:0")
    machine(cpu=8 * 10**9, cuda_0=48 * 10**9)
    assert post(world, model="Qwen/Qwen3.5-4B").status_code == 201
    machine(cpu=8 * 10**9)
    assert "choose a smaller model" in post(world, model="Qwen/Qwen3.5-4B").json()["error"]["remedy"]


def test_an_apple_gpu_is_planned_with_as_the_processor_that_a_run_may_fall_back_to(world, machine):
    world.launcher._devices = ("mps",)
    machine(mps=16 * 10**9)
    ((name, hardware),) = reachable(world.plane)
    assert (name, hardware.name, hardware.kind, hardware.memory) == ("mps", "Apple GPU", "cpu", 16 * 10**9)
    error = post(world, model="Qwen/Qwen3.5-4B").json()["error"]
    assert "the roomiest hardware, Apple GPU, has 16 GB" in error["message"]
    assert post(world).json()["managed"]["estimated_s"] > 0


def test_devices_that_can_not_be_described_refuse_nothing(world, machine):
    machine()
    answer = post(world, model="Qwen/Qwen3.6-35B-A3B")
    assert answer.status_code == 201
    assert answer.json()["estimated_cost_usd"] is None
    assert answer.json()["managed"]["wall_clock_limit_s"] == world.plane.settings.wall_clock_unknown_s


def test_a_run_carries_its_estimate_and_costs_nothing_here(world):
    status = post(world, train={"max_steps": 4}).json()
    assert (status["estimated_cost_usd"], status["cost_usd"]) == (0.0, 0.0)
    assert status["managed"]["estimated_s"] > 0
    assert status["managed"]["memory_needed_bytes"] > 10**8
    assert status["managed"]["wall_clock_limit_s"] >= 3600
    assert stored(world, status["run_id"]).estimate["steps"] == 4


def test_the_package_s_rows_are_counted(world, pack):
    lines = "\n".join(json.dumps({"input": "a", "output": "b"}) for _ in range(70))
    package = pack({"environment.py": ENVIRONMENT, "dataset/train.jsonl": lines})
    assert world.call("POST", "/api/environments/local/arith", content=package).status_code == 201
    run_id = post(world, train={"batch_size": 32, "epochs": 2}).json()["run_id"]
    assert (stored(world, run_id).estimate["rows"], stored(world, run_id).estimate["steps"]) == (70, 6)


def test_rows_that_nobody_counted_keep_the_long_limit(world):
    limits = [post(world, train=train).json()["managed"]["wall_clock_limit_s"] for train in ({}, {"max_steps": 2})]
    assert limits[0] == world.plane.settings.wall_clock_unknown_s > limits[1]


def test_micro_batches_shrink_to_the_device(world, machine):
    machine(cpu=16 * 10**9)
    small = stored(world, post(world, model="Qwen/Qwen3.5-0.8B").json()["run_id"])
    assert 1024 <= small.spec["recipe"]["micro_batch_tokens"] < 16_384
    nano = stored(world, post(world).json()["run_id"])
    assert nano.spec["recipe"]["micro_batch_tokens"] == 16_384


def test_a_cancelled_run_is_priced_at_the_steps_it_reached(world):
    run = stored(world, post(world).json()["run_id"])
    estimate = {**run.estimate, "usd_per_hour": 3.6, "seconds_per_step": 10.0}
    done = replace(run, estimate=estimate, state=RunState.DONE, active_s=500.0, step=20)
    assert cost_usd(done) == pytest.approx(0.5)
    assert cost_usd(replace(done, state=RunState.CANCELLED)) == pytest.approx(0.2)
    assert cost_usd(replace(done, estimate=None)) is None


def test_the_hardware_route_tells_what_is_there(world, machine):
    machine(cpu=16 * 10**9)
    answer = world.call("GET", "/api/hardware").json()
    expected = {"device": "cpu", "name": "CPU", "kind": "cpu", "memory_bytes": 16 * 10**9, "usd_per_hour": 0.0}
    assert answer == {"devices": [expected]}
    assert world.http.get("/api/hardware").status_code == 401


def test_this_machine_s_own_memory_is_read(world):
    (name, hardware), *_ = reachable(world.plane)
    assert (name, hardware.memory) == ("cpu", cpu_device().memory)
    assert 10**8 < hardware.memory < 10**14
