"""An operator's own model, from the hub's stand-in to a trained adapter, by the real command.

The same again without the hub, from the cache; a gated one; and a warm start, which keeps the commit that its
adapter was trained on.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "loading"))
from checkpoints import save

from hub_stand_in import HubStandIn

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ENVIRONMENT = '''
from freesolo.environments import EnvironmentSingleTurn, RewardResult


class Echo(EnvironmentSingleTurn):
    """Says back the word it was given."""

    def build_prompt_messages(self, example, prompt_text):
        return [{"role": "user", "content": example.input}]

    def score_response(self, example, response):
        return RewardResult(score=float(response.strip() == example.output))


def load_environment():
    return Echo()
'''

CONFIG = """
model = "team/tiny"
[environment]
id = "local/echo"
[train]
batch_size = 4
max_steps = 2
max_length = 128
lora_rank = 4
"""

MODELS = """
[[model]]
id = "team/tiny"
params = 200_000
layout = "llama"
context = 4096
shape = { hidden = 32, ffn = 48, layers = 4, full_layers = 4, heads = 2, kv_heads = 1, head_dim = 16, vocab = 999, tied = false }

[[model]]
id = "team/gated"
params = 200_000
layout = "llama"
context = 4096
"""  # noqa: E501 the form of the shipped file


class Machine:
    """A person's machine, on which only the stand-in can be reached."""

    def __init__(self, root: Path, hub: HubStandIn) -> None:
        self.home, self.project, self.hub = root / "home", root / "project", hub
        (self.project / "echo" / "dataset").mkdir(parents=True)
        (self.project / "echo" / "environment.py").write_text(ENVIRONMENT)
        words = ("red", "blue", "green", "grey")
        rows = "".join(json.dumps({"input": f"Say {word}.", "output": word}) + "\n" for word in words * 2)
        (self.project / "echo" / "dataset" / "train.jsonl").write_text(rows)
        (self.project / "echo.toml").write_text(CONFIG)
        self.home.mkdir()
        (self.home / "models.toml").write_text(MODELS)
        hidden = ("FLASH_", "FREESOLO_", "WANDB_", "HF_", "TRANSFORMERS_", "HUGGING")
        self.variables = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
        self.variables |= {"FLASH_HOME": str(self.home), "FLASH_SERVER_IDLE_EXIT_S": "120", "OMP_NUM_THREADS": "1"}
        self.variables |= hub.variables

    def flash(self, *arguments: object, code: int = 0) -> tuple[str, str]:
        process = subprocess.run(
            [sys.executable, "-m", "flash.cli.main", *map(str, arguments)],
            cwd=self.project, env=self.variables, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert process.returncode == code, f"{arguments}: {process.returncode}\n{process.stdout}\n{process.stderr}"
        return process.stdout, process.stderr

    def train(self, *arguments: object, code: int = 0) -> tuple[dict[str, object], str]:
        """The run's status at its end, and what following it showed."""
        out, err = self.flash("train", "echo.toml", *arguments, code=code)
        (run_id,) = set(re.findall(r"flash-\d+-[0-9a-f]{8}", err.splitlines()[0]))
        return json.loads(self.flash("status", run_id)[0]), out + err

    def base_revision(self, run_id: str, folder: Path) -> str:
        self.flash("export", "--adapter-id", run_id, "--output", folder)
        return json.loads((folder / "flash.json").read_text())["base_revision"]

    def left(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("FLASH_HOME") == str(self.home):
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture(scope="module")
def hub():
    with HubStandIn() as found:
        yield found


@pytest.fixture(scope="module")
def machine(hub, tmp_path_factory):
    root = tmp_path_factory.mktemp("machine")
    folder = save("openbmb/MiniCPM5-tiny", root / "published")
    hub.add("team/tiny", folder)
    hub.add("team/gated", folder, gated=True, allowed=("good",))
    machine = Machine(root, hub)
    machine.flash("env", "push", "--name", "echo", "echo")
    yield machine
    machine.flash("server", "stop")
    for process in (left := machine.left()):
        process.kill()
    assert not left, f"left behind: {left}"


@pytest.fixture(scope="module")
def trained(machine, hub):
    """The first run: it fetches the model, slowly enough to be watched."""
    hub.pace = 30_000
    status, shown = machine.train()
    hub.pace = None
    return status, shown


def test_a_model_of_models_toml_is_fetched_shown_and_trained(machine, hub, trained, tmp_path):
    status, shown = trained
    assert (status["state"], status["step"]) == ("done", 2), shown
    lines = re.findall(r"^loading model: (\S+) of (\S+) MB fetched$", shown, re.MULTILINE)
    assert len(lines) > 2 and lines[-1][0] == lines[-1][1]
    repository = hub.repositories["team/tiny"]
    weights = [name for name in repository.files if name.endswith(".safetensors")]
    assert hub.bytes_of(*weights) == sum(len(repository.files[name]) for name in weights)
    assert machine.base_revision(status["run_id"], tmp_path / "adapter") == repository.commit
    assert (machine.home / "cache/models/models--team--tiny/snapshots" / repository.commit).is_dir()
    [warning] = [text for text in status["warnings"] if "config.json" in text]
    assert "shape.vocab = 999, its config.json 640" in warning  # an operator's mistake is told, and no more


def test_the_estimate_stands_beside_what_it_took(trained):
    status, _ = trained
    assert status["estimated_cost_usd"] == 0.0 and status["cost_usd"] == 0.0  # one's own machine
    assert status["managed"]["estimated_s"] > 0 and status["managed"]["active_s"] > 0
    assert status["managed"]["memory_needed_bytes"] > 0
    assert 10**8 < status["metrics"]["peak_memory_bytes"] < 10**10


def test_a_warm_start_keeps_its_adapters_commit(machine, hub, trained, tmp_path):
    status, _ = trained
    first = hub.repositories["team/tiny"]
    changed = {**first.files, "README.md": b"a newer card"}
    assert hub.add("team/tiny", changed) != first.commit
    try:
        run, shown = machine.train("--set", f"train.init_from_adapter={status['run_id']}")
        assert run["state"] == "done", shown
        assert machine.base_revision(run["run_id"], tmp_path / "adapter") == first.commit
    finally:
        hub.repositories["team/tiny"] = first


def test_a_gated_model_is_one_clear_line_and_no_second_try(machine, hub):
    asked = len(hub.requests)
    run, shown = machine.train("--set", "model=team/gated", code=1)
    [line] = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert "team/gated: access is gated (accept its licence at" in line and "and set HF_TOKEN" in line
    assert run["state"] == "failed" and len(run["attempts"]) == 1
    assert run["error"]["code"] == "model" and "Traceback" not in shown
    assert len(hub.requests) - asked < 12


def test_the_cache_is_enough_without_the_hub(machine, hub, trained):
    machine.flash("server", "stop")
    machine.variables["HF_HUB_OFFLINE"] = "1"
    try:
        asked = len(hub.requests)
        run, shown = machine.train()
        assert run["state"] == "done", shown
        assert len(hub.requests) == asked and "fetched" not in shown
        run, shown = machine.train("--set", "model=team/gated", code=1)
        assert "it is not on this machine, and the hub is switched off (HF_HUB_OFFLINE)" in shown
        assert len(run["attempts"]) == 1
    finally:
        machine.flash("server", "stop")
        del machine.variables["HF_HUB_OFFLINE"]
