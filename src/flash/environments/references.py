"""GitHub references: `github:owner/repo[@ref][:path]` resolved to a commit and fetched as a package.

Owns the two requests (ref → commit, commit → archive), the check of every address they are sent to, and the
choice of the environment's folder inside the archive. It never clones and never runs anything; the archive
goes through the same safe extractor as a push.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

import httpx

from flash.config.environment_id import EnvironmentRef
from flash.environments.package import MAX_COMPRESSED_BYTES, Package, pack, unpack_repository
from flash.errors import InvalidInput, NotFound, PackageError, Unavailable

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REDIRECTS = 5


@dataclass(frozen=True)
class GitHub:
    """How to reach GitHub's REST API, GitHub Enterprise's, or a stand-in of them.

    `api_url` is the operator's word: its own host may be private and its scheme plain http. Wherever it redirects
    to must be https at a public address, unless `allow_private`.
    """

    api_url: str = "https://api.github.com"
    token: str | None = field(default=None, repr=False)  # the operator's; sent to `api_url` only, never further
    timeout_s: float = 15.0       # for each connection and each read
    deadline_s: float = 50.0      # for all of it
    allow_private: bool = False   # redirects may lead into a private network


@dataclass(frozen=True)
class FetchedReference:
    """What a run pins: the commit, and the package made from it."""

    commit: str  # 40 hex digits
    package: Package


def pinned_commit(reference: EnvironmentRef) -> str | None:
    """The commit that a reference names in full, which no push to the repository can change."""
    ref = (reference.ref or "").lower()
    return ref if _COMMIT.fullmatch(ref) else None


def at_commit(reference: EnvironmentRef, commit: str) -> EnvironmentRef:
    """The same place at that commit."""
    return replace(reference, ref=commit)


def fetch(reference: EnvironmentRef, github: GitHub) -> FetchedReference:
    """Resolves a reference to a commit, downloads that commit's archive, and packs the environment in it.

    Raises NotFound (no such repository, ref or path), PackageError (no environment there, or an archive that
    breaks the extractor's rules), InvalidInput (an address inside a private network), Unavailable.
    """
    deadline = time.monotonic() + github.deadline_s
    commit = _commit(reference, github)
    with tempfile.TemporaryDirectory(prefix="flash-github-") as scratch:
        archive = Path(scratch) / "archive.tar.gz"
        address = f"{github.api_url}/repos/{reference.owner}/{reference.repo}/tarball/{commit}"
        _download(address, archive, reference, github, deadline)
        tree = Path(scratch) / "tree"
        unpack_repository(archive, tree, only=reference.path)
        place = tree / reference.path if reference.path else tree
        if not place.exists():
            raise NotFound(f"{reference}: commit {commit[:12]} has no `{reference.path}`")
        if place.is_dir() and not (place / "environment.py").is_file():
            raise PackageError(
                f"{reference}: commit {commit[:12]} has no environment.py there",
                remedy="name its folder: github:owner/repo@ref:folder",
            )
        return FetchedReference(commit, pack(place))


def _commit(reference: EnvironmentRef, github: GitHub) -> str:
    ref = reference.ref or "HEAD"
    url = f"{github.api_url}/repos/{reference.owner}/{reference.repo}/commits/{quote(ref, safe='')}"
    headers = {"Accept": "application/vnd.github.sha"}  # answers with the bare SHA
    with _get(url, reference, github, headers) as response:
        text = response.read()[:100].decode("ascii", "replace").strip()
    if not _COMMIT.fullmatch(text):
        raise Unavailable(f"{reference}: GitHub's answer for `{ref}` is not a commit: {text!r}")
    return text


def _download(url: str, target: Path, reference: EnvironmentRef, github: GitHub, deadline: float) -> None:
    size = 0
    with _get(url, reference, github, {}) as response, target.open("wb") as file:
        for chunk in response.iter_bytes(1 << 16):
            size += len(chunk)
            if size > MAX_COMPRESSED_BYTES:
                raise PackageError(
                    f"{reference}: the repository's archive is over {MAX_COMPRESSED_BYTES >> 20} MB",
                    remedy="push the environment's folder with `flash env push` instead",
                )
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"{reference}: the download took over {github.deadline_s:g} s",
                    remedy="try again, or push the environment's folder with `flash env push`",
                )
            file.write(chunk)


@contextmanager
def _get(
    url: str, reference: EnvironmentRef, github: GitHub, headers: dict[str, str]
) -> Iterator[httpx.Response]:
    """A streamed GET that follows redirects itself, checking each address before it is asked."""
    origin = urlsplit(github.api_url)
    with httpx.Client(timeout=github.timeout_s, follow_redirects=False, trust_env=True) as client:
        for _ in range(_REDIRECTS + 1):
            parts = urlsplit(url)
            trusted = github.allow_private or (parts.scheme, parts.netloc) == (origin.scheme, origin.netloc)
            if parts.scheme != "https" and not (trusted and parts.scheme == "http"):
                raise InvalidInput(f"refused to fetch {url:.200}: only https addresses are fetched")
            own = {"User-Agent": "flash-lora", **headers}
            if github.token and (parts.scheme, parts.netloc) == (origin.scheme, origin.netloc):
                own["Authorization"] = f"Bearer {github.token}"
            try:
                response = client.send(_request(client, url, own, private=trusted), stream=True)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise Unavailable(
                    f"{reference}: {parts.hostname} can't be reached: {error}",
                    remedy="check the server's network, or push the folder with `flash env push`",
                ) from error
            try:
                if response.is_redirect:
                    url = _redirected(url, response, reference)
                    continue
                _check_status(response, reference)
                try:
                    yield response
                except httpx.HTTPError as error:
                    raise Unavailable(f"{reference}: the download broke off: {error}") from error
                return
            finally:
                response.close()
    raise Unavailable(f"{reference}: more than {_REDIRECTS} redirects")


def _redirected(url: str, response: httpx.Response, reference: EnvironmentRef) -> str:
    try:
        return urljoin(url, response.headers["location"])
    except ValueError:
        raise Unavailable(f"{reference}: GitHub redirects to what is no address") from None


def _request(client: httpx.Client, url: str, headers: dict[str, str], *, private: bool) -> httpx.Request:
    """A request to the very address that was checked, so that a second look-up can't point elsewhere.

    Behind a proxy, which looks names up itself and may be the only one that can, the name stays.
    """
    target = httpx.URL(url)
    if _goes_by_proxy(target) and not _is_address(target.host):
        return client.build_request("GET", target, headers=headers)
    address = _address(target.host, target.port or (443 if target.scheme == "https" else 80), private=private)
    request = client.build_request("GET", target.copy_with(host=address), headers=headers)
    request.headers["Host"] = target.netloc.decode("ascii")
    request.extensions["sni_hostname"] = target.host
    return request


def _goes_by_proxy(target: httpx.URL) -> bool:
    proxies = urllib.request.getproxies()
    return bool({target.scheme, "all"} & set(proxies)) and not urllib.request.proxy_bypass(target.host)


def _is_address(host: str) -> bool:
    """Whether the host is an IP address, or this machine's own name."""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return True
    return host.lower().rstrip(".").endswith("localhost")


def _address(host: str, port: int, *, private: bool) -> str:
    """One address of the host; unless `private`, all of its addresses must be public ones."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise Unavailable(
            f"{host} has no address: {error}", remedy="check the server's network and name look-up"
        ) from error
    if not private:
        for address in found:
            if not ipaddress.ip_address(address.split("%")[0]).is_global:
                raise InvalidInput(f"refused to fetch from {host}: {address} is inside a private network")
    return sorted(found, key=lambda address: ":" in address)[0]  # IPv4 first: it works in more places


def _check_status(response: httpx.Response, reference: EnvironmentRef) -> None:
    if response.is_success:
        return
    if response.status_code in (404, 409, 422):
        raise NotFound(
            f"{reference}: GitHub has no such repository, branch, tag or commit (or it is private)",
            remedy="check the spelling; for a private repository push the folder with `flash env push`",
        )
    if response.status_code in (401, 403, 429):
        raise Unavailable(
            f"{reference}: GitHub refused ({response.status_code}; its rate limit, perhaps)",
            remedy="wait, or set GITHUB_TOKEN where the Flash server runs",
        )
    raise Unavailable(f"{reference}: GitHub answered {response.status_code}", remedy="try again later")
