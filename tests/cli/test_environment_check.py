"""`flash env setup` and `check`, which ask no server."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def starter(flash, tmp_path):
    folder = tmp_path / "My Task"
    assert flash("env", "setup", folder).exit_code == 0
    return folder


def test_what_setup_writes_passes_check_and_dry_run(flash, starter):
    assert 'id = "local/my-task"' in (starter / "config.toml").read_text()
    checked = flash("env", "check", starter)
    assert checked.exit_code == 0, checked.stderr
    assert "mean score 1.000" in checked.stdout
    assert flash("train", starter / "config.toml", "--dry-run").exit_code == 0


def test_setup_never_overwrites_unasked(flash, starter):
    (starter / "environment.py").write_text("mine")
    refused = flash("env", "setup", starter)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: ")
    assert (starter / "environment.py").read_text() == "mine"


def test_gold_answers_that_all_score_zero_are_an_error(flash, starter):
    text = (starter / "environment.py").read_text()
    (starter / "environment.py").write_text(
        text + "\nfrom freesolo.environments import RewardResult as R\n_load = load_environment\n"
        "def load_environment():\n"
        "    environment = _load()\n"
        "    environment.score_response = lambda *given: R(score=0.0)\n"
        "    return environment\n"
    )
    checked = flash("env", "check", starter, "--json")
    assert checked.exit_code == 1
    assert all(line.startswith("error: ") for line in checked.stderr.splitlines())
    assert "score 0" in checked.stderr
    assert json.loads(checked.stdout)["ok"] is False


def test_an_environment_that_raises_is_a_line_and_its_traceback_on_request(flash, starter):
    (starter / "environment.py").write_text("raise KeyError('lost')\ndef load_environment(): ...\n")
    checked = flash("env", "check", starter)
    assert checked.exit_code == 1
    assert "lost" in checked.stderr.splitlines()[0]
    assert "Traceback" not in checked.stderr
    assert "Traceback" in flash("env", "check", starter, "--debug").stderr


def test_check_takes_params_and_secrets_from_a_config(flash, starter, monkeypatch):
    monkeypatch.setenv("SERVICE_API_KEY", "kept")
    text = (starter / "environment.py").read_text()
    (starter / "environment.py").write_text(
        text + "\nimport os\n_load = load_environment\n"
        "def load_environment(wanted='nothing'):\n"
        "    assert (wanted, os.environ['SERVICE_API_KEY']) == ('this', 'kept')\n"
        "    return _load()\n"
    )
    config = starter / "config.toml"
    config.write_text(
        'model = "flash/nano"\n[environment]\nid = "a/b"\nsecrets = ["SERVICE_API_KEY"]\nparams = {wanted = "this"}\n'
    )
    assert flash("env", "check", starter).exit_code == 1
    checked = flash("env", "check", starter, "--config", config)
    assert checked.exit_code == 0, checked.stderr
