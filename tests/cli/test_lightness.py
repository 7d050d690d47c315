"""What is imported holds the start-up times: under 0.15 s for help, under 0.4 s for a dry run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {
    "torch", "transformers", "ray", "fastapi", "sqlalchemy", "alembic", "uvicorn", "obstore", "freesolo",
    "huggingface_hub",
}  # fmt: skip
HTTP = {"httpx", "psutil"}
PRINT_MODULES = (
    "import json, sys; print(json.dumps(sorted({name.split('.')[0] for name, found in sys.modules.items() if found})))"
)


def imported(code: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def after_command(arguments: list[str]) -> set[str]:
    return imported(
        "import sys\n"
        "from flash.cli.main import app\n"
        f"try: app({arguments!r}, prog_name='flash')\n"
        "except SystemExit as end: assert not end.code, end.code\n" + PRINT_MODULES
    )


def test_help_imports_neither_http_nor_validation_nor_terminal():
    found = after_command(["--help"])
    assert not found & (HEAVY | HTTP | {"rich", "pydantic"})


def test_a_dry_run_imports_neither_http_nor_terminal(config):
    found = after_command(["train", str(config), "--dry-run"])
    assert not found & (HEAVY | HTTP | {"rich"})


def test_http_comes_without_a_terminal():
    found = imported("import flash.cli.main, httpx\nhttpx.Client().close()\n" + PRINT_MODULES)
    assert "httpx" in found and not found & {"rich", "pygments"}


@pytest.mark.parametrize(
    "module",
    [
        "train", "runs", "deploy", "chat", "export", "models", "server", "account", "configuration", "environments",
        "render",
    ],
)  # fmt: skip
def test_no_command_module_imports_anything_heavy(module):
    assert not imported(f"import flash.cli.{module}\n" + PRINT_MODULES) & HEAVY
