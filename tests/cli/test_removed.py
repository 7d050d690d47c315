"""What the commands say of a run whose files and events were kept long enough: on a server that keeps neither."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from flash.client import local_server


@pytest.fixture
def run_id(flash, config, home, tmp_path, monkeypatch):
    """A cancelled run of which everything has gone that goes."""
    monkeypatch.setenv("FLASH_SERVER_DEVICES", "")
    for name in ("KEEP_FILES_DAYS", "KEEP_EVENTS_DAYS", "CLEAN_INTERVAL_S"):
        monkeypatch.setenv(f"FLASH_SERVER_{name}", "0")
    package = tmp_path / "package"
    package.mkdir()
    (package / "environment.py").write_text("def load_environment(): ...\n")
    try:
        assert flash("env", "push", "--name", "arithmetic", package).exit_code == 0
        submitted = flash("train", config, "--background", "--json")
        assert submitted.exit_code == 0, submitted.stderr
        run_id = json.loads(submitted.stdout)["run_id"]
        assert flash("cancel", run_id).exit_code == 0
        deadline = time.monotonic() + 60
        while not all(managed(flash, run_id)[f"{what}_removed_at"] for what in ("files", "events")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield run_id
    finally:
        local_server.stop(home)


def managed(flash, run_id: str) -> dict[str, float | None]:
    return dict(json.loads(flash("status", run_id).stdout)["managed"])


def test_each_command_says_when_and_why_it_went(flash, run_id: str, tmp_path: Path):
    day = time.strftime("%Y-%m-%d", time.gmtime(managed(flash, run_id)["events_removed_at"]))
    removed = f"log, metrics and samples of {run_id} were removed on {day}, by the server's keep_events_days"
    for command in (("log", run_id), ("log", run_id, "-f"), ("samples", run_id)):
        said = flash(*command)
        assert (said.stdout, removed in said.stderr) == ("", True), command
    trace = tmp_path / "trace.json"
    profile = flash("profile", run_id, "--output", trace)
    assert profile.exit_code == 1 and removed in profile.stderr and not trace.exists()
    assert "keep_files_days" in json.loads(flash("status", run_id).stdout)["next"]
    kept = flash("keep", run_id)
    assert kept.exit_code == 1 and "keep_files_days" in kept.stderr and "for good" not in kept.stdout
