"""The artifact store at a distance: a bucket reached by signed addresses instead of the bucket's own keys.

Owns the HTTP of such a store. Who signs, and for which keys, is the other side's affair: a worker's addresses come
from the control plane, are good for one object and one verb each, and only for a while. What a bucket can do without
its keys is all there is: whole objects, one request each (5 GB at most on S3; parts of large files are far smaller). An
object whose upload broke off is sent anew, those before it stay. Knows no runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal, TypeVar

import httpx

from flash.artifacts.store import Store
from flash.errors import Conflict, FlashError, InvalidInput, NotFound, Unavailable

Verb = Literal["GET", "HEAD", "PUT"]
Sign = Callable[[Verb, Sequence[str]], Sequence[str]]
_CHUNK = 4 << 20  # bytes
_TRIES = 3
_PAUSE_S = 0.5
_AZURE = {"x-ms-blob-type": "BlockBlob"}  # without it Azure takes no upload; to the others it says nothing

T = TypeVar("T")


class SignedStore(Store):
    """`sign(verb, keys)` gives an address for each key. Offers what workers need, and refuses the rest.

    Raises as `Store` does.
    """

    def __init__(self, sign: Sign, *, silence_s: float = 60.0) -> None:
        self.url = "signed:"
        self.options = {}
        self._root = None
        self._sign = sign
        # The bucket is the operator's and its address ours: no proxy meant for the user's own traffic.
        self._http = httpx.Client(timeout=httpx.Timeout(silence_s, connect=10.0), trust_env=False)

    def put_bytes(self, key: str, data: bytes, *, create: bool = False) -> None:
        headers = {"If-None-Match": "*"} if create else {}
        self._put(key, lambda: data, len(data), headers)

    def put_file(self, key: str, path: Path) -> None:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            self._put(key, lambda: _from_start(file), size, {})

    def size(self, key: str) -> int | None:
        def ask() -> int:
            return int(_checked(self._http.head(self._address("HEAD", key)), key).headers["Content-Length"])

        try:
            return _repeated(key, ask)
        except NotFound:
            return None

    def get_bytes(self, key: str) -> bytes:
        return _repeated(key, lambda: _checked(self._http.get(self._address("GET", key)), key).content)

    def stream(self, key: str) -> Iterator[bytes]:
        with _translated(key), self._http.stream("GET", self._address("GET", key)) as answer:
            yield from _checked(answer, key).iter_bytes(_CHUNK)

    def copy(self, source: str, target: str) -> None:
        raise InvalidInput(f"{source}: signed addresses copy nothing")

    def delete(self, key: str) -> None:
        raise InvalidInput(f"{key}: signed addresses delete nothing")

    def list(self, prefix: str) -> list[str]:
        raise InvalidInput(f"{prefix}: signed addresses list nothing")

    def folders(self, prefix: str) -> Sequence[str]:
        raise InvalidInput(f"{prefix}: signed addresses list nothing")

    def sweep(self, *, older_than_s: float) -> int:
        return 0

    def _put(
        self, key: str, content: Callable[[], bytes | Iterator[bytes]], size: int, headers: Mapping[str, str]
    ) -> None:
        def send() -> None:
            sized = {**headers, "Content-Length": str(size), **_AZURE}
            _checked(self._http.put(self._address("PUT", key), content=content(), headers=sized), key)

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
    if answer.status_code in (409, 412):
        raise Conflict(f"object {key} is there already")
    raise Unavailable(
        f"the artifact store failed on {key}: it answered {answer.status_code}", remedy="see the bucket's own log"
    )


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
