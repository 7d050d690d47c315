"""Environments from GitHub, against a stand-in of its API and archive addresses: resolved, pinned, fetched safely."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from flash.control_plane.server_config import load_settings

TOKEN = "ghp_the_operators_own_token"
CODE = "def load_environment(): ...\n"


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def repository(*members: tuple[str | tarfile.TarInfo, str | bytes]) -> bytes:
    """An archive as GitHub makes one: everything below a single folder of its own."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT, pax_headers={"comment": "0" * 40}) as tar:
        for name, content in members:
            info = member(f"acme-envs-0123456/{name}") if isinstance(name, str) else name
            data = content.encode() if isinstance(content, str) else content
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@dataclass
class GitHubStandIn:
    """Branches, archives by commit, and what was asked; `faults` answer in the place of a path."""

    url: str = ""
    branches: dict[str, str] = field(default_factory=dict)
    archives: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    faults: dict[str, Callable[[BaseHTTPRequestHandler], None]] = field(default_factory=dict)
    proxied: str = ""  # the address that it stands in for as a proxy
    archive_host: str = ""  # where the archive's redirect leads; itself by default

    def push(self, branch: str, archive: bytes) -> str:
        commit = hashlib.sha1(archive).hexdigest()
        self.branches[branch] = commit
        self.archives[commit] = archive
        return commit

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.removeprefix(self.proxied)
        self.asked.append((path, dict(handler.headers.items())))
        for part, fault in self.faults.items():
            if part in path:
                return fault(handler)
        kind, _, name = path.removeprefix("/repos/acme/envs/").partition("/")
        commit = self.branches.get(name.replace("%2F", "/"), name)
        if kind == "commits" and commit in self.archives:
            return reply(handler, 200, commit.encode())
        if kind == "tarball" and commit in self.archives:
            target = f"{self.archive_host or self.url}/codeload/{commit}"
            return reply(handler, 302, b"", Location=target)
        if path.startswith("/codeload/"):
            return reply(handler, 200, self.archives[path.rsplit("/", 1)[1]])
        return reply(handler, 404, b'{"message": "Not Found"}')


def reply(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(body))}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def serve() -> Iterator[Callable[[], GitHubStandIn]]:
    servers: list[ThreadingHTTPServer] = []

    def start() -> GitHubStandIn:
        stand_in = GitHubStandIn()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stand_in.answer(self)

            def log_message(self, *args: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        stand_in.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        return stand_in

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def github(world, serve) -> GitHubStandIn:
    """GitHub, as far as this world's server knows."""
    stand_in = serve()
    stand_in.push("HEAD", repository(("environment.py", CODE), ("dataset/train.jsonl", '{"input": "1"}\n')))
    configure(world, stand_in)
    return stand_in


def configure(world, stand_in: GitHubStandIn, **settings: str) -> None:
    given = {"FLASH_SERVER_GITHUB_API_URL": stand_in.url, "GITHUB_TOKEN": TOKEN}
    given |= {f"FLASH_SERVER_GITHUB_{name.upper()}": value for name, value in settings.items()}
    world.plane.settings = load_settings(world.home, given)


def submit(world, text: str = "github:acme/envs", key: str | None = None):
    body = {"config": {"model": "flash/nano", "environment": {"id": text}}}
    return world.call("POST", "/api/runs", json=body, headers={"Idempotency-Key": key} if key else {})


def refused(world, text: str = "github:acme/envs", status: int = 422) -> str:
    """What a person reads of a submit that makes no run."""
    answer = submit(world, text)
    assert answer.status_code == status, answer.text
    assert world.call("GET", "/api/runs").json() == {"runs": []}
    error = answer.json()["error"]
    return f"{error['message']} ({error['remedy']})"


def archive_of(world, run_id: str) -> list[str]:
    """The files that the run's worker gets."""
    world.settle()
    worker = world.worker(run_id)
    worker.claim()
    url = f"/worker/attempts/{worker.attempt_id}/environment"
    data = world.http.get(url, headers={"Authorization": f"Bearer {worker.token}"}).content
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return sorted(tar.getnames())


# --- resolved, pinned, fetched ----------------------------------------------------------------------


def test_a_reference_is_pinned_to_its_commit_and_reaches_the_worker(world, github):
    answer = submit(world)
    assert answer.status_code == 201, answer.text
    commit = github.branches["HEAD"]
    run_id = answer.json()["run_id"]
    assert answer.json()["spec"]["environment"]["id"] == f"github:acme/envs@{commit}"
    [row] = world.call("GET", "/api/runs").json()["runs"]
    assert row["environment"] == f"github:acme/envs@{commit}"
    assert archive_of(world, run_id) == ["dataset/train.jsonl", "environment.py"]
    assert github.paths() == [
        "/repos/acme/envs/commits/HEAD", f"/repos/acme/envs/tarball/{commit}", f"/codeload/{commit}",
    ]  # fmt: skip
    assert [each["name"] for each in world.call("GET", "/api/environments").json()["environments"]] == ["arith"], (
        "what was fetched is no part of the hub"
    )


def test_a_moved_branch_changes_later_runs_only(world, github):
    github.push("main", repository(("environment.py", CODE)))
    first = submit(world, "github:acme/envs@main").json()
    github.push("main", repository(("environment.py", CODE), ("more.py", "")))
    second = submit(world, "github:acme/envs@main").json()
    assert first["spec"]["environment"]["id"] != second["spec"]["environment"]["id"]
    assert archive_of(world, first["run_id"]) == ["environment.py"]
    world.call("POST", f"/api/runs/{first['run_id']}/cancel")
    assert world.status(first["run_id"])["spec"]["environment"]["id"] == first["spec"]["environment"]["id"]


def test_a_repeated_submit_does_not_ask_again(world, github):
    first = submit(world, key="once")
    asked = len(github.asked)
    again = submit(world, key="once")
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["run_id"] == again.json()["run_id"]
    assert len(github.asked) == asked


def test_a_commit_that_was_fetched_is_not_fetched_again(world, github):
    pinned = submit(world).json()["spec"]["environment"]["id"]
    asked = len(github.asked)
    again = submit(world, pinned)
    assert again.json()["spec"]["environment"]["id"] == pinned
    assert len(github.asked) == asked


def test_a_commit_whose_archive_is_missing_is_fetched_again(world, github):
    before = set(world.plane.store.list("environments"))
    pinned = submit(world).json()["spec"]["environment"]["id"]
    [archive] = set(world.plane.store.list("environments")) - before
    whole = world.plane.store.get_bytes(archive)
    world.plane.store.delete(archive)
    assert submit(world, pinned).status_code == 201
    assert world.plane.store.get_bytes(archive) == whole


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("github:acme/envs@feature/x:games/chess", ["environment.py", "rules.py"]),
        ("https://github.com/acme/envs/tree/HEAD/games/chess", ["environment.py", "rules.py"]),
        ("github:acme/envs:games/chess/other.py", ["environment.py", "rules.py"]),
    ],
)
def test_a_folder_or_file_of_a_repository_ships_with_its_siblings_alone(world, github, text, files):
    whole = repository(
        ("environment.py", "not this one("), ("games/chess/environment.py", CODE), ("games/chess/rules.py", ""),
        ("games/chess/other.py", CODE), ("games/secret.txt", "x"), ("games/chess/.env", "x"),
    )  # fmt: skip
    github.push("HEAD", whole)
    github.push("feature/x", whole)
    answer = submit(world, text)
    assert answer.status_code == 201, answer.text
    found = archive_of(world, answer.json()["run_id"])
    assert set(files) <= set(found) and not {"secret.txt", ".env"} & set(found)


def test_a_long_path_is_pinned_too(world, github):
    path = "/".join(["folder-of-a-long-name"] * 9)
    github.push("HEAD", repository((f"{path}/environment.py", CODE)))
    answer = submit(world, f"github:acme/envs:{path}")
    assert answer.status_code == 201, answer.text
    assert answer.json()["spec"]["environment"]["id"].endswith(f":{path}")
    assert archive_of(world, answer.json()["run_id"]) == ["environment.py"]
    with world.plane.database.read() as connection:
        names = [row.name for row in connection.exec_driver_sql("select name from environment_versions")]
    assert max(map(len, names)) <= 200


# --- archives that mean harm ------------------------------------------------------------------------


def test_links_are_passed_over(world, github):
    link = member("acme-envs-0123456/passwords.txt", tarfile.SYMTYPE, "/etc/passwd")
    hard = member("acme-envs-0123456/hard.txt", tarfile.LNKTYPE, "acme-envs-0123456/environment.py")
    github.push("HEAD", repository(("environment.py", CODE), (link, ""), (hard, "")))
    assert archive_of(world, submit(world).json()["run_id"]) == ["environment.py"]


def test_an_environment_that_is_a_link_is_none(world, github):
    link = member("acme-envs-0123456/environment.py", tarfile.SYMTYPE, "../../etc/passwd")
    github.push("HEAD", repository((link, ""), ("readme.md", "")))
    assert "has no environment.py there" in refused(world)


@pytest.mark.parametrize("name", ["top/../../evil.py", "top//etc/evil.py", "top/a\\b.py"])
def test_a_path_that_leads_elsewhere_is_refused(world, github, name, tmp_path):
    github.push("HEAD", repository(("environment.py", CODE), (member(name), "x")))
    assert "path" in refused(world)
    assert not list(tmp_path.rglob("evil.py"))


def test_a_bomb_is_refused(world, github):
    github.push("HEAD", repository(("environment.py", CODE), ("dataset/train.jsonl", bytes(300 << 20))))
    assert "expands" in refused(world)


def test_an_archive_that_is_none_is_refused(world, github):
    github.push("HEAD", b"<html>a proxy's page</html>")
    assert "not a .tar.gz" in refused(world)


def test_code_is_read_and_never_run(world, github, tmp_path):
    witness = tmp_path / "ran"
    github.push("HEAD", repository(("environment.py", f"open({str(witness)!r}, 'w')\n{CODE}")))
    assert submit(world).status_code == 201
    assert not witness.exists()


# --- a GitHub that says no, and one that is not there -------------------------------------------------


@pytest.mark.parametrize("text", ["github:acme/none", "github:acme/envs@nowhere", "github:acme/envs:no/such/folder"])
def test_what_is_not_there_is_said_in_words(world, github, text):
    said = refused(world, text)
    assert said.startswith("environment.id = ") and text in said


def test_a_rate_limit_names_the_remedy(world, github):
    github.faults["commits"] = lambda handler: reply(handler, 403, b'{"message": "API rate limit exceeded"}')
    said = refused(world, status=503)
    assert "rate limit" in said and "GITHUB_TOKEN" in said and TOKEN not in said


def test_a_commit_that_is_none_is_refused(world, github):
    github.faults["commits"] = lambda handler: reply(handler, 200, b"../../etc")
    assert "not a commit" in refused(world, status=503)


def test_a_github_that_is_away_is_unavailable(world, github):
    github.url = "http://127.0.0.1:9"  # nothing listens on the discard port
    configure(world, github)
    assert "can't be reached" in refused(world, status=503)


def test_a_github_that_says_nothing_holds_nobody_up(world, github):
    release = threading.Event()
    github.faults["commits"] = lambda handler: release.wait(10)
    configure(world, github, timeout_s="0.3")
    waiting = threading.Thread(target=submit, args=(world,))
    started = time.monotonic()
    waiting.start()
    while not github.asked:
        assert time.monotonic() - started < 5
        time.sleep(0.01)
    assert world.call("GET", "/api/health").status_code == 200
    waiting.join(5)
    release.set()
    assert not waiting.is_alive()
    assert world.call("GET", "/api/runs").json() == {"runs": []}


def test_a_dripping_download_ends_at_its_deadline(world, github):
    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b"\x1f" * 70_000)
            time.sleep(0.02)

    github.faults["codeload"] = drip
    configure(world, github, deadline_s="0.2")
    assert "took over 0.2 s" in refused(world, status=503)


def test_more_fetches_than_allowed_are_told_to_come_again(world, github):
    for _ in range(world.plane.settings.github_fetches):
        assert world.plane.fetches.acquire(blocking=False)
    assert "busy" in refused(world, status=503)
    world.plane.fetches.release()
    assert submit(world).status_code == 201
    assert world.plane.fetches.acquire(blocking=False), "a fetch gives its place back"


# --- redirects, and the operator's token --------------------------------------------------------------


def test_the_token_goes_to_the_api_and_not_along_redirects(world, github, serve):
    elsewhere = serve()
    elsewhere.archives = github.archives
    github.archive_host = elsewhere.url
    configure(world, github, allow_private="true")
    answer = submit(world)
    assert answer.status_code == 201, answer.text
    assert [headers.get("Authorization") for _, headers in github.asked] == [f"Bearer {TOKEN}"] * 2
    assert len(elsewhere.asked) == 1
    assert TOKEN not in json.dumps(elsewhere.asked)
    assert TOKEN not in answer.text


def test_a_redirect_into_the_private_network_is_refused(world, github, serve):
    inside = serve()
    github.archive_host = inside.url.replace("http:", "https:")
    assert "inside a private network" in refused(world)
    github.archive_host = inside.url
    assert "only https" in refused(world)
    for address in ("https://[::1]", "https://169.254.169.254", "https://10.0.0.1", "https://localhost"):
        github.archive_host = address
        assert "inside a private network" in refused(world)
    assert inside.asked == []


@pytest.mark.parametrize("target", ["file:///etc/passwd", "gopher://x", "https://", "//[", "https://\udcff.example"])
def test_a_redirect_to_no_address_is_refused_in_words(world, github, target):
    raw = target.encode("utf-8", "surrogateescape").decode("latin-1")
    github.faults["tarball"] = lambda handler: reply(handler, 302, b"", Location=raw)
    answer = submit(world)
    assert answer.status_code in (422, 503), answer.text
    assert answer.json()["error"]["code"] != "internal"


def test_a_redirect_in_circles_ends(world, github):
    github.faults["tarball"] = lambda handler: reply(handler, 302, b"", Location=handler.path)
    assert "redirects" in refused(world, status=503)


@pytest.fixture
def proxied(world, github, monkeypatch) -> GitHubStandIn:
    """The stand-in as the proxy through which alone GitHub's name means anything."""
    monkeypatch.setenv("http_proxy", github.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    github.proxied = github.url = "http://github.invalid"
    configure(world, github)
    return github


def test_a_proxy_looks_names_up_itself(world, proxied):
    assert submit(world).status_code == 201
    assert len(proxied.asked) == 3


def test_no_redirect_leads_through_a_proxy_into_the_private_network(world, proxied):
    configure(world, proxied)
    for address in ("https://10.0.0.1", "https://localhost", "https://[::1]"):
        proxied.archive_host = address
        assert "inside a private network" in refused(world)


def test_a_retry_keeps_the_commit_and_asks_nobody(world, github):
    first = submit(world).json()
    world.call("POST", f"/api/runs/{first['run_id']}/cancel")
    world.settle()
    github.push("HEAD", repository(("environment.py", CODE), ("later.py", "")))
    asked = len(github.asked)
    again = world.call("POST", f"/api/runs/{first['run_id']}/retry", json={})
    assert again.status_code == 201, again.text
    assert again.json()["spec"]["environment"] == first["spec"]["environment"]
    assert archive_of(world, again.json()["run_id"]) == ["dataset/train.jsonl", "environment.py"]
    assert len(github.asked) == asked
