"""Brings a base model's files from the hub into this machine's cache: once, however many runs ask at a time.

Owns the way to the hub (or a mirror of it), which files of a repository are fetched, going on where a broken
download stopped, the digests that every file must have, and what a refusal means in words. The cache is laid out as
the Hugging Face libraries lay theirs out, so that either side finds what the other fetched. Fetches no code, loads
nothing, knows no torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import httpx

from flash.catalog.catalog import flash_home
from flash.catalog.fit import gigabytes
from flash.errors import FlashError, InvalidInput, ModelError, Unavailable
from flash.inference.model_files import INDEX, WEIGHTS, is_complete, is_safe, is_small, refusal, shards_of

PUBLIC = "https://huggingface.co"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_AT_ONCE = 4  # files
_CHUNK = 1 << 20  # bytes
_LARGEST_SMALL = 256 << 20  # bytes of a file that is no weights: tokenizers reach tens of MB
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_PAUSE_S = 30.0

Progress = Callable[[int, int], None]
"""Called about once a second with the bytes that are here and those of the whole model; only while they grow."""


@dataclass(frozen=True)
class Hub:
    """Where models come from and where they are kept. Times are in seconds."""

    endpoint: str
    cache: Path
    token: str | None = None
    offline: bool = False
    connect_s: float = 10.0
    read_s: float = 30.0    # without a byte
    tries: int = 5          # in a row that bring no byte
    pause_s: float = 1.0    # after the first of them; doubles
    watch_s: float = 1.0    # between two looks at how much is here

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Hub:
        """As the Hugging Face libraries read their variables; without HF_HOME the cache is `$FLASH_HOME`'s."""
        environ = os.environ if environ is None else environ
        endpoint = environ.get("HF_ENDPOINT", "").strip().rstrip("/") or PUBLIC
        if not _is_url(endpoint):
            raise InvalidInput(f"HF_ENDPOINT = {endpoint!r}: must be an http(s) URL", remedy="correct it, or unset it")
        return cls(
            endpoint=endpoint,
            cache=_cache(environ),
            token=environ.get("HF_TOKEN") or _stored_token(environ),
            offline=any(_is_true(environ.get(name)) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")),
            read_s=_seconds(environ.get("HF_HUB_DOWNLOAD_TIMEOUT"), 30.0),
        )

    @property
    def named(self) -> str:
        """For people: a mirror is named."""
        return "the model hub" if self.endpoint == PUBLIC else f"the model hub at {self.endpoint}"


@dataclass(frozen=True)
class Located:
    """A model on this machine. `commit` is the hub's, None for a folder that someone put there; `note`: what a
    person should know of how it came here."""

    folder: Path
    commit: str | None
    note: str | None = None


@dataclass(frozen=True)
class _File:
    """One file of a repository; `digest` is SHA-256 (64 digits) or git's SHA-1 of a blob (40), else unchecked."""

    name: str
    size: int
    digest: str


def locate(
    source: str | Path,
    *,
    revision: str | None = None,
    label: str | None = None,
    weights: bool = True,
    progress: Progress | None = None,
) -> Located:
    """A folder that is given (a Path, or an absolute one as text) as it is; a hub's id through `fetch`."""
    if isinstance(source, str) and not Path(source).is_absolute():
        return fetch(source, revision, label=label, weights=weights, progress=progress)
    if not Path(source).is_dir():
        raise ModelError(f"{label or source}: there is no model folder at {source}")
    return Located(Path(source), None)


def fetch(
    model: str,
    revision: str | None = None,
    *,
    label: str | None = None,
    weights: bool = True,
    hub: Hub | None = None,
    progress: Progress | None = None,
) -> Located:
    """The folder with a model's files, fetched as far as they are not here yet.

    `revision` is a commit, a branch or a tag (default: `main`, which the hub resolves to its commit). A commit that
    is here whole is used without asking the hub. Without `weights`, configuration and tokenizer alone. Raises
    ModelError (no such model, gated, no safetensors, offline), Unavailable (no network, a full disk).
    """
    label = label or model
    if not _ID.fullmatch(model) or ".." in model or len(model) > 200:
        raise ModelError(f"{label}: {model!r:.200} is neither a folder nor an id of the hub's")
    fetcher = _Fetcher(hub or Hub.from_environment(), model, revision or "main", label)
    try:
        return fetcher.fetch(weights=weights, progress=progress)
    except OSError as error:
        raise _disk_trouble(fetcher.hub.cache, label, error) from error


class _Fetcher:
    def __init__(self, hub: Hub, model: str, revision: str, label: str) -> None:
        self.hub = hub
        self._model, self._revision, self._label = model, revision, label
        folder = "models--" + model.replace("/", "--")
        self._home = hub.cache / folder
        self._locks = hub.cache / ".locks" / folder
        self._stop = threading.Event()

    def fetch(self, *, weights: bool, progress: Progress | None) -> Located:
        here = self._here(weights)
        if here is not None and (_COMMIT.fullmatch(self._revision) or self.hub.offline):
            return here
        if self.hub.offline:
            raise ModelError(
                f"{self._label}: it is not on this machine, and the hub is switched off (HF_HUB_OFFLINE)",
                remedy=f"unset HF_HUB_OFFLINE once, or put the model into {self.hub.cache}",
            )
        with self._client() as client:
            self._http = client
            try:
                commit, listed = self._listing()
            except Unavailable as error:
                if here is None:
                    raise
                note = f"{error.message}; using the copy that is here, of commit {here.folder.name[:12]}"
                return replace(here, note=note)
            return Located(self._bring(commit, listed, weights, progress), commit)

    def _here(self, weights: bool) -> Located | None:
        """What the cache has of this revision, if it is whole."""
        commit = self._revision
        if not _COMMIT.fullmatch(commit):
            if not is_safe(commit):
                return None
            try:
                commit = (self._home / "refs" / self._revision).read_text().strip()
            except OSError:
                return None
        folder = self._home / "snapshots" / commit
        whole = is_complete(folder) if weights else (folder / "config.json").is_file()
        return Located(folder, commit) if _COMMIT.fullmatch(commit) and whole else None

    # --- what there is -----------------------------------------------------------------------------------

    def _listing(self) -> tuple[str, list[_File]]:
        """The commit that the revision stands for, and its files."""
        where = f"api/models/{quote(self._model)}/revision/{quote(self._revision, safe='')}"
        answer = self._json(f"{self.hub.endpoint}/{where}", {"blobs": "true"})
        commit, entries = str(answer.get("sha")), answer.get("siblings")
        if not _COMMIT.fullmatch(commit) or not isinstance(entries, list):
            raise ModelError(f"{self._label}: {self.hub.named} gave an answer that makes no sense")
        found = {str(entry.get("rfilename")): entry for entry in entries if isinstance(entry, dict)}
        if (refused := refusal(found)) is not None:
            raise ModelError(f"{self._label}: {refused[0]}", remedy=refused[1])
        wanted = [name for name in found if is_safe(name) and (is_small(name) or name.endswith(".safetensors"))]
        return commit, [self._file(name, found[name]) for name in wanted]

    def _file(self, name: str, entry: Mapping[str, Any]) -> _File:
        large = entry.get("lfs")
        digest = large.get("sha256") if isinstance(large, dict) else entry.get("blobId")
        size = entry.get("size")
        if isinstance(size, int) and re.fullmatch(r"[0-9a-f]{40,64}", str(digest)):
            return _File(name, size, str(digest))
        return _File(name, -1, "")  # a mirror that lists names only: `_described` asks

    def _described(self, commit: str, file: _File) -> _File:
        """With size and digest, by the headers that the Hugging Face libraries go by too."""
        if file.digest:
            return file
        answer = self._patiently(
            lambda: self._http.head(self._url(commit, file.name), follow_redirects=False), file.name
        )
        headers = answer.headers
        size = headers.get("X-Linked-Size") or headers.get("Content-Length") or ""
        tag = (headers.get("X-Linked-Etag") or headers.get("ETag") or "").removeprefix("W/").strip('"')
        if not size.isdigit() or not re.fullmatch(r"[\w.-]{1,128}", tag):
            raise ModelError(f"{self._label}: {self.hub.named} does not say how long {file.name} is")
        return _File(file.name, int(size), tag)

    # --- fetching ----------------------------------------------------------------------------------------

    def _bring(self, commit: str, listed: list[_File], weights: bool, progress: Progress | None) -> Path:
        """Everything that is needed, in the snapshot's folder; the weights last, so that they mark a whole one."""
        folder = self._home / "snapshots" / commit
        small = [self._described(commit, file) for file in listed if is_small(file.name)]
        small = [file for file in small if file.size <= _LARGEST_SMALL]
        self._bring_all(commit, folder, small, None)
        if weights:
            known = {file.name for file in listed}
            names = (WEIGHTS,) if WEIGHTS in known else self._shards(folder)
            missing = sorted(set(names) - known)
            if missing:
                raise ModelError(f"{self._label}: {INDEX} names {missing[0]}, which its repository lacks")
            large = [self._described(commit, file) for file in listed if file.name in names]
            self._check_space([*small, *large])
            self._bring_all(commit, folder, large, progress)
        with contextlib.suppress(OSError):  # a cache that others filled may be read-only
            self._note_revision(commit)
        return folder

    def _shards(self, folder: Path) -> tuple[str, ...]:
        try:
            return shards_of((folder / INDEX).read_bytes())
        except (ValueError, FileNotFoundError) as error:  # not there: it was too large for an index
            raise ModelError(f"{self._label}: {INDEX} can't be read: {error}") from None

    def _bring_all(self, commit: str, folder: Path, files: list[_File], progress: Progress | None) -> None:
        if all(_holds(folder / file.name, file.size) for file in files):
            return
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="fetch") as pool:
            try:
                jobs = [pool.submit(self._bring_one, commit, folder, file) for file in files]
                self._watch(jobs, files, progress)
            finally:
                self._stop.set()  # on the way out of an error the others end too
                for job in jobs:
                    job.cancel()
        self._stop.clear()

    def _watch(self, jobs: list[Future[None]], files: list[_File], progress: Progress | None) -> None:
        """Until all are here: tells what the disk shows, whether this process fetches or another one does."""
        total, told = sum(file.size for file in files), -1
        pending: Iterable[Future[None]] = jobs
        while pending:
            finished, pending = wait(pending, timeout=self.hub.watch_s, return_when=FIRST_EXCEPTION)
            for job in finished:
                job.result()
            here = sum(self._present(file) for file in files)
            if progress is not None and here != told:
                progress(here, total)
                told = here

    def _present(self, file: _File) -> int:
        for path in (self._blob(file), self._draft(file)):
            with contextlib.suppress(OSError):
                return min(path.stat().st_size, file.size)
        return 0

    def _blob(self, file: _File) -> Path:
        return self._home / "blobs" / file.digest

    def _draft(self, file: _File) -> Path:
        return self._home / "blobs" / f"{file.digest}.incomplete"

    def _bring_one(self, commit: str, folder: Path, file: _File) -> None:
        link, blob = folder / file.name, self._blob(file)
        if _holds(link, file.size):
            return
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        with self._locked(file):
            if not _holds(blob, file.size):
                blob.unlink(missing_ok=True)  # it was damaged since
                self._download(commit, file)
            if not _holds(link, file.size):
                _link(link, blob)

    @contextlib.contextmanager
    def _locked(self, file: _File) -> Iterator[None]:
        """One process at a time fetches a file, the Hugging Face libraries' included; the kernel frees a dead one's."""
        self._locks.mkdir(parents=True, exist_ok=True)
        with (self._locks / f"{file.digest}.lock").open("a") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if self._stop.wait(min(0.2, self.hub.watch_s)):
                        raise _StoppedError from None
            yield

    def _download(self, commit: str, file: _File) -> None:
        draft = self._draft(file)
        for _ in range(2):
            with draft.open("ab") as out:
                self._receive(commit, file, out)
                out.flush()
                os.fsync(out.fileno())
            if _digest_is_right(draft, file):
                draft.rename(self._blob(file))
                return
            draft.unlink()  # a torn end of what an earlier process wrote, or bytes that changed on the way
        raise ModelError(
            f"{self._label}: {file.name} came twice with other bytes than {self.hub.named} says it has",
            remedy="try again later" if self.hub.endpoint == PUBLIC else "ask who keeps the mirror",
        )

    def _receive(self, commit: str, file: _File, out: BinaryIO) -> None:
        """Appends what is missing, over as many connections as it takes. The position is the file's end."""
        fruitless = 0
        while (have := out.tell()) < file.size:
            try:
                self._stream(self._url(commit, file.name), have, file, out)
                why = "the connection ended early"
            except (httpx.RequestError, _BusyError) as error:
                why = _words(error)
            if self._stop.is_set():
                raise _StoppedError
            fruitless = 0 if out.tell() > have else fruitless + 1
            if fruitless >= self.hub.tries:
                raise Unavailable(
                    f"{self._label}: {self.hub.named} gave no more of {file.name} after "
                    f"{gigabytes(out.tell())} of {gigabytes(file.size)}: {why}",
                    remedy="what is here is kept; try again when the network is well",
                )
            if fruitless:
                self._stop.wait(self._pause(fruitless))

    def _stream(self, url: str, have: int, file: _File, out: BinaryIO) -> None:
        headers = {"Range": f"bytes={have}-"} if have else {}
        with self._http.stream("GET", url, headers=headers) as answer:
            self._check(answer, file.name)
            if have and answer.status_code != 206:  # it does not know ranges: from the start again
                out.truncate(0)
                out.seek(0)
            for chunk in answer.iter_bytes():  # as they come: gathered into larger ones, a break would lose them
                if self._stop.is_set() or out.tell() > file.size:
                    return
                out.write(chunk)

    def _check_space(self, files: list[_File]) -> None:
        missing = sum(file.size - self._present(file) for file in files)
        self._home.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._home).free
        if missing > free:
            raise Unavailable(
                f"{self._label}: {gigabytes(missing)} are to be fetched, and the disk of {self.hub.cache} has "
                f"{gigabytes(free)} left",
                remedy="free space, or set HF_HOME to a folder on a larger disk",
            )

    def _note_revision(self, commit: str) -> None:
        if self._revision == commit or not is_safe(self._revision):
            return
        path = self._home / "refs" / self._revision
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(commit)
        draft.rename(path)

    # --- asking ------------------------------------------------------------------------------------------

    def _client(self) -> httpx.Client:
        """Redirects to another host go without the token: httpx drops it."""
        own = {"Authorization": f"Bearer {self.hub.token}"} if self.hub.token else {}
        return httpx.Client(
            headers={"User-Agent": "flash-lora", "Accept-Encoding": "identity", **own},
            timeout=httpx.Timeout(self.hub.read_s, connect=self.hub.connect_s),
            follow_redirects=True,
        )

    def _url(self, commit: str, name: str) -> str:
        return f"{self.hub.endpoint}/{quote(self._model)}/resolve/{commit}/{quote(name)}"

    def _json(self, url: str, query: dict[str, str]) -> dict[str, Any]:
        answer = self._patiently(lambda: self._http.get(url, params=query), None)
        try:
            found = answer.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ModelError(
                f"{self._label}: {self.hub.named} gave an answer that is no JSON", remedy="check HF_ENDPOINT"
            )
        return found

    def _patiently(self, ask: Callable[[], httpx.Response], name: str | None) -> httpx.Response:
        """A short request, repeated while the hub is away or busy."""
        for fruitless in range(1, self.hub.tries + 1):
            try:
                answer = ask()
                self._check(answer, name)
                return answer
            except (httpx.RequestError, _BusyError) as error:
                last = error
            if fruitless < self.hub.tries:
                self._stop.wait(self._pause(fruitless))
        raise Unavailable(
            f"{self._label}: {self.hub.named} can't be reached: {_words(last)}",
            remedy="check the network; HF_ENDPOINT names a mirror, and models.toml takes a local copy's path",
        ) from None

    def _pause(self, fruitless: int) -> float:
        return min(_LONGEST_PAUSE_S, self.hub.pause_s * 2.0 ** (fruitless - 1))

    def _check(self, answer: httpx.Response, name: str | None) -> None:
        """Raises what a refusal means. `name` is the file that was asked for; None: the model."""
        if answer.status_code < 400:
            return
        if answer.status_code in _BUSY:
            raise _BusyError(f"it answered {answer.status_code}")
        raise self._refused(answer, name)

    def _refused(self, answer: httpx.Response, name: str | None) -> FlashError:
        code, status = answer.headers.get("X-Error-Code", ""), answer.status_code
        said = answer.headers.get("X-Error-Message", "").strip()
        model = self._label
        if "invalid credentials" in said.lower() or "invalid user token" in said.lower():
            return ModelError(f"{model}: {self.hub.named} does not take this HF_TOKEN", remedy="set one that is valid")
        if code == "GatedRepo" or (status == 403 and "gated" in said.lower()):
            page = f"{self.hub.endpoint}/{self._model}"
            remedy = "and set HF_TOKEN to your token" if self.hub.token is None else "as the owner of this HF_TOKEN"
            return ModelError(f"{model}: access is gated", remedy=f"accept its licence at {page} {remedy}")
        if code == "RevisionNotFound":
            return ModelError(f"{model}: it has no revision {self._revision!r}", remedy="check it in models.toml")
        if code == "EntryNotFound" or (status == 404 and name is not None):
            return ModelError(f"{model}: its file {name} is not on {self.hub.named}")
        if code in ("RepoNotFound", "RepositoryNotFound") or status in (401, 404):  # 401: it does not tell strangers
            return ModelError(
                f"{model}: {self.hub.named} has no such model",
                remedy="check the id with `flash models`; a private one needs HF_TOKEN",
            )
        words = f": {said}" if said else ""
        return ModelError(f"{model}: {self.hub.named} refused it ({status}){words}")


class _BusyError(Exception):
    """The hub answered that it can't answer now."""


class _StoppedError(Exception):
    """Another file of the same model failed."""


def _holds(path: Path, size: int) -> bool:
    """Whether a whole file of this size is there (a link counts by what it leads to)."""
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _link(link: Path, blob: Path) -> None:
    """Points the snapshot's name at the blob, relatively: a cache may be moved."""
    draft = link.with_name(f".{link.name}.{os.getpid()}.{threading.get_ident()}")
    draft.symlink_to(os.path.relpath(blob, link.parent))
    draft.rename(link)


def _digest_is_right(path: Path, file: _File) -> bool:
    with path.open("rb") as content:
        if _SHA256.fullmatch(file.digest):
            return hashlib.file_digest(content, "sha256").hexdigest() == file.digest
        if _COMMIT.fullmatch(file.digest):  # git's name for a blob: SHA-1 over a short header and the content
            found = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
            while chunk := content.read(_CHUNK):
                found.update(chunk)
            return found.hexdigest() == file.digest
    return path.stat().st_size == file.size


def _disk_trouble(cache: Path, label: str, error: OSError) -> FlashError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Unavailable(
            f"{label}: the disk of {cache} is full", remedy="free space, or set HF_HOME to a folder on a larger disk"
        )
    return ModelError(f"{label}: the model cache {cache} can't be used: {error.strerror or error}")


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _is_url(text: str) -> bool:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    return url.scheme in ("http", "https") and bool(url.host)


def _cache(environ: Mapping[str, str]) -> Path:
    if named := environ.get("HF_HUB_CACHE"):
        return Path(named).expanduser()
    if home := environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    return flash_home(environ) / "cache" / "models"


def _stored_token(environ: Mapping[str, str]) -> str | None:
    """The one that `hf auth login` keeps."""
    home = Path(environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    try:
        return (home / "token").read_text().strip() or None
    except OSError:
        return None


def _is_true(text: str | None) -> bool:
    return (text or "").strip().upper() in ("1", "ON", "YES", "TRUE")


def _seconds(text: str | None, default: float) -> float:
    try:
        return max(1.0, float(text)) if text else default
    except ValueError:
        return default
