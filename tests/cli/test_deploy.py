"""`deploy`, `deployments`, `undeploy`, `chat` and `export --repository` against a server with scripted engines."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from tests.hub_stand_in import Handler, HubStandIn
from tests.scripted_service import Service


@pytest.fixture(scope="module")
def serving(tmp_path_factory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("serving")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCRIPT", str(folder))
        opened = Service(folder / "home")
        yield opened
        opened.stop(kill=True)


@pytest.fixture(autouse=True)
def login(serving: Service, home: Path, monkeypatch) -> None:
    monkeypatch.setenv("FLASH_API_URL", serving.plane.api_url)
    monkeypatch.setenv("FREESOLO_API_KEY", serving.token)


def test_from_deploy_to_undeploy(flash, serving):
    run_id = serving.run(2, 4)
    plan = flash("deploy", run_id, "--dry-run")
    assert plan.exit_code == 0 and f"would deploy {run_id}/step-4 (base flash/nano)" in plan.stdout
    assert json.loads(flash("deployments", "--json").stdout) == {"deployments": []}
    assert flash("deploy", run_id).stdout == f"{run_id}/step-4\n"
    said = json.loads(flash("deploy", f"{run_id}/step-2", "--json").stdout)
    base_url = f"{serving.plane.api_url}/v1"
    assert (said["state"], said["live"], said["model"]) == ("live", f"{run_id}/step-2", run_id)
    assert (said["base"], said["base_url"], said["token_file"]) == ("flash/nano", base_url, None)
    [listed] = json.loads(flash("deployments", "--json").stdout)["deployments"]
    assert (listed["model"], listed["base_url"], listed["ref"]) == (run_id, base_url, f"{run_id}/step-2")
    assert flash("deployments").stdout == f"{run_id}/step-2 flash/nano ready\n"
    assert flash("undeploy", run_id).exit_code == 0
    again = flash("undeploy", run_id)
    assert (again.exit_code, again.stderr) == (1, f"error: {run_id} is not deployed (flash deploy {run_id})\n")


def test_a_failed_smoke_completion_is_one_line(flash, serving):
    run_id = serving.run(13)
    refused = flash("deploy", run_id)
    assert (refused.exit_code, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert "does not fit; nothing is deployed (--no-verify" in refused.stderr
    assert flash("deploy", run_id, "--no-verify").exit_code == 0
    flash("undeploy", run_id)


def test_a_run_without_a_final_adapter_shows_the_command(flash, serving):
    run_id = serving.run(2, 4, final=False)
    refused = flash("deploy", run_id)
    assert refused.exit_code == 1
    assert "steps 2, 4" in refused.stderr and f"(flash deploy {run_id}/step-4)" in refused.stderr
    assert flash("deploy", "not a run").exit_code == 1


def test_an_answer_is_printed(flash, serving):
    run_id = serving.run(4)
    flash("deploy", run_id)
    said = flash("chat", run_id, "-m", "one two", "--system", "Be brief.", "--max-tokens", 7, "--temperature", 0.5)
    assert (said.exit_code, said.stdout, said.stderr) == (0, "onetwo\n", "")
    asked = serving.asked()[-1]["body"]
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (asked["max_tokens"], asked["temperature"], asked["stream"]) == (7, 0.5, True)
    told = json.loads(flash("chat", run_id, "-m", "one two", "--json").stdout)
    assert (told["content"], told["checkpoint"]) == ("onetwo", f"{run_id}/step-4")
    assert serving.asked()[-1]["body"]["max_tokens"] == 512
    assert serving.asked()[-1]["body"]["temperature"] == 0.0


@pytest.mark.parametrize(
    ("model", "words"), [("flash-1-00000000", "no run"), ("gpt-4", "no model"), ("flash/nano/step-3", "no model")]
)
def test_a_name_that_is_not_served_is_one_line(flash, model: str, words: str):
    refused = flash("chat", model, "-m", "hello")
    assert (refused.exit_code, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert words in refused.stderr


def test_an_engine_lost_in_mid_answer_is_one_line(flash):
    broken = flash("chat", "flash/nano", "-m", "die")
    assert broken.exit_code == 1 and broken.stdout.startswith("tick tick")
    [line] = broken.stderr.splitlines()
    assert line.startswith("error: the engine was lost in the middle of the answer")


def test_ctrl_c_cancels(serving):
    command = [sys.executable, "-m", "flash.cli.main", "chat", "flash/nano", "-m", "slow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ}) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert b"cancelled" in process.stderr.read()


# --- export to the hub --------------------------------------------------------------------------------


WEIGHTS = "adapter_model.safetensors"


class Uploads(HubStandIn):
    """Takes repositories and commits as the hub does: large files aside, the commit naming them by digest."""

    def __init__(self) -> None:
        super().__init__()
        self.objects: dict[str, bytes] = {}
        self.refused: int | None = None

    def post(self, handler: Handler) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"] or 0))
        path = unquote(handler.path)
        if self.refused is not None:
            handler.refuse(self.refused, "you may not write here")
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.add(repo, {}, private=asked["visibility"] == "private", allowed=("hf_mine",))
            handler.json({"url": f"{self.url}/{repo}", "id": repo})
        elif path == "/api/validate-yaml":
            handler.json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            large = [{"path": file["path"], "uploadMode": self.mode(file["path"])} for file in files]
            handler.json({"files": [{**each, "shouldIgnore": False} for each in large]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            where = {each["oid"]: {"upload": {"href": f"{self.url}/upload/{each['oid']}"}} for each in objects}
            answer = [{**each, "actions": where[each["oid"]]} for each in objects]
            body = json.dumps({"transfer": "basic", "objects": answer}).encode()
            handler.reply(200, body, Content_Type="application/vnd.git-lfs+json")
        elif path.startswith("/upload/"):
            self.objects[path.removeprefix("/upload/")] = body
            handler.json({})
        elif "/commit/" in path:
            repo = path.removeprefix("/api/models/").partition("/commit/")[0]
            self.commit(repo, body)
            oid = self.repositories[repo].commit
            handler.json({"commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid, "hookOutput": ""})
        else:
            handler.refuse(404, "no such page")

    @staticmethod
    def mode(path: str) -> str:
        return "lfs" if path.endswith(".safetensors") else "regular"

    def commit(self, repo: str, body: bytes) -> None:
        there, files = self.repositories[repo], {}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.objects[line["value"]["oid"]]
        self.add(repo, {**there.files, **files}, private=there.private, allowed=there.allowed)


@pytest.fixture
def hub() -> Iterator[Uploads]:
    with Uploads() as opened:
        yield opened


def export(hub: Uploads, *arguments: str, token: str | None = "hf_mine") -> subprocess.CompletedProcess[str]:
    """A process of its own: the hub's client reads where the hub is when it is imported."""
    environment = {**os.environ, **hub.variables, "HF_HOME": os.environ["FLASH_HOME"], "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-m", "flash.cli.main", "export", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


def test_an_adapter_becomes_a_private_repository_of_the_caller(serving, hub):
    run_id = serving.run(2, 4)
    done = export(hub, "--adapter-id", f"{run_id}/step-2", "--repository", "me/adapter", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["repository"], said["url"], said["output"]) == ("me/adapter", f"{hub.url}/me/adapter", None)
    there = hub.repositories["me/adapter"]
    assert there.private and there.files == {WEIGHTS: b"2"}
    again = export(hub, "--adapter-id", run_id, "--repository", "me/adapter")
    assert again.returncode == 0 and hub.repositories["me/adapter"].files == {WEIGHTS: b"4"}
    assert "hf_mine" not in done.stdout + done.stderr + again.stdout + again.stderr


def test_what_everyone_can_read_has_to_be_said(serving, hub, tmp_path):
    run_id = serving.run(4)
    hub.add("me/open", {}, allowed=("hf_mine",))
    refused = export(hub, "--adapter-id", run_id, "--repository", "me/open")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "me/open is public (say --public" in refused.stderr and hub.repositories["me/open"].files == {}
    folder = tmp_path / "copy"
    done = export(hub, "--adapter-id", run_id, "--repository", "me/new", "--public", "--output", str(folder))
    assert done.returncode == 0, done.stderr
    assert not hub.repositories["me/new"].private
    assert hub.repositories["me/new"].files == {WEIGHTS: b"4"} == {WEIGHTS: (folder / WEIGHTS).read_bytes()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "pass --output DIR or --repository OWNER/NAME"),
        (["--repository", "adapter"], "is not OWNER/NAME"),
        (["--output", "x", "--public"], "pass --repository"),
    ],
)
def test_where_to_is_checked_first(flash, arguments: list[str], words: str):
    refused = flash("export", "--adapter-id", "flash-1-00000000", *arguments)
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert words in refused.stderr


def test_the_hubs_refusals_are_one_line(serving, hub):
    run_id = serving.run(4)
    stranger = export(hub, "--adapter-id", run_id, "--repository", "me/adapter", token=None)
    assert "not logged in to Hugging Face (set HF_TOKEN" in stranger.stderr
    hub.refused = 403
    refused = export(hub, "--adapter-id", run_id, "--repository", "me/adapter")
    assert "Hugging Face refuses to write me/adapter" in refused.stderr
    hub.close()
    gone = export(hub, "--adapter-id", run_id, "--repository", "me/adapter")
    assert "the upload to Hugging Face failed" in gone.stderr
    for each in (stranger, refused, gone):
        assert (each.returncode, each.stdout, each.stderr.count("\n")) == (1, "", 1), each.stderr


