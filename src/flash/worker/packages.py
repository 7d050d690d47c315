"""Virtual environments for `environment.pip`: an overlay whose packages stand in front of the training stack's.

Owns building them, sharing them between runs by content, and turning pip's failures into one line. An overlay may
clash with the training stack, since only the environment host runs on it. Knows nothing of environments' code.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import site
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flash.errors import FlashError, InternalError, InvalidInput, Unavailable
from flash.launching.accounts import Account
from flash.worker.environment_host import base_environment

INSTALL_TIMEOUT_S = 900.0
COMPLETE = ".complete"  # written last: an overlay without it was never finished
_FORMAT = 1  # raised when the way overlays are built changes


def prepare(
    requirements: Sequence[str],
    *,
    cache_dir: str | Path,
    timeout_s: float = INSTALL_TIMEOUT_S,
    on_output: Callable[[str], None] = lambda line: None,
    account: Account | None = None,
) -> str:
    """The Python to run an environment host with: this one, or an overlay's with the requirements installed.

    An overlay that is there already is used as it is; one that another run is building is waited for. With an
    `account` pip runs as them and `cache_dir` is theirs, for one attempt: packages run code when they are built, and
    nobody else should have to trust what they left. Raises InvalidInput for a requirement that can't be met,
    Unavailable when the package index can't be reached.
    """
    wanted = [requirement.strip() for requirement in requirements]
    if not wanted:
        return sys.executable
    for requirement in wanted:
        _check(requirement)
    constraints = _constraints()
    folder = Path(cache_dir).resolve() / _key(wanted, constraints)
    python = folder / "bin" / "python"
    if account is not None:
        _build(account.folder(folder.parent) / folder.name, wanted, constraints, timeout_s, on_output, account)
        return str(python)
    if (folder / COMPLETE).is_file():
        return str(python)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        if not (folder / COMPLETE).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            try:
                _build(folder, wanted, constraints, timeout_s, on_output, None)
                (folder / COMPLETE).touch()
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
    return str(python)


def _check(requirement: str) -> None:
    if not requirement or requirement.startswith("-") or not requirement.isprintable():
        raise InvalidInput(
            f"environment.pip {requirement!r}: must be one requirement, e.g. openai>=1.0; options are not taken"
        )


def _constraints() -> list[str]:
    """torch stays the training stack's: any other one would bring gigabytes that the host's machine can't use."""
    try:
        return [f"torch=={importlib.metadata.version('torch').split('+')[0]}"]
    except importlib.metadata.PackageNotFoundError:
        return []


def _key(wanted: list[str], constraints: list[str]) -> str:
    parts = [_FORMAT, sorted(set(wanted)), constraints, sys.version, sys.prefix]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(
    folder: Path,
    wanted: list[str],
    constraints: list[str],
    timeout_s: float,
    on_output: Callable[[str], None],
    account: Account | None,
) -> None:
    # pip of the base installs into the overlay: an overlay's own pip and setuptools would shadow newer ones.
    base_has_pip = importlib.util.find_spec("pip") is not None
    create = [sys.executable, "-m", "venv", *(["--without-pip"] if base_has_pip else []), str(folder)]
    home = folder.with_suffix(".home")
    home.mkdir(exist_ok=True)
    if account is not None:
        account.give(home)
    try:
        status, output = _run(create, home, timeout_s, lambda line: None, account)
        if status != 0:
            raise InternalError("the environment's virtual environment can't be created", detail=output)
        _let_base_show_through(folder)
        files = {"requirements.txt": wanted, "constraints.txt": constraints}
        for name, lines in files.items():
            (folder / name).write_text("".join(f"{line}\n" for line in lines))
        if account is not None:
            account.give(folder)
        install = [
            *([sys.executable, "-m", "pip", "--python"] if base_has_pip else []),
            str(folder / "bin" / "python"),
            *([] if base_has_pip else ["-m", "pip"]),
            "install", "--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--retries", "2",
            "-c", str(folder / "constraints.txt"), "-r", str(folder / "requirements.txt"),
        ]  # fmt: skip
        status, output = _run(install, home, timeout_s, on_output, account)
        if status != 0:
            raise _failure(output, wanted)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _let_base_show_through(folder: Path) -> None:
    """Adds this interpreter's packages behind the overlay's own."""
    [packages] = (folder / "lib").glob("python*/site-packages")
    lines = [f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages()]
    (packages / "_training_stack.pth").write_text("".join(lines))


def _run(
    command: list[str], home: Path, timeout_s: float, on_output: Callable[[str], None], account: Account | None
) -> tuple[int, str]:
    """Runs a command in a group of its own; its status, and the end of what it said."""
    pip_settings = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    for config in (Path.home() / ".config/pip/pip.conf", Path.home() / ".pip/pip.conf"):
        if config.is_file():  # the home of these processes is an empty folder, and an index may be configured there
            pip_settings.setdefault("PIP_CONFIG_FILE", str(config))
    pip_settings.setdefault("PIP_CACHE_DIR", str(home.parent / "pip"))
    process = subprocess.Popen(
        command,
        env={**base_environment(home), **pip_settings},
        cwd=home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        **(account.popen if account else {}),
    )
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(timeout_s, expire)
    timer.start()
    lines: list[str] = []
    try:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                lines.append(line)
                del lines[:-2000]
                on_output(line.rstrip())
        status = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if expired.is_set():
        raise InvalidInput(
            f"installing environment.pip took longer than {timeout_s:g} s and was stopped",
            remedy="ask for fewer packages, or for ones with ready-made wheels",
            detail="".join(lines)[-8000:],
        )
    return status, "".join(lines)


_UNREACHABLE = re.compile(
    r"NewConnectionError|ConnectTimeoutError|ReadTimeoutError|NameResolutionError|Temporary failure in name|ProxyError"
    r"|Network is unreachable|Connection refused|Could not fetch URL"
)
_NOT_FOUND = re.compile(r"No matching distribution found for (.+)")
_INVALID = re.compile(r"Invalid requirement: ('.*?'|\S+)")


def _failure(output: str, wanted: list[str]) -> FlashError:
    detail = output[-8000:]
    missing = _NOT_FOUND.search(output)
    if _UNREACHABLE.search(output):
        what = missing[1].strip() if missing else ", ".join(wanted)
        return Unavailable(
            f"environment.pip {what}: the package index can't be reached",
            remedy="check the worker's network, or leave the requirement out",
            detail=detail,
        )
    if missing:
        return InvalidInput(
            f"environment.pip {missing[1].strip()}: no such package or version for this Python",
            remedy="check its name and version",
            detail=detail,
        )
    if "ResolutionImpossible" in output or "conflicting dependencies" in output:
        torch = [line for line in wanted if re.match(r"torch\b", line)]
        reason = (
            f"{torch[0]} asks for another torch than the training stack's"
            if torch
            else f"the requirements contradict each other ({', '.join(wanted)})"
        )
        return InvalidInput(f"environment.pip: {reason}", remedy="loosen a version", detail=detail)
    if invalid := _INVALID.search(output):
        return InvalidInput(f"environment.pip: invalid requirement {invalid[1].strip()}", detail=detail)
    errors = [line.removeprefix("ERROR:").strip() for line in output.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1] if errors else "pip failed"
    return InvalidInput(
        f"environment.pip {', '.join(wanted)}: can't be installed: {reason[:300]}",
        remedy="the run's log has pip's own words",
        detail=detail,
    )
