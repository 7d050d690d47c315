"""Names, engines and requests over real HTTP: a server, its launcher, and hosts that are scripted processes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from tests.scripted_service import Service, until

from flash.storage import deployments, engines, identity


@pytest.fixture
def script(tmp_path: Path, monkeypatch) -> Path:
    folder = tmp_path / "script"
    folder.mkdir()
    monkeypatch.setenv("SCRIPT", str(folder))
    return folder


@pytest.fixture
def open_service(tmp_path: Path, migrated: Path, script: Path) -> Iterator[Callable[..., Service]]:
    opened: list[Service] = []
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(migrated, home / "flash.db")

    def start(**settings: Any) -> Service:
        opened.append(Service(home, **settings))
        original = opened[-1].again

        def again() -> Service:
            opened[-1] = original()
            return opened[-1]

        opened[-1].again = again  # type: ignore[method-assign]
        return opened[-1]

    yield start
    for each in opened:
        each.stop(kill=True)


@pytest.fixture
def service(open_service: Callable[..., Service]) -> Service:
    return open_service()


def error(answer: httpx.Response) -> dict[str, Any]:
    """An error in OpenAI's form."""
    found = answer.json()
    assert set(found) == {"error"} and set(found["error"]) == {"message", "type", "param", "code"}, found
    return dict(found["error"])


# --- deploying ----------------------------------------------------------------------------------------


def test_a_deployed_run_answers_by_its_name(service: Service):
    run_id = service.run(2, 4)
    assert service.chat(run_id).status_code == 404
    done = service.live(run_id)
    assert (done["state"], done["device"]) == ("live", "cpu")
    assert done["ref"] == done["live"] == f"{run_id}/step-4"
    answer = service.chat(run_id, "hello there")
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "hello there"
    assert answer.headers["x-freesolo-checkpoint"] == f"{run_id}/step-4"
    smoke, asked = service.asked()
    assert smoke["body"]["max_tokens"] <= 8 and smoke["headers"]["x-flash-adapter"] == done["adapter_sha256"]
    assert asked["body"]["model"] == run_id
    assert asked["headers"]["x-flash-adapter"] == done["adapter_sha256"]
    assert asked["headers"]["x-flash-adapter-manifest"] == f"runs/{run_id}/checkpoints/step-4.json"
    assert (asked["headers"]["x-flash-model"], asked["headers"]["x-flash-scope"]) == (run_id, "local")
    assert service.token not in json.dumps(service.asked())
    (listed,) = service.http.get("/api/deployments").json()["deployments"]
    assert (listed["run_id"], listed["ref"], listed["engine"]["state"]) == (run_id, f"{run_id}/step-4", "ready")
    assert service.http.get(f"/api/runs/{run_id}").json()["deployment"] == f"{run_id}/step-4"


def test_names_pinned_steps_and_bases(service: Service):
    run_id = service.run(2, 4)
    assert service.chat(f"{run_id}/step-2").status_code == 404, "pinned steps answer while their run is deployed"
    service.live(run_id)
    pinned = service.chat(f"{run_id}/step-2")
    assert (pinned.status_code, pinned.headers["x-freesolo-checkpoint"]) == (200, f"{run_id}/step-2")
    assert service.asked()[-1]["headers"]["x-flash-adapter-manifest"].endswith("/step-2.json")
    assert service.chat(f"{run_id}/step-3").status_code == 404
    bare = service.chat("flash/nano")
    assert bare.status_code == 200 and "x-freesolo-checkpoint" not in bare.headers
    assert not [name for name in service.asked()[-1]["headers"] if name.startswith("x-flash-adapter")]
    assert len(service.engines()) == 1, "one engine serves a base and all its adapters"
    listed = service.http.get("/v1/models").json()
    ids = [each["id"] for each in listed["data"]]
    assert listed["object"] == "list" and run_id in ids and "flash/nano" in ids
    for name in (run_id, f"{run_id}/step-2", "flash/nano"):
        assert service.http.get(f"/v1/models/{name}").json()["id"] == name
    for name in ("gpt-4", "flash-1-00000000", f"{run_id}/step-9"):
        answer = service.http.get(f"/v1/models/{name}")
        assert answer.status_code == 404 and error(answer)["code"] == "model_not_found"


def test_the_expected_checkpoint_is_checked(service: Service):
    run_id = service.run(2, 4)
    service.live(run_id)
    for value in (f"{run_id}/step-4", "step-4", "4"):
        assert service.chat(run_id, headers={"X-Freesolo-Expected-Checkpoint": value}).status_code == 200
    asked = len(service.asked())
    for name, value in ((run_id, f"{run_id}/step-2"), (run_id, "2"), ("flash/nano", "4")):
        refused = service.chat(name, headers={"X-Freesolo-Expected-Checkpoint": value})
        assert refused.status_code == 409
        error(refused)
    service.live(run_id, 2)
    assert service.chat(run_id, headers={"X-Freesolo-Expected-Checkpoint": "4"}).status_code == 409
    assert len(service.asked()) == asked + 1  # the smoke completion alone


def test_a_failed_smoke_completion_moves_nothing(service: Service):
    run_id = service.run(2, 13)
    refused = service.deploy(run_id)
    assert refused.status_code == 422
    message = refused.json()["error"]["message"]
    assert "does not fit" in message and "nothing is deployed" in message
    assert service.chat(run_id).status_code == 404
    service.live(run_id, 2)
    assert f"{run_id}/step-2 stays live" in service.deploy(run_id).json()["error"]["message"]
    assert service.chat(run_id).headers["x-freesolo-checkpoint"] == f"{run_id}/step-2"
    forced = service.deploy(run_id, verify=False)
    assert (forced.status_code, forced.json()["live"]) == (201, f"{run_id}/step-13")
    with service.plane.database.read() as connection:
        told = deployments.history(connection, run_id)
    moves = [(move["action"], move["from_step"], move["to_step"], move["verified"]) for move in told]
    assert moves == [("deploy", None, 2, True), ("deploy", 2, 13, False)]


def test_undeploying_takes_the_name_back(service: Service):
    run_id = service.run(4)
    assert service.http.delete(f"/api/deployments/{run_id}").status_code == 404
    service.live(run_id)
    assert service.http.delete(f"/api/deployments/{run_id}").json()["ref"] == f"{run_id}/step-4"
    for name in (run_id, f"{run_id}/step-4"):
        assert service.chat(name).status_code == 404
    assert service.http.delete(f"/api/deployments/{run_id}").status_code == 404
    assert service.http.get("/api/deployments").json() == {"deployments": []}
    assert service.live(run_id)["state"] == "live"
    with service.plane.database.read() as connection:
        assert [move["version"] for move in deployments.history(connection, run_id)] == [1, 2, 3]


def test_a_run_without_a_final_adapter_names_its_steps_and_the_command(service: Service):
    run_id = service.run(2, 4, final=False)
    refused = service.deploy(run_id)
    assert refused.status_code == 422
    told = refused.json()["error"]
    assert "2, 4" in told["message"] and told["remedy"] == f"flash deploy {run_id}/step-4"
    assert service.live(run_id, 4)["live"] == f"{run_id}/step-4"
    assert "nor any checkpoint" in service.deploy(service.run(final=False)).json()["error"]["message"]


def test_a_dry_run_says_what_would_happen_and_changes_nothing(service: Service):
    run_id = service.run(2, 4)
    answer = service.deploy(run_id, dry_run=True)
    plan = answer.json()
    assert (answer.status_code, plan["state"], plan["ref"]) == (200, "planned", f"{run_id}/step-4")
    assert (plan["live"], plan["engine"], plan["device"], plan["wait"]) == (None, None, "cpu", None)
    assert service.engines() == [] and service.chat(run_id).status_code == 404


def test_another_orgs_run_is_not_there(service: Service):
    theirs = service.run(4, org="others")
    token = identity.new_token()
    with service.plane.database.write() as connection:
        identity.add_key(connection, org="others", token=token, name="theirs")
    with service.client(token) as others:
        assert others.post("/api/deployments", json={"run_id": theirs}).status_code == 201
        assert others.get("/v1/models").json()["data"][0]["id"] == theirs
    assert service.deploy(theirs).status_code == 404
    for name in (theirs, f"{theirs}/step-4"):
        answer = service.chat(name)
        assert answer.status_code == 404 and error(answer)["code"] == "model_not_found"
    assert service.http.get(f"/api/deployments/{theirs}").status_code == 404
    assert service.http.delete(f"/api/deployments/{theirs}").status_code == 404
    assert theirs not in service.http.get("/v1/models").text + service.http.get("/api/deployments").text
    assert "flash_deployments 0" in service.http.get("/metrics").text


# --- engines' lives -----------------------------------------------------------------------------------


def test_an_idle_engine_leaves_and_the_next_request_starts_another(open_service):
    service = open_service(engine_idle_s=0.5)
    run_id = service.run(4)
    service.live(run_id)
    (first,) = service.engines()
    until(lambda: not service.engines())
    assert service.http.get("/api/deployments").json()["deployments"][0]["engine"] is None
    assert service.chat(run_id).status_code == 200
    (second,) = service.engines()
    assert second.id != first.id
    with service.stream(run_id, "slow") as stream:  # an engine with an open request is not idle
        lines = stream.iter_lines()
        next(lines)
        time.sleep(1.5)
        assert service.engines()[0].id == second.id
        next(lines)


def test_an_address_outlives_the_server_and_the_engine_is_taken_up_again(open_service):
    service = open_service()
    run_id = service.run(4)
    service.live(run_id)
    (before,) = service.engines()
    pid, port, token = before.pid, service.port, service.token
    later = service.again()
    assert (later.port, later.token) == (port, token)
    assert later.chat(run_id).status_code == 200
    assert [engine.pid for engine in later.engines()] == [pid]
    os.kill(pid, signal.SIGKILL)
    latest = later.again()  # it died while no server watched
    assert latest.chat(run_id).status_code == 200
    assert latest.engines()[0].id != before.id


def test_a_host_that_dies_before_it_answers_is_replaced_within_the_request(service: Service):
    run_id = service.run(4)
    service.live(run_id)
    os.kill(service.engines()[0].pid, signal.SIGKILL)
    assert service.chat(run_id).status_code == 200


def test_a_request_that_kills_hosts_is_tried_twice_and_not_more(service: Service):
    answer = service.chat("flash/nano", "die")
    assert answer.status_code == 503 and "was lost" in error(answer)["message"]
    assert answer.headers["retry-after"] == "5"
    assert sum(each["body"]["messages"][0]["content"] == "die" for each in service.asked()) == 2
    assert service.chat("flash/nano").status_code == 200


def test_a_host_that_dies_in_mid_stream_ends_it_with_an_error_and_the_next_request_works(service: Service):
    run_id = service.run(4)
    service.live(run_id)
    with service.stream(run_id, "die") as stream:
        events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
    assert events[0]["choices"][0]["delta"]["content"] == "tick "
    assert "lost in the middle" in events[-1]["error"]["message"]
    assert service.chat(run_id).status_code == 200


def test_a_base_that_can_not_be_loaded_is_said_and_tried_again(service: Service, script: Path):
    (script / "refuse").touch()
    run_id = service.run(4)
    answer = service.chat("flash/nano")
    assert answer.status_code == 503 and "the weights are not there" in error(answer)["message"]
    refused = service.deploy(run_id)
    assert (refused.status_code, refused.json()["error"]["message"]) == (422, "the weights are not there")
    (script / "refuse").unlink()
    assert service.live(run_id)["state"] == "live"


def test_a_request_waits_only_so_long_and_is_told_why(open_service, script: Path):
    service = open_service(engine_wait_s=0.5)
    (script / "late").touch()
    answer = service.chat("flash/nano")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "flash/nano is not ready yet" in error(answer)["message"]
    (script / "late").unlink()
    until(lambda: [engine for engine in service.engines() if engine.state == "ready"])
    assert service.chat("flash/nano").status_code == 200


def test_an_engine_makes_room_for_another_base(open_service):
    service = open_service(engine_yield_s=0.2)
    (service.home / "models.toml").write_text(
        '[[model]]\nid = "other/base"\npath = "."\nparams = 1000\nlayout = "qwen3"\ncontext = 100\n'
    )
    run_id, other = service.run(4), service.run(4, model="other/base")
    service.live(run_id)
    (first,) = service.engines()
    plan = service.deploy(other, dry_run=True).json()
    assert plan["device"] is None and plan["wait"] == "waiting for a free device: cpu serves flash/nano"
    assert service.live(other)["state"] == "live"
    (second,) = service.engines()
    assert (second.model, second.id != first.id) == ("other/base", True)
    with ThreadPoolExecutor(1) as pool:
        with service.stream(other, "slow") as stream:
            lines = stream.iter_lines()  # kept: one that is dropped closes the connection
            next(lines)  # busy: it does not yield
            waiting = pool.submit(service.chat, run_id)
            until(lambda: "cpu serves other/base" in waiting_reason(service))
            time.sleep(0.5)
            assert not waiting.done()
            next(lines)
        assert waiting.result().status_code == 200


def waiting_reason(service: Service) -> str:
    with service.plane.database.read() as connection:
        found = engines.usable(connection, "flash/nano")
    return (found.reason if found else None) or ""


# --- requests -----------------------------------------------------------------------------------------


def test_streams_pass_through_as_they_come(service: Service):
    with service.stream("flash/nano", "one two three") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in stream.iter_lines() if line]
    assert len(lines) == 4 and lines[-1] == "data: [DONE]"


def test_a_caller_who_leaves_frees_the_engine(service: Service):
    def open_on() -> int:
        return service.plane.traffic.open_on(service.engines()[0].id)

    with service.stream("flash/nano", "slow") as stream:
        lines = stream.iter_lines()  # kept: one that is dropped closes the connection
        next(lines)
        assert open_on() == 1
    until(lambda: open_on() == 0)
    until(lambda: service.engines()[0].stats.get("closed_early") == 1)
    with pytest.raises(httpx.ReadTimeout), service.client(service.token) as hasty:
        body = {"model": "flash/nano", "messages": [{"role": "user", "content": "stall"}]}
        hasty.post("/v1/chat/completions", json=body, timeout=0.5)
    until(lambda: open_on() == 0)


def test_a_hosts_own_errors_and_headers_pass_through(service: Service):
    answer = service.chat("flash/nano", "full")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    assert error(answer)["code"] == "rate_limit_exceeded"


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b'{"messages": []}', 400),
        (b'{"model": 7}', 400),
        (b'{"model": "gpt-4", "messages": [{"role": "user", "content": "x"}]}', 404),
    ],
)
def test_errors_of_the_servers_own_have_openais_form(service: Service, content: bytes, status: int):
    answer = service.http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert error(answer)["type"] == "invalid_request_error"
    for strange in (service.http.get("/v1/nothing"), httpx.get(f"{service.plane.api_url}/v1/models", trust_env=False)):
        assert strange.status_code in (401, 404)
        error(strange)


def test_more_requests_than_the_limit_are_told_to_come_again(open_service):
    service = open_service(max_requests=4)
    service.chat("flash/nano")
    with ThreadPoolExecutor(12) as pool, service.client(service.token) as http:
        body = {"model": "flash/nano", "messages": [{"role": "user", "content": "slow"}], "stream": True}
        stop = threading.Event()

        def one(_: int) -> int:
            with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code == 200:
                    stop.wait(30)
                return answer.status_code

        answers = [pool.submit(one, number) for number in range(12)]
        until(lambda: sum(each.done() for each in answers) == 8)
        stop.set()
        statuses = sorted(each.result() for each in answers)
    assert statuses == [200] * 4 + [429] * 8


def test_metrics_count_what_happened(service: Service):
    run_id = service.run(4)
    service.live(run_id)
    service.chat(run_id)
    service.chat("gpt-4")
    until(lambda: service.engines()[0].stats)
    page = service.http.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = page.text.splitlines()
    for line in (
        'flash_runs{state="done"} 1',
        "flash_deployments 1",
        'flash_engines{model="flash/nano",state="ready"} 1',
        'flash_requests_total{path="/v1/chat/completions",status="200"} 1',
        'flash_requests_total{path="/v1/chat/completions",status="404"} 1',
        'flash_request_seconds_count{path="/v1/chat/completions"} 2',
        'flash_request_seconds_bucket{path="/v1/chat/completions",le="+Inf"} 2',
    ):
        assert line in lines, page.text
    assert [line for line in lines if line.startswith("flash_engine_requests_total{")]
    assert httpx.get(f"{service.plane.api_url}/metrics", trust_env=False).status_code == 401


# --- made-up calls ------------------------------------------------------------------------------------

TAKEN = {"method", "url", "params", "headers", "cookies", "json", "content"}


@pytest.mark.parametrize("examples", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_no_made_up_call_is_a_5xx_or_tells_of_another_org(service: Service, examples: int):
    mine, theirs = service.run(2, 4), service.run(4, org="others")
    service.live(mine)
    schema = schemathesis.openapi.from_dict(service.http.get("/openapi.json").json())
    operations = [found.ok() for found in schema.get_all_operations()]
    chosen = [each for each in operations if each.path.startswith(("/v1/", "/api/deployments", "/metrics"))]
    chosen += [each for each in operations if each.path == "/worker/engines/{engine_id}/heartbeat"]
    assert len(chosen) == 10
    names = itertools.cycle([mine, f"{mine}/step-2", theirs, "flash/nano", None])
    seen: Counter[int] = Counter()
    for operation in chosen:

        @seed(7)
        @settings(
            max_examples=examples, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(operation.as_strategy())
        def one(case: Any) -> None:
            name = next(names)
            body = case.body if isinstance(case.body, dict) else {}
            for fields, key in ((body, "model"), (body, "run_id"), (case.path_parameters, "run_id")):
                if name is not None and key in fields:
                    fields[key] = name
            if "engine_id" in case.path_parameters:
                case.path_parameters["engine_id"] = service.engines()[0].id
            headers = {"Authorization": f"Bearer {service.token}"}
            request = case.as_transport_kwargs(base_url=service.plane.api_url, headers=headers)
            try:
                answer = service.http.request(**{key: value for key, value in request.items() if key in TAKEN})
            except (httpx.InvalidURL, UnicodeEncodeError, httpx.LocalProtocolError):
                return  # no such request can be sent
            seen[answer.status_code] += 1
            assert answer.status_code < 500, (request, answer.text)
            assert theirs in str(request) or theirs not in answer.text

        one()
    assert {200, 400, 401, 404} <= set(seen), seen
