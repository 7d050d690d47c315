"""Makes `docs/images/dashboard-*.png`: the dashboard of a real server with real runs, in this machine's own Chromium.

    .venv/bin/python docs/screenshots.py

Trains examples/arithmetic by SFT and by GRPO under an empty FLASH_HOME, deploys one of them and asks it, and takes a
picture of each page on the way. A few minutes on a laptop.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.dashboard.browsing import browser  # noqa: E402

EXAMPLE = ROOT / "examples" / "arithmetic"
IMAGES = ROOT / "docs" / "images"
WIDTH, HEIGHT = 1280, 860
PATIENCE_MS = 600_000
GRPO = ["--set", "train.steps=40", "--set", "train.save_every=20"]


def flash(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "flash.cli.main", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def wait(run: str) -> None:
    while json.loads(flash("status", run, "--json"))["state"] not in ("done", "failed", "cancelled"):
        time.sleep(2)


def take(page: Any, name: str, *, height: int = HEIGHT) -> None:
    page.set_viewport_size({"width": WIDTH, "height": height})
    page.wait_for_timeout(1500)  # charts and engines' states come a moment after the page
    page.screenshot(path=IMAGES / f"dashboard-{name}.png")
    print(f"docs/images/dashboard-{name}.png")


def pictures(opened: Any) -> None:
    context = opened.new_context(viewport={"width": WIDTH, "height": HEIGHT}, locale="en-GB")
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    flash("env", "push", "--name", "arithmetic", str(EXAMPLE))
    sft = flash("train", str(EXAMPLE / "sft.toml"), "--background")
    wait(sft)
    page.goto(flash("dashboard"))
    base = page.url.rstrip("/")

    page.goto(f"{base}/start?environment=local/arithmetic")
    page.get_by_text("What it comes to").wait_for()
    take(page, "start")

    grpo = flash("train", str(EXAMPLE / "grpo.toml"), "--background", *GRPO)
    wait(grpo)
    page.goto(base)
    page.get_by_role("link", name=grpo).wait_for()
    take(page, "runs")
    page.goto(f"{base}/runs/{grpo}")
    page.locator('[data-metric="reward"] path.curve').wait_for()
    page.get_by_label("Smoothing").fill("0.5")
    take(page, "run", height=1300)
    page.goto(f"{base}/runs/{grpo}/samples?order=disagreeing&kind=rollout&colour=logprob")
    page.locator(".token").first.wait_for()
    take(page, "samples")
    page.goto(f"{base}/compare?runs={sft},{grpo}")
    page.locator("path.curve").first.wait_for()
    take(page, "compare")

    page.goto(f"{base}/runs/{sft}")
    page.get_by_role("button", name="Deploy").first.click()
    page.locator(".tag", has_text="live").first.wait_for()
    page.goto(f"{base}/playground?model={sft}")
    page.get_by_label("Message", exact=True).fill("What is 55 + 90?")
    page.keyboard.press("Enter")
    page.locator("#answers").get_by_text("first after").nth(1).wait_for()
    take(page, "playground")
    context.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"FLASH_HOME": home, "FLASH_SERVER_IDLE_EXIT_S": "0"}
        try:
            with browser() as opened:
                pictures(opened)
        finally:
            flash("server", "stop")


if __name__ == "__main__":
    main()
