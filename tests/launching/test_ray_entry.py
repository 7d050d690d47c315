"""What a Ray job runs, without Ray: started by hand, with a control plane of a few lines and a worker of ours."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.launching.plane import Plane
from torture.machine import wait_for

from flash.launching.lineage import alive
from flash.launching.ray import TICKET
from flash.launching.ray_entry import STOPPED, remove_leftovers

# Says what it was told, and what it does when it is asked to stop.
WORKER = """
import os, pathlib, signal, subprocess, sys, time
hello = sys.stdin.readline()
home = pathlib.Path(os.environ["FLASH_HOME"])

def stop(*_):
    (home / "flushed").write_text("all")
    sys.exit(0 if mood == "obeys" else time.sleep(600))

mood = (home / "mood").read_text()
signal.signal(signal.SIGTERM, stop)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
(home / "told.draft").write_text(hello)
(home / "told.draft").rename(home / "told")
if mood == "ends":
    sys.exit(5)
time.sleep(600)
"""
ENTRY = f"""
import sys
from flash.launching.ray_entry import main

worker = (sys.executable, "-S", "-c", {WORKER!r})
main({{"attempt": worker, "engine": worker}})
"""


class Node:
    def __init__(self, home: Path, plane: Plane) -> None:
        self.home, self.plane = home, plane
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, worker_id: str, *, kind: str = "attempt", mood: str = "obeys") -> psutil.Process:
        """An entry whose worker was told its start line."""
        (self.home / "mood").write_text(mood)
        (self.home / "told").unlink(missing_ok=True)
        options = ["--kind", kind, "--id", worker_id, "--plane", self.plane.url]
        variables = {**os.environ, "FLASH_HOME": str(self.home), TICKET: "t"}
        self._started.append(subprocess.Popen([sys.executable, "-P", "-c", ENTRY, *options], env=variables))
        wait_for((self.home / "told").exists)
        return psutil.Process(self._started[-1].pid)

    def told(self) -> dict[str, Any]:
        return dict(json.loads((self.home / "told").read_text()))

    def status(self) -> int:
        """The newest entry's exit status."""
        return self._started[-1].wait(60)

    def close(self) -> None:
        for each in self._started:
            if each.poll() is None:
                for process in psutil.Process(each.pid).children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        process.kill()
                each.kill()
                each.wait()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    plane = Plane()
    node = Node(tmp_path, plane)
    yield node
    node.close()
    plane.close()


@pytest.mark.parametrize("mood", ["obeys", "stays"])
def test_a_worker_is_asked_to_stop_before_all_that_is_left_is_killed(node: Node, mood: str):
    entry = node.start("flash-1-00000000.1", mood=mood)
    family = entry.children(recursive=True)
    assert len(family) == 2
    entry.terminate()
    assert node.status() == STOPPED
    assert (node.home / "flushed").read_text() == "all"
    assert not [process for process in family if alive(process)]
    assert not list((node.home / "work").iterdir())


def test_a_worker_that_ends_ends_its_job(node: Node):
    node.start("flash-1-00000000.1", mood="ends")
    assert node.status() == 5
    assert not (node.home / "flushed").exists() and not list((node.home / "work").iterdir())


def test_what_a_killed_entry_left_goes_with_the_next_one_and_nothing_else_does(node: Node):
    work = node.home / "work"
    killed = node.start("flash-1-00000000.1")
    family = killed.children(recursive=True)
    killed.kill()
    node.status()
    for process in family:  # the worker goes with its entry, and what it started lives on
        with contextlib.suppress(psutil.Error):
            process.kill()
    wait_for(lambda: not [process for process in family if alive(process)])
    living = node.start("flash-1-00000001.1")
    node.start("flash-1-00000002.1")
    (work / "flash-1-00000003" / "1").mkdir(parents=True)  # an attempt's of a server on this machine
    remove_leftovers(work)
    assert {each.name for each in work.iterdir()} == {"flash-1-00000001.1", "flash-1-00000002.1", "flash-1-00000003"}
    assert alive(living)


def test_a_folder_is_held_as_long_as_its_worker_lives(tmp_path: Path):
    folder = tmp_path / "flash-1-00000000.1"
    folder.mkdir()
    with (folder / ".entry").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        remove_leftovers(tmp_path)
        assert folder.exists()
    remove_leftovers(tmp_path)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("wish", "installed", "found"),
    [
        (None, True, None),
        ("auto", True, "engines/vllm/bin/python"),
        ("auto", False, None),
        ("vllm", True, "engines/vllm/bin/python"),
        ("vllm", False, "engines/vllm/bin/python"),  # the host says that it is not there
    ],
)
def test_an_engine_has_its_own_nodes_vllm(node: Node, wish: str | None, installed: bool, found: str | None):
    if installed:
        (node.home / "engines" / "vllm").mkdir(parents=True)
        (node.home / "engines" / "vllm" / "installed.txt").write_text("vllm==0\n")
    node.plane.hello = {"work_dir": "-", "threads": 0, "vllm_python": wish}
    node.start("engine-1", kind="engine")
    told = node.told()
    assert told["vllm_python"] == (None if found is None else str(node.home / found))
    assert (told["cache_dir"], told["bind"]) == (str(node.home / "cache"), "127.0.0.1")
