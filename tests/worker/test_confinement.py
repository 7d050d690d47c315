"""User code as another user of the operating system: what it must not read it can't, and its own work goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import pwd
import shutil
import site
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.worker.test_packages import wheel
from torture.machine import Machine, wait_for

import flash
from flash.errors import InvalidInput
from flash.launching.accounts import Account, account_of, check_account, remove_quarters
from flash.worker.environment_host import EnvironmentHost, HostSpec

USER = "nobody"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")

# Tries each path in turn, by whatever it is, and says how that went.
PEEK = '''
import os, pathlib

def peek(path):
    try:
        if path.startswith("pid "):
            os.kill(int(path[4:]), 0)
            return "signalled"
        if os.path.isdir(path):
            return "listed " + " ".join(sorted(os.listdir(path)))
        with open(path, "rb") as file:
            return "read " + file.read(200).decode("latin1")
    except OSError as error:
        return "refused" if isinstance(error, PermissionError) else f"failed: {type(error).__name__}"
'''
ENVIRONMENT = PEEK + '''
import sys
from freesolo.environments import EnvironmentSingleTurn, RewardResult

class Env(EnvironmentSingleTurn):
    dataset = [{"input": "a", "output": "b"}] * 8

    def __init__(self, paths):
        super().__init__()
        self.paths = paths

    def build_prompt_messages(self, example, prompt_text):
        parent = os.getppid()
        paths = [*self.paths, f"/proc/{parent}/environ", f"/proc/{parent}/mem", f"/proc/{parent}/fd", f"pid {parent}"]
        outside = "|".join(f"{path} {peek(path)}" for path in paths if path)
        pathlib.Path(os.environ["HOME"], "mine").write_text("mine")
        pathlib.Path(os.environ["TMPDIR"], "mine").write_text("mine") if "TMPDIR" in os.environ else None
        status = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
        packages = pathlib.Path(sys.prefix).stat() if self.paths else os.stat(".")
        inside = f"{packages.st_uid} {os.getuid()} {os.getgroups()} {status['NoNewPrivs']} {sorted(os.listdir('.'))}"
        print(f"told {inside}|{outside}")
        return [{"role": "user", "content": f"{inside}|{outside}"}]

    def score_response(self, example, response):
        return RewardResult(score=0.0)

def load_environment(paths=()):
    return Env(list(paths))
'''


@pytest.fixture(scope="module")
def python() -> Iterator[str]:
    """A Python with Flash that USER can run: this one, or, where that is root's alone, another of its version."""
    root = Path(tempfile.mkdtemp(prefix="flash-python-"))
    root.chmod(0o755)
    try:
        check_account(USER)
        yield sys.executable
    except InvalidInput:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        other = next(path for path in (Path("/usr/bin", version), Path("/usr/local/bin", version)) if path.exists())
        subprocess.run([other, "-m", "venv", "--without-pip", root / "venv"], check=True)
        [packages] = (root / "venv/lib").glob("python*/site-packages")
        lines = [f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages()]
        (packages / "everything.pth").write_text("".join(lines))
        found = str(root / "venv/bin/python")
        try:
            check_account(USER, python=found)
        except InvalidInput:  # the checkout too is root's alone
            large = shutil.ignore_patterns("torch", "nvidia", "playwright", "__pycache__", "*.pth")
            for place in site.getsitepackages():
                shutil.copytree(place, packages, symlinks=True, ignore=large, dirs_exist_ok=True)
            shutil.copytree(Path(flash.__file__).parent, packages / "flash", dirs_exist_ok=True)
            check_account(USER, python=found)
        yield found
    finally:
        shutil.rmtree(root)


@pytest.fixture
def account() -> Iterator[Account]:
    yield account_of(USER)
    remove_quarters(f"test-{os.getpid()}")


def hosted(python: str, account: Account, *paths: str) -> tuple[EnvironmentHost, Path]:
    root = account.quarters(f"test-{os.getpid()}")
    (root / "environment").mkdir()
    (root / "environment/environment.py").write_text(ENVIRONMENT)
    account.give(root / "environment")
    work = account.folder(root / "work")
    for name in ("home", "tmp"):
        account.folder(work / name)
    spec = HostSpec(root / "environment", work, {"paths": list(paths)}, {}, python=python, account=account)
    return EnvironmentHost(spec), root


def told(host: EnvironmentHost) -> list[str]:
    host.call("rows", {"split": "train", "limit": 0})
    [start] = host.call("start", {"split": "train", "indices": [0], "seed": 0})
    return str(start["messages"][0]["content"]).split("|")


@as_root
def test_it_is_another_user_in_no_group_and_lives_in_a_folder_of_its_own(python: str, account: Account):
    host, root = hosted(python, account)
    try:
        inside, *outside = told(host)
        assert inside.split(" ")[1:3] == [str(account.uid), "[]"] and " 1 [" in inside and "environment.py" in inside
        assert host.pid is not None
        ids = psutil.Process(host.pid)
        assert set(ids.uids()) == {account.uid} and set(ids.gids()) == {account.gid}
        assert (root / "work/home/mine").stat().st_mode & 0o777 == 0o600
        assert (root / "work/tmp/mine").stat().st_uid == account.uid
        assert {line.rpartition(" ")[2] for line in outside} == {"refused"}, outside  # its parent's
        host._process.kill()
        assert told(host)[0] == inside, "and so it is after a restart"
    finally:
        host.close()


@as_root
def test_two_hosts_of_one_user_are_strangers(python: str, account: Account, tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("of the server")
    neighbour, root = hosted(python, dataclasses.replace(account, gid=account.gid + 1))
    try:
        assert told(neighbour)[0]
        pid = neighbour.pid
        host, _ = hosted(
            python, account, str(secret), str(root), str(root / "work"), str(root / "work/home/mine"),
            str(root / "environment/environment.py"), f"/proc/{pid}/environ", f"/proc/{pid}/cwd", f"/proc/{pid}/root",
            f"/proc/{pid}/fd/0", f"/proc/{pid}/mem",
        )  # fmt: skip
        try:
            outside = told(host)[1:]
        finally:
            host.close()
        assert len(outside) == 14 and {line.rpartition(" ")[2] for line in outside} <= {"refused"}, outside
    finally:
        neighbour.close()


@as_root
def test_users_who_will_not_do_are_refused_in_a_line(python: str):
    for name, words in (("no-such-user", "no such user"), ("root", "must not be root")):
        with pytest.raises(InvalidInput, match=words):
            check_account(name)
    with tempfile.TemporaryDirectory() as ours:  # open to its owner alone, who is root
        hidden = Path(ours) / "python"
        hidden.symlink_to(python)
        with pytest.raises(InvalidInput, match=f"that user can't run {hidden}"):
            check_account(USER, python=str(hidden))
    check_account(USER, python=python)
    assert not list(Path(tempfile.gettempdir()).glob(f"flash-host-check-{os.getpid()}-*"))


@as_root
def test_a_server_without_the_right_to_it_does_not_start(python: str):
    home = Path(tempfile.mkdtemp(prefix="flash-unprivileged-"))
    entry = pwd.getpwnam(USER)
    try:
        os.chown(home, entry.pw_uid, entry.pw_gid)
        (home / "server.toml").write_text('home = "h"\nhost_user = "daemon"\nlog_to = "file"\n')
        found = subprocess.run(
            [python, "-P", "-m", "flash.control_plane.main", "--config", str(home / "server.toml")],
            user=entry.pw_uid, group=entry.pw_gid, extra_groups=[], cwd="/", capture_output=True, text=True,
            env={"PATH": os.defpath, "HOME": str(home)}, timeout=100, check=False,
        )  # fmt: skip
        [line] = found.stderr.splitlines()
        assert found.returncode == 1 and line.startswith("error: host_user = 'daemon': only root may")
    finally:
        shutil.rmtree(home)


@as_root
@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_a_run_of_a_real_server_learns_nothing(python: str, killed: bool):
    """Of the server's database, its vault's key, its token, its processes. What a package does when it is built is
    user code too, and so it is installed by the same user."""
    shared = Path(tempfile.mkdtemp(prefix="flash-shared-"))
    shared.chmod(0o755)  # nothing above the server's home keeps anybody out
    command = (python, "-P", "-m", "flash.control_plane.main")
    hold = shared / "hold"
    held = {"FLASH_FAILPOINTS": "trainer.step:6", "FLASH_FAILPOINTS_HOLD": str(hold)} if killed else {}
    machine = Machine(shared / "home", command=command, FLASH_SERVER_HOST_USER=USER, **held)
    home = machine.home
    try:
        hold.touch()
        machine.start()
        server = json.loads((home / "server.json").read_text())["pid"]
        paths = [
            home, home / "flash.db", home / "vault.key", home / "token", home / "server.json", home / "work",
            home / "artifacts", home / "logs" / "server.log", f"/proc/{server}/environ", f"/proc/{server}/fd",
        ]  # fmt: skip
        machine.push(ENVIRONMENT)
        train = {"epochs": 1000, "max_steps": 8 if killed else 4, "save_every": 2, "batch_size": 2, "lora_rank": 4}
        config = {
            "model": "flash/nano", "train": {**train, "max_length": 2048},
            "environment": {
                "id": "local/echo", "params": {"paths": [str(path) for path in paths]},
                "pip": [wheel(shared / "wheels", "flash_test_dependency", "1.0", "NAME = 'mine'")],
            },
        }  # fmt: skip
        run_id = machine.call("POST", "/api/runs", json={"config": config})["run_id"]
        if killed:
            wait_for(lambda: machine.status(run_id)["checkpoints"], 150)
            machine.processes(run_id, "flash.worker.supervisor")[0].kill()
            hold.unlink()
        status = machine.ended(run_id, 250)
        assert status["state"] == "done", status["summary"]
        wait_for(lambda: not list(Path(tempfile.gettempdir()).glob(f"flash-host-{run_id}.*")), 60)
        if killed:
            assert len(status["attempts"]) > 1
        texts = [event["data"].get("text", "") for event in machine.events(run_id) if event["kind"] == "log"]
        lines = [text.split("|") for text in texts if text.startswith("told ")]
        assert lines
        for inside, *outside in lines:
            uid = pwd.getpwnam(USER).pw_uid
            assert inside.startswith(f"told {uid} {uid} [] 1 ")
            assert len(outside) == len(paths) + 4
            assert {each.rpartition(" ")[2] for each in outside} == {"refused"}, outside
    finally:
        machine.close()
        shutil.rmtree(shared)
