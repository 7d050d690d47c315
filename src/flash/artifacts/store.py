"""The artifact store: bytes by key, in a folder, a bucket, or memory, through obstore.

Owns durability and naming of stores. It knows nothing of runs or manifests. A put is complete or absent: on a
local disk it is written aside, synced, renamed, and its folder synced (obstore's local store does not sync by
itself, and this one's temporary names are hidden from its listings); a bucket's own puts are atomic.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Literal, Protocol
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import AzureStore, GCSStore, LocalStore, MemoryStore, S3Store, from_url

from flash.errors import Conflict, InvalidInput, NotFound, Unavailable
from flash.failpoints import failpoint

_CHUNK = 4 << 20  # bytes
_PARTS = 4  # of one upload at once: more would leave each too slow for `read_timeout` on a thin line

# Requests under way at once, and how long one waits for its turn: a bucket that hangs must not take every thread of a
# server that has heartbeats to answer.
_AT_ONCE, _PLACE_S = 16, 2.0

# How a bucket is talked to, over obstore's own defaults, which repeat a request for three minutes and give a whole
# download 30 s: our callers repeat by themselves and hold leases, and an object may be of any size.
_CLIENT = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "24h"}
_RETRY = {"max_retries": "2", "retry_timeout": "30"}  # times; seconds
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class Objects(Protocol):
    """What whoever writes and reads checkpoints needs of a store, at hand or at a distance. Raises as `Store` does."""

    def put_bytes(self, key: str, data: bytes, *, create: bool = False) -> None:
        """Writes an object whole; with `create`, raises `Conflict` if the key is taken."""

    def put_file(self, key: str, path: Path) -> None:
        """Writes a local file's bytes under the key."""

    def size(self, key: str) -> int | None:
        """Bytes of the object, or None if there is none."""

    def get_bytes(self, key: str) -> bytes: ...

    def stream(self, key: str) -> Iterator[bytes]:
        """The object in chunks of a few MiB."""

    def digest(self, key: str) -> str:
        """SHA-256 of the object's bytes, read from the store."""
        found = hashlib.sha256()
        for chunk in self.stream(key):
            found.update(chunk)
        return found.hexdigest()


class Store(Objects):
    """A store by URL: `file:///folder`, `memory://`, `s3://bucket/prefix`, `gs://`, `az://`.

    `options` are a bucket's settings under obstore's names (`endpoint`, `region`, `access_key_id`,
    `secret_access_key`, `virtual_hosted_style_request`, `allow_http`, `read_timeout`, `max_retries`, …); what they
    leave out comes from the provider's own environment variables (`AWS_…`). An endpoint without TLS is taken on
    loopback only, unless `allow_http` says otherwise.

    Raises `NotFound` for an absent key and `Unavailable` when the store can't be reached or written.
    """

    def __init__(self, url: str, options: Mapping[str, str] | None = None) -> None:
        self.url = url
        self.options = dict(options or {})
        self._places = threading.BoundedSemaphore(_AT_ONCE)
        self._root: Path | None = None
        parts = urlsplit(url)
        if parts.scheme == "file":
            self._root = Path(unquote(parts.path))
            self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._backend: Any = LocalStore(self._root)
        elif parts.scheme == "memory":
            self._backend = MemoryStore()
        elif parts.scheme:
            self._backend = _bucket(url, self.options)
        else:
            raise InvalidInput(f"{url!r} is not a store", remedy="write a URL such as file:///folder or s3://bucket")

    @contextmanager
    def _asking(self, key: str) -> Iterator[None]:
        """Around a request: its place among those under way, and its failures in Flash's words."""
        if not self._places.acquire(timeout=_PLACE_S):
            raise Unavailable(
                f"the artifact store is slow: {_AT_ONCE} requests wait for it, and {key} with them",
                remedy="try again in a moment",
            )
        try:
            with _translated(key):
                yield
        finally:
            self._places.release()

    # --- writing ------------------------------------------------------------------------------------

    def put_bytes(self, key: str, data: bytes, *, create: bool = False) -> None:
        if self._root is not None:
            with self._replacing(key, create=create) as file:
                file.write(data)
            return
        with self._asking(key):
            mode: Any = "create" if create else "overwrite"
            obstore.put(self._backend, _safe(key), data, mode=mode, max_concurrency=_PARTS)

    def put_file(self, key: str, path: Path) -> None:
        """In parts where the store takes parts."""
        if self._root is not None:
            with path.open("rb") as source, self._replacing(key, create=False) as file:
                shutil.copyfileobj(source, file, _CHUNK)
            return
        with self._asking(key):
            obstore.put(self._backend, _safe(key), path, max_concurrency=_PARTS)

    @contextmanager
    def _replacing(self, key: str, *, create: bool) -> Iterator[IO[bytes]]:
        assert self._root is not None
        target = self._root / _safe(key)
        # obstore's listings leave out names that end in "#<digits>".
        draft = target.with_name(f"{target.name}#{secrets.randbelow(10**12)}")
        try:
            _make_folders(target.parent)
            with draft.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            failpoint("store.draft")
            if create:
                _link_new(draft, target, key)
            else:
                draft.rename(target)
            sync_folder(target.parent)
        except OSError as error:
            raise _failed(key, error) from error
        finally:
            with suppress(OSError):
                draft.unlink()

    def copy(self, source: str, target: str) -> None:
        """Gives an object a second key; a local disk shares the bytes, a bucket copies them on its side."""
        if self._root is None:
            with self._asking(source):
                obstore.copy(self._backend, _safe(source), _safe(target))
            return
        path = self._root / _safe(target)
        try:
            _make_folders(path.parent)
            with suppress(FileExistsError):
                os.link(self._root / _safe(source), path)
            sync_folder(path.parent)
        except FileNotFoundError:
            raise NotFound(f"no object {source}") from None
        except OSError as error:
            raise _failed(source, error) from error

    def delete(self, key: str) -> None:
        """Removes the object; an absent key is fine."""
        try:
            with self._asking(key):
                obstore.delete(self._backend, _safe(key))
        except NotFound:
            pass

    # --- reading ------------------------------------------------------------------------------------

    def size(self, key: str) -> int | None:
        try:
            with self._asking(key):
                return int(obstore.head(self._backend, _safe(key))["size"])
        except NotFound:
            return None

    def get_bytes(self, key: str) -> bytes:
        with self._asking(key):
            return bytes(obstore.get(self._backend, _safe(key)).bytes())

    def stream(self, key: str) -> Iterator[bytes]:
        with self._asking(key):
            found = obstore.get(self._backend, _safe(key))
        with _translated(key):  # whoever reads may take any time
            for chunk in found.stream(min_chunk_size=_CHUNK):
                yield bytes(chunk)

    def list(self, prefix: str) -> list[str]:
        """Keys below a prefix, which ends at a path segment."""
        with self._asking(prefix):
            pages = obstore.list(self._backend, prefix=prefix)
            return sorted(str(item["path"]) for page in pages for item in page)

    def folders(self, prefix: str) -> Sequence[str]:
        """Names directly below a prefix that have objects below them."""
        with self._asking(prefix):
            found = obstore.list_with_delimiter(self._backend, prefix=prefix)
        return sorted(str(each).rstrip("/").rpartition("/")[2] for each in found["common_prefixes"])

    # --- at a distance ------------------------------------------------------------------------------

    @property
    def signs(self) -> bool:
        """Whether it can give out addresses: buckets can, folders and memory have none."""
        return isinstance(self._backend, S3Store | GCSStore | AzureStore)

    def sign(self, verb: Literal["GET", "HEAD", "PUT"], keys: Sequence[str], *, expires_s: float) -> Sequence[str]:
        """An address for each key, good for that verb and so long, without any key of the bucket's."""
        with _translated(keys[0] if keys else ""):
            safe = [_safe(key) for key in keys]
            return [str(url) for url in obstore.sign(self._backend, verb, safe, timedelta(seconds=expires_s))]

    # --- clean-up -----------------------------------------------------------------------------------

    def sweep(self, *, older_than_s: float) -> int:
        """Removes what killed writers left half-written; returns how many. Buckets expire their own parts."""
        if self._root is None:
            return 0
        swept = 0
        for draft in self._root.rglob("*#*"):
            if _is_draft(draft.name) and time.time() - draft.stat().st_mtime > older_than_s:
                draft.unlink(missing_ok=True)
                swept += 1
        return swept


def digest_file(path: Path) -> tuple[str, int]:
    """SHA-256 and size in bytes of a local file."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256")
        return found.hexdigest(), file.tell()


def sync_folder(folder: Path) -> None:
    """Makes names in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folders(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def credentials(options: Mapping[str, str]) -> list[str]:
    """Those of a store's options that are secrets, by their names: secret_access_key, session_token, account_key, …"""
    words = ("secret", "token", "account_key", "password", "credential", "private")
    return [value for name, value in options.items() if any(word in name.lower() for word in words)]


def _bucket(url: str, options: Mapping[str, str]) -> Any:
    config = dict(options)
    client: dict[str, Any] = {name: config.pop(name, default) for name, default in _CLIENT.items()}
    repeats = {name: config.pop(name, default) for name, default in _RETRY.items()}
    given = (config.get("endpoint"), *(os.environ.get(name) for name in _ENDPOINT_VARIABLES))
    endpoint = urlsplit(next((found for found in given if found), ""))
    plain = config.pop("allow_http", os.environ.get("AWS_ALLOW_HTTP", "")).lower() in ("1", "true")
    if endpoint.scheme == "http":
        if not plain and endpoint.hostname not in _LOOPBACK:
            raise InvalidInput(
                f"the store's endpoint {endpoint.geturl()} is not encrypted",
                remedy="use https, or say allow_http=true among the store's options",
            )
        plain = True
    try:
        retry: Any = {
            "max_retries": int(repeats["max_retries"]),
            "retry_timeout": timedelta(seconds=float(repeats["retry_timeout"])),
        }
        return from_url(url, config=config, client_options={**client, "allow_http": plain}, retry_config=retry)
    except (BaseError, ValueError, TypeError) as error:
        raise InvalidInput(
            f"{url!r} can't be used as a store: {_first_line(error)}", remedy="check the URL and the store's options"
        ) from error


def _link_new(draft: Path, target: Path, key: str) -> None:
    try:
        os.link(draft, target)
    except FileExistsError:
        raise Conflict(f"object {key} is there already") from None


def _safe(key: str) -> str:
    parts = key.split("/")
    if any(part in ("", ".", "..") or "\0" in part or "#" in part for part in parts):
        raise InvalidInput(f"{key!r:.200} is not a store key")
    return key


def _is_draft(name: str) -> bool:
    _, mark, digits = name.rpartition("#")
    return bool(mark) and digits.isdigit()


@contextmanager
def _translated(key: str) -> Iterator[None]:
    """The store's failures in Flash's words; what went wrong inside is kept as the cause."""
    try:
        yield
    except (NotFoundError, FileNotFoundError) as error:  # obstore raises either
        raise NotFound(f"no object {key}") from error
    except (AlreadyExistsError, FileExistsError) as error:
        raise Conflict(f"object {key} is there already") from error
    except (BaseError, OSError) as error:
        raise _failed(key, error) from error


def _failed(key: str, error: Exception) -> Unavailable:
    return Unavailable(
        f"the artifact store failed on {key}: {_first_line(error)}", remedy="check space, permissions and the network"
    )


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:300]
