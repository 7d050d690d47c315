"""What pages ask of the API: bounded whatever the run, by the key's own org, safe whatever a run said."""

from __future__ import annotations

import pytest
from tests.dashboard.conftest import World, archive

from flash.control_plane.links import VALID_S, Links
from flash.errors import Unauthorized
from flash.storage import identity

ROWS = (
    '{"input": "1+1", "output": "2"}\n{"input": "1+1", "output": "3"}\n'
    '{"output": "no input"}\n{"input": "3", "extra": 1}\n'
)


def get(world: World, address: str, /, **query: object) -> dict:
    answer = world.call("GET", address, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_table_of_runs_has_value_course_and_cost(world: World):
    run_id, worker = world.started()
    for step in (1, 2, 3):
        worker.tell("metrics", step=step, total_steps=3, values={"loss": 3.0 - step})
    row = get(world, "/api/overview")["runs"][0]
    assert (row["run_id"], row["summary_metric"], row["value"]) == (run_id, "loss", 0.0)
    assert row["spark"] == [2.0, 1.0, 0.0]
    assert row["cost_usd"] == 0.0
    assert row["deployed_step"] is None


def test_the_table_can_be_asked_for_what_changed(world: World):
    first, worker = world.started()
    second = world.submit()
    before = world.status(second)["updated_at"]
    worker.tell("metrics", step=1, values={"loss": 1.0})
    changed = get(world, "/api/overview", since=before + 1e-6)["runs"]
    assert [row["run_id"] for row in changed] == [first]
    assert get(world, "/api/overview", since=before + 1e6)["runs"] == []
    assert [row["run_id"] for row in get(world, "/api/overview", limit=1)["runs"]] == [second]
    assert [row["run_id"] for row in get(world, "/api/overview", before=second)["runs"]] == [first]


def test_metrics_come_thinned_or_closely(world: World):
    run_id, worker = world.started()
    told = [
        {"n": n, "time": float(n), "kind": "metrics", "data": {"step": n, "values": {"loss": float(n), "kl": 0.5}}}
        for n in range(1, 1001)
    ]
    answer = worker.post("events", {"epoch": 1, "events": told})
    assert answer.json() == {"acknowledged": 1000}
    whole = get(world, f"/api/runs/{run_id}/series", points=50)
    assert len(whole["steps"]) <= 50 and whole["thinned"] and whole["last_step"] == 1000
    assert whole["curves"]["loss"]["low"][0] == 1.0 and whole["curves"]["loss"]["high"][-1] == 1000.0
    assert whole["curves"]["kl"]["low"] is None  # always the same: nothing to draw
    part = get(world, f"/api/runs/{run_id}/series", points=50, first=500, last=520, names="loss")
    assert part["steps"] == list(range(500, 521)) and not part["thinned"]
    assert part["curves"] == {"loss": {"mean": [float(step) for step in range(500, 521)], "low": None, "high": None}}
    assert part["times"][0] == 500.0


def test_samples_are_paged_and_filtered(world: World):
    run_id, worker = world.started()
    for step in range(1, 31):
        data = {"step": step, "kind": "rollout", "row": 7, "text": "<b>", "reward": step / 30}
        told = [{"n": step, "time": 1.0, "kind": "sample", "data": {**data, "rewards": [0, step / 30]}}]
        assert worker.post("events", {"epoch": 1, "events": told}).status_code == 200
    page = get(world, f"/api/runs/{run_id}/samples", order="best", limit=2)
    assert [each["step"] for each in page["samples"]] == [30, 29]
    assert page["found"] == 30 and page["steps"][0] == [1, 1]
    assert page["samples"][0]["data"]["text"] == "<b>"
    assert get(world, f"/api/runs/{run_id}/samples", step=3)["found"] == 1
    assert get(world, f"/api/runs/{run_id}/samples", mark="failed")["found"] == 0
    assert world.call("GET", f"/api/runs/{run_id}/samples", params={"order": "odd"}).status_code == 422


def test_logs_are_followed_searched_and_read_backwards(world: World):
    run_id, worker = world.started()
    for number in range(40):
        worker.tell("log", stream="trainer", text=f"line {number} 100%_sure Ünï")
    end = get(world, f"/api/runs/{run_id}/log", limit=10)
    assert len(end["lines"]) == 10 and end["more"]
    earlier = get(world, f"/api/runs/{run_id}/log", limit=10, before=end["lines"][0]["seq"])
    assert earlier["lines"][-1]["seq"] < end["lines"][0]["seq"]
    found = get(world, f"/api/runs/{run_id}/log", find="LINE 7")["lines"]
    assert [line["data"]["text"] for line in found] == ["line 7 100%_sure Ünï"]
    assert len(get(world, f"/api/runs/{run_id}/log", find="100%_sure Ünï")["lines"]) == 40
    assert get(world, f"/api/runs/{run_id}/log", find="stream")["lines"] == []  # a key's name, not what it says
    assert get(world, f"/api/runs/{run_id}/log", find="1000_sure")["lines"] == []
    after = get(world, f"/api/runs/{run_id}/log", after=end["lines"][-1]["seq"])
    assert after["lines"] == []


def test_lineage_names_both_directions(world: World):
    run_id, worker = world.started()
    worker.save(5)
    worker.finish("failed", failure="user_code")
    world.launcher.die(worker.attempt_id)
    world.settle()
    retry = world.call("POST", f"/api/runs/{run_id}/retry", json={"secrets": {}})
    assert retry.status_code == 201, retry.text
    retried = retry.json()["run_id"]
    down = get(world, f"/api/runs/{run_id}/lineage")
    assert down["came_of"] == [{"run_id": retried, "state": "queued", "how": "retry", "step": None}]
    assert down["config"]["model"] == "flash/nano" and down["environment"] == "local/arith"
    assert get(world, f"/api/runs/{retried}/lineage")["retry_of"] == run_id


def test_environments_show_versions_files_rows_and_differences(world: World):
    first = world.push("arith", "x = 1\n")
    packed = archive({"environment.py": "x = 2\n", "dataset/train.jsonl": ROWS, "raw.txt": "a\0b"})
    second = world.call("POST", "/api/environments/local/arith", content=packed).json()
    world.submit()
    listed = get(world, "/api/packages/versions", environment="local/arith")
    assert [version["sha256"] for version in listed["versions"]][:2] == [second["sha256"], first["sha256"]]
    assert listed["versions"][0]["runs"] == 1 and len(listed["runs"]) == 1
    files = get(world, "/api/packages/files", environment="local/arith")
    assert sorted(file["path"] for file in files["files"]) == ["dataset/train.jsonl", "environment.py", "raw.txt"]
    assert files["splits"] == ["train"]
    shown = get(world, "/api/packages/file", environment="local/arith", path="environment.py")
    assert shown == {"path": "environment.py", "size": 6, "text": "x = 2\n", "truncated": False}
    assert get(world, "/api/packages/file", environment="local/arith", path="raw.txt")["text"] is None
    old = {"environment": "local/arith", "path": "environment.py", "version": first["sha256"][:12]}
    assert get(world, "/api/packages/file", **old)["text"] == "x = 1\n"
    between = get(
        world,
        "/api/packages/diff",
        before=f"local/arith@{first['sha256'][:12]}",
        after=f"local/arith@{second['sha256'][:12]}",
    )
    changed = {file["path"]: file for file in between["files"]}
    assert changed["environment.py"]["lines"][-2:] == ["-x = 1", "+x = 2"]
    assert changed["dataset/train.jsonl"]["change"] == "added" and changed["raw.txt"]["lines"] == []


def test_rows_come_with_what_a_run_would_say_of_them(world: World):
    broken = '{"input": 1}\n{broken\n'
    packed = archive({"environment.py": "", "dataset/train.jsonl": ROWS, "dataset/eval.jsonl": broken})
    assert world.call("POST", "/api/environments/local/rows", content=packed).status_code == 201
    page = get(world, "/api/packages/rows", environment="local/rows", offset=1, limit=2)
    assert page["count"] == 4 and page["dropped"] == {"extra": 1}
    assert [row["place"] for row in page["rows"]] == ["dataset/train.jsonl line 2", "dataset/train.jsonl line 3"]
    assert "the same input as" in page["problems"][0] and "no `input`" in page["problems"][1]
    stopped = get(world, "/api/packages/rows", environment="local/rows", split="eval")
    assert "not JSON" in stopped["problems"][0] and stopped["count"] == 1
    missing = world.call("GET", "/api/packages/rows", params={"environment": "local/rows", "split": "nope"})
    assert missing.status_code == 404 and "train" in missing.json()["error"]["remedy"]


def test_a_plan_says_what_a_submit_would(world: World):
    answer = world.call("POST", "/api/plan", json={"config": world.config(epochs=1)})
    assert answer.status_code == 200, answer.text
    plan = answer.json()
    assert plan["spec"]["train"]["epochs"] == 1 and "train.lora_rank" in plan["spec"]["defaulted"]
    assert plan["estimate"]["wall_clock_s"] > 0 and plan["problem"] is None
    assert plan["alternatives"]
    bad = world.call("POST", "/api/plan", json={"config": {"model": "nope", "train": {"epochs": 0}}})
    assert bad.status_code == 422 and "train.epochs" in bad.json()["error"]["message"]
    config = {**world.config(), "environment": {"id": "local/absent"}}
    assert "local/absent" in world.call("POST", "/api/plan", json={"config": config}).json()["problem"]
    assert get(world, "/api/runs")["runs"] == []


def test_the_form_and_the_models_are_the_servers_own(world: World):
    form = get(world, "/api/config/form")
    keys = {f"{key['section']}.{key['name']}": key for key in form["keys"]}
    assert keys["train.lora_rank"]["type"] == "int" and keys[".model"]["required"]
    assert form["schema"]["title"] and form["recipes"]["grpo"]["flash/nano"]["steps"] > 0
    assert "flash/nano" in [model["id"] for model in get(world, "/api/models")["models"]]


@pytest.mark.parametrize(
    "path",
    [
        "/api/overview",
        "/api/runs/{run}/series",
        "/api/runs/{run}/samples",
        "/api/runs/{run}/log",
        "/api/runs/{run}/lineage",
        "/api/packages/versions?environment=local/arith",
        "/api/packages/files?environment=local/arith",
        "/api/packages/file?environment=local/arith&path=environment.py",
        "/api/packages/rows?environment=local/arith",
        "/api/packages/diff?before=local/arith&after=local/arith",
        "/api/models",
        "/api/config/form",
    ],
)
def test_pages_show_ones_own_org_and_nothing_without_a_key(world: World, path: str):
    path = path.format(run=world.submit())
    assert world.http.get(path).status_code == 401
    stranger = identity.new_token()
    with world.plane.database.write() as connection:
        identity.add_key(connection, org="other", token=stranger, name="test")
    answer = world.http.get(path, headers={"Authorization": f"Bearer {stranger}"})
    if path in ("/api/models", "/api/config/form"):
        assert answer.status_code == 200
    elif path == "/api/overview":
        assert answer.json() == {"runs": []}
    else:
        assert answer.status_code == 404


# --- the way in -----------------------------------------------------------------------------------------------


def test_a_link_gives_a_browser_the_callers_key_once(world: World):
    made = world.call("POST", "/api/dashboard/links")
    assert made.status_code == 201
    code = made.json()["code"]
    assert world.token not in made.text
    entered = world.http.post("/api/dashboard/session", json={"code": code})
    assert entered.json() == {"key": world.token}
    assert entered.headers["cache-control"] == "no-store"
    again = world.http.post("/api/dashboard/session", json={"code": code})
    assert again.status_code == 401 and "flash dashboard" in again.json()["error"]["remedy"]
    assert world.http.post("/api/dashboard/links").status_code == 401
    assert world.http.post("/api/dashboard/session", json={"code": "x" * 43}).status_code == 401


def test_a_link_is_good_for_a_short_while():
    now = 0.0
    links = Links(lambda: now)
    code, other = links.make("key"), links.make("key")
    now = VALID_S
    assert links.redeem(code) == "key"
    now = VALID_S + 1
    with pytest.raises(Unauthorized, match="too old"):
        links.redeem(other)


def test_pages_need_no_key_and_come_with_their_rules(world: World):
    for path in ("/dashboard", "/dashboard/", "/dashboard/runs/flash-1-00000000", "/dashboard/x/y?z=1"):
        answer = world.http.get(path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html"), path
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
    again = world.http.get("/dashboard", headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304
    assert world.http.get("/dashboard/static/app.js").headers["content-type"].startswith("text/javascript")
    for path in ("/dashboard/static/absent.js", "/dashboard/static/../site.py", "/dashboard/static/"):
        assert world.http.get(path).status_code in (404, 200)
        assert "hashlib" not in world.http.get(path).text
    assert world.http.get("/", follow_redirects=False).headers["location"] == "/dashboard"
