"""What `--dry-run` says of deploying what a run would train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flash.catalog.catalog import load_catalog
from flash.catalog.deploying import deployment_notes
from flash.cli.main import app

SHIPPED = {entry.id: entry for entry in load_catalog(Path("/nowhere"))}


@pytest.mark.parametrize("model", sorted(set(SHIPPED) - {"Qwen/Qwen3.6-35B-A3B"}))
def test_dense_models_of_the_catalog_deploy_as_asked_up_to_their_cap(model: str) -> None:
    assert deployment_notes(SHIPPED[model], SHIPPED[model].rank_cap) == []


@pytest.mark.parametrize(("rank", "share"), [(64, 8), (32, 4), (20, 2), (4, 1)])
def test_a_mixture_says_what_its_experts_get(rank: int, share: int) -> None:
    [note] = deployment_notes(SHIPPED["Qwen/Qwen3.6-35B-A3B"], rank)
    assert f"train.lora_rank = {rank}: each of the 256 routed experts gets rank {share}," in note


def test_what_vllm_can_not_take_is_said() -> None:
    entry = SHIPPED["flash/nano"].model_copy(update={"id": "own/odd", "layout": "mamba", "rank_cap": 1000})
    layout, rank = deployment_notes(entry, 600)
    assert "its layout, mamba, is none that Flash has tried" in layout
    assert "train.lora_rank = 600: vLLM takes adapters up to rank 512" in rank


def test_a_dry_run_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_HOME", str(tmp_path))
    config = tmp_path / "run.toml"
    config.write_text('model = "Qwen/Qwen3.6-35B-A3B"\n[environment]\nid = "me/task"\n')
    answer = CliRunner().invoke(app, ["train", str(config), "--dry-run"])
    assert answer.exit_code == 0
    [warning] = json.loads(answer.stdout)["warnings"]
    assert "gets rank 4" in warning
