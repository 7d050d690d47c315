"""The artifact store at a distance: a bucket reached by signed addresses instead of the bucket's own keys.

Owns the HTTP of such a store. Who signs, and for which keys, is the other side's affair: a worker's addresses come
from the control plane, are good for one object and one verb each, and only for a while. What a bucket can do without
its keys is all there is: whole objects, one request each (5 GB at most on S3; parts of large files are far smaller). An
object whose upload broke off is sent anew, those before it stay. Knows no runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal, TypeVar

import httpx

from flash.artifacts.store import Objects
from flash.errors import Conflict, FlashError, NotFound, Unavailable

Verb = Literal["GET", "HEAD", "PUT"]
Sign = Callable[[Verb, Sequence[str]], Sequence[str]]
_CHUNK = 4 << 20  # bytes
_TRIES = 3
_PAUSE_S = 0.5
_AZURE = {"x-ms-blob-type": "BlockBlob"}  # without it Azure takes no upload; to the others it says nothing

T = TypeVar("T")


class SignedStore(Objects):
    """`sign(verb, keys)` gives an address for each key."""

    def __init__(self, sign: Sign, *, silence_s: float = 60.0) -> None:
        self._sign = sign
        # The bucket is the operator's and its address ours: no proxy meant for the user's own traffic.
        self._http = httpx.Client(timeout=httpx.Timeout(silence_s, connect=10.0), trust_env=False)

    def put_bytes(self, key: str, data: bytes, *, create: bool = False) -> None:
        # Google's store heeds no If-None-Match on a PUT, and a header of its own would have to be signed: there, this
        # look is all that keeps an object, and of two writers at once the later one wins.
        if create and self.size(key) is not None:
            raise _taken(key)
        self._put(key, lambda: data, len(data), create=create)

    def put_file(self, key: str, path: Path) -> None:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            self._put(key, lambda: _from_start(file), size)

    def size(self, key: str) -> int | None:
        def ask() -> int:
            told = _checked(self._http.head(self._address("HEAD", key)), key).headers.get("Content-Length", "")
            if not told.isdigit():
                raise _failed(key, "it did not say how large that is")
            return int(told)

        try:
            return _repeated(key, ask)
        except NotFound:
            return None

    def get_bytes(self, key: str) -> bytes:
        return _repeated(key, lambda: _checked(self._http.get(self._address("GET", key)), key).content)

    def stream(self, key: str) -> Iterator[bytes]:
        with _translated(key), self._http.stream("GET", self._address("GET", key)) as answer:
            yield from _checked(answer, key).iter_bytes(_CHUNK)

    def _put(
        self, key: str, content: Callable[[], bytes | Iterator[bytes]], size: int, *, create: bool = False
    ) -> None:
        headers = {"Content-Length": str(size), **_AZURE, **({"If-None-Match": "*"} if create else {})}

        def send() -> None:
            answer = self._http.put(self._address("PUT", key), content=content(), headers=headers)
            if create and answer.status_code in (409, 412):  # else they mean that it could not be done just now
                raise _taken(key)
            _checked(answer, key)

        _repeated(key, send)

    def _address(self, verb: Verb, key: str) -> str:
        [address] = self._sign(verb, [key])
        return address


def _from_start(file: IO[bytes]) -> Iterator[bytes]:
    file.seek(0)
    while chunk := file.read(_CHUNK):
        yield chunk


def _checked(answer: httpx.Response, key: str) -> httpx.Response:
    if answer.is_success:
        return answer
    if answer.status_code == 404:
        raise NotFound(f"no object {key}")
    raise _failed(key, f"it answered {answer.status_code}")


def _taken(key: str) -> Conflict:
    return Conflict(f"object {key} is there already")


def _failed(key: str, problem: str) -> Unavailable:
    return Unavailable(f"the artifact store failed on {key}: {problem}", remedy="see the bucket's own log")


def _repeated(key: str, once: Callable[[], T]) -> T:
    """What `once` gives; a failure that may pass is tried again, with an address signed anew."""
    for left in range(_TRIES - 1, -1, -1):
        try:
            with _translated(key):
                return once()
        except Unavailable:
            if not left:
                raise
            time.sleep(_PAUSE_S)
    raise AssertionError("the last try raises")


@contextmanager
def _translated(key: str) -> Iterator[None]:
    try:
        yield
    except FlashError:
        raise
    except (httpx.HTTPError, OSError) as error:
        raise Unavailable(
            f"the artifact store failed on {key}: {error or type(error).__name__}", remedy="check the network"
        ) from error
