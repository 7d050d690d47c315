"""A retry: a new run that goes on from the exact state of one that failed or was cancelled."""

from __future__ import annotations

from typing import Any

import pytest

from flash.storage import runs


def failed(world, *steps: int, **train: Any) -> str:
    """A run that saved `steps` and then failed for good."""
    run_id, worker = world.started(**train)
    for step in steps:
        worker.save(step)
    worker.finish("failed", failure="user_code")
    world.launcher.die(worker.attempt_id)
    world.settle()
    assert world.status(run_id)["state"] == "failed"
    return run_id


def retry(world, run_id: str, key: str | None = None, **body: Any):
    headers = {"Idempotency-Key": key} if key else {}
    return world.call("POST", f"/api/runs/{run_id}/retry", json=body, headers=headers)


def test_a_retry_is_a_new_run_with_the_same_intent_and_the_exact_state(world):
    source = failed(world, 2, 4, max_steps=9)
    answer = retry(world, source)
    assert answer.status_code == 201, answer.text
    new = answer.json()
    old = world.status(source)
    assert new["run_id"] != source
    assert (new["retry_of"], new["spec"], new["seed"], new["step"]) == (source, old["spec"], old["seed"], 4)
    assert new["checkpoints"] == [f"{new['run_id']}/step-4"], "it is the new run's own, whatever becomes of the old"
    assert f"a retry of {source} from step 4" in world.events(new["run_id"], kinds="state")[0]["data"]["reason"]
    world.settle()
    claim = world.worker(new["run_id"]).claim()
    with world.plane.database.read() as connection:
        saved = runs.manifest_of(connection, source, 4)
        pinned = runs.get_run(connection, source).environment_sha256
    assert claim["resume_from"]["step"] == 4
    assert claim["resume_from"]["files"] == [file.model_dump(mode="json") for file in saved.files], "state included"
    assert claim["environment"]["sha256"] == pinned


def test_the_old_runs_objects_may_go_and_the_new_run_still_resumes(world):
    source = failed(world, 2)
    new = retry(world, source).json()["run_id"]
    for key in world.plane.store.list(f"runs/{source}"):
        world.plane.store.delete(key)
    world.settle()
    assert world.worker(new).claim()["resume_from"]["step"] == 2


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(world):
    source = failed(world, 2, 4)
    with world.plane.database.read() as connection:
        newest = runs.manifest_of(connection, source, 4)
    world.plane.store.put_bytes(f"runs/{source}/objects/{newest.files[0].sha256}", b"short")
    assert retry(world, source).json()["step"] == 2


def without_state(world, run_id: str, *steps: int) -> None:
    with world.plane.database.write() as connection:
        runs.forget_state(connection, run_id, steps)


def test_what_has_lost_its_state_is_not_silently_begun_again(world):
    source = failed(world, 2, 4)
    without_state(world, source, 2, 4)
    refused = retry(world, source)
    assert refused.status_code == 409
    said = f'train.init_from_adapter = "{source}/step-4"'
    assert said in refused.json()["error"]["remedy"]
    assert said in world.status(source)["next"] and "flash retry" not in world.status(source)["next"]


def test_the_newest_checkpoint_with_state_is_the_one_that_is_promised_and_taken(world):
    source = failed(world, 2, 4)
    without_state(world, source, 4)
    assert f"goes on from {source}/step-2" in world.status(source)["next"]
    assert retry(world, source).json()["step"] == 2


def test_a_run_without_checkpoints_is_started_again_from_what_it_started_from(world):
    done, worker = world.started()
    worker.save(3, final=True)
    worker.finish("done")
    world.launcher.die(worker.attempt_id)
    world.settle()
    source = failed(world, init_from_adapter=done)
    new = retry(world, source).json()["run_id"]
    world.settle()
    claim = world.worker(new).claim()
    assert (claim["resume_from"], claim["init_from"]["run_id"]) == (None, done)


@pytest.mark.parametrize("state", ["queued", "running", "done"])
def test_only_what_failed_or_was_cancelled_is_retried(world, state: str):
    if state == "queued":
        run_id = world.submit()
    else:
        run_id, worker = world.started()
        worker.save(1, final=True)
        if state == "done":
            worker.finish("done")
            world.settle()
    answer = retry(world, run_id)
    assert answer.status_code == 409
    assert f"is {state}" in answer.json()["error"]["message"]


def test_a_cancelled_run_is_retried_and_no_other_orgs(world):
    run_id = world.submit()
    world.call("POST", f"/api/runs/{run_id}/cancel")
    world.settle()
    assert retry(world, run_id).status_code == 201
    assert retry(world, "flash-1-00000000").status_code == 404


def test_a_repeat_with_one_key_is_one_run_and_another_request_a_conflict(world):
    first, second = failed(world, 1), failed(world, 1)
    made = retry(world, first, key="k")
    again = retry(world, first, key="k")
    assert (made.status_code, again.status_code) == (201, 200)
    assert made.json()["run_id"] == again.json()["run_id"]
    assert retry(world, second, key="k").status_code == 409


def test_secrets_end_with_a_run_and_are_asked_for_again(world):
    config = world.config()
    config["environment"]["secrets"] = ["SERVICE_KEY"]
    body = {"config": config, "secrets": {"SERVICE_KEY": "value-of-it"}}
    run_id = world.call("POST", "/api/runs", json=body).json()["run_id"]
    world.call("POST", f"/api/runs/{run_id}/cancel")
    world.settle()
    missing = retry(world, run_id)
    assert missing.status_code == 422
    assert "SERVICE_KEY" in missing.json()["error"]["message"]
    new = retry(world, run_id, secrets={"SERVICE_KEY": "another-value"}).json()["run_id"]
    world.settle()
    assert world.worker(new).claim()["secrets"] == {"SERVICE_KEY": "another-value"}
