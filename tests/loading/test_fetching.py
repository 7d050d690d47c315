"""Fetching from the hub: once, whole, resumed, checked, refused in words. The hub is a stand-in on this machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from flash.errors import InvalidInput, ModelError, Unavailable
from flash.inference.fetching import Hub, fetch, locate
from hub_stand_in import HubStandIn

NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def weights(length: int, seed: int) -> bytes:
    """A safetensors file of one tensor, without torch."""
    header = json.dumps({f"w{seed}": {"dtype": "U8", "shape": [length], "data_offsets": [0, length]}}).encode()
    body = (bytes(range(256)) * (length // 256 + 2))[seed : seed + length]
    return len(header).to_bytes(8, "little") + header + body


def repository(size: int = 200_000, **more: bytes) -> dict[str, bytes]:
    index = {"weight_map": {"w1": NAMES[0], "w2": NAMES[1]}}
    return {
        "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        NAMES[0]: weights(size, 1),
        NAMES[1]: weights(size, 2),
        **more,
    }


@pytest.fixture
def stand_in():
    with HubStandIn() as found:
        yield found


@pytest.fixture
def hub(stand_in, tmp_path):
    return Hub(stand_in.url, tmp_path / "cache", read_s=10, pause_s=0.01, watch_s=0.02)


CHILD = """
import sys
from flash.inference.fetching import fetch
found = fetch(sys.argv[1], progress=lambda done, total: print(done, total, flush=True))
print(found.folder, flush=True)
"""


def child(stand_in, home, *, before="", **variables):
    """A process that fetches `team/tiny` as any run on this machine would; it prints its progress and the folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "FLASH_"))}
    environment = {**kept, **stand_in.variables, "FLASH_HOME": str(home), **variables}
    return subprocess.Popen(
        [sys.executable, "-c", before + CHILD, "team/tiny"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_until(holds, limit_s=60.0):
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- what comes --------------------------------------------------------------------------------------------


def test_a_model_comes_whole_and_once(stand_in, hub):
    files = repository()
    commit = stand_in.add("team/tiny", files)
    found = fetch("team/tiny", hub=hub)
    assert found.commit == commit and found.note is None
    assert {path.name: path.read_bytes() for path in found.folder.iterdir()} == files
    assert stand_in.bytes_of() == sum(map(len, files.values()))
    assert fetch("team/tiny", hub=hub) == found  # `main` is asked for again: it may have moved
    assert [request.path.partition("?")[0] for request in stand_in.requests[-1:]] == [
        "/api/models/team/tiny/revision/main"
    ]
    asked = len(stand_in.requests)
    assert fetch("team/tiny", commit, hub=hub) == found  # a commit never does
    assert len(stand_in.requests) == asked
    assert stand_in.bytes_of() == sum(map(len, files.values()))


@pytest.mark.parametrize("split_too", [False, True])
def test_a_model_in_one_file_needs_no_index(split_too, stand_in, hub):
    whole = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": weights(1000, 1)}
    commit = stand_in.add("team/tiny", {**repository(), **whole} if split_too else whole)
    found = fetch("team/tiny", hub=hub)
    assert (found.folder / "model.safetensors").read_bytes() == weights(1000, 1)
    assert stand_in.bytes_of(*NAMES) == 0
    asked = len(stand_in.requests)
    assert fetch("team/tiny", commit, hub=hub) == found and len(stand_in.requests) == asked


def test_a_new_commit_fetches_what_changed_alone(stand_in, hub):
    first = stand_in.add("team/tiny", repository())
    old = fetch("team/tiny", hub=hub)
    sent = stand_in.bytes_of()
    changed = repository(**{NAMES[1]: weights(1000, 7)})
    second = stand_in.add("team/tiny", changed)
    new = fetch("team/tiny", hub=hub)
    assert (old.commit, new.commit) == (first, second)
    assert stand_in.bytes_of() - sent == len(changed[NAMES[1]])
    assert (old.folder / NAMES[1]).read_bytes() == weights(200_000, 2)  # a run on the old commit goes on with it


def test_only_what_loading_reads_is_fetched(stand_in, hub):
    more = {
        "modeling_tiny.py": b"raise SystemExit", "pytorch_model.bin": b"pickle", "original/consolidated.pth": b"pickle",
        "README.md": b"# words", "onnx/model.safetensors": weights(10, 3), "tf_model.h5": b"h5",
        "consolidated.safetensors": weights(10, 4), "pytorch_model.bin.index.json": b"{}",
    }  # fmt: skip
    stand_in.add("team/tiny", {**repository(), **more})
    found = fetch("team/tiny", hub=hub)
    assert {path.name for path in found.folder.iterdir()} == set(repository())


def test_the_tokenizer_alone_can_be_asked_for(stand_in, hub):
    stand_in.add("team/tiny", repository())
    found = fetch("team/tiny", weights=False, hub=hub)
    assert (found.folder / "tokenizer.json").is_file() and stand_in.bytes_of(*NAMES) == 0
    fetch("team/tiny", hub=hub)
    assert stand_in.bytes_of(*NAMES) == sum(len(repository()[name]) for name in NAMES)


def test_names_that_lead_out_of_the_cache_are_not_followed(stand_in, hub):
    evil = {"../../../evil.json": b"{}", "/evil.json": b"{}", "a\\..\\evil.json": b"{}"}
    stand_in.add("team/tiny", {**repository(), **evil})
    found = fetch("team/tiny", hub=hub)
    assert {path.name for path in found.folder.iterdir()} == set(repository())
    assert not list(hub.cache.parent.rglob("evil*"))


def test_either_side_finds_what_the_other_fetched(stand_in, hub):
    """The layout is that of the Hugging Face libraries: one cache for both."""
    from huggingface_hub import hf_hub_download, snapshot_download

    commit = stand_in.add("team/ours", repository())
    ours = fetch("team/ours", hub=hub)
    found = snapshot_download("team/ours", cache_dir=hub.cache, local_files_only=True)
    assert Path(found) == ours.folder
    commit = stand_in.add("team/theirs", repository(50_000))
    for name in repository():
        hf_hub_download("team/theirs", name, cache_dir=hub.cache, endpoint=stand_in.url, token=False)
    sent = stand_in.bytes_of()
    assert fetch("team/theirs", hub=hub).commit == commit
    assert stand_in.bytes_of() == sent
    assert fetch("team/theirs", hub=dataclasses.replace(hub, offline=True)).commit == commit


def test_a_mirror_that_lists_names_only_is_asked_for_the_rest(tmp_path):
    with HubStandIn(digests=False) as mirror:
        mirror.add("team/tiny", repository())
        hub = Hub(mirror.url, tmp_path / "cache", pause_s=0.01)
        found = fetch("team/tiny", hub=hub)
        assert {path.name: path.read_bytes() for path in found.folder.iterdir()} == repository()
        assert (found.folder / NAMES[0]).resolve().name == mirror.repositories["team/tiny"].digest(NAMES[0])


# --- broken on the way -------------------------------------------------------------------------------------


def test_a_broken_connection_goes_on_where_it_stopped(stand_in, hub):
    files = repository()
    stand_in.add("team/tiny", files)
    stand_in.break_after = {NAMES[0]: [70_000, 30_000, 0, 0], "config.json": [5]}
    found = fetch("team/tiny", hub=hub)
    assert (found.folder / NAMES[0]).read_bytes() == files[NAMES[0]]
    assert stand_in.bytes_of() == sum(map(len, files.values()))  # not a byte twice
    assert {"bytes=70000-", "bytes=100000-"} <= {request.range for request in stand_in.requests}


def test_a_killed_process_leaves_what_it_has(stand_in, tmp_path):
    size = 600_000
    files = repository(size)
    stand_in.add("team/tiny", files)
    stand_in.pace = 400_000
    first = child(stand_in, tmp_path / "home")
    drafts = tmp_path / "home/cache/models/models--team--tiny/blobs"
    wait_until(lambda: sum(path.stat().st_size for path in drafts.glob("*.incomplete")) > size / 2)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    kept = {path.stat().st_size for path in drafts.glob("*.incomplete")}
    stand_in.pace = None
    second = child(stand_in, tmp_path / "home")
    out, err = second.communicate(timeout=100)
    assert second.returncode == 0, err
    folder = Path(out.splitlines()[-1])
    assert all((folder / name).read_bytes() == files[name] for name in files)
    assert {f"bytes={size}-" for size in kept} <= {request.range for request in stand_in.requests}
    assert not list(drafts.glob("*.incomplete"))


def test_a_mirror_without_ranges_starts_again(stand_in, hub):
    stand_in.add("team/tiny", repository())
    stand_in.ranges = False
    stand_in.break_after = {NAMES[0]: [70_000]}
    found = fetch("team/tiny", hub=hub)
    assert (found.folder / NAMES[0]).read_bytes() == repository()[NAMES[0]]


def test_changed_bytes_are_noticed_and_fetched_again(stand_in, hub):
    stand_in.add("team/tiny", repository())
    stand_in.corrupt = {NAMES[1]: 1, "config.json": 1}
    found = fetch("team/tiny", hub=hub)
    assert (found.folder / NAMES[1]).read_bytes() == repository()[NAMES[1]]
    assert json.loads((found.folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_hub_that_only_has_other_bytes_is_refused(stand_in, hub):
    stand_in.add("team/tiny", repository())
    stand_in.corrupt = {NAMES[1]: 9}
    with pytest.raises(ModelError, match=rf"^team/tiny: {NAMES[1]} came twice with other bytes than"):
        fetch("team/tiny", hub=hub)
    refused = hashlib.sha256(repository()[NAMES[1]]).hexdigest()
    assert not list(hub.cache.rglob(f"{refused}*.incomplete"))  # another's beginning may stay, for the next try
    stand_in.corrupt = {}
    assert fetch("team/tiny", hub=hub).note is None


@pytest.mark.parametrize("harm", ["shorter", "gone"])
def test_a_cached_file_that_was_damaged_is_fetched_again(harm, stand_in, hub):
    commit = stand_in.add("team/tiny", repository())
    found = fetch("team/tiny", commit, hub=hub)
    blob = (found.folder / NAMES[0]).resolve()
    if harm == "gone":
        blob.unlink()
    else:
        with blob.open("r+b") as file:
            file.truncate(1000)
    sent = stand_in.bytes_of()
    fetch("team/tiny", commit, hub=hub)
    assert (found.folder / NAMES[0]).read_bytes() == repository()[NAMES[0]]
    assert stand_in.bytes_of() - sent == len(repository()[NAMES[0]])


def test_a_busy_hub_is_asked_again(stand_in, hub):
    stand_in.add("team/tiny", repository())
    stand_in.busy = 3
    assert fetch("team/tiny", hub=hub).note is None


def test_a_hub_that_gives_nothing_more_is_named_with_what_came(stand_in, hub):
    stand_in.add("team/tiny", repository())
    stand_in.break_after = {NAMES[0]: [70_000] + [0] * 50}
    with pytest.raises(Unavailable, match=rf"gave no more of {NAMES[0]} after 0.0 GB of 0.0 GB: \S+") as caught:
        fetch("team/tiny", hub=hub)
    assert "what is here is kept" in str(caught.value)
    stand_in.break_after = {}
    sent = stand_in.bytes_of(NAMES[0])
    fetch("team/tiny", hub=hub)
    assert stand_in.bytes_of(NAMES[0]) - sent == len(repository()[NAMES[0]]) - 70_000


# --- several at once, and how far it is --------------------------------------------------------------------


def test_processes_that_want_one_model_fetch_it_once(stand_in, tmp_path):
    files = repository(300_000)
    stand_in.add("team/tiny", files)
    stand_in.pace = 300_000
    running = [child(stand_in, tmp_path / "home") for _ in range(3)]
    said = [process.communicate(timeout=100) for process in running]
    assert all(process.returncode == 0 for process in running), [err for _, err in said]
    folders = {out.splitlines()[-1] for out, _ in said}
    assert len(folders) == 1
    assert {path.name: path.read_bytes() for path in Path(folders.pop()).iterdir()} == files
    assert stand_in.bytes_of(*NAMES) == sum(len(files[name]) for name in NAMES)


def test_progress_rises_to_the_whole_whoever_fetches(stand_in, tmp_path):
    """A run that waits for another one's download sees it move, and so does its stall deadline."""
    files = repository(300_000)
    stand_in.add("team/tiny", files)
    stand_in.pace = 100_000  # three seconds: longer than a process's start
    hub = Hub(stand_in.url, tmp_path / "home/cache/models", watch_s=0.02)
    other = child(stand_in, tmp_path / "home")
    wait_until(lambda: stand_in.bytes_of(*NAMES) > 0)
    seen = []
    fetch("team/tiny", hub=hub, progress=lambda done, total: seen.append((done, total)))
    assert other.communicate(timeout=100)[1] == "" and other.returncode == 0
    whole = sum(len(files[name]) for name in NAMES)
    assert seen[-1] == (whole, whole) and {total for _, total in seen} == {whole}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen}) and len(seen) > 2
    assert stand_in.bytes_of(*NAMES) == whole


def test_nothing_is_told_of_what_is_here_already(stand_in, hub):
    stand_in.add("team/tiny", repository())
    fetch("team/tiny", hub=hub)
    seen = []
    fetch("team/tiny", hub=hub, progress=lambda done, total: seen.append(done))
    assert seen == []


# --- refusals ----------------------------------------------------------------------------------------------


def refused(hub, model="team/tiny", revision=None, **changes):
    with pytest.raises(ModelError) as caught:
        fetch(model, revision, hub=dataclasses.replace(hub, **changes))
    said = str(caught.value)
    assert said.startswith(f"{model}: ") and "\n" not in said
    return said


def test_what_the_hub_refuses_is_said_in_words(stand_in, hub):
    commit = stand_in.add("team/tiny", repository())
    stand_in.add("team/gated", repository(), gated=True, allowed=("good",))
    stand_in.add("team/private", repository(), private=True, allowed=("good",))
    url = stand_in.url
    gated = refused(hub, "team/gated")
    assert gated == (
        f"team/gated: access is gated (accept its licence at {url}/team/gated and set HF_TOKEN to your token)"
    )
    assert "as the owner of this HF_TOKEN" in refused(hub, "team/gated", token="other")
    for model, token in (("team/none", None), ("team/none", "good"), ("team/private", None), ("team/private", "bad")):
        said = refused(hub, model, token=token)
        assert said == (
            f"{model}: the model hub at {url} has no such model "
            "(check the id with `flash models`; a private one needs HF_TOKEN)"
        )
    assert "does not take this HF_TOKEN" in refused(hub, token="invalid")
    assert "it has no revision 'v9' (check it in models.toml)" in refused(hub, revision="v9")
    assert "it has no revision" in refused(hub, revision="0" * 40)
    for model in ("team/gated", "team/private"):
        assert fetch(model, hub=dataclasses.replace(hub, token="good")).commit == commit


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"README.md": b""}, "it has no config.json: it is no model in transformers' form"),
        ({"adapter_config.json": b"{}"}, "it is an adapter, not a base model (name the model that it was trained on)"),
        ({"config.json": b"{}", "pytorch_model.bin": b""}, "it has no safetensors weights (it has pytorch_model.bin)"),
        ({"config.json": b"{}", "tiny.Q4.gguf": b""}, "it has no safetensors weights (it has tiny.Q4.gguf)"),
        ({**repository(), NAMES[1]: None}, f"index.json names {NAMES[1]}, which its repository lacks"),
        ({**repository(), "model.safetensors.index.json": b"{}"}, "index.json can't be read: it has no weight_map"),
        (
            {**repository(), "model.safetensors.index.json": b'{"weight_map": {"w": "../../w.safetensors"}}'},
            "it names files that are no safetensors",
        ),
    ],
)
def test_what_is_no_model_is_refused_before_its_weights(files, words, stand_in, hub):
    stand_in.add("team/tiny", {name: data for name, data in files.items() if data is not None})
    assert words in refused(hub)
    assert stand_in.bytes_of(*NAMES, "pytorch_model.bin") == 0


@pytest.mark.parametrize("model", ["", "a/b/c", "../x", "team/..", "team/ti ny", "C:\\models\\x", "x" * 300])
def test_what_is_no_id_never_reaches_the_hub(model, stand_in, hub):
    with pytest.raises(ModelError, match="is neither a folder nor an id of the hub's"):
        fetch(model, hub=hub)
    assert stand_in.requests == []


def test_the_token_stays_with_the_hub(stand_in, hub):
    """Large files come from elsewhere, and what is there needs no token."""
    stand_in.add("team/tiny", repository(), gated=True, allowed=("hf-secret",))
    fetch("team/tiny", hub=dataclasses.replace(hub, token="hf-secret"))
    seen = {(request.server, request.authorization) for request in stand_in.requests}
    assert seen == {("hub", "Bearer hf-secret"), ("store", None)}


# --- no network, no room -----------------------------------------------------------------------------------


def test_without_a_network_the_copy_that_is_here_is_used_and_said(stand_in, hub):
    commit = stand_in.add("team/tiny", repository())
    fetch("team/tiny", hub=hub)
    away = dataclasses.replace(hub, endpoint="http://127.0.0.1:9", tries=2)
    found = fetch("team/tiny", hub=away)
    assert found.commit == commit and found.note is not None
    assert "can't be reached" in found.note and f"the copy that is here, of commit {commit[:12]}" in found.note
    assert fetch("team/tiny", commit, hub=away).note is None
    with pytest.raises(Unavailable, match=r"the model hub at http://127\.0\.0\.1:9 can't be reached"):
        fetch("team/other", hub=away)


def test_offline_asks_no_one(stand_in, hub):
    commit = stand_in.add("team/tiny", repository())
    fetch("team/tiny", hub=hub)
    asked = len(stand_in.requests)
    off = dataclasses.replace(hub, offline=True)
    assert fetch("team/tiny", hub=off).commit == commit
    said = refused(off, "team/other")
    assert "it is not on this machine, and the hub is switched off (HF_HUB_OFFLINE)" in said
    (found,) = hub.cache.rglob(NAMES[1])
    found.unlink()
    assert "it is not on this machine" in refused(off)  # half a model is none
    assert len(stand_in.requests) == asked


def test_a_model_larger_than_the_disk_is_refused_at_once(stand_in, hub):
    stand_in.add("team/tiny", repository(), listed_sizes={NAMES[0]: 10**16})
    with pytest.raises(Unavailable, match=r"10,000,000 GB are to be fetched, and the disk of .* has .* left") as caught:
        fetch("team/tiny", hub=hub)
    assert "HF_HOME" in str(caught.value) and stand_in.bytes_of(*NAMES) == 0


def test_a_disk_that_fills_up_is_one_clear_line(stand_in, tmp_path):
    stand_in.add("team/tiny", repository(300_000))
    before = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    process = child(stand_in, tmp_path / "home", before=before)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert err.splitlines()[-1].startswith("flash.errors.Unavailable: team/tiny: the disk of ")
    assert "is full (free space" in err.splitlines()[-1]


def test_a_cache_that_can_not_be_used_is_one_clear_line(stand_in, hub, tmp_path):
    stand_in.add("team/tiny", repository())
    (tmp_path / "a file").write_text("")
    assert "the model cache" in refused(dataclasses.replace(hub, cache=tmp_path / "a file"))


# --- settings ----------------------------------------------------------------------------------------------


def test_the_settings_are_the_hugging_face_libraries_own(tmp_path):
    home = {"FLASH_HOME": str(tmp_path / "flash"), "HOME": str(tmp_path)}
    plain = Hub.from_environment({**home, "HF_TOKEN": "t"})
    assert (plain.endpoint, plain.cache) == ("https://huggingface.co", tmp_path / "flash/cache/models")
    assert (plain.token, plain.offline, plain.named) == ("t", False, "the model hub")
    assert Hub.from_environment({**home, "HF_HOME": "/hf"}).cache == Path("/hf/hub")
    assert Hub.from_environment({**home, "HF_HOME": "/hf", "HF_HUB_CACHE": "/c"}).cache == Path("/c")
    mirror = Hub.from_environment({**home, "HF_ENDPOINT": "https://mirror.example/hf/"})
    assert mirror.endpoint == "https://mirror.example/hf" and mirror.named.endswith("at https://mirror.example/hf")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        assert Hub.from_environment({**home, name: "1"}).offline
        assert not Hub.from_environment({**home, name: "0"}).offline
    assert Hub.from_environment({**home, "HF_HUB_DOWNLOAD_TIMEOUT": "90"}).read_s == 90
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("stored\n")
    assert Hub.from_environment({**home, "HF_HOME": str(tmp_path / "hf")}).token == "stored"


@pytest.mark.parametrize("endpoint", ["mirror.example", "ftp://mirror.example", "http://"])
def test_a_mirror_is_a_url(endpoint):
    with pytest.raises(InvalidInput, match=r"HF_ENDPOINT = .*must be an http\(s\) URL"):
        Hub.from_environment({"HF_ENDPOINT": endpoint})


def test_a_folder_is_taken_as_it_is(tmp_path, stand_in):
    assert locate(tmp_path).folder == tmp_path and locate(str(tmp_path)).commit is None
    with pytest.raises(ModelError, match="my/model: there is no model folder at"):
        locate(tmp_path / "nowhere", label="my/model")
    assert stand_in.requests == []
