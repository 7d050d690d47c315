"""`flash train --cost` and `flash gpus`: local, deterministic, with their parts."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from flash.cli import render

ESTIMATE = {
    "hardware": str, "usd_per_hour": (int, float), "hardware_memory_bytes": int, "memory_bytes": int,
    "memory_parts": dict, "micro_batch_tokens": int, "rows": int, "steps": int, "tokens_per_step": int,
    "seconds_per_step": (int, float), "sampling_s": (int, float), "training_s": (int, float),
    "start_s": (int, float), "evaluation_s": (int, float), "wall_clock_s": (int, float), "usd": (int, float),
    "assumptions": list,
}  # fmt: skip


def cost(flash, config, *arguments):
    answer = flash("train", config, "--cost", *arguments)
    assert answer.exit_code == 0, answer.stderr
    return json.loads(answer.stdout)


def test_the_document_has_every_part_and_asks_no_server(flash, config, home):
    document = cost(flash, config)
    assert document["state"] == "cost"
    assert set(document) == {"state", "model", "algorithm", "estimate", "alternatives", "warnings"}
    assert set(document["estimate"]) == set(ESTIMATE)
    for name, kind in ESTIMATE.items():
        assert isinstance(document["estimate"][name], kind), name
    assert all(each["usd"] >= 0 for each in document["alternatives"])
    assert list(home.iterdir()) == []  # no server was started, nothing was written
    assert cost(flash, config) == document == cost(flash, config, "--json")


def test_the_smallest_model_is_planned_on_a_laptop_and_a_large_one_on_a_gpu(flash, config):
    assert cost(flash, config)["estimate"]["usd"] == 0
    large = cost(flash, config, "--set", "model=Qwen/Qwen3.5-9B")["estimate"]
    assert large["usd"] > 0
    assert large["hardware_memory_bytes"] >= large["memory_bytes"] > 2 * 8_953_803_264


def test_an_environment_beside_the_config_tells_the_rows(flash, config):
    assert cost(flash, config)["estimate"]["rows"] == 1000
    folder = config.parent
    (folder / "environment.py").write_text("")
    (folder / "dataset").mkdir()
    lines = [json.dumps({"input": "2+2?" * 5, "output": "4"}) for _ in range(64)]
    (folder / "dataset" / "train.jsonl").write_text("\n".join(lines) + "\n\n")
    (folder / "dataset" / "small.json").write_text("[{}, {}]")
    found = cost(flash, config, "--set", "train.batch_size=32")["estimate"]
    assert (found["rows"], found["steps"]) == (64, 3 * 2)
    assert found["assumptions"][0] == "the dataset is dataset/train.jsonl beside the config: 64 rows"
    assert cost(flash, config, "--set", "environment.params.split=small")["estimate"]["rows"] == 2
    assert cost(flash, config, "--set", "environment.params.dataset_path=../../x.jsonl")["estimate"]["rows"] == 1000


def test_too_large_names_the_key_to_lower(flash, config):
    sets = ("model=Qwen/Qwen3.6-35B-A3B", "algorithm=grpo", "train.max_length=32768")
    answer = flash("train", config, "--cost", *(word for pair in sets for word in ("--set", pair)))
    assert answer.exit_code == 1
    assert "train.max_length = 32768" in answer.stderr and "lower train.max_length to" in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("width", [60, 100])
def test_the_tables_say_what_the_documents_say(flash, config, monkeypatch, width):
    screen = io.StringIO()
    monkeypatch.setattr(render, "_console", lambda: Console(file=screen, width=width, highlight=False))
    document = cost(flash, config, "--set", "model=Qwen/Qwen3.5-4B", "--set", "algorithm=grpo")
    render.print_cost(document)
    text = screen.getvalue()
    assert document["estimate"]["hardware"] in text and f"${document['estimate']['usd']:.2f}" in text
    assert "rollouts" in text and "assumed: the dataset has 1,000 rows" in text
    monkeypatch.setenv("FLASH_API_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("FREESOLO_API_KEY", "k")
    cpu = {"device": "cpu", "name": "CPU", "kind": "cpu", "memory_bytes": 16 * 10**9, "usd_per_hour": 0.0}
    reference = json.loads(flash("gpus", "--json").stdout)["reference"]
    render.print_hardware([cpu], reference)
    assert "16 GB" in screen.getvalue() and "RTX 4090" in screen.getvalue()


def test_gpus_lists_reference_prices_even_without_a_server(flash, monkeypatch):
    monkeypatch.setenv("FLASH_API_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("FREESOLO_API_KEY", "k")
    answer = flash("gpus", "--json")
    assert answer.exit_code == 0, answer.stderr
    document = json.loads(answer.stdout)
    assert document["reachable"] is None and "warning: " in answer.stderr
    assert {"H200", "B200", "L40S"} <= {each["name"] for each in document["reference"]}
    assert all(each["usd_per_hour"] > 0 and each["prices"][0]["source"] for each in document["reference"])
    assert flash("gpus").stdout.startswith("reference ")
