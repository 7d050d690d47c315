"""Adapters where requests need them: in the store, on this machine's disk, in the engine.

Owns two caches. On disk, adapters' files lie under their digest, shared by every host of the machine; what
appears there is whole and was checked. The engine holds at most `room` adapters, and the least recently used one
that no request needs makes place; which of them are in its batch is the engine's own affair. Knows the engine as
something that loads and unloads folders by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from flash.artifacts.manifests import fetch_checkpoint
from flash.artifacts.store import Objects, digest_file
from flash.errors import InvalidInput, NotFound, Unavailable
from flash.records import Manifest
from flash.serving.hello import adapter_digest

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Adapter:
    """One adapter as a request names it: its identity, and the key of a manifest that lists its files."""

    digest: str
    manifest_key: str

    def __post_init__(self) -> None:
        if not _DIGEST.fullmatch(self.digest):
            raise InvalidInput(f"{self.digest!r:.100} is no adapter's digest: it must be 64 hexadecimal digits")


class AdapterFiles:
    """Adapters' folders below `cache_dir`, filled from the store and kept under `most_bytes`. Blocking."""

    def __init__(self, store: Objects, cache_dir: Path, *, most_bytes: int) -> None:
        self._store = store
        self._root = cache_dir / "adapters"
        self._most_bytes = most_bytes
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)

    @contextmanager
    def folder(self, adapter: Adapter) -> Iterator[Path]:
        """The PEFT folder, checked against the digest; inside, no other host removes it."""
        place = self._root / adapter.digest
        with self._locked(adapter.digest):
            if _digest_of(place) != adapter.digest:
                self._fetch(adapter, place)
            os.utime(place)  # used now
            yield place / "adapter"
        self._make_room(spared=adapter.digest)

    def _fetch(self, adapter: Adapter, place: Path) -> None:
        try:
            manifest = Manifest.model_validate_json(self._store.get_bytes(adapter.manifest_key))
        except ValidationError:
            raise Unavailable(f"the manifest {adapter.manifest_key} is damaged") from None
        if adapter_digest(manifest) != adapter.digest:
            raise NotFound(f"the manifest {adapter.manifest_key} lists another adapter than {adapter.digest[:12]}")
        try:
            fetch_checkpoint(self._store, manifest, place, only="adapter")
        except OSError as error:
            raise Unavailable(
                f"the adapter could not be written to the cache: {error.strerror}", remedy="check space and permissions"
            ) from error

    def _make_room(self, *, spared: str) -> None:
        """Removes the folders that were used longest ago, but none that a host is reading."""
        sizes = {place: _bytes_below(place) for place in self._root.iterdir() if _DIGEST.fullmatch(place.name)}
        excess = sum(sizes.values()) - self._most_bytes
        for place in sorted(sizes, key=_used):
            if excess <= 0:
                return
            if place.name == spared:
                continue
            with contextlib.suppress(BlockingIOError), self._locked(place.name, wait=False):
                shutil.rmtree(place, ignore_errors=True)
                excess -= sizes[place]

    @contextmanager
    def _locked(self, digest: str, *, wait: bool = True) -> Iterator[None]:
        """One of 256 locks, so that their files need no removal."""
        with (self._root / f"{digest[:2]}.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield


def _digest_of(place: Path) -> str | None:
    """What `adapter_digest` says of the files that are really there; None if there are none."""
    try:
        files = sorted(found for found in (place / "adapter").rglob("*") if found.is_file())
        lines = sorted(f"{found.relative_to(place).as_posix()} {digest_file(found)[0]}\n" for found in files)
    except OSError:
        return None
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else None


def _bytes_below(place: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(found.stat().st_size for found in place.rglob("*") if found.is_file())
    return 0


def _used(place: Path) -> float:
    with contextlib.suppress(OSError):
        return place.stat().st_mtime
    return 0.0


# --- in the engine ----------------------------------------------------------------------------------------


class Loader(Protocol):
    """The part of an engine that is needed here."""

    def load_adapter(self, name: str, folder: Path) -> None: ...

    def unload_adapter(self, name: str) -> None: ...


class Held:
    """A request's hold on an adapter; nothing evicts it before `release`."""

    def __init__(self, shelf: AdapterShelf, place: _Place, *, thinking: bool) -> None:
        self.thinking = thinking  # whether the adapter was trained to think
        self._shelf = shelf
        self._place: _Place | None = place

    def release(self) -> None:
        if self._place is not None:
            self._shelf.leave(self._place)
            self._place = None


@dataclass
class _Place:
    """One of the engine's places for adapters; `ready` gives whether the adapter was trained to think."""

    ready: asyncio.Future[bool]
    users: int = 0
    used: float = field(default_factory=time.monotonic)


class AdapterShelf:
    """The adapters in the engine, each under its digest as its name. For one event loop.

    Its state changes between two awaits only, so that a dropped request leaves nothing half done.
    """

    def __init__(self, engine: Loader, files: AdapterFiles, *, room: int) -> None:
        self._engine = engine
        self._files = files
        self._room = room
        self._places: dict[str, _Place] = {}
        self._waiters: list[asyncio.Future[None]] = []
        self._fetching = ThreadPoolExecutor(4, "adapter-files")
        self._switching = ThreadPoolExecutor(1, "adapter-switch")  # one thread: loads follow the unloads before them
        self.loads_total = 0
        self.evictions_total = 0

    @property
    def count(self) -> int:
        return len(self._places)

    async def hold(self, adapter: Adapter) -> Held:
        """Brings the adapter into the engine, or waits for it; while adapters in use take every place, for one of them.

        Raises NotFound (the store has no such files), Unavailable (store or disk fails) or ModelError (the
        engine can't use it).
        """
        place = await self._claim(adapter)
        try:
            return Held(self, place, thinking=await asyncio.shield(place.ready))
        except BaseException:
            self.leave(place)
            raise

    def leave(self, place: _Place) -> None:
        place.users -= 1
        place.used = time.monotonic()
        self._wake()

    async def _claim(self, adapter: Adapter) -> _Place:
        while True:
            place = self._places.get(adapter.digest)
            if place is not None:
                place.users += 1
                return place
            if len(self._places) < self._room or self._evict():
                return self._open(adapter)
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def _evict(self) -> bool:
        idle = [digest for digest, place in self._places.items() if not place.users and place.ready.done()]
        if not idle:
            return False
        oldest = min(idle, key=lambda digest: self._places[digest].used)
        del self._places[oldest]
        self._switching.submit(self._engine.unload_adapter, oldest)
        self.evictions_total += 1
        return True

    def _open(self, adapter: Adapter) -> _Place:
        loop = asyncio.get_running_loop()
        place = self._places[adapter.digest] = _Place(loop.create_future(), users=1)
        loading = loop.run_in_executor(self._fetching, self._bring, adapter)
        loading.add_done_callback(lambda done: self._settle(adapter, place, done))
        return place

    def _settle(self, adapter: Adapter, place: _Place, done: asyncio.Future[bool]) -> None:
        error = done.exception()
        if error is None:
            self.loads_total += 1
            place.ready.set_result(done.result())
            return
        del self._places[adapter.digest]  # the next request tries again
        place.ready.set_exception(error)
        place.ready.exception()  # seen, should every request that waited be gone
        self._wake()

    def _bring(self, adapter: Adapter) -> bool:
        with self._files.folder(adapter) as folder:
            self._switching.submit(self._engine.load_adapter, adapter.digest, folder).result()
            return _thinks(folder)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()


def _thinks(folder: Path) -> bool:
    """Whether `flash.json` says that the adapter was trained with `thinking = true`."""
    try:
        record: Any = json.loads((folder / "flash.json").read_text(encoding="utf-8"))
        return record["spec"]["thinking"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False  # an adapter that was made elsewhere
