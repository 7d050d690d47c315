"""The commands that the documentation shows are run, or the page says why not.

One machine serves all pages: a FLASH_HOME of its own, the `flash` command on the path, the examples beside it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from flash.client import local_server

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^\n]*?) -->\n)?```bash\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)

# Around `flash`: a starter config trains a few steps only. `newest` is the run that RUN_ID stands for.
PREAMBLE = """
set -euo pipefail
flash() {
    command flash "$@"
    if [ "$1 ${2-}" = "env setup" ]; then printf 'max_steps = 4\\n' >> "$3/config.toml"; fi
}
newest() { command flash runs --limit 1 | cut -d' ' -f1; }
"""


@dataclass(frozen=True)
class Block:
    """One ```bash block, and what the comment above it says: run, run: slow, or not run: REASON."""

    mark: str
    code: str


def blocks(page: Path) -> list[Block]:
    return [Block(match["mark"] or "", match["code"]) for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]


@dataclass
class Machine:
    home: Path

    def bash(self, script: str, folder: Path, *, limit_s: float) -> str:
        """Runs the commands one after the other, up to the first that fails; returns what they printed."""
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "examples").exists():
            shutil.copytree(ROOT / "examples", folder / "examples")
        variables = {
            key: value for key, value in os.environ.items() if not key.startswith(("FLASH_", "FREESOLO_", "WANDB_"))
        }
        variables |= {
            "FLASH_HOME": str(self.home),
            "FLASH_SERVER_IDLE_EXIT_S": "120",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        done = subprocess.run(
            ["bash", "-c", PREAMBLE + re.sub(r"(?<![$\w])RUN_ID\b(?!=)", "$(newest)", script)],
            cwd=folder, env=variables, capture_output=True, text=True, timeout=limit_s, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{script}\n--- stdout\n{done.stdout[-3000:]}\n--- stderr\n{done.stderr[-3000:]}"
        return done.stdout


@pytest.fixture(scope="session")
def machine(tmp_path_factory) -> Iterator[Machine]:
    home = tmp_path_factory.mktemp("home")
    yield Machine(home)
    local_server.stop(home)


# --- the pages ------------------------------------------------------------------------------------------

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
TRAINING = ROOT / "src" / "flash" / "environments" / "scaffold" / "starter" / "TRAINING.md"


def with_blocks(mark: str) -> list[Path]:
    return [page for page in PAGES if any(block.mark == mark for block in blocks(page))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_says_whether_it_is_run(page):
    for block in blocks(page):
        reason = block.mark.removeprefix("not run: ")
        assert block.mark in ("run", "run: slow") or (reason != block.mark and len(reason) > 10), (
            f"{page.name}: needs <!-- run --> or <!-- not run: reason --> above it:\n{block.code}"
        )


@pytest.fixture(scope="session")
def trained(machine, tmp_path_factory) -> Path:
    """Every command of TRAINING.md, in order, in the folder that `flash env setup` writes; that folder."""
    folder = tmp_path_factory.mktemp("starter")
    commands = "".join(block.code for block in blocks(TRAINING)).replace("{{name}}", "task")
    machine.bash(f"flash env setup task\ncd task\n{commands}", folder, limit_s=110)
    return folder / "task"


def test_training_md_leads_from_the_starter_to_an_adapter(machine, trained):
    assert len(blocks(TRAINING)) >= 7
    assert (trained / "adapter" / "adapter_model.safetensors").is_file()
    status = json.loads(machine.bash("flash status RUN_ID --json", trained, limit_s=30))
    assert (status["state"], status["step"]) == ("done", 4)
    assert set(status["metrics"].pop("eval")) == {"base", "adapter", "n"}
    explained = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert [name for name in status["metrics"] if f"`{name}`" not in explained] == []


@pytest.mark.parametrize("page", with_blocks("run"), ids=lambda page: page.stem)
def test_the_commands_of_a_page_work(machine, trained, page, tmp_path):
    """RUN_ID stands for the newest run; there is one by now."""
    commands = "".join(block.code for block in blocks(page) if block.mark == "run")
    machine.bash(commands, tmp_path, limit_s=110)
    if page.stem == "quickstart":
        assert (tmp_path / "my-adapter" / "adapter_config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("page", with_blocks("run: slow"), ids=lambda page: page.stem)
def test_the_longer_commands_of_a_page_work(machine, page, tmp_path):
    """With the shorter ones around them, as a reader would run them."""
    push = "flash env push --name arithmetic examples/arithmetic\n"
    commands = "".join(block.code for block in blocks(page) if block.mark in ("run", "run: slow"))
    machine.bash(push + commands, tmp_path, limit_s=600)
