"""Every catalog model's true weight naming, served by a stand-in of the hub and loaded by the real code."""

from __future__ import annotations

import json
import socket
import sys
import threading
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import NAMES, published, save, text_parameters

from flash.catalog.catalog import ModelEntry, load_catalog
from flash.catalog.facts import differences
from flash.config.recipes import resolve
from flash.config.run import RunConfig
from flash.inference.loading import load_base
from flash.worker.channel import Channel
from flash.worker.trainer import run
from hub_stand_in import HubStandIn

TOKENS = torch.tensor([[5, 81, 230, 17, 99, 400, 3, 12], [7, 7, 301, 22, 54, 610, 90, 41]])


@pytest.fixture
def hub():
    with HubStandIn() as found:
        yield found


@pytest.fixture
def home(hub, tmp_path, monkeypatch):
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLASH_HOME", str(tmp_path / "home"))
    for name, value in hub.variables.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "home"


@pytest.mark.parametrize("name", NAMES)
def test_a_published_checkpoint_loads_as_its_text_model(name, hub, home, tmp_path):
    torch.set_num_threads(1)
    folder = save(name, tmp_path / "published")
    commit = hub.add(name, folder)
    seen = []
    base = load_base(name, device="cpu", progress=lambda done, total: seen.append((done, total)))
    assert base.revision == commit and base.name == name
    shards = [path.name for path in folder.glob("*.safetensors")]
    assert len(shards) == 3 and hub.bytes_of(*shards) == sum((folder / shard).stat().st_size for shard in shards)
    assert seen[-1][0] == seen[-1][1] == hub.bytes_of(*shards)

    names = [name for name, _ in base.model.named_parameters()]
    assert not any("visual" in name or "mtp" in name for name in names)
    assert sum(weight.numel() for weight in base.model.parameters()) == text_parameters(name)
    assert base.stop_ids[:2] == (633, 631)
    with torch.no_grad():
        theirs = published(name, folder)(input_ids=TOKENS).logits
        assert torch.allclose(base.model(input_ids=TOKENS).logits, theirs, atol=1e-5)

    asked = len(hub.requests)
    again = load_base(name, revision=commit, device="cpu")  # pinned and here: the hub is not asked
    assert len(hub.requests) == asked
    assert torch.equal(again.head, base.head)


def test_an_entry_is_compared_with_the_files(tmp_path):
    save("Qwen/Qwen3.6-tiny-A1", tmp_path / "moe")
    own = load_catalog(tmp_path).get("Qwen/Qwen3.6-35B-A3B")
    said = {line.split(" = ")[0].rpartition(" ")[2] for line in differences(own, tmp_path / "moe")}
    assert {"shape.hidden", "shape.layers", "shape.ffn", "experts.count", "shape.linear.key_heads", "context"} <= said
    assert "layout" not in said and "shape.tied" not in said
    shape = {"hidden": 32, "ffn": 16, "layers": 4, "full_layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 16,
             "vocab": 640, "tied": False,
             "linear": {"key_heads": 2, "value_heads": 4, "head_dim": 8, "conv": 4}}  # fmt: skip
    right = ModelEntry.model_validate(
        {"id": "a", "params": 1, "layout": "qwen3_5_moe", "context": 4096, "shape": shape,
         "experts": {"count": 4, "active": 2}}
    )  # fmt: skip
    assert differences(right, tmp_path / "moe") == []
    [line] = differences(right.model_copy(update={"layout": "qwen3_5"}), tmp_path / "moe")
    assert line.startswith("a: its catalog entry says layout = qwen3_5, its config.json qwen3_5_moe")
    assert differences(right, tmp_path / "nowhere") == []
    nano = load_catalog(tmp_path).get("flash/nano")
    assert differences(nano, Path(nano.source)) == []


def test_shipped_facts_name_their_layout_as_the_files_do(tmp_path):
    """The names that a config.json gives the shipped layouts, vision-language wrappers included."""
    for name, layout in zip(NAMES, ("qwen3_5", "qwen3_5_moe", "qwen3_5_moe", "llama"), strict=True):
        folder = save(name, tmp_path / layout / name.rpartition("/")[2])
        config = json.loads((folder / "config.json").read_text())
        kind = config.get("text_config", config)["model_type"]
        assert kind.removesuffix("_text") == layout


@pytest.mark.parametrize(
    ("resumes", "pinned", "starts_from", "asked"),
    [
        ("1" * 40, "2" * 40, None, "1" * 40),  # a run goes on with what it began with, whatever is pinned since
        (None, "2" * 40, "3" * 40, "2" * 40),
        (None, None, "3" * 40, "3" * 40),  # an adapter belongs to the weights that it was trained on
    ],
)
def test_which_commit_a_run_asks_for(resumes, pinned, starts_from, asked, hub, home, tmp_path):
    hub.add("team/tiny", {"config.json": b"{}"})
    home.mkdir()
    pin = f'revision = "{pinned}"\n' if pinned else ""
    (home / "models.toml").write_text(
        f'[[model]]\nid = "team/tiny"\nparams = 9\nlayout = "llama"\ncontext = 99\n{pin}'
    )
    config = {"model": "team/tiny", "environment": {"id": "local/task"}}
    spec = resolve(RunConfig.model_validate(config)).model_dump(mode="json")
    job = {"spec": spec, "threads": 1, "device": "cpu", "work_dir": str(tmp_path)}
    for name, commit, folder in (
        ("resume_from", resumes, tmp_path / "checkpoint"), ("init_from", starts_from, tmp_path / "source"),
    ):  # fmt: skip
        if commit is not None:
            adapter = folder / "adapter" if name == "resume_from" else folder
            adapter.mkdir(parents=True)
            (adapter / "flash.json").write_text(json.dumps({"base_revision": commit}))
            job[name] = str(folder)
    ours, theirs = socket.socketpair()
    supervisor, channel = Channel(theirs).start(), Channel(ours).start()
    outcome = run(job, channel, threading.Event())
    channel.close()
    supervisor.wait_closed(5)
    assert outcome["error"]["message"] == f"team/tiny: it has no revision {asked!r}"
