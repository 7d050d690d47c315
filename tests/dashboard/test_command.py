"""`flash dashboard`, and where other commands point to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from flash.cli.main import app
from flash.client import local_server


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FLASH_HOME", str(tmp_path))
    monkeypatch.setenv("FLASH_SERVER_DEVICES", "")
    for name in ("FLASH_API_URL", "FREESOLO_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path
    local_server.stop(tmp_path)


def flash(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, prog_name="flash")


def test_it_prints_an_address_that_lets_in_once_and_names_a_run(home: Path):
    link = flash("dashboard").stdout.strip()
    server = local_server.recorded(home)
    assert server is not None
    page, _, code = link.partition("#code=")
    assert page == f"{server.base_url}/dashboard" and len(code) > 30 and server.token not in link
    with httpx.Client(base_url=server.base_url, trust_env=False) as http:
        assert "<title>Flash</title>" in http.get("/dashboard").text
        answer = http.post("/api/dashboard/session", json={"code": code})
        assert answer.json() == {"key": server.token}
        assert http.post("/api/dashboard/session", json={"code": code}).status_code == 401
    assert json.loads(flash("dashboard", "--json").stdout)["url"].startswith(page)
    unknown = flash("dashboard", "flash-1-00000000")
    assert unknown.exit_code == 1 and "flash-1-00000000" in unknown.stderr
