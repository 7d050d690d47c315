"""`environment.id`: the forms a user may write, parsed into a reference.

Owns the grammar only. It asks no hub and no GitHub whether the thing exists: `flash.environments` does.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import Literal
from urllib.parse import unquote

_PART = re.compile(r"[A-Za-z0-9._-]+")
_VERSION = re.compile(r"[0-9a-fA-F]{4,64}")
_OWNER = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,38})")
_GIT_REF = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/+-]*")
_URL = "https://github.com/"
_FORMS = (
    "`namespace/name`, `namespace/name@<version>`, `github:owner/repo[@ref][:path]` or a https://github.com/... address"
)


@dataclass(frozen=True)
class EnvironmentRef:
    """Where an environment comes from.

    kind "hub":    namespace, name, and `version`, a lower-case SHA-256 prefix, or None for the newest.
    kind "github": owner, repo, `ref` (branch, tag or commit; None: the default branch) and `path`
                   (a folder or one .py inside the repository; None: its root).
    """

    kind: Literal["hub", "github"]
    namespace: str | None = None
    name: str | None = None
    version: str | None = None
    owner: str | None = None
    repo: str | None = None
    ref: str | None = None
    path: str | None = None

    def __str__(self) -> str:
        if self.kind == "hub":
            return f"{self.namespace}/{self.name}" + (f"@{self.version}" if self.version else "")
        return (
            f"github:{self.owner}/{self.repo}"
            + (f"@{self.ref}" if self.ref else "")
            + (f":{self.path}" if self.path else "")
        )


def parse_environment_id(text: str) -> EnvironmentRef:
    """Reads an id; raises ValueError with "rule; remedy" (no key, no value) when it has no valid form."""
    text = text.strip()
    if not text:
        raise ValueError(f"must not be empty; write {_FORMS}")
    if text.startswith("github:"):
        return _github_short(text.removeprefix("github:"))
    if "://" in text or text.startswith("github.com/"):
        return _github_url(text)
    if _looks_local(text):
        raise ValueError(
            f"is a local path, and a run uses published environments only; publish it with "
            f"{_push_command(text)} and write the id that it prints"
        )
    return _hub(text)


def _hub(text: str) -> EnvironmentRef:
    base, at, version = text.partition("@")
    parts = base.split("/")
    if len(parts) != 2:
        raise ValueError(f"must be namespace/name; write {_FORMS}, and publish a folder with {_push_command(text)}")
    for part in parts:
        if not _PART.fullmatch(part) or part in (".", ".."):
            raise ValueError(
                "has a part with other characters than A-Z a-z 0-9 . _ -; "
                "write `namespace/name` as `flash env list` shows it"
            )
    if at and not _VERSION.fullmatch(version):
        raise ValueError("has a version that is no SHA-256 prefix (4 to 64 hex digits); copy one from `flash env list`")
    return EnvironmentRef("hub", namespace=parts[0], name=parts[1], version=version.lower() or None)


def _github_short(text: str) -> EnvironmentRef:
    location, colon, path = text.partition(":")
    repository, at, ref = location.partition("@")
    if colon and not path:
        raise ValueError("ends in an empty path; write `github:owner/repo@ref:folder`, or drop the colon")
    if at and not ref:
        raise ValueError("has an empty ref; write `github:owner/repo@ref`, or drop the @")
    parts = repository.split("/")
    if len(parts) != 2:
        raise ValueError("must name one repository; write `github:owner/repo[@ref][:path]`")
    return _github(parts[0], parts[1], ref or None, path or None)


def _github_url(text: str) -> EnvironmentRef:
    if not text.startswith(_URL):
        raise ValueError(f"must be an address under {_URL}; or write {_FORMS}")
    parts = [unquote(part) for part in re.split(r"[?#]", text.removeprefix(_URL))[0].rstrip("/").split("/")]
    if len(parts) == 2:
        return _github(parts[0], parts[1], None, None)
    if len(parts) >= 4 and parts[2] in ("tree", "blob"):
        return _github(parts[0], parts[1], parts[3], "/".join(parts[4:]) or None)
    raise ValueError("must be a repository, tree or blob address; write https://github.com/owner/repo/tree/main/folder")


def _github(owner: str, repo: str, ref: str | None, path: str | None) -> EnvironmentRef:
    repo = repo.removesuffix(".git")
    if not _OWNER.fullmatch(owner) or not _PART.fullmatch(repo) or repo in (".", ".."):
        raise ValueError(
            "has an owner or repository that GitHub would not allow; write `github:owner/repo[@ref][:path]`"
        )
    if ref is not None and not _is_git_ref(ref):
        raise ValueError("has a ref that is no branch, tag or commit name; write `github:owner/repo@ref`")
    path = path.rstrip("/") if path else None
    if path and not _stays_inside(path):
        raise ValueError("has a path that leaves the repository; write it relative to the repository's root")
    return EnvironmentRef("github", owner=owner, repo=repo, ref=ref, path=path or None)


def _is_git_ref(ref: str) -> bool:
    if ".." in ref or "//" in ref or ref.endswith(("/", ".", ".lock")):
        return False
    return bool(_GIT_REF.fullmatch(ref))


def _stays_inside(path: str) -> bool:
    return path.isprintable() and "\\" not in path and not {"", ".", ".."}.intersection(path.split("/"))


def _looks_local(text: str) -> bool:
    return (
        text.startswith((".", "/", "~"))
        or "\\" in text
        or bool(PureWindowsPath(text).drive)
        or text.endswith((".py", "/"))
        or text.count("/") > 1
    )


def _push_command(path: str) -> str:
    return f"`flash env push --name {suggested_name(path)} {shlex.quote(path)}`"


def suggested_name(path: str) -> str:
    """A name for `flash env push --name` made from a path's last folder."""
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..", "~")]
    if parts and parts[-1] == "environment.py":
        parts.pop()
    stem = parts[-1].removesuffix(".py") if parts else ""
    return re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-.") or "my-env"
