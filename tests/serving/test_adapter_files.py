"""Adapters' files on a machine's disk: whole or absent, shared by hosts, bounded."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.serving.sites import Stored, made_up_adapter

from flash.artifacts.store import Store
from flash.errors import InvalidInput, NotFound, Unavailable
from flash.serving.adapters import Adapter, AdapterFiles


@pytest.fixture
def store(tmp_path):
    return Store((tmp_path / "artifacts").as_uri())


def files_in(folder: Path, store: Store, *, most_bytes: int = 1 << 30) -> AdapterFiles:
    return AdapterFiles(store, folder, most_bytes=most_bytes)


def named(stored: Stored) -> Adapter:
    return Adapter(stored.digest, stored.manifest_key)


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def kept(folder: Path) -> set[str]:
    return {place.name for place in (folder / "adapters").iterdir() if place.is_dir()}


def test_files_come_from_the_store_once(store, tmp_path):
    adapter = named(made_up_adapter(store, tmp_path, 1))
    files = files_in(tmp_path / "cache", store)
    with files.folder(adapter) as folder:
        first = weights(folder)
    for key in store.list("runs"):
        store.delete(key)
    with files.folder(adapter) as folder:
        assert weights(folder) == first


def test_files_that_changed_on_disk_are_fetched_again(store, tmp_path):
    adapter = named(made_up_adapter(store, tmp_path, 1))
    files = files_in(tmp_path / "cache", store)
    with files.folder(adapter) as folder:
        first = weights(folder)
        (folder / "adapter_model.safetensors").write_bytes(first[:-1])
    with files.folder(adapter) as folder:
        assert weights(folder) == first


def test_damaged_objects_are_not_served(store, tmp_path):
    adapter = named(made_up_adapter(store, tmp_path, 1))
    [key] = [key for key in store.list("runs") if "/objects/" in key and store.size(key) == 2000]
    store.put_bytes(key, b"\0" * 2000)
    with pytest.raises(Unavailable), files_in(tmp_path / "cache", store).folder(adapter):
        pass
    assert kept(tmp_path / "cache") == set()


def test_a_manifest_must_list_the_adapter_that_was_named(store, tmp_path):
    one, two = (made_up_adapter(store, tmp_path, step) for step in (1, 2))
    files = files_in(tmp_path / "cache", store)
    with pytest.raises(NotFound, match="another adapter"), files.folder(Adapter(one.digest, two.manifest_key)):
        pass
    with pytest.raises(InvalidInput, match="digest"):
        Adapter("../escape", one.manifest_key)


def test_the_disk_keeps_what_was_used_last(store, tmp_path):
    adapters = [named(made_up_adapter(store, tmp_path, step)) for step in range(4)]
    files = files_in(tmp_path / "cache", store, most_bytes=5000)  # two of about 2,040 bytes
    for age, adapter in enumerate(adapters):
        with files.folder(adapter):
            pass
        os.utime(tmp_path / "cache" / "adapters" / adapter.digest, (age, age))
    assert kept(tmp_path / "cache") == {adapters[2].digest, adapters[3].digest}
    with files.folder(adapters[2]):
        pass
    with files.folder(adapters[0]):
        pass
    assert kept(tmp_path / "cache") == {adapters[2].digest, adapters[0].digest}


def test_what_a_host_reads_is_not_removed(store, tmp_path):
    one, two = (named(made_up_adapter(store, tmp_path, step)) for step in (1, 2))
    ours, theirs = (files_in(tmp_path / "cache", store, most_bytes=0) for _ in range(2))
    with ours.folder(one) as folder:
        other = threading.Thread(target=lambda: theirs.folder(two).__enter__())
        other.start()
        other.join()
        with theirs.folder(two):
            pass
        assert weights(folder)


HOLD = """
import sys
from pathlib import Path
from flash.artifacts.store import Store
from flash.serving.adapters import Adapter, AdapterFiles

url, cache, *wanted = sys.argv[1:]
files = AdapterFiles(Store(url), Path(cache), most_bytes=3000)  # room for one
for turn in range(40):
    digest, key = wanted[turn % 2].split("=")
    with files.folder(Adapter(digest, key)) as folder:
        assert len((folder / "adapter_model.safetensors").read_bytes()) == 2000
"""


def test_hosts_share_a_folder(store, tmp_path):
    """Three processes fetch and evict each other's adapters; none ever sees a part of one."""
    stored = [made_up_adapter(store, tmp_path, step) for step in (1, 2)]
    wanted = [f"{each.digest}={each.manifest_key}" for each in stored]
    command = [sys.executable, "-c", HOLD, store.url, str(tmp_path / "cache"), *wanted]
    hosts = [subprocess.Popen(command) for _ in range(3)]
    assert [host.wait(100) for host in hosts] == [0] * 3
