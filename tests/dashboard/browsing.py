"""A browser for the tests: this machine's own Chromium, driven by Playwright; axe from the npm registry's client."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

AXE = "axe-core@4.11.0"
CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-dev-shm-usage",
]


def missing(what: str, remedy: str) -> None:
    """Skips on a person's machine; on CI everything must be there."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is missing: {remedy}")
    pytest.skip(f"{what} is missing: {remedy}")


def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if found := shutil.which(name):
            return found
    missing("Chromium", "apt-get install chromium")
    raise AssertionError("unreachable")


@contextmanager
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        # Playwright gives each browser a profile folder of its own, removed with it.
        opened = driver.chromium.launch(executable_path=chromium(), args=CHROMIUM_OPTIONS)
        try:
            yield opened
        finally:
            opened.close()


def axe_source() -> str:
    """axe-core's script, fetched once into a cache outside the repository."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flash-tests" / AXE.replace("@", "-")
    script = cache / "axe.min.js"
    if not script.is_file():
        npm = shutil.which("npm")
        if npm is None:
            missing("npm", "apt-get install npm")
        cache.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            [str(npm), "pack", "--silent", AXE], cwd=cache, capture_output=True, text=True, timeout=300, check=True
        )
        archive = cache / packed.stdout.split()[-1]
        with tarfile.open(archive) as tar:
            member = tar.extractfile("package/axe.min.js")
            assert member is not None
            script.write_bytes(member.read())
        archive.unlink()
    return script.read_text()


def axe_problems(page: Any, source: str, *, rule: str | None = None) -> list[str]:
    """What axe finds serious or critical on the page as it is, one line each; by one rule or by all."""
    page.evaluate(source)
    options: dict[str, Any] = {"resultTypes": ["violations"], **({"runOnly": [rule]} if rule else {})}
    found = page.evaluate("options => axe.run(document, options)", options)
    return [
        f"{each['id']}: {node['target']} {node['failureSummary']}"
        for each in found["violations"]
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"][:3]
    ]
