"""Who may call what: every route has a role, nothing crosses orgs, what is refused is on record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.team.worlds import Team

from flash.artifacts.manifests import write_checkpoint
from flash.control_plane.auth import Needs, _engine, _launched, _worker
from flash.storage import identity, runs
from flash.storage.identity import Role

# Routes that take no key, and why.
PUBLIC = {
    "/api/health": "says only that it lives",
    "/api/ready": "for load balancers",
    "/api/dashboard/session": "takes a one-time code in place of a key",
    "/": "leads to the dashboard",
    "/dashboard": "pages without anyone's data",
    "/dashboard/{path:path}": "the same",
    "/openapi.json": "the schema",
    "/docs": "the schema",
    "/docs/oauth2-redirect": "the schema",
    "/redoc": "the schema",
}
# What an owner or an admin alone may do.
ABOVE_MEMBERS = {
    ("POST", "/api/orgs"): Role.OWNER,
    ("GET", "/api/orgs"): Role.OWNER,
    ("PATCH", "/api/orgs/{org}"): Role.OWNER,
    ("DELETE", "/api/orgs/{org}"): Role.OWNER,
    ("POST", "/api/server/stop"): Role.OWNER,
    ("POST", "/api/keys"): Role.ADMIN,
    ("GET", "/api/keys"): Role.ADMIN,
    ("DELETE", "/api/keys/{key}"): Role.ADMIN,
    ("GET", "/api/audit"): Role.ADMIN,
}


def routes_of(router: Any) -> Iterator[Any]:
    for route in router.routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            yield from routes_of(inner)
        else:
            yield route


def rules_of(dependant: Any) -> Iterator[Any]:
    yield dependant.call
    for below in dependant.dependencies:
        yield from rules_of(below)


def role_of(route: APIRoute, method: str) -> Role | str | None:
    """The least role that a route takes, or whose token it takes instead."""
    for rule in rules_of(route.dependant):
        if isinstance(rule, Needs):
            return rule.role or (Role.READ_ONLY if method == "GET" else Role.MEMBER)
        if rule in (_worker, _launched):
            return "worker"
        if rule is _engine:
            return "engine"
    return None


def test_every_route_has_a_role_or_a_reason_to_have_none(team: Team):
    seen = set()
    for route in routes_of(team.app):
        seen.add(route.path)
        if route.path in PUBLIC:
            continue
        assert isinstance(route, APIRoute), f"{route.path} is no route of ours"
        for method in route.methods:
            found = role_of(route, method)
            assert found is not None, f"{method} {route.path} takes no key"
            if isinstance(found, Role):
                assert found == ABOVE_MEMBERS.get((method, route.path), found)
                assert (method, route.path) in ABOVE_MEMBERS or found <= Role.MEMBER
    assert {path for _, path in ABOVE_MEMBERS} <= seen and len(seen) > 30


def test_roles_are_held_to(team: Team):
    keys = {role: team.key("acme", role) for role in (Role.READ_ONLY, Role.MEMBER, Role.ADMIN)}
    team.push(keys[Role.MEMBER], "acme")
    run_id = team.run(keys[Role.MEMBER], "acme")
    asked = [
        ("GET", f"/api/runs/{run_id}", None, Role.READ_ONLY),
        ("GET", "/v1/models", None, Role.READ_ONLY),
        ("GET", "/metrics", None, Role.READ_ONLY),
        ("POST", f"/api/runs/{run_id}/cancel", None, Role.MEMBER),
        ("DELETE", "/api/environments/acme/none", None, Role.MEMBER),
        ("POST", "/v1/completions", {"model": "no/such", "prompt": "x"}, Role.MEMBER),
        ("GET", "/api/keys", None, Role.ADMIN),
        ("GET", "/api/audit", None, Role.ADMIN),
        ("POST", "/api/keys", {"name": "one more"}, Role.ADMIN),
        ("GET", "/api/orgs", None, Role.OWNER),
        ("POST", "/api/orgs", {"name": "beta"}, Role.OWNER),
        ("PATCH", "/api/orgs/acme", {"share": 2}, Role.OWNER),
        ("POST", "/api/server/stop", None, Role.OWNER),
    ]
    for method, path, body, needed in asked:
        for role, key in keys.items():
            answer = team.call(key, method, path, json=body)
            assert (answer.status_code == 403) == (role < needed), (method, path, role, answer.text)
            if role < needed:
                assert needed.word in answer.text and role.word in answer.text
    assert not team.plane.stopping.is_set()
    assert team.call(team.owner, "GET", "/api/orgs").status_code == 200


def test_no_one_makes_a_key_above_their_own(team: Team):
    admin = team.key("acme", Role.ADMIN)
    refused = team.call(admin, "POST", "/api/keys", json={"name": "mine", "role": "owner"})
    assert refused.status_code == 403 and "owner" in refused.json()["error"]["message"]
    assert team.call(admin, "POST", "/api/keys", json={"name": "x", "role": "boss"}).status_code == 422
    assert team.call(admin, "POST", "/api/keys", json={"name": "this machine too"}).status_code == 422
    made = team.call(admin, "POST", "/api/keys", json={"name": "ada", "role": "admin", "max_runs": 3})
    assert made.status_code == 201 and made.headers["cache-control"] == "no-store"
    secret, view = made.json()["secret"], made.json()["key"]
    assert secret.startswith("fslo_") and len(secret) >= 48
    assert (view["org"], view["role"], view["max_runs"], view["max_usd"]) == ("acme", "admin", 3, None)
    assert secret not in team.call(admin, "GET", "/api/keys").text
    assert team.call(admin, "POST", "/api/keys", json={"name": "ada"}).status_code == 409
    assert team.call(secret, "GET", "/api/whoami").json() == {
        "org": "acme", "role": "admin", "key": view["id"], "name": "ada", "server": team.plane.api_url,
    }  # fmt: skip
    assert team.call(admin, "DELETE", "/api/keys/ada").json()["revoked_at"] is not None
    assert team.call(secret, "GET", "/api/whoami").status_code == 401
    assert team.call(admin, "DELETE", "/api/keys/ada").status_code == 404


def test_a_revoked_org_can_do_nothing_more_and_its_runs_are_cancelled(team: Team):
    key = team.key("acme")
    team.push(key, "acme")
    run_id = team.run(key, "acme")
    assert team.call(team.owner, "DELETE", "/api/orgs/acme").json()["revoked_at"] is not None
    assert team.call(key, "GET", "/api/runs").status_code == 401
    team.settle()
    with team.plane.database.read() as connection:
        assert runs.get_run(connection, run_id).state.value == "cancelled"
    assert team.call(team.owner, "POST", "/api/keys", json={"org": "acme", "name": "x"}).status_code == 404
    assert team.call(team.owner, "POST", "/api/orgs", json={"name": "acme"}).status_code == 409
    assert team.call(team.owner, "DELETE", "/api/orgs/local").status_code == 403


# --- orgs apart -------------------------------------------------------------------------------------------


@pytest.fixture
def two(open_team) -> tuple[Team, str, dict[str, str]]:
    """A team where `theirs` has one of everything, the key of the other org, and the ids of what is not its own."""
    team: Team = open_team(devices=("cpu",))
    theirs, mine = team.key("theirs", Role.ADMIN, name="canary-of-theirs"), team.key("mine", Role.ADMIN)
    team.push(theirs, "theirs")
    team.push(mine, "mine")
    run_id = team.run(theirs, "theirs")
    team.settle()
    token = team.launcher.requests[f"{run_id}.1"].token
    worker = {"Authorization": f"Bearer {token}"}
    base = f"/worker/attempts/{run_id}.1"
    assert team.http.post(f"{base}/claim", json={"pid": 7}, headers=worker).status_code == 200
    folder = team.settings.home / "saved"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "weights").write_bytes(b"canary-of-theirs")
    _, sha256 = write_checkpoint(team.plane.store, run_id, 3, folder, True, {"loss": 1.0})
    report = {"epoch": 1, "step": 3, "final": True, "manifest_sha256": sha256}
    assert team.http.post(f"{base}/checkpoints", json=report, headers=worker).status_code == 204
    event = {"n": 1, "time": 1.0, "kind": "log", "data": {"stream": "trainer", "text": "canary-of-theirs"}}
    assert team.http.post(f"{base}/events", json={"epoch": 1, "events": [event]}, headers=worker).status_code == 200
    deployed = team.call(theirs, "POST", "/api/deployments", json={"run_id": run_id, "verify": False})
    assert deployed.status_code == 201, deployed.text
    with team.plane.database.read() as connection:
        key_id = identity.list_keys(connection, org="theirs")[0].id
    ids = {
        "run_id": run_id, "attempt_id": f"{run_id}.1", "worker_id": f"{run_id}.1", "namespace": "theirs",
        "name": "echo", "key": key_id, "org": "theirs", "environment": "theirs/echo", "path": "adapter/weights",
        "step": "3",
    }  # fmt: skip
    return team, mine, ids


def asked_of(team: Team) -> list[tuple[str, APIRoute]]:
    return [
        (method, route)
        for route in routes_of(team.app)
        if isinstance(route, APIRoute) and route.path not in PUBLIC
        for method in sorted(route.methods)
    ]


def test_another_orgs_object_is_a_404_on_every_route_that_names_one(two):
    team, mine, ids = two
    named = 0
    for method, route in asked_of(team):
        if not route.param_convertors or role_of(route, method) == "engine":
            continue
        path = route.path.replace("{path:path}", ids["path"]).replace("{name:path}", ids["run_id"])
        unknown = [name for name in route.param_convertors if f"{{{name}}}" in path and name not in ids]
        assert unknown == [], f"{route.path}: say here what of another org {unknown} is"
        body = {"priority": "low"} if route.path.endswith("/priority") else {}
        address = f"192.0.2.{named + 10}"
        answer = team.call(mine, method, path.format(**ids), json=body, address=address)
        refused = 404
        if role_of(route, method) == "worker":
            refused = 401
        elif route.path == "/api/orgs/{org}":
            refused = 403
        elif (method, route.path) == ("POST", "/api/environments/{namespace}/{name}"):
            refused = 422  # the one that makes what it names
        assert answer.status_code == refused, (method, path, answer.status_code, answer.text[:200])
        entry = team.audited()[-1]
        assert (entry.action, entry.status, entry.address) == (f"{method} {route.path}", refused, address)
        assert entry.org == (None if refused == 401 else "mine"), entry
        named += 1
    assert named >= 12


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_asked_nothing_of_another_org_comes_back_or_changes(two, data):
    team, mine, ids = two
    method, route = data.draw(st.sampled_from(asked_of(team)), label="route")
    if route.path.endswith("/stream"):
        return  # the 404 is tested above; one of an own run would not end
    texts = st.sampled_from([*ids.values(), f"{ids['run_id']}/step-3", "flash/nano", "nothing"])
    path = route.path
    for name in route.param_convertors:
        path = path.replace(f"{{{name}}}", data.draw(texts, label=name)).replace(
            f"{{{name}:path}}", data.draw(texts, label=name)
        )
    names = ["run_id", "model", "environment", "org", "before", "init_from_adapter", "runs", "name", "config", "q"]
    query = data.draw(st.dictionaries(st.sampled_from(names), texts, max_size=3), label="query")
    warm = {"init_from_adapter": ids["run_id"]}
    config = {"model": "flash/nano", "environment": {"id": data.draw(texts)}, "train": warm}
    bodies = [{}, query, {"config": config}, {"run_id": ids["run_id"]}, {"model": ids["run_id"], "messages": []}]
    body = data.draw(st.sampled_from(bodies), label="body")
    with team.plane.database.read() as connection:
        before = runs.get_run(connection, ids["run_id"])
    answer = team.call(mine, method, path, json=body, params=query)
    assert answer.status_code < 500, answer.text
    asked = json.dumps([path, query, body])
    assert "canary-of-theirs" not in answer.text, (method, path, answer.text[:500])
    if route.path not in ("/api/audit", "/api/keys"):  # which repeat what was asked and named before
        for secret in (ids["run_id"], ids["key"]):
            assert secret not in answer.text or secret in asked, (method, path, answer.text[:500])
    with team.plane.database.read() as connection:
        after = runs.get_run(connection, ids["run_id"])
        assert (after.desired, after.pinned, after.last_seq) == (before.desired, before.pinned, before.last_seq)


def test_what_another_org_trains_is_not_told_to_who_waits_for_its_device(open_team):
    team: Team = open_team(devices=("cuda:0",), engine_wait_s=0.1)
    theirs, mine = team.key("theirs"), team.key("mine")
    team.push(theirs, "theirs")
    run_id = team.run(theirs, "theirs")
    team.settle()
    body = {"model": "flash/nano", "messages": [{"role": "user", "content": "x"}]}
    for _ in range(2):
        answer = team.call(mine, "POST", "/v1/chat/completions", json=body)
        team.settle()
    assert answer.status_code == 503 and "cuda:0 trains" in answer.text
    assert run_id not in answer.text
    assert run_id not in team.call(mine, "GET", "/metrics").text


# --- refusals on record -----------------------------------------------------------------------------------


def test_refusals_have_their_status_and_an_entry(open_team):
    team: Team = open_team(devices=("cpu",))
    mine, theirs = team.key("mine"), team.key("theirs")
    team.push(theirs, "theirs")
    run_id = team.run(theirs, "theirs")
    spent = team.key("mine", name="spent", max_usd=0.0)
    busy = team.key("mine", name="busy", max_runs=0)
    revoked = team.key("mine", name="gone")
    with team.plane.database.write() as connection:
        identity.revoke_key(connection, "gone", org="mine", now=2.0)
    team.push(mine, "mine")
    team.settle()
    tampered = team.launcher.requests[f"{run_id}.1"].token[:-1] + "_"
    before = len(team.audited())
    worker = f"/worker/attempts/{run_id}.1/heartbeat"
    for key, method, path, status, actor, words in [
        (mine, "GET", f"/api/runs/{run_id}", 404, "member of mine", "no run"),
        (mine, "POST", f"/api/runs/{run_id}/cancel", 404, "member of mine", "no run"),
        (revoked, "GET", "/api/runs", 401, "gone", "not valid"),
        ("fslo_never-was", "GET", "/api/runs", 401, None, "not valid"),
        (None, "GET", "/api/runs", 401, None, "no bearer"),
        (tampered, "POST", worker, 401, None, "not this attempt's"),
        (mine, "POST", "/api/orgs", 403, "member of mine", "role owner"),
    ]:
        body = {"name": "x", "epoch": 1, "phase": "training"}
        assert team.call(key, method, path, json=body if method == "POST" else None).status_code == status, path
        entry = team.audited()[-1]
        assert (entry.status, entry.name, entry.address) == (status, actor, "192.0.2.7")
        assert words in (entry.message or "") and entry.action.startswith(method)
    assert team.submit(spent, "mine").status_code == 402
    assert (team.audited()[-1].status, team.audited()[-1].name) == (402, "spent")
    assert team.submit(busy, "mine").status_code == 429
    assert (team.audited()[-1].status, team.audited()[-1].name) == (429, "busy")
    assert len(team.audited()) == before + 9
    assert team.http.get("/nowhere").status_code == 404
    assert len(team.audited()) == before + 9, "nobody asked for nothing"
    text = json.dumps([vars(entry) for entry in team.audited()])
    assert not any(key in text for key in (mine, theirs, spent, revoked, tampered, "fslo_"))


def test_a_key_that_is_revoked_or_a_token_that_is_tampered_with_opens_nothing(two):
    """Every route, each refusal on record; a revoked key is still named there."""
    team, _, ids = two
    gone = team.key("mine", Role.ADMIN, name="gone")
    with team.plane.database.write() as connection:
        identity.revoke_key(connection, "gone", org="mine", now=2.0)
    token = team.launcher.requests[ids["attempt_id"]].token
    tampered = [token[:-1], token + "x", token[:-1] + ("A" if token[-1] != "A" else "B"), token.upper()]
    asked = 0
    for method, route in asked_of(team):
        whose = role_of(route, method)
        path = route.path.replace("{path:path}", ids["path"]).replace("{name:path}", ids["run_id"])
        path = path.replace("{engine_id}", "none").format(**ids)
        for number, key in enumerate(tampered if whose == "worker" else [gone]):
            address = f"198.51.{number}.{asked % 250 + 1}"
            answer = team.call(key, method, path, json={}, address=address)
            assert answer.status_code == (404 if whose == "engine" else 401), (method, path, answer.text[:200])
            if whose == "engine":
                continue  # there is none yet: nobody asked for nothing
            entry = team.audited()[-1]
            assert (entry.action, entry.status, entry.address) == (f"{method} {route.path}", 401, address)
            assert entry.name == (None if whose == "worker" else "gone")
            assert key not in json.dumps(vars(entry)) and token not in json.dumps(vars(entry))
        asked += 1
    assert asked > 40


def test_a_spent_budget_and_a_full_cap_are_refused_and_on_record_wherever_a_run_is_asked_for(open_team):
    team: Team = open_team(devices=("cpu",))
    free = team.key("acme", name="free")
    team.push(free, "acme")
    run_id = team.run(free, "acme")
    assert team.call(free, "POST", f"/api/runs/{run_id}/cancel").status_code == 200
    team.settle()
    for name, caps, status, words in (
        ("spent", {"max_usd": 0.0}, 402, "may cost $0.00 in all"),
        ("busy", {"max_runs": 0}, 429, "may have 0 run(s)"),
    ):
        key = team.key("acme", name=name, **caps)
        for action in ("POST /api/runs", "POST /api/runs/{run_id}/retry"):
            retried = action.endswith("/retry")
            path = f"/api/runs/{run_id}/retry"
            answer = team.call(key, "POST", path, json={}) if retried else team.submit(key, "acme")
            assert answer.status_code == status, answer.text
            entry = team.audited()[-1]
            assert (entry.action, entry.status, entry.name, entry.org) == (action, status, name, "acme")
            assert words in (entry.message or "")
    assert len(team.call(free, "GET", "/api/runs").json()["runs"]) == 1


def test_changes_are_on_record_and_looking_is_not(team: Team):
    admin = team.key("acme", Role.ADMIN)
    team.push(admin, "acme")
    run_id = team.run(admin, "acme")
    team.call(admin, "GET", f"/api/runs/{run_id}")
    team.call(admin, "POST", f"/api/runs/{run_id}/cancel")
    said = team.call(admin, "GET", "/api/audit").json()["entries"]
    told = [(entry["action"], entry["status"], entry["object"]) for entry in said]
    assert told == [
        ("POST /api/runs/{run_id}/cancel", 200, f"run_id={run_id}"),
        ("POST /api/runs", 201, f"run={run_id}"),
        ("POST /api/environments/{namespace}/{name}", 201, "namespace=acme name=echo"),
    ]
    assert {entry["actor"] for entry in said} == {team.call(admin, "GET", "/api/whoami").json()["key"]}
    [first] = team.call(admin, "GET", "/api/audit", params={"before": said[1]["id"]}).json()["entries"]
    assert first["id"] == said[2]["id"]
    other = team.key("beta", Role.ADMIN)
    assert team.call(other, "GET", "/api/audit").json()["entries"] == []
    assert team.call(other, "GET", "/api/audit", params={"org": "acme"}).status_code == 404
    assert len(team.call(team.owner, "GET", "/api/audit").json()["entries"]) == 4


def test_refusals_without_end_do_not_fill_the_log(team: Team):
    for _ in range(80):
        assert team.call("fslo_guess", "GET", "/api/runs").status_code == 401
    assert 25 <= len(team.audited()) <= 35
