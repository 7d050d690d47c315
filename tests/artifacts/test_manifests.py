"""Checkpoints in the store: complete or invisible, verified when read, safe to write again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flash.artifacts.manifests import (
    Damaged,
    adapter_only,
    copy_checkpoint,
    fetch_checkpoint,
    manifest_key,
    object_key,
    read_manifest,
    remove_checkpoint,
    remove_state,
    verify,
    write_checkpoint,
)
from flash.artifacts.store import Store
from flash.errors import InvalidInput, NotFound, Unavailable
from flash.records import Manifest, ManifestFile

RUN = "flash-1-00000000"


class CountingStore(Store):
    """A store that notes what is put where, and can fail at a given put."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.puts: list[str] = []
        self.fail_at: int | None = None

    def _note(self, key: str) -> None:
        if self.fail_at == len(self.puts):
            raise Unavailable("the store is out of reach")
        self.puts.append(key)

    def put_bytes(self, key: str, data: bytes, *, create: bool = False) -> None:
        self._note(key)
        super().put_bytes(key, data, create=create)

    def put_file(self, key: str, path: Path) -> None:
        self._note(key)
        super().put_file(key, path)


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore((tmp_path / "store").as_uri())


def checkpoint(folder: Path, weights: bytes = b"weights", state: bytes = b"state") -> Path:
    for name, body in {"adapter/model": weights, "adapter/card.md": b"# card", "state/optimizer": state}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_comes_back_byte_for_byte(store: CountingStore, tmp_path: Path):
    source = checkpoint(tmp_path / "source")
    written, sha256 = write_checkpoint(store, RUN, 5, source, True, {"loss": 0.5})
    assert read_manifest(store, RUN, 5) == (written, sha256)
    assert (written.step, written.final, written.metrics) == (5, True, {"loss": 0.5})
    fetch_checkpoint(store, written, tmp_path / "fetched")
    assert tree(tmp_path / "fetched") == tree(source)
    fetch_checkpoint(store, written, tmp_path / "fetched", only="adapter")  # replaces what was there
    assert set(tree(tmp_path / "fetched")) == {"adapter/model", "adapter/card.md"}


def test_the_manifest_is_the_last_thing_written(store: CountingStore, tmp_path: Path):
    source = checkpoint(tmp_path / "source")
    write_checkpoint(store, RUN, 5, source, False, {})
    assert store.puts[-1] == manifest_key(RUN, 5) and len(store.puts) == 4


@pytest.mark.parametrize("survived", range(4))
def test_a_store_that_fails_at_any_put_shows_no_checkpoint_and_the_next_try_goes_on(
    store: CountingStore, tmp_path: Path, survived: int
):
    source = checkpoint(tmp_path / "source")
    store.fail_at = survived
    with pytest.raises(Unavailable):
        write_checkpoint(store, RUN, 5, source, False, {})
    with pytest.raises(NotFound):
        read_manifest(store, RUN, 5)
    store.fail_at = None
    write_checkpoint(store, RUN, 5, source, False, {})
    assert len(store.puts) == 4  # what was there already was not sent again


def test_what_two_checkpoints_share_is_stored_once(store: CountingStore, tmp_path: Path):
    write_checkpoint(store, RUN, 5, checkpoint(tmp_path / "a"), False, {})
    write_checkpoint(store, RUN, 6, checkpoint(tmp_path / "b", weights=b"more"), False, {})
    assert len(store.list(f"runs/{RUN}/objects")) == 4


def test_a_step_written_again_keeps_its_first_manifest(store: CountingStore, tmp_path: Path):
    first = write_checkpoint(store, RUN, 5, checkpoint(tmp_path / "a"), False, {})
    assert write_checkpoint(store, RUN, 5, checkpoint(tmp_path / "b", weights=b"other"), False, {}) == first


def test_a_step_that_turns_out_to_be_the_last_becomes_final(store: CountingStore, tmp_path: Path):
    write_checkpoint(store, RUN, 5, checkpoint(tmp_path / "a"), False, {})
    final = write_checkpoint(store, RUN, 5, tmp_path / "a", True, {})
    assert final[0].final and read_manifest(store, RUN, 5) == final


def damage(store: Store, manifest: Manifest, path: str, body: bytes | None) -> None:
    (file,) = [file for file in manifest.files if file.path == path]
    key = object_key(RUN, file.sha256)
    store.delete(key)
    if body is not None:
        store.put_bytes(key, body)


@pytest.mark.parametrize("body", [None, b"", b"short"])
def test_a_missing_or_truncated_object_is_damage_and_the_step_can_be_written_anew(
    store: CountingStore, tmp_path: Path, body: bytes | None
):
    manifest, _ = write_checkpoint(store, RUN, 5, checkpoint(tmp_path / "a"), False, {})
    damage(store, manifest, "adapter/model", body)
    with pytest.raises(Damaged, match="adapter/model"):
        verify(store, manifest)
    verify(store, manifest, only="state")
    again, _ = write_checkpoint(store, RUN, 5, tmp_path / "a", False, {})
    verify(store, again, digests=True)


def test_flipped_bytes_are_found_by_digest_and_nothing_is_fetched(store: CountingStore, tmp_path: Path):
    manifest, _ = write_checkpoint(store, RUN, 5, checkpoint(tmp_path / "a"), False, {})
    damage(store, manifest, "state/optimizer", b"stat3")
    verify(store, manifest)  # sizes alone can't tell
    with pytest.raises(Damaged, match="other bytes"):
        verify(store, manifest, digests=True)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "old").write_text("old")
    with pytest.raises(Damaged):
        fetch_checkpoint(store, manifest, tmp_path / "kept")
    assert tree(tmp_path / "kept") == {"old": b"old"}
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")] == []
    fetch_checkpoint(store, manifest, tmp_path / "adapter", only="adapter")


def test_a_manifest_of_another_run_or_no_manifest_at_all_is_damage(store: CountingStore, tmp_path: Path):
    manifest, _ = write_checkpoint(store, RUN, 5, checkpoint(tmp_path / "a"), False, {})
    store.put_bytes(manifest_key(RUN, 6), store.get_bytes(manifest_key(RUN, 5)))
    store.put_bytes(manifest_key(RUN, 7), b"{")
    for step in (6, 7):
        with pytest.raises(Damaged):
            read_manifest(store, RUN, step)
    assert json.loads(store.get_bytes(manifest_key(RUN, 5)))["step"] == manifest.step


@pytest.mark.parametrize("path", ["../out", "/out", "a/../../out", "a//b", "a\\b"])
def test_a_manifest_can_not_write_outside_its_folder(store: CountingStore, tmp_path: Path, path: str):
    good, _ = write_checkpoint(store, RUN, 5, checkpoint(tmp_path / "a"), False, {})
    first = good.files[0]
    evil = good.model_copy(
        update={"files": (ManifestFile(path=path, sha256=first.sha256, size=first.size),)}
    )
    with pytest.raises(Unavailable, match="outside"):
        fetch_checkpoint(store, evil, tmp_path / "fetched")
    assert not (tmp_path / "out").exists()


def test_removing_keeps_what_others_share(store: CountingStore, tmp_path: Path):
    one, _ = write_checkpoint(store, RUN, 5, checkpoint(tmp_path / "a"), False, {})
    two, _ = write_checkpoint(store, RUN, 6, checkpoint(tmp_path / "b", weights=b"more"), False, {})
    remove_state(store, one, keep=[two])
    verify(store, one)  # both have the same state: it stays
    remove_state(store, one, keep=[adapter_only(two)])
    verify(store, one, only="adapter")
    with pytest.raises(Damaged):
        verify(store, one)
    remove_checkpoint(store, one, keep=[adapter_only(two)])
    verify(store, two, only="adapter")
    assert len(store.list(f"runs/{RUN}")) == 3  # the other's manifest, weights and card


# --- large files ----------------------------------------------------------------------------------------

LARGE = b"".join(b"%09d\n" % number for number in range(100))  # 1,000 bytes, no two parts alike


def parted(folder: Path, weights: bytes = LARGE) -> Path:
    return checkpoint(folder, weights=weights)


@pytest.mark.parametrize("size", [1, 299, 300, 301, 600, 1000])
def test_a_large_file_is_several_objects_and_one_file(store: CountingStore, tmp_path: Path, size: int):
    source = parted(tmp_path / "source", LARGE[:size])
    written, sha256 = write_checkpoint(store, RUN, 5, source, False, {}, part_bytes=300)
    whole, _ = write_checkpoint(Store("memory://"), RUN, 5, source, False, {})
    assert read_manifest(store, RUN, 5) == (written, sha256)
    assert [(file.path, file.sha256, file.size) for file in written.files] == [
        (file.path, file.sha256, file.size) for file in whole.files
    ]
    [weights] = [file for file in written.files if file.path == "adapter/model"]
    expected = [min(300, size - start) for start in range(0, size, 300)]
    assert [part.size for part in weights.objects] == expected and bool(weights.parts) == (size > 300)
    verify(store, written, digests=True)
    fetch_checkpoint(store, written, tmp_path / "fetched")
    assert tree(tmp_path / "fetched") == tree(source)


@pytest.mark.parametrize("survived", range(7))
def test_an_upload_that_broke_off_goes_on_with_the_parts_that_are_missing(
    store: CountingStore, tmp_path: Path, survived: int
):
    store.fail_at = survived
    with pytest.raises(Unavailable):
        write_checkpoint(store, RUN, 5, parted(tmp_path / "first"), False, {}, part_bytes=300)
    store.fail_at = None
    # Whoever comes next has the same bytes in another place.
    manifest, _ = write_checkpoint(store, RUN, 5, parted(tmp_path / "second"), False, {}, part_bytes=300)
    assert len(store.puts) == len(set(store.puts)) == 7  # four parts, two more files, the manifest
    verify(store, manifest, digests=True)


@pytest.mark.parametrize("body", [None, b"short", b"x" * 300])
def test_a_part_that_is_damaged_is_told_and_sent_anew(store: CountingStore, tmp_path: Path, body: bytes | None):
    source = parted(tmp_path / "source")
    manifest, _ = write_checkpoint(store, RUN, 5, source, False, {}, part_bytes=300)
    second = next(file for file in manifest.files if file.parts).parts[1]
    store.delete(object_key(RUN, second.sha256))
    if body is not None:
        store.put_bytes(object_key(RUN, second.sha256), body)
    with pytest.raises(Damaged, match="adapter/model, part 2 of 4, "):
        verify(store, manifest, digests=True)
    with pytest.raises((Damaged, NotFound)):
        fetch_checkpoint(store, manifest, tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()
    if body != b"x" * 300:  # an object of the right size is taken for what it says; its readers check the digest
        again, _ = write_checkpoint(store, RUN, 5, source, False, {}, part_bytes=300)
        verify(store, again, digests=True)


def test_parts_are_copied_shared_and_removed_as_files_are(store: CountingStore, tmp_path: Path):
    one, _ = write_checkpoint(store, RUN, 5, parted(tmp_path / "a"), False, {}, part_bytes=300)
    two, _ = write_checkpoint(store, RUN, 6, parted(tmp_path / "b", LARGE[:600] + b"else"), False, {}, part_bytes=300)
    assert len(store.list(f"runs/{RUN}/objects")) == 4 + 1 + 2, "the two parts that are alike are stored once"
    copied, _ = copy_checkpoint(store, one, "flash-1-other000")
    remove_checkpoint(store, one, keep=[two])
    verify(store, two, digests=True)
    verify(store, copied, digests=True)
    assert len(store.list(f"runs/{RUN}/objects")) == 5
    remove_checkpoint(store, two, keep=[])
    assert store.list(f"runs/{RUN}") == []


def test_a_file_that_is_not_as_long_as_its_parts_is_damage(store: CountingStore, tmp_path: Path):
    manifest, _ = write_checkpoint(store, RUN, 5, parted(tmp_path / "a"), False, {}, part_bytes=300)
    files = tuple(file.model_copy(update={"size": file.size + bool(file.parts)}) for file in manifest.files)
    with pytest.raises(Damaged, match="not as long as its parts"):
        verify(store, manifest.model_copy(update={"files": files}))


def test_an_empty_folder_is_no_checkpoint(store: CountingStore, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match="no files"):
        write_checkpoint(store, RUN, 5, tmp_path / "empty", False, {})


def test_a_copied_checkpoint_is_another_runs_own(store: CountingStore, tmp_path: Path):
    source = checkpoint(tmp_path / "source")
    written, _ = write_checkpoint(store, RUN, 5, source, False, {"loss": 0.5})
    copied, sha256 = copy_checkpoint(store, written, "flash-1-other000")
    assert read_manifest(store, "flash-1-other000", 5) == (copied, sha256)
    assert (copied.files, copied.metrics) == (written.files, written.metrics)
    remove_checkpoint(store, written, [])
    verify(store, copied, digests=True)
    fetch_checkpoint(store, copied, tmp_path / "fetched")
    assert tree(tmp_path / "fetched") == tree(source)
