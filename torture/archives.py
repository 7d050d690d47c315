"""Archives made to harm: nothing lands outside the folder, and none costs more than its caps allow."""

from __future__ import annotations

import gzip
import io
import os
import random
import resource
import tarfile
import tempfile
import time
from pathlib import Path

from flash.environments.package import inspect, unpack
from flash.errors import FlashError
from torture.tally import Tally

NAMES = (
    "environment.py", "../evil", "/tmp/evil", "a/../../evil", "a/./b", "C:\\evil", "a\\..\\..\\evil", "", ".", "..",
    "a//b", "x" * 300, "/".join("d" * 30), "\udcff", "na\0me", "dataset/train.jsonl", "LINK", "LINK/evil", "CON",
    "a\nb", "~/evil", "-rf", "dataset", "environment.py/below",
)  # fmt: skip
KINDS = (
    tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE,
    tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, b"Z",
)  # fmt: skip
TARGETS = ("/etc/passwd", "..", "../../evil", "environment.py", "/", "LINK")
MOST_S = 20.0
MOST_BYTES = 300 << 20  # by which the process may grow over the whole row


def hostile(chance: random.Random) -> bytes:
    """One archive, wrong in some way or other, or right by chance."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=chance.choice((0, 1, 2)), errors="surrogateescape") as tar:
        for _ in range(chance.randint(0, 6)):
            info = tarfile.TarInfo(chance.choice(NAMES))
            info.type = chance.choice(KINDS)
            info.linkname = chance.choice(TARGETS) if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            info.mode = chance.choice((0o644, 0o7777, 0))
            body = chance.randbytes(chance.randint(0, 200)) if info.type in KINDS[:2] else b""
            if chance.random() < 0.05:
                body = bytes(chance.randint(1, 4) << 20)  # compresses a thousandfold
            info.size = len(body)
            if chance.random() < 0.2:
                size = str(chance.choice((-1, 10**18)))
                info.pax_headers = {"path": chance.choice(NAMES).replace("\0", ""), "size": size}
            try:
                tar.addfile(info, io.BytesIO(body))
            except (ValueError, UnicodeError, OSError):
                continue
    data = buffer.getvalue()
    for _ in range(chance.choice((0, 0, 1, 5))):  # flipped bytes, in headers more often than not
        at = chance.randrange(max(1, min(len(data), 2048)))
        data = data[:at] + chance.randbytes(1) + data[at + 1 :]
    packed = gzip.compress(data, 1)
    if chance.random() < 0.2:
        packed = packed[: chance.randrange(len(packed) + 1)]
    if chance.random() < 0.1:
        packed += chance.randbytes(20)
    return chance.randbytes(50) if chance.random() < 0.02 else packed


def archives(count: int, seed: int) -> Tally:
    chance = random.Random(seed)
    tally = Tally()
    refused, slowest = 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        outer = Path(folder)
        target = outer / "a" / "b" / "target"
        (outer / "a" / "b").mkdir(parents=True)
        before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(count):
            data = hostile(chance)
            began = time.monotonic()
            try:
                inspect(data)
                unpack(data, target, overwrite=True)
            except FlashError:
                refused += 1
            except Exception as error:
                tally.count(False, f"archive {number} of seed {seed}: {type(error).__name__}: {error}")
                continue
            took = time.monotonic() - began
            slowest = max(slowest, took)
            outside = _outside(outer, target)
            tally.count(not outside and took < MOST_S, f"archive {number} of seed {seed}: {outside}, {took:.1f} s")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) << 10
        if grown > MOST_BYTES:
            tally.losses.append(f"memory grew by {grown >> 20} MiB")
            tally.survived = 0
    tally.counts = {"refused": refused}
    tally.note = f"slowest {slowest * 1000:.0f} ms, {max(grown, 0) >> 20} MiB grown"
    return tally


def _outside(outer: Path, target: Path) -> list[str]:
    """What lies where only the target may, and links in it."""
    found = []
    for place, folders, files in os.walk(outer):
        inside = Path(place) == target or target in Path(place).parents
        for name in [*folders, *files]:
            path = Path(place, name)
            if path.is_symlink() or (not inside and path != target and path not in target.parents):
                found.append(str(path))
    return found + [name for name in ("/tmp/evil",) if Path(name).exists()]
