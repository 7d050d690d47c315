"""Another user of the operating system, as whom what users bring runs on a team's server: who that is, whether this
process may start programs as them, and the folders in which they live.

Owns the kernel's side of it: user, group, modes. Each attempt gets a group of its own, so that of two hosts of the
same user neither reads the other's folder, variables or memory. They are one user all the same, and could end each
other. Knows nothing of environments.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash.errors import InvalidInput

_FIRST_GROUP = 1 << 30  # beyond what systems give out; the process that owns a host adds its own number
_PROBE = "import os, sys; os.listdir(sys.argv[1]); import flash.errors, pydantic, freesolo"
_REMEDY = "start the server as root, or leave host_user out"


@dataclass(frozen=True)
class Account:
    """A user, with a group that no one else is in."""

    name: str
    uid: int
    gid: int

    @property
    def popen(self) -> dict[str, Any]:
        """What `subprocess.Popen` needs to start a program as them: no group but the one, no file for others."""
        return {"user": self.uid, "group": self.gid, "extra_groups": [], "umask": 0o077}

    def quarters(self, label: str) -> Path:
        """A new folder that they may enter and not change, outside everything of the server's."""
        root = Path(tempfile.mkdtemp(prefix=f"{_prefix(label)}-"))
        os.chown(root, 0, self.gid)
        root.chmod(0o750)  # what stands in it can't be replaced by a link to something else
        return root

    def folder(self, path: Path) -> Path:
        """Makes a folder of theirs."""
        path.mkdir(parents=True)
        self.give(path)
        return path

    def give(self, root: Path) -> None:
        """Makes a tree theirs and nobody else's. Only for one that they have not touched yet."""
        for path in (root, *root.rglob("*")):
            os.chown(path, self.uid, self.gid, follow_symlinks=False)
        root.chmod(0o700)


def account_of(name: str) -> Account:
    """The account for what this process starts. InvalidInput if there is no such user, or no right to be them."""
    told = f"host_user = {name!r}"
    try:
        uid = pwd.getpwnam(name).pw_uid
    except KeyError:
        raise InvalidInput(f"{told}: this machine has no such user", remedy=f"make one: useradd {name}") from None
    if uid == 0:
        raise InvalidInput(f"{told}: must not be root", remedy="name a user who may nothing")
    if os.geteuid() != 0:
        raise InvalidInput(f"{told}: only root may start programs as another user", remedy=_REMEDY)
    return Account(name, uid, _FIRST_GROUP + os.getpid())


def check_account(name: str, *, python: str = sys.executable) -> None:
    """Starts Python as them, as an environment's host would be started. InvalidInput, in one line, if it fails."""
    account, label = account_of(name), f"check-{os.getpid()}"
    try:
        root = account.quarters(label)
        found = subprocess.run(
            [python, "-P", "-s", "-c", _PROBE, str(root)],
            capture_output=True, text=True, errors="replace", cwd="/", env={"PATH": os.defpath}, check=False,
            **account.popen,
        )  # fmt: skip
        problem = found.stderr.strip().rpartition("\n")[2] if found.returncode else ""
    except (OSError, subprocess.SubprocessError) as error:
        problem = str(error)
    finally:
        remove_quarters(label)
    if problem:
        raise InvalidInput(
            f"host_user = {name!r}: that user can't run {python}: {problem}",
            remedy="install Python and Flash where everybody may read, and give TMPDIR a folder that they may enter",
        )


def remove_quarters(label: str) -> None:
    """What is left of all folders of this label, which may be a pattern."""
    for root in Path(tempfile.gettempdir()).glob(f"{_prefix(label)}-*"):
        with contextlib.suppress(OSError):  # another one was quicker
            if root.stat(follow_symlinks=False).st_uid == os.geteuid():
                shutil.rmtree(root, ignore_errors=True)


def _prefix(label: str) -> str:
    return f"flash-host-{label}"
