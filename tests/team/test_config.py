"""server.toml: read, overridden, refused with every mistake in it; logs; who is believed about addresses."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash.control_plane.administering import OnTheMachine
from flash.control_plane.logs import JsonLines
from flash.control_plane.main import main
from flash.control_plane.server_config import load_server_config, variable
from flash.control_plane.settings import ServerSettings
from flash.errors import ConfigError, InvalidInput
from flash.records import KeyRequest

WHOLE = """
home = "data"
port = 8765
database_url = "postgresql://flash:s3cret-of-the-file@127.0.0.1/flash"
trusted_proxies = ["10.0.0.0/8"]
devices = ["cuda:0", "cuda:1"]
keep_files_days = 30

[store_options]
region = "eu-central-1"
secret_access_key = "canary-of-the-bucket"

[usd_per_hour]
gpu = 2.5

[stall_s]
"loading model" = 60
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "server.toml"
    path.write_text(text)
    return path


def test_a_file_is_read_and_variables_win(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("FLASH_HOME", "/elsewhere")
    environment = {"FLASH_SERVER_PORT": "9000", "FLASH_SERVER_STORE_OPTIONS": "region=x,endpoint=http://127.0.0.1:1"}
    found = load_server_config(write(tmp_path, WHOLE), environment)
    assert (found.home, found.port) == (tmp_path / "data", 9000)
    assert found.store_options == {"region": "x", "endpoint": "http://127.0.0.1:1"}
    assert found.devices == ("cuda:0", "cuda:1") and found.usd_per_hour == {"gpu": 2.5}
    assert found.times.files_s == 30 * 86400 and found.times.state_s is None
    assert (found.idle_exit_s, found.log_to) == (0.0, "stderr"), "not a laptop's"
    assert found.database.drivername == "postgresql+psycopg"
    assert "s3cret" not in repr(found) and "canary" not in repr(found)
    assert load_server_config(write(tmp_path, ""), {}).home == Path("/elsewhere")


RAY = 'launcher = "ray"\nray_address = "http://ray-head:8265"\nworker_url = "http://flash:8765"\n'


def test_a_cluster_is_named_with_the_way_back(tmp_path: Path):
    found = load_server_config(write(tmp_path, RAY), {"FLASH_SERVER_RAY_TOKEN": "canary-of-the-cluster"})
    assert found.ray_token is not None and found.ray_token.get_secret_value() == "canary-of-the-cluster"
    assert "canary" not in repr(found)
    assert load_server_config(write(tmp_path, RAY + 'devices = ["cuda", "cpu"]\n'), {}).devices == ("cuda", "cpu")
    near = 'launcher = "ray"\nray_address = "http://127.0.0.1:8265"\n'
    assert load_server_config(write(tmp_path, near), {}).worker_url is None, "one machine needs no way back"
    assert load_server_config(write(tmp_path, 'devices = ["cuda:0"]\n'), {}).ray_address is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('launcher = "ray"\n', "the address of the head's dashboard"),
        ('launcher = "ray"\nray_address = "http://ray-head:8265"\n', "set worker_url"),
        ('launcher = "ray"\nray_address = "ray://ray-head:10001"\n', "pattern"),
        (RAY + 'devices = ["cuda:0"]\n', "names kinds"),
        ('launcher = "slurm"\n', "'local' or 'ray'"),
        (RAY + "ray_cpus = 0\n", "greater than or equal to 1"),
    ],
)
def test_a_cluster_that_can_not_work_is_refused_in_a_line(tmp_path: Path, text: str, words: str):
    with pytest.raises(InvalidInput) as refused:
        load_server_config(write(tmp_path, text), {})
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_every_mistake_is_told_at_once_each_in_a_line(tmp_path: Path):
    text = 'lease = 3\nport = 70000\nhost = 5\nheartbeat_s = true\nlog_format = "xml"\n[stall_s]\ndreaming = 3\n'
    with pytest.raises(ConfigError) as told:
        load_server_config(write(tmp_path, text), {})
    problems = sorted(problem.split("server.toml: ")[1] for problem in told.value.problems)
    assert [problem.split(":")[0].split(" ")[0] for problem in problems] == [
        "heartbeat_s", "host", "lease", "log_format", "port", "stall_s",
    ]  # fmt: skip
    assert any("did you mean lease_s?" in problem for problem in problems)
    assert any("dreaming" in problem for problem in problems)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("port = ", "is not TOML"),
        ('database_url = "mysql://root:hunter22@db/x"', "mysql"),
        ('database_url = 7\n', "database_url"),
        ('store_options = "hunter22"\n', "store_options"),
    ],
)
def test_mistakes_never_quote_what_may_be_secret(tmp_path: Path, text: str, words: str, capsys):
    assert main(["--config", str(write(tmp_path, f'home = "h"\nlog_to = "file"\n{text}'))]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line and "hunter22" not in line


def test_a_network_that_could_reach_it_is_refused_before_anybody_has_a_key(tmp_path: Path):
    """Refused in a line, and on record; a key that was revoked is nobody's."""
    path = write(tmp_path, 'home = "h"\nhost = "0.0.0.0"\ndevices = []\nlog_to = "file"\n')
    with closing(OnTheMachine(path)) as there:
        made = there.create_key(KeyRequest(name="ada", role="admin", org="local"))
        there.revoke_key(made.key.id, "local")
    command = [sys.executable, "-P", "-m", "flash.control_plane.main", "--config", str(path)]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=100)
    [line] = refused.stderr.splitlines()
    assert refused.returncode == 1
    assert "host = '0.0.0.0': nobody has a key" in line and "flash admin key create" in line
    with closing(OnTheMachine(path)) as there:
        [entry] = there.audit(None, 1, None)
    told = (entry.action, entry.status, entry.actor, entry.object)
    assert told == ("server start", InvalidInput.status, "server", "0.0.0.0")
    assert entry.message is not None and "this machine only" in entry.message


def test_a_file_that_is_not_there_and_one_that_is_sound(tmp_path: Path, capsys):
    assert main(["--config", str(tmp_path / "none.toml")]) == 1
    assert "can't be read" in capsys.readouterr().err
    assert main(["--config", str(write(tmp_path, WHOLE)), "--check"]) == 0
    assert not (tmp_path / "data").exists(), "a check makes nothing"


VALUES = st.one_of(
    st.integers(-(10**12), 10**12), st.floats(allow_nan=False, allow_infinity=False), st.booleans(),
    st.text(st.characters(codec="ascii", exclude_characters='"\\\n\r\x7f', min_codepoint=32), max_size=20),
)  # fmt: skip


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from([*ServerSettings.model_fields, "x"]), VALUES, max_size=5))
def test_whatever_a_file_says_it_is_read_or_refused_by_key(tmp_path_factory, values: dict):
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    path = write(tmp_path_factory.mktemp("any"), "\n".join(lines))
    try:
        load_server_config(path, {})
    except InvalidInput as error:
        problems = error.problems if isinstance(error, ConfigError) else [error.message]
        assert all("\n" not in problem and any(name in problem for name in values) for problem in problems)


def test_every_setting_has_a_variable_of_its_own():
    names = {variable(name) for name in ServerSettings.model_fields}
    assert len(names) == len(ServerSettings.model_fields)
    assert names - {"GITHUB_TOKEN"} == {
        f"FLASH_SERVER_{name.upper()}" for name in ServerSettings.model_fields if name != "github_token"
    }


# --- what it says and whom it believes ----------------------------------------------------------------------


def test_a_line_of_json_has_what_was_said_and_the_traceback():
    record = logging.makeLogRecord({"name": "flash.x", "msg": "%s ü", "args": ("said",), "levelno": 40})
    record.levelname, record.run = "ERROR", "flash-1"
    try:
        raise ValueError("broken")
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    line = JsonLines().format(record)
    told = json.loads(line)
    assert "\n" not in line
    assert (told["level"], told["logger"], told["message"], told["run"]) == ("error", "flash.x", "said ü", "flash-1")
    assert "ValueError: broken" in told["traceback"] and told["time"].endswith("Z")


def test_a_request_is_one_line_with_who_asked(open_team, caplog):
    team = open_team(access_log=True)
    key = team.key("acme", name="ada")
    caplog.clear()
    with caplog.at_level(logging.INFO, "flash.requests"):
        answer = team.call(key, "GET", "/api/runs/none", headers={"X-Request-Id": "trace-7"})
    assert answer.headers["x-request-id"] == "trace-7"
    [record] = [found for found in caplog.records if found.name == "flash.requests"]
    said = json.loads(JsonLines().format(record))
    assert (said["route"], said["status"]) == ("/api/runs/{run_id}", 404)
    assert (said["org"], said["request_id"]) == ("acme", "trace-7")
    assert key not in json.dumps(said)
    assert team.call(key, "GET", "/api/runs", headers={"X-Request-Id": 'a" b'}).headers["x-request-id"] != 'a" b'


def test_readiness_names_the_part_that_is_not_well(open_team):
    team = open_team()
    ready = team.http.get("/api/ready")
    assert (ready.status_code, ready.json()["status"]) == (200, "ready")
    team.plane.stopping.set()
    stopping = team.http.get("/api/ready")
    assert (stopping.status_code, stopping.json()["parts"]["server"]) == (503, "stopping")
    assert team.http.get("/api/health").status_code == 200, "it lives all the same"


def test_the_owners_metrics_are_the_whole_servers_and_others_see_their_own(open_team):
    team = open_team()
    key = team.key("acme")
    team.push(key, "acme")
    team.run(key, "acme")
    whole = team.call(team.owner, "GET", "/metrics").text
    assert 'flash_server_runs{org="acme",state="queued"} 1' in whole
    assert 'flash_http_requests_total{method="POST",route="/api/runs",status="201"} 1' in whole
    assert "flash_server_leads 1" in whole or team.plane.database.shared
    assert "process_resident_memory_bytes" in whole
    own = team.call(key, "GET", "/metrics").text
    assert "flash_server_" not in own and "flash_http_" not in own
    assert 'flash_runs{state="queued"} 1' in own
