from __future__ import annotations

import hashlib
from urllib.parse import unquote

import pytest

from flash.client.client import FlashClient
from flash.client.exporting import export_adapter, parse_reference
from flash.errors import Conflict, InternalError, InvalidInput, NotFound

RUN = "flash-1700000000-0123abcd"
FILES = {"adapter/adapter_model.safetensors": b"\x00" * 200_000, "adapter/flash.json": b"{}"}


def serve(site, files, *, claimed=None):
    """Serves `files`; the manifest names the digests of `claimed`, which is what the files should be."""
    claimed = claimed or files

    def handle(request):
        path = unquote(request.path.partition("?")[0])
        if path.endswith("/adapter"):
            rows = [
                {"path": name, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
                for name, data in claimed.items()
            ]
            manifest = {"run_id": RUN, "step": 8, "final": True, "created_at": 1.0, "files": rows}
            request.answer(manifest)
        elif (name := path.partition("/files/")[2]) in files:
            request.answer(files[name])
        else:
            request.answer({"error": NotFound("no such file").to_wire()}, 404)

    site.handler = handle


def export(site, reference, output):
    with FlashClient(site.url, "t", retry_delays_s=()) as client:
        return export_adapter(client, reference, output)


def test_the_folder_has_every_file_byte_for_byte(site, tmp_path):
    serve(site, FILES)
    done = export(site, f"{RUN}/step-8", tmp_path / "deep" / "out")
    assert {path.name: path.read_bytes() for path in done.folder.iterdir()} == {
        name.removeprefix("adapter/"): data for name, data in FILES.items()
    }
    assert done.step == 8
    assert all("step=8" in path for _, path, _, _ in site.seen)


@pytest.mark.parametrize(
    "files", [{**FILES, "adapter/flash.json": b"[]"}, {"adapter/flash.json": b"{}"}], ids=["damaged", "missing"]
)
def test_a_damaged_or_missing_file_leaves_nothing_behind(site, tmp_path, files):
    serve(site, files, claimed=FILES)
    with pytest.raises((InternalError, NotFound)):
        export(site, RUN, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_never_overwritten(site, tmp_path):
    serve(site, FILES)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(Conflict, match="--output"):
        export(site, RUN, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "mine"


@pytest.mark.parametrize("name", ["adapter/../../evil", "/etc/evil", "adapter//etc/evil", "adapter/"])
def test_a_name_outside_the_folder_is_refused(site, tmp_path, name):
    serve(site, {name: b"x"})
    with pytest.raises(InternalError, match="outside"):
        export(site, RUN, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "a/b", f"{RUN}/step-", f"{RUN}/step-x", f"{RUN}/step-1/adapter"])
def test_a_reference_has_one_of_two_forms(text):
    with pytest.raises(InvalidInput, match="flash checkpoints"):
        parse_reference(text)
