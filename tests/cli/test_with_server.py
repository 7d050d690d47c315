"""The commands against a real server: a laptop's, which the first of them starts, and a team's on Postgres,
S3 and Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flash import __version__
from flash.client import local_server

ENVIRONMENT = """
from freesolo.environments import EnvironmentSingleTurn

def load_environment():
    raise RuntimeError("pushing must not run this")
"""


@pytest.fixture(scope="module", params=["laptop", pytest.param("team", marks=pytest.mark.slow)])
def server_home(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    process = start_team(folder, request.getfixturevalue("team_profile")) if request.param == "team" else None
    yield folder
    local_server.stop(folder)
    if process is not None:
        assert process.wait(timeout=60) == 0


def start_team(folder: Path, backing: dict[str, str]) -> subprocess.Popen[bytes]:
    """`flash server start --config`, which stays in the foreground."""
    config = folder / "server.toml"
    config.write_text('home = "."\nlog_to = "file"\n')
    command = [sys.executable, "-m", "flash.cli.main", "server", "start", "--config", str(config)]
    process = subprocess.Popen(command, env={**os.environ, **backing, "FLASH_SERVER_DEVICES": ""})
    deadline = time.monotonic() + 120
    while local_server.running(folder) is None:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    return process


@pytest.fixture(autouse=True)
def served(server_home, home, monkeypatch) -> Path:
    monkeypatch.setenv("FLASH_HOME", str(server_home))
    monkeypatch.setenv("FLASH_SERVER_IDLE_EXIT_S", "60")
    monkeypatch.setenv("FLASH_SERVER_DEVICES", "")  # runs stay queued: nothing here trains
    return server_home


@pytest.fixture
def package(tmp_path) -> Path:
    folder = tmp_path / "My Task!"
    (folder / "dataset").mkdir(parents=True)
    (folder / "environment.py").write_text(ENVIRONMENT + '\nNOTES = open("notes/words.bin")\n')
    (folder / "dataset" / "train.jsonl").write_text('{"input": "1+1", "output": "2"}\n')
    (folder / "requirements.txt").write_text("openai\n")
    (folder / "notes").mkdir()
    (folder / "notes" / "words.bin").write_bytes(b"x")
    return folder


def errors_of(result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


def test_server_status_says_where_and_on_what(flash):
    assert flash("server", "start").exit_code == 0
    said = json.loads(flash("server", "status", "--json").stdout)
    assert said["running"] is True
    assert said["base_url"].startswith("http://127.0.0.1:")
    assert said["version"] == __version__
    assert said["sqlite_version"][0].isdigit()
    os.kill(said["pid"], 0)
    assert json.loads(flash("server", "start", "--json").stdout)["pid"] == said["pid"]
    assert json.loads(flash("whoami", "--json").stdout)["org"] == "local"


def test_push_list_pull_delete(flash, package, tmp_path):
    pushed = flash("env", "push", "--name", "My Task!", package)
    assert pushed.exit_code == 0
    for part in ("dataset/train.jsonl", "environment.py", "left out", "requirements.txt", 'id = "local/my-task"'):
        assert part in pushed.stdout
    assert "notes" in pushed.stderr, "what the code refers to and does not ship is worth a warning"
    again = json.loads(flash("env", "push", "--name", "local/my-task", package, "--json").stdout)
    assert again["pinned"] in pushed.stdout, "the same content is the same version"
    assert again["pinned"] in flash("env", "list").stdout.replace(" ", "@")

    target = tmp_path / "copy"
    assert flash("env", "pull", "local/my-task", "-o", target).exit_code == 0
    assert (target / "environment.py").read_text() == (package / "environment.py").read_text()
    (target / "environment.py").write_text("mine")
    refused = flash("env", "pull", "local/my-task", target)
    assert (refused.exit_code, len(errors_of(refused))) == (1, 1)
    assert (target / "environment.py").read_text() == "mine"
    assert flash("env", "pull", "local/my-task", target, "-f").exit_code == 0
    assert (target / "environment.py").read_text() != "mine"

    assert flash("env", "delete", "local/my-task", "-y").exit_code == 0
    assert json.loads(flash("env", "list", "--json").stdout) == {"environments": []}
    gone = flash("env", "pull", "local/my-task", "-o", tmp_path / "other")
    assert (gone.exit_code, len(errors_of(gone))) == (1, 1)
    assert not (tmp_path / "other").exists()


def test_another_orgs_namespace_is_refused(flash, package):
    result = flash("env", "push", "--name", "else/x", package)
    assert result.exit_code == 1
    assert "'local'" in result.stderr


UNKNOWN = "flash-1700000000-00000000"


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", UNKNOWN],
        ["status", UNKNOWN, "-f"],
        ["log", UNKNOWN],
        ["log", UNKNOWN, "-f"],
        ["samples", UNKNOWN],
        ["profile", UNKNOWN],
        ["cancel", UNKNOWN],
        ["checkpoints", UNKNOWN],
        ["retry", UNKNOWN],
        ["export", "--adapter-id", UNKNOWN, "--output", "nowhere"],
        ["status", "../health"],
        ["env", "delete", "local/none", "-y"],
    ],
)
def test_what_is_not_there_is_one_line(flash, arguments, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = flash(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == len(errors_of(result)) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_submit_that_the_server_refuses_is_one_line_and_no_run(flash, config):
    result = flash("train", config, "--set", "environment.id=local/none")
    assert (result.exit_code, len(errors_of(result))) == (1, 1)
    assert "local/none" in result.stderr
    assert json.loads(flash("runs", "--json").stdout) == {"runs": []}


def test_a_wandb_table_without_a_key_warns_at_submit(flash, config, monkeypatch):
    ask = ("train", config, "--set", "environment.id=local/none", "--set", "wandb.project=mine")
    assert "warning: wandb: WANDB_API_KEY is not set" in flash(*ask).stderr
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert "warning: wandb" not in flash(*ask).stderr


def test_retry_makes_a_new_run_of_a_cancelled_one_and_wants_its_secrets_again(flash, package, config, monkeypatch):
    flash("env", "push", "--name", "again", package)
    ask = ("train", config, "--background", "--json", "--seed", 7, "--set", "environment.id=local/again")
    monkeypatch.setenv("SERVICE_KEY", "a-value-of-its-own")
    first = json.loads(flash(*ask, "--set", "environment.secrets=[SERVICE_KEY]").stdout)
    early = flash("retry", first["run_id"])
    assert (early.exit_code, len(errors_of(early))) == (1, 1)
    assert "queued" in early.stderr
    flash("cancel", first["run_id"])
    while json.loads(flash("status", first["run_id"], "--json").stdout)["state"] != "cancelled":
        time.sleep(0.05)
    monkeypatch.delenv("SERVICE_KEY")
    missing = flash("retry", first["run_id"])
    assert (missing.exit_code, "SERVICE_KEY" in missing.stderr) == (1, True)
    monkeypatch.setenv("SERVICE_KEY", "a-value-of-its-own")
    second = json.loads(flash("retry", first["run_id"], "--background", "--json").stdout)
    assert second["run_id"] != first["run_id"]
    assert (second["retry_of"], second["seed"], second["spec"]) == (first["run_id"], 7, first["spec"])
    assert flash("retry", first["run_id"], "--background").stdout.startswith("flash-")
    for run in json.loads(flash("runs", "--json").stdout)["runs"]:
        flash("cancel", run["run_id"])


def test_priority_is_given_at_submit_and_changed_while_a_run_waits(flash, package, config):
    assert flash("env", "push", "--name", "urgent", package).exit_code == 0
    ask = ("train", config, "--background", "--json", "--set", "environment.id=local/urgent")
    run_id = json.loads(flash(*ask, "--priority", "low").stdout)["run_id"]
    assert json.loads(flash("status", run_id, "--json").stdout)["priority"] == "low"
    assert flash("priority", run_id, "high").stdout.startswith(f"{run_id} has priority high: queued; waiting for")
    assert json.loads(flash("priority", run_id, "normal", "--json").stdout)["priority"] == "normal"
    for wrong in ((*ask, "--priority", "urgent"), ("priority", run_id, "urgent"), ("priority", run_id)):
        assert flash(*wrong).exit_code == 2
    flash("cancel", run_id)
    while json.loads(flash("status", run_id, "--json").stdout)["state"] != "cancelled":
        time.sleep(0.05)
    late = flash("priority", run_id, "high")
    assert (late.exit_code, len(errors_of(late))) == (1, 1)
    assert flash("env", "delete", "local/urgent", "-y").exit_code == 0


def test_an_orgs_share_is_set_by_the_owner(flash):
    assert flash("admin", "org", "create", "acme").exit_code == 0
    assert flash("admin", "org", "share", "acme", "2.5").stdout == "acme has a share of 2.5\n"
    assert "acme  share 2.5\n" in flash("admin", "org", "list").stdout
    assert flash("admin", "org", "share", "acme", "0").exit_code == 2
    assert flash("admin", "org", "share", "nobody", "1").exit_code == 1
    assert "org=acme share=2.5" in flash("admin", "audit").stdout
    assert flash("admin", "org", "revoke", "acme").exit_code == 0


def test_keep_says_how_long(flash, package, config):
    assert flash("env", "push", "--name", "kept", package).exit_code == 0
    ask = ("train", config, "--background", "--json", "--set", "environment.id=local/kept")
    run_id = json.loads(flash(*ask).stdout)["run_id"]
    assert flash("keep", run_id).stdout == f"{run_id} is kept for good\n"
    assert json.loads(flash("keep", run_id, "--json").stdout)["managed"]["pinned"] is True
    assert flash("keep", run_id, "--days", "30").stdout == f"{run_id} is kept for 30 day(s) from its end\n"
    assert flash("keep", run_id, "--no").stdout == f"{run_id} is kept as long as the server keeps any run\n"
    assert json.loads(flash("status", run_id, "--json").stdout)["managed"]["pinned"] is False
    for wrong in (["--no", "--days", "3"], ["--days", "-1"]):
        assert flash("keep", run_id, *wrong).exit_code != 0
    assert flash("cancel", run_id).exit_code == 0
    assert flash("env", "delete", "local/kept", "-y").exit_code == 0


def test_login_points_every_command_at_another_server(flash, served, home, monkeypatch):
    server = local_server.ensure(served)
    monkeypatch.setenv("FLASH_HOME", str(home))  # another machine's home, so to say
    refused = flash("login", "--api-url", server.base_url, "--api-key", "wrong")
    assert (refused.exit_code, len(errors_of(refused))) == (1, 1)
    assert list(home.iterdir()) == []
    assert flash("login", "--api-url", server.base_url, input=server.token + "\n").exit_code == 0
    assert json.loads(flash("whoami", "--json").stdout)["server"] == server.base_url
    assert [path.name for path in home.iterdir()] == ["config.json"], "a local server was started for nothing"
    assert flash("login", "--local").exit_code == 0


def test_stop_is_clean_and_may_be_repeated(flash, served):
    pid = local_server.ensure(served).pid
    stopped = json.loads(flash("server", "stop", "--json").stdout)
    assert stopped == {"stopped": True, "pid": pid}
    assert json.loads(flash("server", "status", "--json").stdout)["running"] is False
    assert flash("server", "stop").exit_code == 0
