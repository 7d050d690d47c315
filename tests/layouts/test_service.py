"""Every layout through the whole service, as its user meets it: an operator's entry, train, deploy, chat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.end_to_end.test_walking_path import Machine
from tests.layouts.checkpoints import LAYOUTS, Layout
from tests.layouts.conftest import slug
from tests.layouts.proofs import proves

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def entry(layout: Layout, folder: Path) -> str:
    lines = [
        f'id = "tiny/{slug(layout)}"', f'path = "{folder}"', "params = 100_000", f'layout = "{layout.layout}"',
        "thinking = true", "rank_cap = 16", "context = 2048",
    ]  # fmt: skip
    return "\n".join(["[[model]]", *lines, ""])


@pytest.fixture(scope="module")
def machine(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine whose operator has added all layouts' checkpoints to models.toml."""
    machine = Machine(tmp_path_factory.mktemp("machine"))
    machine.home.mkdir(parents=True, exist_ok=True)
    entries = [entry(layout, checkpoints[name]) for name, layout in LAYOUTS.items()]
    (machine.home / "models.toml").write_text("\n".join(entries))
    try:
        machine.flash("env", "push", "--name", "echo", "echo")
        yield machine
    finally:
        machine.flash("server", "stop")
        for process in machine.processes():
            process.kill()


def patiently(machine: Machine, *arguments: str) -> str:
    process = machine.begin(*arguments)
    out, said = process.communicate(timeout=400)
    assert process.returncode == 0, said
    return out


@proves("SFT", "serve")
def test_train_deploy_and_chat(machine: Machine, layout: Layout) -> None:
    model = f"tiny/{slug(layout)}"
    keys = (f"model={model}", "train.lora_rank=8", "train.max_steps=4", "train.learning_rate=0.01")
    overrides = [part for key in keys for part in ("--set", key)]
    told = patiently(machine, "train", "echo.toml", "--background", "--json", *overrides)
    run_id = json.loads(told)["run_id"]
    patiently(machine, "status", run_id, "-f")
    status = json.loads(machine.flash("status", run_id))
    assert status["state"] == "done" and status["step"] == 4
    assert status["spec"]["model"] == model
    patiently(machine, "deploy", run_id)
    said = patiently(machine, "chat", run_id, "-m", "Say red.", "--max-tokens", "6")
    assert said.strip()
    patiently(machine, "undeploy", run_id)
