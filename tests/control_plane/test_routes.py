"""The public API: submits, the hub, events, errors in one shape, hostile requests."""

from __future__ import annotations

import hashlib
import json
import threading

import pytest

from flash.storage import identity, schema


def problem(answer) -> dict:
    """The error of an answer, which always has the same shape."""
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"code", "message", "remedy", "detail"}
    return body["error"]


# --- keys -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic abc", "Bearer wrong", "Bearer schlüssel"])
def test_every_route_but_health_wants_a_key(world, header):
    headers = {} if header is None else {"Authorization": header.encode()}
    assert world.http.get("/api/health").json()["status"] == "ok"
    for method, path in [
        ("GET", "/api/whoami"),
        ("GET", "/api/runs"),
        ("POST", "/api/runs"),
        ("GET", "/api/runs/x/events/stream"),
        ("GET", "/api/environments"),
        ("DELETE", "/api/environments/local/arith"),
        ("POST", "/api/server/stop"),
        ("POST", "/worker/attempts/flash-1-00000000.1/heartbeat"),
    ]:
        answer = world.http.request(method, path, headers=headers)
        assert answer.status_code in (401, 404), (path, answer.text)
        if path.startswith("/api"):
            assert problem(answer)["code"] == "unauthorized"
    assert not world.plane.stopping.is_set()


def test_another_org_sees_none_of_it(world):
    run_id, worker = world.started()
    worker.save(1, final=True)
    token = identity.new_token()
    with world.plane.database.write() as connection:
        identity.add_key(connection, org="other", token=token, name="k")
    headers = {"Authorization": f"Bearer {token}"}
    assert world.http.get("/api/whoami", headers=headers).json()["org"] == "other"
    assert world.http.get("/api/runs", headers=headers).json() == {"runs": []}
    assert world.http.get("/api/environments", headers=headers).json() == {"environments": []}
    for method, path in [
        ("GET", f"/api/runs/{run_id}"),
        ("POST", f"/api/runs/{run_id}/cancel"),
        ("GET", f"/api/runs/{run_id}/events"),
        ("GET", f"/api/runs/{run_id}/checkpoints"),
        ("GET", f"/api/runs/{run_id}/adapter"),
        ("GET", f"/api/runs/{run_id}/adapter/files/adapter/model"),
        ("GET", "/api/environments/local/arith/archive"),
        ("DELETE", "/api/environments/local/arith"),
    ]:
        assert world.http.request(method, path, headers=headers).status_code == 404, path
    body = {"config": world.config()}
    assert world.http.post("/api/runs", json=body, headers=headers).status_code == 422
    warm = {"config": {**world.config(init_from_adapter=run_id)}}
    assert world.http.post("/api/runs", json=warm, headers=headers).status_code == 422
    assert world.status(run_id)["state"] == "running"


# --- submits ----------------------------------------------------------------------------------------


def test_a_submit_is_validated_resolved_and_pinned(world):
    old = world.push(body="def load_environment(): return 1\n")
    run_id = world.submit(lora_rank=8)
    world.push(body="def load_environment(): return 2\n")
    status = world.status(run_id)
    assert status["spec"]["train"]["lora_rank"] == 8 and status["spec"]["train"]["epochs"] >= 1
    assert (status["state"], status["summary"], status["seed"]) == ("queued", "queued", 0)
    world.settle()
    worker = world.worker(run_id)
    assert worker.claim()["environment"]["sha256"] == old["sha256"]
    headers = {"Authorization": f"Bearer {worker.token}"}
    archive = world.http.get(f"/worker/attempts/{worker.attempt_id}/environment", headers=headers).content
    assert hashlib.sha256(archive).hexdigest() == old["sha256"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, ["model", "environment"]),
        ({"model": "flash/nano", "environment": {"id": "local/arith"}, "trian": {}}, ["trian"]),
        ({"model": "flash/nano", "environment": {"id": "local/arith"}, "train": {"epochs": 0}}, ["train.epochs"]),
        ({"model": "flash/nano", "environment": {"id": "local/none"}}, ["local/none", "flash env"]),
        ({"model": "flash/nano", "environment": {"id": "local/arith@ffff"}}, ["no version ffff"]),
        ({"model": "no/such", "environment": {"id": "local/arith"}}, ["no/such"]),
        ({"model": "flash/nano", "environment": {"id": "local/arith", "secrets": ["MY_KEY"]}}, ["MY_KEY"]),
    ],
)
def test_a_config_that_can_not_run_is_refused_in_words(world, config, words):
    answer = world.call("POST", "/api/runs", json={"config": config})
    assert answer.status_code == 422
    said = json.dumps(problem(answer), ensure_ascii=False)
    assert all(word in said for word in words), said
    assert world.call("GET", "/api/runs").json() == {"runs": []}


def test_secrets_reach_the_claim_and_nothing_else(world):
    config = {**world.config(), "environment": {"id": "local/arith", "secrets": ["MY_KEY"]}}
    secrets = {"MY_KEY": "canary-4711", "WANDB_API_KEY": "canary-4712"}
    answer = world.call("POST", "/api/runs", json={"config": config, "secrets": secrets})
    run_id = answer.json()["run_id"]
    world.settle()
    worker = world.worker(run_id)
    assert worker.claim()["secrets"] == secrets
    world.call("POST", f"/api/runs/{run_id}/cancel")
    worker.finish("cancelled")
    world.launcher.die(worker.attempt_id)
    world.settle()
    seen = answer.text + json.dumps([world.status(run_id), world.events(run_id)])
    assert "canary" not in seen
    with world.plane.database.read() as connection:
        assert connection.execute(schema.secrets.select()).all() == []
    world.plane.database.close()
    assert not [path for path in world.home.rglob("*") if path.is_file() and b"canary" in path.read_bytes()]


def test_a_wandb_table_without_a_key_is_a_warning_of_the_run(world):
    config = {**world.config(), "wandb": {"project": "mine"}}
    without, having = (
        world.call("POST", "/api/runs", json={"config": config, "secrets": secrets}).json()
        for secrets in ({}, {"WANDB_API_KEY": "canary-4713"})
    )
    assert [text for text in without["warnings"] if text.startswith("wandb: WANDB_API_KEY is not set")]
    assert having["warnings"] == []


def test_an_undeclared_secret_is_refused(world):
    answer = world.call("POST", "/api/runs", json={"config": world.config(), "secrets": {"OTHER": "canary-1"}})
    assert answer.status_code == 422
    assert "OTHER" in problem(answer)["message"] and "canary" not in answer.text


def test_the_same_key_gives_the_same_run_and_another_body_a_conflict(world):
    headers = {"Idempotency-Key": "key-1"}
    body = {"config": world.config(), "seed": 1}
    first = world.call("POST", "/api/runs", json=body, headers=headers)
    again = world.call("POST", "/api/runs", json=body, headers=headers)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["run_id"] == again.json()["run_id"]
    other = world.call("POST", "/api/runs", json={**body, "seed": 2}, headers=headers)
    assert other.status_code == 409 and problem(other)["code"] == "conflict"
    assert world.call("POST", "/api/runs", json=body).status_code == 201
    assert len(world.call("GET", "/api/runs").json()["runs"]) == 2


def test_many_submits_with_one_key_at_once_make_one_run(world):
    made: list[str] = []

    def submit() -> None:
        answer = world.call(
            "POST", "/api/runs", json={"config": world.config()}, headers={"Idempotency-Key": "together"}
        )
        made.append(answer.json()["run_id"])

    threads = [threading.Thread(target=submit) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 6 and len(set(made)) == 1


# --- warm starts ------------------------------------------------------------------------------------


def finished(world, **train) -> str:
    run_id, worker = world.started(**train)
    worker.save(5)
    worker.save(9, final=True)
    worker.finish("done")
    world.launcher.die(worker.attempt_id)
    world.settle()
    return run_id


def test_a_warm_start_takes_weights_rank_and_alpha_of_its_source(world):
    source = finished(world, lora_rank=4, lora_alpha=12)
    for reference, step in ((source, 9), (f"{source}/step-5", 5)):
        run_id = world.submit(init_from_adapter=reference)
        spec = world.status(run_id)["spec"]["train"]
        assert (spec["lora_rank"], spec["lora_alpha"]) == (4, 12)
        world.settle()
        worker = world.worker(run_id)
        claim = worker.claim()
        assert (claim["init_from"]["run_id"], claim["init_from"]["step"]) == (source, step)
        assert [file["path"] for file in claim["init_from"]["files"]] == ["adapter/model"]
        assert claim["resume_from"] is None
        worker.finish("failed", failure="user_code")
        world.launcher.die(worker.attempt_id)
        world.settle()


def test_a_warm_start_that_does_not_fit_is_refused(world):
    source = finished(world, lora_rank=4)
    unfinished, worker = world.started()
    worker.save(3)
    for reference, words in [
        ("flash-1-00000000", "no such run"),
        (f"{source}/step-7", "steps: 5, 9"),
        (unfinished, "without a final adapter"),
    ]:
        answer = world.call("POST", "/api/runs", json={"config": world.config(init_from_adapter=reference)})
        assert answer.status_code == 422 and words in json.dumps(problem(answer))
    bad = world.config(init_from_adapter=source, lora_rank=8)
    answer = world.call("POST", "/api/runs", json={"config": bad})
    assert answer.status_code == 422 and "lora_rank" in problem(answer)["message"]
    assert world.submit(init_from_adapter=f"{unfinished}/step-3")


# --- events -----------------------------------------------------------------------------------------


def streamed(world, run_id: str, **headers: str) -> list[dict]:
    answer = world.call("GET", f"/api/runs/{run_id}/events/stream", headers=headers)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.splitlines()
    events = [json.loads(line.removeprefix("data:")) for line in lines if line.startswith("data:")]
    ids = [int(line.removeprefix("id:")) for line in lines if line.startswith("id:")]
    assert ids == [event["seq"] for event in events]
    return events


def test_a_finished_run_streams_its_history_and_ends(world):
    run_id = finished(world)
    history = world.events(run_id)
    assert streamed(world, run_id) == history
    middle = history[3]["seq"]
    assert streamed(world, run_id, **{"Last-Event-ID": str(middle)}) == history[middle:]
    assert streamed(world, run_id, **{"Last-Event-ID": "99999999999999999999"}) == []
    assert streamed(world, run_id, **{"Last-Event-ID": "nonsense"}) == history


def test_a_stream_of_no_run_is_not_found(world):
    answer = world.call("GET", "/api/runs/flash-1-00000000/events/stream")
    assert answer.status_code == 404 and problem(answer)["code"] == "not_found"


def test_a_follower_sees_each_event_as_it_comes_until_the_end(world):
    run_id, worker = world.started()
    seen: list[dict] = []
    follower = threading.Thread(target=lambda: seen.extend(streamed(world, run_id)))
    follower.start()
    for number in range(20):
        worker.tell("log", stream="trainer", text=str(number))
    worker.save(1, final=True)
    worker.finish("done")
    world.settle()
    follower.join(timeout=20)
    assert not follower.is_alive()
    assert seen == world.events(run_id) and seen[-1]["data"]["to"] == "done"


def test_events_are_paged_and_filtered(world):
    run_id, worker = world.started()
    for number in range(5):
        worker.tell("log", stream="trainer", text=str(number))
    page = world.call("GET", f"/api/runs/{run_id}/events", params={"kinds": "log", "limit": 2, "after": 3}).json()
    assert [event["data"]["text"] for event in page["events"]] == ["0", "1"]
    assert page["last_seq"] == world.events(run_id)[-1]["seq"]
    answer = world.call("GET", f"/api/runs/{run_id}/events", params={"kinds": "log,nonsense"})
    assert answer.status_code == 422 and "nonsense" in problem(answer)["message"]


# --- the hub and adapters ---------------------------------------------------------------------------


def test_environments_are_pushed_listed_pulled_and_deleted(world, pack):
    body = pack({"environment.py": "x = 1\n", "dataset/train.jsonl": "{}\n"})
    first = world.call("POST", "/api/environments/local/second", content=body)
    again = world.call("POST", "/api/environments/local/second", content=body)
    assert first.status_code == again.status_code == 201 and first.json() == again.json()
    version = first.json()
    assert version["sha256"] == hashlib.sha256(body).hexdigest() and version["size"] == len(body)
    assert sorted(version["files"]) == ["dataset/train.jsonl", "environment.py"]
    listed = world.call("GET", "/api/environments").json()["environments"]
    assert [found["name"] for found in listed] == ["arith", "second"]
    query = {"version": version["sha256"][:8]}
    assert world.call("GET", "/api/environments/local/second/archive", params=query).content == body
    assert world.call("GET", "/api/environments/local/second/archive", params={"version": "zz"}).status_code == 422
    assert world.call("DELETE", "/api/environments/local/second").status_code == 204
    assert world.call("DELETE", "/api/environments/local/second").status_code == 404
    assert world.call("GET", "/api/environments/local/second/archive").status_code == 404


@pytest.mark.parametrize(
    ("path", "files", "words"),
    [
        ("other/env", {"environment.py": ""}, "your own"),
        ("local/Upper", {"environment.py": ""}, "lower-case"),
        ("local/env", {"main.py": ""}, "no environment.py"),
        ("local/env", {"../environment.py": ""}, ""),
        ("local/env", None, ""),
    ],
)
def test_a_push_that_is_not_right_is_refused(world, pack, path, files, words):
    body = b"not an archive" if files is None else pack(files)
    answer = world.call("POST", f"/api/environments/{path}", content=body)
    assert answer.status_code == 422 and words in problem(answer)["message"]
    assert len(world.call("GET", "/api/environments").json()["environments"]) == 1


def test_an_adapter_is_named_by_step_or_final_and_its_files_come_whole(world):
    run_id, worker = world.started()
    worker.save(5)
    answer = world.call("GET", f"/api/runs/{run_id}/adapter")
    assert answer.status_code == 404 and "steps: 5" in problem(answer)["remedy"]
    worker.save(6, final=True, weights=b"w" * (5 << 20))
    manifest = world.call("GET", f"/api/runs/{run_id}/adapter").json()
    assert manifest["step"] == 6 and [file["path"] for file in manifest["files"]] == ["adapter/model"]
    body = world.call("GET", f"/api/runs/{run_id}/adapter/files/adapter/model")
    assert body.content == b"w" * (5 << 20)
    for path in ("state/optimizer", "adapter/none", "../../flash.db", "%2e%2e/flash.db"):
        assert world.call("GET", f"/api/runs/{run_id}/adapter/files/{path}").status_code == 404
    assert world.call("GET", f"/api/runs/{run_id}/adapter", params={"step": 4}).status_code == 404


# --- hostile requests -------------------------------------------------------------------------------

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("body", [b"{", b"", b"\xff\xfe", b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}"])
def test_what_is_no_json_is_a_bad_request(world, body):
    answer = world.call("POST", "/api/runs", content=body, headers=JSON)
    assert answer.status_code in (400, 422)
    problem(answer)


@pytest.mark.parametrize(
    "body",
    [
        [],
        {"config": 3},
        {"config": {}, "seed": -1},
        {"config": {}, "seed": 2**70},
        {"config": {}, "seed": 1.5},
        {"config": {}, "extra": 1},
        {"config": {"model": "\ud800", "environment": {"id": "local/arith"}}},
        {"config": {"\ud800": 1}},
        {"config": {"model": "flash/nano\u0000", "environment": {"id": "local/arith"}}},
        {"config": {"model": "flash/nano", "environment": {"id": "local/arith", "params": {"x": "\ud800"}}}},
        {"config": {"model": "flash/nano", "environment": {"id": "local/arith", "params": {"x": float("nan")}}}},
        {"config": {}, "secrets": {"A": "\ud800"}},
        {"config": {}, "secrets": {"A": 3}},
    ],
)
def test_strange_submits_are_refused_without_a_trace(world, body):
    answer = world.call("POST", "/api/runs", content=json.dumps(body).encode(), headers=JSON)
    assert answer.status_code == 422, answer.text
    problem(answer)


def test_deeply_nested_configs_are_refused(world):
    for depth in (100, 900, 5000):
        nested = b'{"config": {"train": ' + b'{"a":' * depth + b"1" + b"}" * depth + b"}}"
        assert world.call("POST", "/api/runs", content=nested, headers=JSON).status_code in (400, 422)


@pytest.mark.parametrize("world", [{"max_body": 10_000, "max_archive": 20_000}], indirect=True)
def test_bodies_over_the_limit_are_refused_declared_or_not(world):
    def chunks(total: int):
        for _ in range(total // 1000):
            yield b"x" * 1000

    for content in (b"x" * 11_000, chunks(11_000)):
        answer = world.call("POST", "/api/runs", content=content, headers=JSON)
        assert answer.status_code == 413 and "10,000" in problem(answer)["message"]
    for content in (b"x" * 21_000, chunks(21_000)):
        assert world.call("POST", "/api/environments/local/big", content=content).status_code == 413
    assert world.call("POST", "/api/environments/local/big", content=b"x" * 19_000).status_code == 422


@pytest.mark.parametrize(
    "path",
    [
        "/nowhere", "/api", "/api/runs/%00", "/api/runs/..%2f..", "/api/runs/ü", "/worker/attempts/x",
        "/api/environments/a/b/c",
    ],
)
def test_paths_that_lead_nowhere_are_not_found(world, path):
    answer = world.call("GET", path)
    assert answer.status_code == 404
    problem(answer)


def test_a_method_that_a_path_does_not_have_is_said_so(world):
    answer = world.call("PUT", "/api/runs")
    assert answer.status_code == 405
    problem(answer)


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=99999", "before=flash-1-00000000"])
def test_queries_out_of_range_are_refused(world, query):
    assert world.call("GET", f"/api/runs?{query}").status_code in (404, 422)


def test_the_schema_documents_its_errors(world):
    schema_ = world.http.get("/openapi.json").json()
    submit = schema_["paths"]["/api/runs"]["post"]["responses"]
    assert {"200", "201", "400", "401", "409", "413", "422"} <= set(submit)
    assert submit["422"]["content"]["application/json"]["schema"]["$ref"].endswith("ErrorAnswer")


# --- the worker API's fences ------------------------------------------------------------------------


def test_a_workers_token_is_good_for_its_attempt_alone(world):
    run_id, worker = world.started()
    other = world.submit()
    stranger = {"Authorization": f"Bearer {worker.token}"}
    beat = {"epoch": 1, "phase": "training"}
    for attempt in (f"{other}.1", f"{run_id}.2", f"{run_id}.x", "nonsense", f"{run_id}.99999999999999"):
        answer = world.http.post(f"/worker/attempts/{attempt}/heartbeat", json=beat, headers=stranger)
        assert answer.status_code in (401, 404), answer.text
    assert world.http.get("/api/runs", headers=stranger).status_code == 401
    assert worker.post("heartbeat", {"epoch": 2, "phase": "training"}).status_code == 409
    assert world.call("POST", f"/worker/attempts/{run_id}.1/heartbeat", json=beat).status_code == 401


def test_a_second_claim_is_refused_and_a_lost_answer_is_given_again(world):
    run_id = world.submit()
    world.settle()
    worker = world.worker(run_id)
    assert worker.post("heartbeat", {"epoch": 1, "phase": "starting"}).status_code == 409  # claim first
    first = worker.claim(pid=5)
    assert worker.claim(pid=5) == first
    assert worker.post("claim", {"pid": 6}).status_code == 409
    worker.beat()
    assert worker.post("claim", {"pid": 5}).status_code == 409


def test_a_checkpoint_is_believed_only_when_it_is_in_the_store(world):
    run_id, worker = world.started()
    report = {"epoch": 1, "step": 4, "final": True, "manifest_sha256": "0" * 64}
    assert worker.post("checkpoints", report).status_code == 409
    assert worker.post("checkpoints", {**report, "step": 10**40}).status_code == 409
    worker.save(4)
    assert worker.post("checkpoints", report).status_code == 409  # another digest, and not final
    assert world.status(run_id)["checkpoints"] == [f"{run_id}/step-4"]


def test_strange_reports_do_no_harm(world):
    run_id, worker = world.started()
    events = [
        {"n": 1, "time": 1e999, "kind": "metrics", "data": {"values": {"loss": float("nan")}, "step": 10**30}},
        {"n": 2, "time": 1.0, "kind": "log", "data": {"text": "\ud800 \u0000"}},
        {"n": 3, "time": 1.0, "kind": "phase", "data": {"phase": {"a": []}}},
    ]
    body = json.dumps({"epoch": 1, "events": events}).encode()
    headers = {"Authorization": f"Bearer {worker.token}", **JSON}
    answer = world.http.post(f"/worker/attempts/{run_id}.1/events", content=body, headers=headers)
    assert answer.json() == {"acknowledged": 3}
    assert worker.post("heartbeat", {"epoch": 1, "phase": "training", "step": 10**40}).status_code == 200
    assert world.status(run_id)["metrics"] == {"loss": None}
    assert world.events(run_id, kinds="log")[0]["data"]["text"] == "? \ufffd"  # Postgres holds no NUL
    assert worker.post("finish", {"epoch": 1, "outcome": "failed", "error": {"message": ["x"]}}).status_code == 204
    world.launcher.die(worker.attempt_id)
    world.settle()
    assert world.status(run_id)["state"] == "failed"
