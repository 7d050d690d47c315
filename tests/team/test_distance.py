"""Workers at a distance: no key of the bucket's, addresses for their own run's objects alone, broken uploads."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update
from tests.team.test_retention import DAYS, SPEC, Made, World, name
from tests.team.worlds import Team
from torture.bucket import Bucket, Kill
from torture.machine import HERE

from flash.artifacts.manifests import (
    Damaged,
    fetch_checkpoint,
    manifest_key,
    object_key,
    read_manifest,
    verify,
    write_checkpoint,
)
from flash.artifacts.signed import SignedStore
from flash.artifacts.store import Store, credentials
from flash.errors import Conflict, NotFound, Unavailable
from flash.records import Manifest, ManifestFile, RunState
from flash.storage import schema

pytestmark = pytest.mark.slow

WRITER = (sys.executable, str(HERE / "bucket_writer.py"))


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with Bucket(random.Random(3)) as bucket:
        yield bucket


@pytest.fixture
def distant(open_team: Callable[..., Team], bucket: Bucket, tmp_path: Path) -> Team:
    url = f"{bucket.url}/{tmp_path.name}"
    return open_team(store_url=url, store_options=bucket.options, worker_store="signed", devices=("cpu", "cpu:1"))


def launched(team: Team, key: str, **train: Any) -> tuple[str, dict[str, str]]:
    """A run with its worker's way in."""
    run_id = team.run(key, "acme", **train)
    team.settle()
    return run_id, {"Authorization": f"Bearer {team.launcher.requests[f'{run_id}.1'].token}"}


def test_a_claim_brings_no_key_of_the_bucket(distant: Team, bucket: Bucket):
    key = distant.key("acme")
    distant.push(key, "acme")
    run_id, worker = launched(distant, key)
    claim = distant.http.post(f"/worker/attempts/{run_id}.1/claim", json={"pid": 7}, headers=worker)
    assert claim.status_code == 200 and claim.json()["signed"] and claim.json()["store_options"] == {}
    asked = {"epoch": 1, "verb": "PUT", "keys": [object_key(run_id, "a" * 64)]}
    urls = distant.http.post(f"/worker/attempts/{run_id}.1/urls", json=asked, headers=worker)
    assert urls.status_code == 200
    for secret in credentials(bucket.options):
        if secret != bucket.options["access_key_id"]:  # whose key has signed is no secret
            assert secret not in urls.text
        assert secret not in claim.text


def test_addresses_are_for_a_workers_own_objects_alone(distant: Team):
    key = distant.key("acme")
    distant.push(key, "acme")
    mine, worker = launched(distant, key)
    other, others = launched(distant, key)
    for run_id, token in ((mine, worker), (other, others)):
        path = f"/worker/attempts/{run_id}.1/claim"
        assert distant.http.post(path, json={"pid": 7}, headers=token).status_code == 200

    def ask(verb: str, *keys: str, epoch: int = 1, headers: dict[str, str] = worker) -> int:
        body = {"epoch": epoch, "verb": verb, "keys": keys}
        return int(distant.http.post(f"/worker/attempts/{mine}.1/urls", json=body, headers=headers).status_code)

    own = object_key(mine, "a" * 64)
    for verb in ("GET", "HEAD", "PUT"):
        assert ask(verb, own, manifest_key(mine, 3)) == 200
        strange = (
            object_key(other, "a" * 64), manifest_key(other, 3), "environments/x.tar.gz", "runs", f"runs/{mine}x/y",
        )  # fmt: skip
        for stranger in strange:
            assert ask(verb, stranger) == 403, stranger
            assert ask(verb, own, stranger) == 403, "one among one's own"
        for crooked in (f"runs/{mine}/../{other}/objects/x", f"runs/{mine}/", f"runs/{mine}//x", f"runs/{mine}/./x"):
            assert ask(verb, crooked) == 422, crooked
    assert ask("DELETE", own) == 422
    assert ask("PUT", own, epoch=2) == 409
    assert ask("PUT", own, headers=others) == 401
    assert ask("PUT", own, headers={}) == 401
    assert ask("PUT", own, headers={"Authorization": f"Bearer {key}"}) == 401
    assert distant.call(key, "POST", f"/api/runs/{mine}/cancel").status_code == 200
    finish = {"epoch": 1, "outcome": "cancelled"}
    assert distant.http.post(f"/worker/attempts/{mine}.1/finish", json=finish, headers=worker).is_success
    assert ask("PUT", own) in (401, 409), "an ended attempt writes no more"


def test_the_adapter_that_a_run_starts_from_may_be_read_and_not_written(distant: Team):
    world = World(distant)
    source = Made(name(), RunState.DONE, 0.0, world.environment("e", deleted_days=None))
    world.add(source, 1)
    distant.plane.clock = distant.plane.database.clock
    key = distant.key("beta")
    with distant.plane.database.write() as connection:
        connection.exec_driver_sql("UPDATE api_keys SET org_id = 'acme' WHERE org_id = 'beta'")
    distant.push(key, "acme")
    run_id, worker = launched(distant, key, init_from_adapter=source.run_id)
    path = f"/worker/attempts/{run_id}.1"
    assert distant.http.post(f"{path}/claim", json={"pid": 7}, headers=worker).status_code == 200
    [manifest] = source.checkpoints
    for file in manifest.files:
        for verb, allowed in (("GET", file.path.startswith("adapter/")), ("PUT", False)):
            body = {"epoch": 1, "verb": verb, "keys": [object_key(source.run_id, file.sha256)]}
            answer = distant.http.post(f"{path}/urls", json=body, headers=worker)
            assert answer.status_code == (200 if allowed else 403), (verb, file.path)


def test_an_engine_has_no_key_and_reads_the_adapters_of_its_base_alone(
    open_team: Callable[..., Team], bucket: Bucket, tmp_path: Path
):
    team = open_team(
        store_url=f"{bucket.url}/{tmp_path.name}", store_options=bucket.options, worker_store="signed",
        devices=("cpu",), engine_wait_s=0.0,
    )  # fmt: skip
    world = World(team)
    environment = world.environment("e", deleted_days=None)
    fitting, strange = (Made(name(), RunState.DONE, 0.0, environment) for _ in range(2))
    for made in (fitting, strange):
        world.add(made, 2)
    with team.plane.database.write() as connection:
        table = schema.runs
        other = {**SPEC, "model": "Qwen/Qwen3.5-0.8B"}
        connection.execute(update(table).where(table.c.id == strange.run_id).values(spec=other))
    key = team.key("beta")
    asked = {"model": "flash/nano", "messages": [{"role": "user", "content": "x"}]}
    team.call(key, "POST", "/v1/chat/completions", json=asked)
    team.settle()
    [engine] = team.launcher.requests
    launch = team.launcher.requests[engine]
    assert launch.engine is not None and launch.engine["signed"] and launch.engine["store_options"] == {}
    assert not [secret for secret in credentials(bucket.options) if secret in json.dumps(launch.engine)]

    def ask(*keys: str, token: str = launch.token) -> Any:
        headers = {"Authorization": f"Bearer {token}"}
        return team.http.post(f"/worker/engines/{engine}/urls", json={"keys": keys}, headers=headers)

    for made, adapters in ((fitting, 200), (strange, 403)):
        for manifest in made.checkpoints:
            assert ask(manifest_key(made.run_id, manifest.step)).status_code == adapters
            for file in manifest.files:
                expected = adapters if file.path.startswith("adapter/") else 403
                assert ask(object_key(made.run_id, file.sha256)).status_code == expected, file.path
    own = manifest_key(fitting.run_id, 1)
    [address] = ask(own).json()["urls"]
    assert httpx.get(address).content == team.plane.store.get_bytes(own)
    for crooked in (manifest_key(fitting.run_id, 3), f"runs/{fitting.run_id}/../x", "environments/x.tar.gz", "runs"):
        assert ask(own, crooked).status_code == 403, crooked
    assert ask(manifest_key(name(), 1)).status_code == 404
    assert ask(own, token=key).status_code == ask(own, token="").status_code == 401


# --- the bucket by addresses ------------------------------------------------------------------------------


def signed(bucket: Bucket, prefix: str, *, silence_s: float = 2.0) -> tuple[SignedStore, Store, list[str]]:
    """A store by addresses, the same with keys, and what was signed."""
    behind, asked = Store(f"{bucket.url}/{prefix}", {**bucket.options, "read_timeout": "30s"}), []

    def sign(verb: Any, keys: Any) -> Any:
        asked.append(f"{verb} {' '.join(keys)}")
        return behind.sign(verb, keys, expires_s=60)

    return SignedStore(sign, silence_s=silence_s), behind, asked


def folder_of(root: Path, size: int) -> Path:
    for path, bytes_ in (("adapter/weights", os.urandom(size)), ("adapter/empty", b""), ("state/a", os.urandom(9))):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(bytes_)
    return root


def test_it_keeps_a_stores_promises(bucket: Bucket, tmp_path: Path):
    store, behind, _ = signed(bucket, tmp_path.name)
    folder = folder_of(tmp_path / "made", 9 << 20)
    manifest, sha256 = write_checkpoint(store, "r", 3, folder, False, {})
    assert (manifest, sha256) == read_manifest(store, "r", 3) == read_manifest(behind, "r", 3)
    verify(behind, manifest, digests=True)
    assert write_checkpoint(store, "r", 3, folder_of(tmp_path / "other", 9), False, {})[1] == sha256, "the first stays"
    fetch_checkpoint(store, manifest, tmp_path / "back")
    assert (tmp_path / "back/adapter/weights").read_bytes() == (folder / "adapter/weights").read_bytes()
    store.put_bytes("runs/r/one", b"1", create=True)
    with pytest.raises(Conflict):
        store.put_bytes("runs/r/one", b"2", create=True)
    assert store.size("runs/r/none") is None
    with pytest.raises(NotFound):
        store.get_bytes("runs/r/none")


def test_an_upload_that_breaks_off_is_tried_again_and_is_whole(bucket: Bucket, tmp_path: Path):
    """A third of all requests go wrong, answers of successful ones among them; one whole checkpoint comes of it."""
    store, behind, asked = signed(bucket, tmp_path.name)
    folder = folder_of(tmp_path / "made", 2 << 20)
    failures = 0
    bucket.rate = 0.34
    try:
        for step in range(1, 7):
            while True:
                try:
                    saved = folder_of(folder, 300_000)
                    manifest, sha256 = write_checkpoint(store, "r", step, saved, step == 6, {}, part_bytes=100_000)
                    break
                except Unavailable as error:
                    assert "\n" not in str(error) and "Signature" not in str(error)
                    failures += 1  # the uploader comes back to it
            bucket.rate, rate = 0.0, bucket.rate
            try:
                assert read_manifest(behind, "r", step) == (manifest, sha256)
                verify(behind, manifest, digests=True)
            except Damaged:  # seen by size or digest: never taken for whole
                assert "truncated" in bucket.injected
                manifest, _ = write_checkpoint(store, "r", step, folder, step == 6, {}, part_bytes=100_000)
            verify(behind, manifest, digests=True)
            bucket.rate = rate
    finally:
        bucket.rate = 0.0
    assert len(set(bucket.injected)) >= 4 and failures < 20
    assert len(asked) > len(set(asked)), "some were asked for again"


@pytest.mark.parametrize("after", [False, True], ids=["as it begins", "unanswered"])
def test_what_a_killed_worker_has_sent_is_not_sent_again(bucket: Bucket, tmp_path: Path, after: bool):
    """A process is killed in the middle of a file; its successor sends the parts that are missing."""
    folder = folder_of(tmp_path / "made", 9 << 20)
    store, behind, asked = signed(bucket, tmp_path.name)
    job = {
        "url": behind.url, "options": behind.options, "run_id": "r", "step": 3, "folder": str(folder), "final": True,
        "part_bytes": 1 << 20,
    }  # fmt: skip
    with subprocess.Popen(WRITER, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        bucket.kill = Kill(writer.pid, 10, after=after)  # it asks before it sends, so that is its fourth part
        said, _ = writer.communicate(json.dumps(job).encode())
    assert (writer.returncode, said, bucket.kill) == (-signal.SIGKILL, b"", None)
    there = set(behind.list("runs/r/objects"))
    assert len(there) == 4 + after, "the empty file, and parts"
    with pytest.raises(NotFound):
        read_manifest(behind, "r", 3)
    manifest, _ = write_checkpoint(store, "r", 3, folder, True, {}, part_bytes=1 << 20)
    sent = [entry.removeprefix("PUT ") for entry in asked if entry.startswith("PUT")]
    assert len(sent) == len(set(sent)) == 9 + 2 - len(there) + 1 and not there & set(sent)
    verify(behind, manifest, digests=True)


def test_bytes_that_are_others_are_noticed(bucket: Bucket, tmp_path: Path):
    store, behind, _ = signed(bucket, tmp_path.name)
    manifest, _ = write_checkpoint(store, "r", 1, folder_of(tmp_path / "made", 1000), True, {})
    file: ManifestFile = next(file for file in manifest.files if file.size == 1000)
    behind.put_bytes(object_key("r", file.sha256), os.urandom(1000))
    with pytest.raises(Damaged):
        fetch_checkpoint(store, manifest, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_bucket_that_is_away_is_told_in_a_line(bucket: Bucket, tmp_path: Path):
    store = SignedStore(lambda verb, keys: ["http://127.0.0.1:9/x?X-Amz-Signature=canary" for _ in keys])
    with pytest.raises(Unavailable) as told:
        store.put_bytes("runs/r/x", b"1")
    assert "runs/r/x" in str(told.value) and "canary" not in str(told.value) and "\n" not in str(told.value)


# --- keeping, on a bucket ---------------------------------------------------------------------------------


def test_what_was_kept_long_enough_leaves_the_bucket(open_team: Callable[..., Team], bucket: Bucket, tmp_path: Path):
    url = f"{bucket.url}/{tmp_path.name}"
    team = open_team(
        **DAYS, store_url=url, store_options=bucket.options, clean_interval_s=0.0, work_grace_s=0.0
    )
    world = World(team)
    environment = world.environment("kept", deleted_days=None)
    states = (RunState.DONE, RunState.DONE, RunState.DONE, RunState.FAILED)
    old, pinned, source, built_upon = (Made(name(), state, 9.0, environment) for state in states)
    pinned.pinned, built_upon.source, built_upon.age_days = True, source, 1.0
    for made in (old, pinned, source, built_upon):
        world.add(made, 2)
    world.rounds()

    def left(made: Made) -> set[str]:
        return set(team.plane.store.list(f"runs/{made.run_id}"))

    def named(manifest: Manifest, *, state: bool) -> set[str]:
        files = [file for file in manifest.files if state or file.path.startswith("adapter/")]
        keys = {object_key(manifest.run_id, file.sha256) for file in files}
        return keys | {manifest_key(manifest.run_id, manifest.step)}

    assert left(old) == set()
    for made, state in ((pinned, True), (source, False), (built_upon, True)):
        assert left(made) == set().union(*(named(manifest, state=state) for manifest in made.checkpoints))
