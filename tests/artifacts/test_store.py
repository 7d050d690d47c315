"""The store's promises: whole objects or none, synced, private names, plain errors."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torture.bucket import Bucket

from flash.artifacts.store import Store, digest_file
from flash.errors import Conflict, InvalidInput, NotFound, Unavailable


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with Bucket(random.Random(0)) as bucket:
        yield bucket


@pytest.fixture(params=["file", "memory", pytest.param("bucket", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "bucket":
        bucket = request.getfixturevalue("bucket")
        return Store(f"{bucket.url}/{tmp_path.name}", bucket.options)
    return Store((tmp_path / "with space").as_uri() if request.param == "file" else "memory://")


def test_bytes_come_back_as_they_went_in(store: Store, tmp_path: Path):
    body = os.urandom(9 << 20)
    (tmp_path / "source").write_bytes(body)
    store.put_file("a/b/large", tmp_path / "source")
    store.put_bytes("a/small", b"one")
    store.put_bytes("a/small", b"three")
    assert (store.get_bytes("a/small"), store.size("a/b/large")) == (b"three", len(body))
    assert b"".join(store.stream("a/b/large")) == body
    assert store.digest("a/b/large") == hashlib.sha256(body).hexdigest() == digest_file(tmp_path / "source")[0]
    assert store.list("a") == ["a/b/large", "a/small"]


def test_creating_succeeds_once(store: Store):
    store.put_bytes("key", b"first", create=True)
    with pytest.raises(Conflict):
        store.put_bytes("key", b"second", create=True)
    assert store.get_bytes("key") == b"first"


def test_absent_keys_are_not_found_and_may_be_deleted(store: Store):
    assert store.size("nope") is None
    with pytest.raises(NotFound):
        store.get_bytes("nope")
    with pytest.raises(NotFound):
        list(store.stream("nope"))
    store.delete("nope")
    store.put_bytes("yes", b"")
    store.delete("yes")
    assert store.list("") == []


@pytest.mark.parametrize("key", ["../x", "/x", "a//b", "a/./b", "a/../../b", "", "a\0b", "a#1"])
def test_keys_that_lead_elsewhere_are_refused(store: Store, key: str):
    with pytest.raises(InvalidInput, match="not a store key"):
        store.put_bytes(key, b"x")


def test_a_writer_killed_midway_leaves_nothing_to_read_and_is_swept(tmp_path: Path):
    url = (tmp_path / "store").as_uri()
    code = f"""
        import time
        from pathlib import Path
        from flash.artifacts.store import Store
        store = Store({url!r})
        with store._replacing("runs/key", create=False) as file:
            file.write(b"half")
            file.flush()
            print("ready", flush=True)
            time.sleep(60)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    store = Store(url)
    assert (store.list("runs"), store.size("runs/key")) == ([], None)
    store.put_bytes("runs/other", b"x")
    assert store.sweep(older_than_s=3600) == 0
    assert store.sweep(older_than_s=-1) == 1
    assert [path.name for path in (tmp_path / "store" / "runs").iterdir()] == ["other"]


def test_a_full_disk_is_unavailable_and_leaves_no_draft(tmp_path: Path):
    store = Store((tmp_path / "store").as_uri())
    code = f"""
        import resource, signal
        from flash.artifacts.store import Store
        from flash.errors import Unavailable
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # writes beyond it fail as on a full disk
        try:
            Store({store.url!r}).put_bytes("a/key", b"x" * 5000)
        except Unavailable as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert "check space" in done.stdout
    assert list((tmp_path / "store" / "a").iterdir()) == []


def test_a_place_that_can_not_be_written_is_unavailable(tmp_path: Path):
    store = Store((tmp_path / "store").as_uri())
    (tmp_path / "store" / "a").write_text("a file where a folder belongs")
    with pytest.raises(Unavailable, match="artifact store failed"):
        store.put_bytes("a/key", b"x")


def test_what_is_no_url_is_refused():
    with pytest.raises(InvalidInput, match="not a store"):
        Store("/just/a/path")


@pytest.mark.parametrize(
    ("url", "options", "says"),
    [
        ("s3://", {}, "can't be used as a store"),
        ("s3://bucket", {"colour": "blue"}, "colour"),
        ("s3://bucket", {"max_retries": "often"}, "often"),
        ("s3://bucket", {"endpoint": "http://store.example:9000"}, "not encrypted .*allow_http=true"),
        ("what://bucket", {}, "can't be used as a store"),
    ],
)
def test_a_bucket_that_can_not_be_meant_is_refused_at_once(url: str, options: dict[str, str], says: str):
    with pytest.raises(InvalidInput, match=says):
        Store(url, options)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://localhost:9"])
def test_a_bucket_out_of_reach_is_unavailable_and_plain_http_is_for_loopback(endpoint: str):
    keys = {"access_key_id": "key", "secret_access_key": "secret", "region": "us-east-1"}
    store = Store("s3://bucket/prefix", {"endpoint": endpoint, "max_retries": "0", **keys})
    with pytest.raises(Unavailable, match="artifact store failed on a/key"):
        store.put_bytes("a/key", b"x")


@pytest.mark.slow
def test_a_bucket_that_hangs_takes_no_more_than_its_share_of_threads():
    keys = {"access_key_id": "key", "secret_access_key": "secret", "region": "us-east-1"}
    with socket.create_server(("127.0.0.1", 0), backlog=64) as deaf, ThreadPoolExecutor(20) as threads:
        endpoint = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        store = Store("s3://bucket", {"endpoint": endpoint, "max_retries": "0", "read_timeout": "6s", **keys})
        asked = [threads.submit(store.size, f"key-{number}") for number in range(20)]
        told = [str(each.exception()) for each in asked]
    assert sum("the artifact store is slow" in text for text in told) == 4
    assert sum("the artifact store failed on" in text for text in told) == 16


@pytest.mark.slow
def test_a_bucket_slower_than_its_time_out_still_gives_a_whole_object(bucket: Bucket):
    store = Store(bucket.url, {**bucket.options, "read_timeout": "0.9s"})
    body = os.urandom(3 << 20)
    store.put_bytes("a/large", body)
    bucket.slow_s = 2.0
    try:
        assert b"".join(store.stream("a/large")) == body
    finally:
        bucket.slow_s = 0.0


def test_a_copy_lives_on_without_its_source(store: Store):
    store.put_bytes("a/one", b"bytes")
    for _ in range(2):  # again is fine
        store.copy("a/one", "b/deep/two")
    store.put_bytes("a/one", b"others")
    assert store.get_bytes("b/deep/two") == b"bytes"
    store.delete("a/one")
    assert store.get_bytes("b/deep/two") == b"bytes"
    with pytest.raises(NotFound):
        store.copy("a/one", "b/three")


def test_folders_are_listed_by_name_alone(store: Store):
    for key in ("runs/x/objects/1", "runs/y/objects/2", "runs/y/checkpoints/3", "runs/plain", "other/z/4"):
        store.put_bytes(key, b"")
    assert store.folders("runs") == ["x", "y"]
    assert store.folders("none") == []
