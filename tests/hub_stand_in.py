"""A stand-in of the model hub: real HTTP on 127.0.0.1, with the answers that the Hugging Face libraries go by.

It serves repositories that a test adds: their listing, their tree, their files with ETags, ranges, and large files
behind a redirect to a second server, as the hub's do. It refuses as the hub refuses (gated, private, missing,
busy), breaks off a download where it is told to, and remembers every request.

    with HubStandIn() as hub:
        commit = hub.add("team/tiny", folder)
        ... run something with hub.variables in its environment ...
        assert hub.bytes_of("model.safetensors") == ...

To answer more than GET and HEAD (an upload, say), derive a class and override `post`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin")
"""Endings of files that the hub keeps as LFS objects: they are redirected, and their ETag is a SHA-256."""
_CHUNK = 16_384


@dataclass
class Repository:
    """One commit of one repository."""

    files: dict[str, bytes]
    commit: str
    revisions: tuple[str, ...] = ("main",)
    gated: bool = False             # the files want a token of `allowed`
    private: bool = False           # everything does; strangers are told that there is nothing
    allowed: tuple[str, ...] = ()
    listed_sizes: dict[str, int] = field(default_factory=dict)  # what the listing claims instead of the truth

    def digest(self, name: str) -> str:
        """The file's ETag: SHA-256 of a large file, git's SHA-1 of a small one."""
        return hashlib.sha256(self.files[name]).hexdigest() if name.endswith(LARGE) else self.blob(name)

    def blob(self, name: str) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.files[name]) + self.files[name]).hexdigest()

    def size(self, name: str) -> int:
        return self.listed_sizes.get(name, len(self.files[name]))


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    server: str  # "hub", or "store" for what large files are redirected to
    authorization: str | None
    range: str | None


class HubStandIn:
    """Serves until `close`. What is no argument and public may be turned at any time."""

    def __init__(self, *, digests: bool = True) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.break_after: dict[str, list[int]] = {}  # by file name: each entry ends one answer after so many bytes
        self.corrupt: dict[str, int] = {}            # by file name: so many answers have a changed byte
        self.busy = 0                                # so many requests are answered 503
        self.pace: float | None = None               # bytes a second of a large file's answer
        self.ranges = True                           # False: a mirror that always sends whole files
        self.digests = digests                       # False: a mirror that lists names only
        self._sent: dict[str, int] = {}
        self._lock = threading.Lock()
        self._servers = {name: _serve(self, name) for name in ("hub", "store")}
        self.url = self._address("hub")
        self.store_url = self._address("store")

    def _address(self, server: str) -> str:
        return f"http://127.0.0.1:{self._servers[server].server_port}"

    @property
    def variables(self) -> dict[str, str]:
        """For the environment of what is to use this hub."""
        return {"HF_ENDPOINT": self.url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def add(self, repo: str, files: Path | Mapping[str, bytes], **facts: Any) -> str:
        """Puts a folder (or named bytes) up as the repository's only commit, and returns the commit."""
        if isinstance(files, Path):
            paths = [path for path in sorted(files.rglob("*")) if path.is_file()]
            files = {str(path.relative_to(files)): path.read_bytes() for path in paths}
        content = hashlib.sha1()
        for name, data in files.items():
            content.update(f"{name}\0".encode() + hashlib.sha1(data).digest())
        self.repositories[repo] = Repository(dict(files), content.hexdigest(), **facts)
        return content.hexdigest()

    def bytes_of(self, *names: str) -> int:
        """Bytes that went out of the files with these names; of all files without a name."""
        with self._lock:
            return sum(count for name, count in self._sent.items() if not names or name in names)

    def post(self, handler: Handler) -> None:
        """Answers POST, PUT and DELETE on the hub's own server."""
        handler.refuse(405, "this stand-in only gives")

    def close(self) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    def __enter__(self) -> HubStandIn:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- for the handlers ---

    def note(self, request: Request) -> bool:
        """Remembers the request; True: it is to be told that the hub is busy."""
        with self._lock:
            self.requests.append(request)
            busy = self.busy > 0
            self.busy -= busy
            return busy

    def count(self, name: str, size: int) -> None:
        with self._lock:
            self._sent[name] = self._sent.get(name, 0) + size

    def next_break(self, name: str) -> int | None:
        with self._lock:
            left = self.break_after.get(name)
            return left.pop(0) if left else None

    def next_corrupt(self, name: str) -> bool:
        with self._lock:
            left = self.corrupt.get(name, 0)
            self.corrupt[name] = max(0, left - 1)
            return left > 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubStandIn
    server_name: str

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self._noted():
            return None
        url = urlsplit(self.path)
        path = unquote(url.path)
        if self.server_name == "store":
            return self._object(path)
        if match := re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/(.+?))?/?", path):
            repo, kind, revision = match[1], match[2], match[3] or "main"
            return self._tree(repo, revision) if kind == "tree" else self._model(repo, revision, parse_qs(url.query))
        if match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            return self._file(match[1], match[2], match[3])
        return self.refuse(404, "no such page")

    def do_POST(self) -> None:
        if not self._noted():
            self.hub.post(self)

    do_PUT = do_DELETE = do_POST

    def _noted(self) -> bool:
        own = self.headers
        request = Request(self.command, self.path, self.server_name, own["Authorization"], own["Range"])
        if busy := self.hub.note(request):
            self.refuse(503, "busy")
        return busy

    # --- answers ---

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {"Content-Length": str(len(body)), **sent}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, document: Any, status: int = 200, **headers: str) -> None:
        self.reply(status, json.dumps(document).encode(), Content_Type="application/json", **headers)

    def refuse(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X_Error_Code": code} if code else {}
        self.json({"error": message}, status, X_Error_Message=message, **headers)

    @property
    def token(self) -> str | None:
        return (self.headers["Authorization"] or "").removeprefix("Bearer ") or None

    def found(self, repo: str, revision: str) -> Repository | None:
        """The repository, or None after a refusal was sent: strangers are not told that a private one exists."""
        there = self.hub.repositories.get(repo)
        if self.token == "invalid":
            self.refuse(401, "Invalid credentials in Authorization header")
        elif there is None or (there.private and self.token not in there.allowed):
            self.refuse(404 if self.token else 401, "Repository not found", "RepoNotFound")
        elif revision not in (there.commit, *there.revisions):
            self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        else:
            return there
        return None

    def _model(self, repo: str, revision: str, query: dict[str, list[str]]) -> None:
        if (there := self.found(repo, revision)) is None:
            return
        siblings: list[dict[str, Any]] = [{"rfilename": name} for name in there.files]
        if "blobs" in query and self.hub.digests:
            for entry in siblings:
                name = entry["rfilename"]
                entry |= {"size": there.size(name), "blobId": there.blob(name)}
                if name.endswith(LARGE):
                    entry["lfs"] = {"sha256": there.digest(name), "size": there.size(name), "pointerSize": 134}
        gated = "manual" if there.gated else False
        self.json({"id": repo, "modelId": repo, "sha": there.commit, "private": there.private, "gated": gated,
                   "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})  # fmt: skip

    def _tree(self, repo: str, revision: str) -> None:
        if (there := self.found(repo, revision)) is None:
            return
        listed = []
        for name in there.files:
            entry = {"type": "file", "path": name, "size": there.size(name), "oid": there.blob(name)}
            if name.endswith(LARGE):
                entry["lfs"] = {"oid": there.digest(name), "size": there.size(name), "pointerSize": 134}
            listed.append(entry)
        self.json(listed)

    def _file(self, repo: str, revision: str, name: str) -> None:
        if (there := self.found(repo, revision)) is None:
            return None
        if there.gated and self.token not in there.allowed:
            status = 403 if self.token else 401
            return self.refuse(status, f"Access to model {repo} is restricted", "GatedRepo")
        if name not in there.files:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        known = {"X_Repo_Commit": there.commit, "ETag": f'"{there.digest(name)}"', "Accept_Ranges": "bytes"}
        if not name.endswith(LARGE):
            return self._send(name, there.files[name], known)
        known |= {"X_Linked_Etag": known.pop("ETag"), "X_Linked_Size": str(there.size(name))}
        where = f"{self.hub.store_url}/{repo}/{there.commit}/{name}?signature=of-the-day"
        return self.reply(302, Location=where, **known)

    def _object(self, path: str) -> None:
        """A large file, from the second server, which knows no tokens."""
        repo, commit, name = re.fullmatch(r"/(.+)/([0-9a-f]{40})/(.+)", path).groups()  # type: ignore[union-attr]
        there = self.hub.repositories[repo]
        assert commit == there.commit
        self._send(name, there.files[name], {"ETag": f'"{there.digest(name)}"'})

    def _send(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        status, start = 200, 0
        if (wanted := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")) and self.hub.ranges:
            status, start = 206, int(wanted[1])
            if start >= len(data):
                return self.refuse(416, "beyond the end")
            headers = {**headers, "Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        body = data[start:]
        if self.command == "HEAD":
            return self.reply(status, body, **headers)
        if self.hub.next_corrupt(name):
            body = body[:-1] + bytes([body[-1] ^ 1])
        broken = self.hub.next_break(name)
        self.send_response(status)
        for key, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self._stream(name, body if broken is None else body[:broken])
        if broken is not None:
            self.close_connection = True
        return None

    def _stream(self, name: str, body: bytes) -> None:
        pace = self.hub.pace if name.endswith(LARGE) else None
        step = min(_CHUNK, max(1, int(pace / 50))) if pace else _CHUNK
        for start in range(0, len(body), step):
            piece = body[start : start + step]
            self.wfile.write(piece)
            self.hub.count(name, len(piece))
            if pace:
                time.sleep(len(piece) / pace)

    def log_message(self, *_: object) -> None: ...


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed while it asked is no news here."""


def _serve(hub: HubStandIn, name: str) -> ThreadingHTTPServer:
    server = _Server(("127.0.0.1", 0), type("_Handler", (Handler,), {"hub": hub, "server_name": name}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server
