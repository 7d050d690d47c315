"""Runs from submit to end through the real database, with workers that the test plays."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from tests.scripted_service import until

from flash.control_plane.cleaning import Cleaner
from flash.errors import Unavailable
from flash.launching.fake import FakeLauncher
from flash.storage import runs, schema


def states(world, run_id: str) -> list[str]:
    return [event["data"]["to"] for event in world.events(run_id, kinds="state")]


def test_a_run_goes_from_queue_to_done(world):
    run_id, worker = world.started()
    worker.beat(step=1, progress=1)
    worker.tell("metrics", step=2, total_steps=2, values={"loss": 0.25})
    worker.tell("eval", base=0.3, adapter=0.9, n=200)
    worker.save(2, final=True)
    assert worker.finish("done").status_code == 204
    world.settle()
    status = world.status(run_id)
    assert states(world, run_id) == ["queued", "provisioning", "running", "done"]
    assert (status["state"], status["phase"], status["step"]) == ("done", "finished", 2)
    assert status["metrics"] == {"loss": 0.25, "eval": {"base": 0.3, "adapter": 0.9, "n": 200}}
    assert (status["checkpoints"], status["adapter_ref"]) == ([f"{run_id}/step-2"], f"{run_id}/step-2")
    assert "0.900" in status["summary"] and "export" in status["next"]
    assert status["attempts"][0]["state"] == "ending"  # its process lives still, so its device is taken
    waiting = world.submit()
    assert world.settle() == []
    world.launcher.die(worker.attempt_id)
    world.settle()
    assert world.status(waiting)["state"] == "provisioning"
    seqs = [event["seq"] for event in world.events(run_id)]
    assert seqs == list(range(1, len(seqs) + 1))
    assert world.events(run_id)[-1]["data"]["to"] == "done"  # nothing follows the end


@pytest.mark.parametrize("world", [{"reconcile_interval_s": 3600.0}], indirect=True)
def test_a_device_is_given_on_as_soon_as_its_worker_is_gone_however_rarely_one_looks(world):
    world.reconciler.start()
    try:
        first = world.submit()
        until(lambda: f"{first}.1" in world.launcher.requests)
        worker = world.worker(first)
        worker.claim()
        second = world.submit()
        worker.save(1, final=True)
        assert worker.finish("done").status_code == 204
        until(lambda: world.status(first)["state"] == "done")
        assert f"{second}.1" not in world.launcher.requests
        world.launcher.die(worker.attempt_id)  # nobody tells the server
        until(lambda: f"{second}.1" in world.launcher.requests)
    finally:
        world.reconciler.stop()


def test_a_lost_worker_is_fenced_killed_and_replaced_from_the_newest_checkpoint(world):
    run_id, first = world.started()
    first.save(1)
    first.save(2)
    world.launcher.stubborn = True
    world.clock.now += 31.0  # past the lease
    world.settle()
    assert first.beat().status_code == 409
    late = {"epoch": 1, "events": [{"n": 1, "time": 1.0, "kind": "log", "data": {}}]}
    assert first.post("events", late).status_code == 409
    assert first.finish("done").status_code == 409
    assert world.status(run_id)["state"] == "running"  # not dead yet: no second worker
    assert f"{run_id}.2" not in world.launcher.requests
    world.launcher.stubborn = False
    world.settle()
    world.settle()
    second = world.worker(run_id, 2)
    claim = second.claim()
    assert (claim["epoch"], claim["resume_from"]["step"]) == (2, 2)
    second.save(3, final=True)
    assert second.finish("done").status_code == 204
    world.settle()
    status = world.status(run_id)
    assert (status["state"], status["managed"]["retries"]) == ("done", 1)
    assert status["attempts"][0]["failure"] == "infrastructure"


@pytest.mark.parametrize("world", [{"stall_s": {"training": 100.0}}], indirect=True)
def test_a_worker_that_beats_keeps_its_lease_and_stalls_only_without_progress(world):
    run_id, worker = world.started()
    for progress in range(1, 8):
        world.clock.now += 29.0
        assert worker.beat(progress=progress).status_code == 200
        world.settle()
    assert world.status(run_id)["state"] == "running"
    while worker.beat(progress=7).status_code == 200:
        world.clock.now += 29.0
        world.settle()
    world.settle()
    attempt = world.status(run_id)["attempts"][0]
    assert attempt["failure"] == "stall" and "while training" in attempt["message"]


def test_three_fruitless_attempts_end_the_run_and_a_checkpoint_counts_anew(world):
    run_id, worker = world.started()
    for epoch in range(1, 6):
        worker = world.worker(run_id, epoch)
        worker.claim()
        if epoch == 2:
            worker.save(5)
        world.launcher.die(worker.attempt_id)
        world.settle()
        expected = "failed" if epoch == 5 else "provisioning"
        assert world.status(run_id)["state"] == expected
    status = world.status(run_id)
    assert "3 attempts in a row" in status["error"]["message"] and status["error"]["code"] == "infrastructure"
    assert f"{run_id}/step-5" in status["next"]


def test_user_code_is_not_retried_and_its_account_is_kept(world):
    run_id, worker = world.started()
    assert worker.finish("failed", failure="user_code", message="reward raised").status_code == 204
    assert worker.finish("failed", failure="user_code").status_code == 204  # its answer was lost
    world.settle()
    assert world.status(run_id)["state"] == "running"  # until it is known dead
    world.launcher.die(worker.attempt_id)
    world.settle()
    status = world.status(run_id)
    assert (status["state"], status["error"]["detail"]) == ("failed", "Traceback")
    assert "reward raised" in status["summary"]


def test_out_of_memory_halves_the_micro_batch_once(world):
    run_id, worker = world.started()
    for epoch, expected in ((1, "provisioning"), (2, "failed")):
        worker = world.worker(run_id, epoch)
        assert worker.claim()["micro_batch_divisor"] == epoch
        worker.finish("failed", failure="out_of_memory")
        world.launcher.die(worker.attempt_id)
        world.settle()
        assert world.status(run_id)["state"] == expected


def test_a_worker_that_ignores_its_end_is_killed(world):
    run_id, worker = world.started()
    worker.finish("failed", failure="user_code")
    world.settle()
    assert world.launcher.kills == []
    world.clock.now += 16.0
    world.settle()
    world.settle()
    assert len(world.launcher.kills) == 1 and world.status(run_id)["state"] == "failed"


def test_done_without_a_final_checkpoint_is_a_failure(world):
    run_id, worker = world.started()
    worker.save(1)
    answer = worker.finish("done")
    assert answer.status_code == 409 and "final" in answer.json()["error"]["message"]
    world.launcher.die(worker.attempt_id)
    world.settle()
    assert world.status(run_id)["state"] == "failed"


def test_a_cancel_reaches_the_worker_and_is_settled_when_it_is_dead(world):
    run_id, worker = world.started()
    assert worker.beat().json()["desired"] == "run"
    assert world.call("POST", f"/api/runs/{run_id}/cancel").status_code == 200
    assert worker.beat().json()["desired"] == "cancel"
    world.settle()
    worker.save(3)
    assert worker.finish("cancelled").status_code == 204
    world.settle()
    assert world.status(run_id)["state"] == "running"
    world.launcher.die(worker.attempt_id)
    world.settle()
    status = world.status(run_id)
    assert (status["state"], status["checkpoints"]) == ("cancelled", [f"{run_id}/step-3"])
    assert world.call("POST", f"/api/runs/{run_id}/cancel").json()["state"] == "cancelled"


def test_a_worker_deaf_to_a_cancel_is_killed(world):
    run_id, worker = world.started()
    world.call("POST", f"/api/runs/{run_id}/cancel")
    world.settle()
    for _ in range(5):
        world.clock.now += 29
        worker.beat()
        world.settle()
    world.settle()
    assert world.status(run_id)["state"] == "cancelled"


def test_a_queued_run_is_cancelled_at_once(world):
    world.started()
    waiting = world.submit()
    world.settle()
    assert "behind" not in world.status(waiting)["next"]
    world.call("POST", f"/api/runs/{waiting}/cancel")
    world.settle()
    status = world.status(waiting)
    assert (status["state"], status["attempts"], status["next"]) == (
        "cancelled",
        [],
        f"no checkpoint was saved; `flash retry {waiting}` starts it again",
    )


def test_a_preempted_worker_is_replaced(world):
    run_id, worker = world.started()
    worker.finish("cancelled")  # no one asked: its machine did
    world.launcher.die(worker.attempt_id)
    world.settle()
    status = world.status(run_id)
    assert (status["state"], status["attempts"][0]["failure"]) == ("provisioning", "preempted")


@pytest.mark.parametrize(
    "world", [{"wall_clock_min_s": 60.0, "wall_clock_unknown_s": 60.0, "wall_clock_factor": 1e-6}], indirect=True
)
def test_the_wall_clock_limit_counts_time_under_a_lease_and_ends_the_run(world):
    run_id, worker = world.started()
    world.clock.now += 25
    assert worker.beat(progress=1).json()["desired"] == "run"
    world.clock.now += 25
    worker.beat(progress=2)
    world.settle()
    world.clock.now += 25
    worker.beat(progress=3)
    world.settle()
    assert worker.beat(progress=4).json()["desired"] == "cancel"
    assert "time limit" in world.status(run_id)["summary"]
    worker.save(7)
    worker.finish("cancelled")
    world.launcher.die(worker.attempt_id)
    world.settle()
    status = world.status(run_id)
    assert (status["state"], status["error"]["code"]) == ("failed", "wall_clock")
    assert status["checkpoints"] == [f"{run_id}/step-7"]


def test_a_launch_that_fails_is_a_lost_attempt(world):
    world.launcher.refusal = Unavailable("no room")
    run_id = world.submit()
    world.settle()
    status = world.status(run_id)
    assert status["state"] == "failed" and len(status["attempts"]) == 3
    assert "no room" in status["attempts"][0]["message"]


@pytest.mark.parametrize("started", [True, False])
def test_a_launch_whose_answer_is_lost_is_neither_doubled_nor_given_up(world, started):
    world.launcher.unsure = [started]
    run_id = world.submit()
    world.settle()
    if started:
        worker = world.worker(run_id)
        worker.claim()
    world.settle()
    if not started:
        worker = world.worker(run_id)
        worker.claim()
    assert worker.beat().status_code == 200
    status = world.status(run_id)
    assert (status["state"], len(status["attempts"]), len(world.launcher.list())) == ("running", 1, 1)


def test_a_launch_that_arrives_late_has_the_token_of_the_one_after_it(world):
    world.launcher.unsure = [False, True]
    run_id = world.submit()
    world.settle()
    with world.plane.database.read() as connection:
        before = runs.get_attempt(connection, run_id, 1).token_sha256
    world.settle()
    with world.plane.database.read() as connection:
        assert runs.get_attempt(connection, run_id, 1).token_sha256 == before
    world.worker(run_id).claim()


@pytest.mark.parametrize("world", [{"claim_timeout_s": 60.0}], indirect=True)
def test_launches_whose_answers_are_always_lost_end_the_attempt_in_time(world):
    world.launcher.unsure = [False] * 4
    run_id = world.submit()
    for _ in range(4):
        world.settle()
        assert len(world.status(run_id)["attempts"]) == 1
    world.clock.now += 61.0
    world.settle()
    first, second = world.status(run_id)["attempts"]
    assert "did not report" in first["message"] and second["state"] == "launching"


# --- restarts ---------------------------------------------------------------------------------------


def test_a_restarted_server_takes_its_workers_back_with_a_fresh_lease(world, restart):
    run_id, worker = world.started()
    worker.tell("log", stream="trainer", text="before")
    world.clock.now += 1000.0  # the server was down for long
    later = restart(world)
    later.settle()
    worker.world = later
    assert worker.beat(step=3, progress=3).status_code == 200
    assert worker.tell("log", stream="trainer", text="after") == 2
    texts = [event["data"]["text"] for event in later.events(run_id, kinds="log")]
    assert texts == ["before", "after"]
    assert later.status(run_id)["state"] == "running"


def test_a_server_that_died_between_creating_and_launching_launches(world, restart):
    run_id = world.submit()
    with world.plane.database.write() as connection:
        runs.insert_attempt(connection, run_id, 1, device="cpu", work_dir="/w", now=1.0)
    later = restart(world)
    later.settle()
    later.worker(run_id).claim()
    assert later.status(run_id)["state"] == "running"


def test_a_server_that_died_between_launching_and_noting_it_adopts_the_worker(world, restart):
    run_id = world.submit()
    world.settle()
    with world.plane.database.write() as connection:
        connection.execute(schema.attempts.update().values(handle=None))
    later = restart(world)
    later.settle()
    assert len(later.launcher.list()) == 1
    later.worker(run_id).claim()  # with the token of the first launch
    assert later.status(run_id)["state"] == "running"


def test_a_worker_that_no_one_owns_is_killed_after_a_grace(world):
    run_id, worker = world.started()
    worker.finish("failed", failure="user_code")
    world.launcher.die(worker.attempt_id)
    world.settle()
    world.launcher.launch(world.launcher.requests[worker.attempt_id])  # it comes back from somewhere
    world.settle()
    assert world.launcher.list() != {}
    world.clock.now += 31
    world.settle()
    assert world.launcher.list() == {}
    assert world.status(run_id)["state"] == "failed"


def test_an_unreachable_launcher_frees_no_device(world):
    run_id, worker = world.started()
    waiting = world.submit()
    world.launcher.reachable = False
    world.clock.now += 31
    world.settle()
    assert world.status(run_id)["state"] == "running" and worker.beat().status_code == 409
    assert world.status(waiting)["state"] == "queued"
    world.launcher.reachable = True
    world.settle()
    world.settle()
    assert world.status(run_id)["attempts"][0]["state"] == "ended"
    assert world.worker(waiting).claim()["epoch"] == 1  # the device is free now


# --- checkpoints ------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_is_dropped_and_the_one_before_is_resumed(world):
    run_id, worker = world.started()
    worker.save(1)
    worker.save(2)
    with world.plane.database.read() as connection:
        newest = runs.manifest_of(connection, run_id, 2)
    key = f"runs/{run_id}/objects/{newest.files[0].sha256}"
    world.plane.store.put_bytes(key, b"x" * newest.files[0].size)
    world.launcher.die(worker.attempt_id)
    world.settle()
    second = world.worker(run_id, 2)
    assert second.claim()["resume_from"]["step"] == 2, "its bytes are the worker's to check"
    error = {"code": "damaged", "message": "state/optimizer has other bytes than recorded"}
    second.post("finish", {"epoch": 2, "outcome": "failed", "failure": "infrastructure", "error": error})
    world.launcher.die(second.attempt_id)
    world.settle()
    assert "other bytes" in world.status(run_id)["attempts"][1]["message"]
    third = world.worker(run_id, 3)
    assert third.claim()["resume_from"]["step"] == 1
    status = world.status(run_id)
    assert status["checkpoints"] == [f"{run_id}/step-1"]
    (warning,) = world.events(run_id, kinds="warning")
    assert "step-2 is damaged" in warning["data"]["text"]
    third.save(2)  # whole again
    assert len(world.status(run_id)["checkpoints"]) == 2


def test_a_checkpoint_cut_short_is_dropped_at_the_claim(world):
    run_id, worker = world.started()
    worker.save(1)
    worker.save(2)
    with world.plane.database.read() as connection:
        newest = runs.manifest_of(connection, run_id, 2)
    world.plane.store.put_bytes(f"runs/{run_id}/objects/{newest.files[0].sha256}", b"x")
    world.launcher.die(worker.attempt_id)
    world.settle()
    assert world.worker(run_id, 2).claim()["resume_from"]["step"] == 1
    assert world.status(run_id)["checkpoints"] == [f"{run_id}/step-1"]


def test_a_worker_is_not_believed_that_a_whole_checkpoint_is_damaged(world):
    run_id, worker = world.started()
    worker.save(1)
    error = {"code": "damaged", "message": "state/optimizer has other bytes than recorded"}
    worker.post("finish", {"epoch": 1, "outcome": "failed", "failure": "infrastructure", "error": error})
    world.launcher.die(worker.attempt_id)
    world.settle()
    assert world.worker(run_id, 2).claim()["resume_from"]["step"] == 1
    assert world.events(run_id, kinds="warning") == []


def test_optimizer_state_is_kept_for_the_two_newest_only(world):
    run_id, worker = world.started()
    for step in (1, 2, 3):
        worker.save(step)
    listed = world.call("GET", f"/api/runs/{run_id}/checkpoints").json()["checkpoints"]
    assert [(found["step"], found["has_state"]) for found in listed] == [(1, False), (2, True), (3, True)]
    objects = world.plane.store.list(f"runs/{run_id}/objects")
    assert len(objects) == 3 + 2
    for step in (1, 2, 3):  # adapters stay whole
        files = world.call("GET", f"/api/runs/{run_id}/adapter", params={"step": step}).json()["files"]
        body = world.call("GET", f"/api/runs/{run_id}/adapter/files/{files[0]['path']}", params={"step": step})
        assert body.content == b"weights %d" % step


def test_one_runs_trouble_keeps_no_other_waiting(world):
    _, worker = world.started()
    worker.save(1, final=True)
    worker.finish("done")
    world.settle()
    world.launcher.die(worker.attempt_id)
    world.launcher.refusal = RuntimeError("a defect in the launcher")
    stuck = world.submit()
    queued = world.submit()
    world.call("POST", f"/api/runs/{queued}/cancel")
    world.settle()
    assert world.status(queued)["state"] == "cancelled"
    world.launcher.refusal = None
    world.settle()
    assert world.worker(stuck).claim()["run_id"] == stuck


# --- what is in the way, and what is left behind ----------------------------------------------------


class DeafLauncher(FakeLauncher):
    """One that can't say what lives, though it can do all else."""

    deaf = False

    def list(self) -> dict[str, str]:
        if self.deaf:
            raise ConnectionError("the cluster does not answer")
        return super().list()


def test_a_launcher_that_can_not_list_stops_neither_leases_nor_cancels_and_starts_nothing_twice(world):
    world.plane.launcher = launcher = DeafLauncher(("cpu", "gpu"))
    world.launcher = launcher
    run_id, worker = world.started()
    launcher.deaf = True
    waiting = world.submit()
    world.call("POST", f"/api/runs/{waiting}/cancel")
    world.settle()
    assert world.status(waiting)["state"] == "cancelled"
    world.clock.now += world.plane.settings.lease_s + 1
    world.settle()
    assert worker.beat().status_code == 409, "the lease is judged all the same"
    assert launcher.kills
    world.settle()
    assert world.status(run_id)["state"] == "queued", "but no device is known to be free"
    launcher.deaf = False
    world.settle()
    assert world.status(run_id)["state"] == "provisioning"


def spool(world, worker, events: list[dict[str, object]], tail: bytes = b"") -> Path:
    run_id, _, epoch = worker.attempt_id.rpartition(".")
    path = world.home / "work" / run_id / epoch / "spool" / "events.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"".join(json.dumps(event).encode() + b"\n" for event in events) + tail)
    return path


def test_what_a_dead_worker_had_not_sent_yet_is_in_the_history_once_and_in_order(world):
    run_id, worker = world.started()
    said = [
        {"n": n, "time": 1.0, "kind": "log", "data": {"stream": "trainer", "text": f"line {n}"}} for n in range(1, 8)
    ]
    worker.post("events", {"epoch": 1, "events": said[:3]})
    spool(world, worker, said, tail=b'{"n": 8, "time": 1.0, "ki')
    world.launcher.die(worker.attempt_id)
    world.settle()
    told = world.events(run_id)
    lines = [event["data"]["text"] for event in told if event["kind"] == "log"]
    assert lines == [f"line {n}" for n in range(1, 8)]
    ended = next(event["seq"] for event in told if event["data"].get("state") == "ended")
    assert max(event["seq"] for event in told if event["kind"] == "log") < ended, "before its end is told"
    assert [event["seq"] for event in told] == list(range(1, len(told) + 1))


A_GAP = b'{"n": 9, "time": 0, "kind": "log", "data": {}}\n'


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"no json\n", A_GAP])
def test_a_spool_that_says_nothing_useful_does_no_harm(world, content: bytes):
    run_id, worker = world.started()
    spool(world, worker, [], tail=content)
    world.launcher.die(worker.attempt_id)
    world.settle()
    assert world.events(run_id, kinds="log") == []
    assert len(world.status(run_id)["attempts"]) == 2


def test_an_ended_runs_folder_and_unnamed_objects_go_after_a_grace(world):
    run_id, worker = world.started()
    worker.save(1)
    worker.save(2, final=True)
    store = world.plane.store
    store.put_bytes(f"runs/{run_id}/objects/{'ab' * 32}", b"uploaded, and then the worker died")
    store.put_bytes(f"runs/{run_id}/checkpoints/step-9.json", b"{}")
    folder = spool(world, worker, [])
    worker.finish("done")
    world.launcher.die(worker.attempt_id)
    world.settle()
    now = [time.time()]
    world.plane.clock = lambda: now[0]
    Cleaner(world.plane).clean()
    assert folder.exists() and store.size(f"runs/{run_id}/objects/{'ab' * 32}")
    now[0] += world.plane.settings.work_grace_s + 1
    Cleaner(world.plane).clean()
    assert not (world.home / "work" / run_id).exists()
    kept = store.list(f"runs/{run_id}")
    assert len(kept) == 4 + 2, "two checkpoints with their adapters and states"
    assert [key for key in kept if "step-9" in key or "abab" in key] == []
    for step in (1, 2):
        assert world.call("GET", f"/api/runs/{run_id}/adapter/files/model", params={"step": step}).status_code == 200


def test_an_open_runs_objects_stay_and_those_of_no_run_go(world):
    run_id, _ = world.started()
    store = world.plane.store
    for name in (run_id, "flash-1-00000000"):
        store.put_bytes(f"runs/{name}/objects/{'cd' * 32}", b"on its way")
    store.put_bytes("runs/flash-2-00000000/checkpoints/step-1.json", b"whole, and of another database")
    settings = world.plane.settings.model_copy(update={"draft_grace_s": 0.0, "work_grace_s": 0.0})
    world.plane.settings = settings
    Cleaner(world.plane).clean()
    assert store.size(f"runs/{run_id}/objects/{'cd' * 32}")
    assert store.list("runs/flash-1-00000000") == []
    assert len(store.list("runs/flash-2-00000000")) == 1


def test_a_store_out_of_reach_puts_cleaning_off(world):
    class Away:
        def __getattr__(self, name: str):
            raise Unavailable("away")

    world.plane.store = Away()
    Cleaner(world.plane).clean()


@pytest.mark.parametrize("jump_s", [-86_400.0, 86_400.0])
def test_a_clock_that_jumps_moves_no_lease_no_stall_and_no_back_off(world, jump_s: float):
    now = [1_700_000_000.0]
    world.plane.clock = lambda: now[0]
    world.plane.settings = world.plane.settings.model_copy(update={"backoff_first_s": 5.0, "backoff_max_s": 5.0})
    run_id, worker = world.started()
    now[0] += jump_s
    world.settle()
    assert worker.beat(step=1).status_code == 200
    assert world.status(run_id)["state"] == "running"
    world.launcher.die(worker.attempt_id)
    world.settle()
    now[0] -= jump_s
    world.settle()
    now[0] += 6.0
    world.settle()
    assert len(world.status(run_id)["attempts"]) == 2, "the retry came, whatever the clock said"
    seqs = [event["seq"] for event in world.events(run_id)]
    assert seqs == list(range(1, len(seqs) + 1))
