"""A real Ray cluster on this machine: a head that takes no worker, and nodes that do, with token authentication.

Each has an address of its own in 127.0.0.0/8, since Ray takes 127.0.0.1 for "this machine's other address", and
clusters side by side have networks of their own. Everything is started by `ray start`, and ended by pid, together with
what its jobs left.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
import psutil
from torture.machine import wait_for

from flash.launching.ray import ENTRY

RAY = Path(sys.executable).parent / "ray"
MARK = "FLASH_TEST_CLUSTER"  # in the environment of every process of a cluster
# Seconds in place of minutes until a death is noticed.
QUICK = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
}


def free_port(host: str) -> int:
    return free_ports(host, 1)[0]


def free_ports(host: str, count: int, *, but: int = 0) -> list[int]:
    """No two alike, and not `but`: asked for one after the other, a port that was let go may come again."""
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        while len(ports) < count:
            free = held.enter_context(socket.socket())
            free.bind((host, 0))
            ports += {int(free.getsockname()[1])} - {but}
    return ports


class Cluster:
    """Start it with `with`. `add_node` gives a node's number; nodes have a FLASH_HOME of their own."""

    def __init__(self, **variables: str) -> None:
        self.token = secrets.token_hex(32)
        self.folder = Path(tempfile.mkdtemp(prefix="flash-ray-"))
        self._network = f"127.{secrets.randbelow(200) + 20}.{secrets.randbelow(250) + 1}"
        self._head = f"{self._network}.2"
        self._port = free_port(self._head)
        self.address = f"http://{self._head}:{self._port}"
        self._name = secrets.token_hex(8)
        self._variables = variables
        self._gcs = 0
        self._nodes = 0

    @property
    def settings(self) -> dict[str, str]:
        """A server's, as variables."""
        return {
            "FLASH_SERVER_LAUNCHER": "ray",
            "FLASH_SERVER_RAY_ADDRESS": self.address,
            "FLASH_SERVER_RAY_TOKEN": self.token,
            "FLASH_SERVER_RAY_CPUS": "1",
            "FLASH_SERVER_RAY_LOST_S": "3",
            "FLASH_SERVER_DEVICES": "cpu",
            "FLASH_SERVER_CLAIM_TIMEOUT_S": "90",
        }

    def __enter__(self) -> Cluster:
        try:
            self.start_head()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while found := self.processes():
            for process in found:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(found, timeout=5)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_head(self) -> None:
        """Another one after `kill_head`: the same dashboard, and nothing of what the old one knew."""
        self._gcs, client = free_ports(self._head, 2, but=self._port)
        self._start(
            "--head", f"--port={self._gcs}", f"--node-ip-address={self._head}", f"--dashboard-host={self._head}",
            f"--dashboard-port={self._port}", "--include-dashboard=true", f"--temp-dir={self.folder}",
            f"--ray-client-server-port={client}", "--num-cpus=0", home=self.folder / "head",
        )  # fmt: skip

    def add_node(self, cpus: int = 2, *, entry: Path | None = None) -> int:
        """`entry`: a program that this node runs in place of Flash's own entry."""
        self._nodes += 1
        address = f"{self._network}.{2 + self._nodes}"
        before = len(self.living())
        home = self.home(self._nodes)
        if entry is not None:
            home.mkdir(parents=True)
            python = home / "python"
            python.write_text(f'#!/bin/sh\ncase "$3" in {ENTRY}) shift 3; set -- {entry} "$@";; esac\n'
                              f'exec {sys.executable} "$@"\n')  # fmt: skip
            python.chmod(0o755)
        self._start(
            f"--address={self._head}:{self._gcs}", f"--node-ip-address={address}", f"--num-cpus={cpus}",
            home=home,
        )  # fmt: skip
        wait_for(lambda: len(self.living()) > before)
        return self._nodes

    def home(self, node: int) -> Path:
        return self.folder / f"node-{node}"

    def kill_node(self, node: int) -> None:
        """As a machine's end looks to the others: its raylet is gone at once."""
        option = f"--node_ip_address={self._network}.{2 + node}"
        [raylet] = [found for found in self.processes("raylet") if option in found.cmdline()]
        raylet.kill()

    def kill_nodes(self) -> None:
        for node in self.living():
            if not node["is_head_node"]:
                self.kill_node(int(node["node_ip"].rpartition(".")[2]) - 2)
        wait_for(lambda: len(self.living()) == 1)

    def kill_head(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                at_head = process.environ().get("FLASH_HOME") == str(self.folder / "head")
                if at_head:
                    process.kill()
        wait_for(lambda: not self.answers())

    def answers(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self._get("/api/version", timeout=2).is_success
        return False

    def living(self) -> list[dict[str, Any]]:
        nodes = self._get("/api/v0/nodes?detail=1").json()["data"]["result"]["result"]
        return [node for node in nodes if node["state"] == "ALIVE"]

    def jobs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._get("/api/jobs/").json()
        return found

    def processes(self, name: str | None = None) -> list[psutil.Process]:
        """Living ones of this cluster, its jobs' among them as long as they kept its mark."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() == psutil.STATUS_ZOMBIE or (name is not None and process.name() != name):
                    continue
                own = process.environ().get(MARK) == self._name or str(self.folder) in " ".join(process.cmdline())
                if own and process.pid != os.getpid():
                    found.append(process)
        return found

    def _get(self, path: str, timeout: float = 10) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.get(self.address + path, headers=headers, timeout=timeout, trust_env=False)

    def _start(self, *options: str, home: Path) -> None:
        hidden = ("FLASH_", "FREESOLO_", "WANDB_", "RAY_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        own = {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, MARK: self._name, "FLASH_HOME": str(home),
            "PATH": f"{home}:{RAY.parent}:{kept['PATH']}",
        }  # fmt: skip
        home.mkdir(parents=True, exist_ok=True)
        with (self.folder / "ray.out").open("ab") as output:
            done = subprocess.run(
                [RAY, "start", *options, "--disable-usage-stats", "--object-store-memory=100000000",
                 "--dashboard-agent-listen-port=0"],
                env={**kept, **QUICK, **self._variables, **own}, stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, timeout=120, cwd=home,
            )  # fmt: skip
        assert done.returncode == 0, (self.folder / "ray.out").read_text()[-3000:]

