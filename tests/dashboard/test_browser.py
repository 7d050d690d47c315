"""The pages in a real browser, against a real server: what a person sees and does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.dashboard import browsing
from tests.dashboard.seeding import FAILED, HOSTILE, LONG, SAMPLES, STEPS, seed

from flash.client import local_server

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "arithmetic"
PATIENCE_MS = 240_000  # on a busy machine a run or an engine takes its time

FLAWED = '{"input": "1+1", "output": "2"}\n{"input": "1+1", "output": "3"}\n{"output": "no input"}\n'


@dataclass
class Site:
    """A server of its own home, and the command line beside it."""

    home: Path
    runs: dict[str, str]

    def flash(self, *arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "flash.cli.main", *map(str, arguments)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLASH_", "FREESOLO_"))}
        return {**kept, "FLASH_HOME": str(self.home), "FLASH_SERVER_IDLE_EXIT_S": "0", "OMP_NUM_THREADS": "1"}

    @property
    def base(self) -> str:
        found = local_server.recorded(self.home)
        assert found is not None
        return f"{found.base_url}/dashboard"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("dashboard")
    opened = Site(folder / "home", {})
    seed(opened.home)
    try:
        opened.flash("env", "push", "--name", "arithmetic", EXAMPLE)
        config = folder / "grpo.toml"
        config.write_text(
            'model = "flash/nano"\nalgorithm = "grpo"\n[environment]\nid = "local/arithmetic"\n'
            "[train]\nsteps = 2\nbatch_size = 2\ngroup_size = 4\nmax_tokens = 24\nmax_examples = 40\n"
        )
        opened.runs["grpo"] = opened.flash("train", config, "--background")
        package = folder / "changed"
        (package / "dataset").mkdir(parents=True)
        (package / "environment.py").write_text((EXAMPLE / "environment.py").read_text() + "\n# changed\n")
        (package / "dataset" / "train.jsonl").write_text((EXAMPLE / "dataset" / "train.jsonl").read_text())
        opened.flash("env", "push", "--name", "arithmetic", package)
        flawed = folder / "flawed"
        (flawed / "dataset").mkdir(parents=True)
        (flawed / "environment.py").write_text((EXAMPLE / "environment.py").read_text())
        (flawed / "dataset" / "train.jsonl").write_text(FLAWED)
        opened.flash("env", "push", "--name", "flawed", flawed)
        yield opened
    finally:
        local_server.stop(opened.home)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browsing.browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def state(site: Site, chromium: Any) -> Any:
    """What a browser keeps once it was let in."""
    context = chromium.new_context()
    page = context.new_page()
    page.goto(site.flash("dashboard"))
    page.get_by_role("heading", name="Runs", exact=True).wait_for(timeout=PATIENCE_MS)
    kept = context.storage_state()
    context.close()
    return kept


@pytest.fixture
def open_page(site: Site, chromium: Any, state: Any) -> Iterator[Callable[..., Any]]:
    """`open_page("/runs/…")`: a page of its own context; nothing may fail in its scripts."""
    contexts: list[Any] = []
    failures: list[str] = []

    def opened(path: str = "", **options: Any) -> Any:
        contexts.append(chromium.new_context(**{"storage_state": state, **options}))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("console", lambda line: failures.append(line.text) if "Content Security" in line.text else None)
        page.goto(site.base + path)
        page.locator("h1").wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not failures


def until(check: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while time.monotonic() < deadline:
        if found := check():
            return found
        time.sleep(0.2)
    raise AssertionError(f"it never happened: {what}")


# --- the way in -----------------------------------------------------------------------------------------------


def test_a_link_lets_one_browser_in_and_leaves_no_trace(site: Site, chromium: Any):
    link = site.flash("dashboard", FAILED)
    code = link.partition("#code=")[2]
    assert len(code) > 30
    context = chromium.new_context()
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url + str(request.headers.get("referer"))))
    page.goto(link)
    page.get_by_role("heading", name=re.compile(FAILED)).wait_for(timeout=PATIENCE_MS)
    assert "#" not in page.url and not any(code in each for each in asked)
    assert code not in (site.home / "logs" / "server.log").read_text()
    page.reload()
    page.get_by_role("heading", name=re.compile(FAILED)).wait_for(timeout=PATIENCE_MS)
    other = chromium.new_context().new_page()
    other.goto(link)
    other.get_by_role("heading", name="Open the dashboard from a terminal").wait_for(timeout=PATIENCE_MS)
    assert "used before" in other.get_by_role("alert").first.inner_text()
    other.get_by_label("Or enter an API key").fill("fslo_wrong")
    other.get_by_role("button", name="Sign in").click()
    other.get_by_text("This key is not valid here.").wait_for()
    server = local_server.recorded(site.home)
    assert server is not None
    other.get_by_label("Or enter an API key").fill(server.token)
    other.get_by_role("button", name="Sign in").click()
    other.get_by_role("heading", name=re.compile(FAILED)).wait_for(timeout=PATIENCE_MS)
    context.close()
    other.context.close()


# --- the table ------------------------------------------------------------------------------------------------


def test_the_table_filters_sorts_and_searches(open_page: Callable[..., Any]):
    page = open_page()
    rows = page.locator("#runs tbody tr")
    page.get_by_role("link", name=LONG).wait_for()
    everything = rows.count()
    assert everything >= 4 and page.locator("svg.spark").count() >= 3
    page.get_by_label("State").select_option("failed")
    until(lambda: rows.count() == 2, "only failed runs")
    assert "state=failed" in page.url
    page.get_by_label("Search").fill("flaky")
    until(lambda: rows.count() == 1, "one run")
    page.reload()
    page.get_by_role("link", name=FAILED).wait_for()
    assert rows.count() == 1
    page.get_by_label("Search").fill("nothing like it")
    page.get_by_role("button", name="Clear search and filters").click()
    until(lambda: rows.count() == everything, "all runs")
    page.get_by_role("button", name="Progress").click()
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("Progress")
    assert LONG in rows.nth(0).inner_text() or "of 100,000" not in rows.nth(0).inner_text()
    page.get_by_role("button", name="Progress").click()
    assert page.locator("th[aria-sort=ascending]").count() == 1


# --- one run --------------------------------------------------------------------------------------------------


def test_a_hundred_thousand_steps_open_at_once(open_page: Callable[..., Any], site: Site):
    page = open_page()
    took = []
    for _ in range(3):
        began = time.monotonic()
        page.goto(f"{site.base}/runs/{LONG}")
        page.locator('[data-metric="reward"] path.curve').wait_for()
        took.append(time.monotonic() - began)
    points = page.locator('[data-metric="reward"] path.curve').get_attribute("d")
    assert 100 < points.count("L") <= 300
    assert min(took) < 3.0  # about half a second where the machine is ours alone
    moved = page.evaluate(
        """async () => {
            const slider = document.querySelector('input[type=range]');
            const began = performance.now();
            for (let at = 1; at <= 10; at++) { slider.value = at / 11; slider.dispatchEvent(new Event('input')); }
            await new Promise(requestAnimationFrame);
            return (performance.now() - began) / 10;
        }"""
    )
    assert moved < 250  # ms to smooth all charts anew; 10 on an idle machine
    page.get_by_role("link", name="Samples").click()
    page.get_by_text(f"1–20 of {SAMPLES:,} samples").wait_for()


def test_charts_zoom_smooth_and_speak(open_page: Callable[..., Any]):
    page = open_page(f"/runs/{LONG}")
    chart = page.locator('[data-metric="entropy"] svg')
    chart.wait_for()
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.51, box["y"] + 40, steps=4)
    page.mouse.move(box["x"] + box["width"] * 0.56, box["y"] + 40, steps=4)
    page.mouse.up()
    page.wait_for_url(re.compile(r"from=\d+&to=\d+"))
    first, last = map(int, re.search(r"from=(\d+)&to=(\d+)", page.url).groups())
    assert 0 < last - first < STEPS / 4
    words = page.locator('[data-metric="reward"] svg').get_attribute("aria-label")
    assert words.startswith("Reward, with its spread, steps")
    page.get_by_label("Smoothing").fill("0.9")
    until(lambda: page.locator('[data-metric="reward"] path.faint').count() == 1, "a smoothed line")
    chart.focus()
    page.keyboard.press("ArrowLeft")
    assert re.match(r"step [\d,]+: ", page.locator("#said").inner_text())
    page.keyboard.press("Escape")
    until(lambda: "from=" not in page.url, "all steps again")
    page.reload()
    until(lambda: page.get_by_label("Smoothing").input_value() == "0.9", "smoothing is in the address")


def test_attempts_errors_and_what_was_left_out(open_page: Callable[..., Any]):
    page = open_page(f"/runs/{FAILED}")
    page.get_by_text("Attempt 2", exact=False).first.wait_for()
    assert page.locator(".attempt").count() == 2
    assert "the worker was lost" in page.locator("main").inner_text()
    assert page.get_by_role("alert").filter(has_text="KeyError").count() == 1
    page.get_by_text("Traceback", exact=True).click()
    assert 'File "environment.py", line 12' in page.locator("main").inner_text()
    curve = page.locator('[data-metric="loss"] path.curve').first.get_attribute("d")
    assert curve.count("L") + curve.count("M") == 80  # what attempt 2 did again counts once
    page.get_by_role("link", name="Config", exact=True).click()
    row = page.get_by_role("row", name=re.compile("train.lora_rank"))
    row.wait_for()
    assert "recipe" in row.inner_text() and "config" in page.get_by_role("row", name="train.epochs").inner_text()
    assert "epochs = 3" in page.get_by_label("Config as TOML").inner_text()


def test_logs_are_read_back_and_searched(open_page: Callable[..., Any]):
    page = open_page(f"/runs/{LONG}/log")
    lines = page.locator(".log .line")
    until(lambda: lines.count() == 500, "the log's end")
    page.get_by_role("button", name="Earlier lines").click()
    until(lambda: lines.count() == 1000, "earlier lines")
    page.get_by_label("Search the whole log").fill("step 500:")
    until(lambda: lines.count() == 1, "the one line")
    assert page.locator("mark").inner_text() == "step 500:" and "find=step" in page.url
    page.get_by_label("Search the whole log").fill("absent")
    page.get_by_text("No line says that.").wait_for()


@pytest.mark.parametrize("part", ["", "/log", "/samples", "/samples?colour=logprob", "/config"])
def test_hostile_text_is_shown_and_does_nothing(open_page: Callable[..., Any], part: str):
    page = open_page(f"/runs/{HOSTILE}{part}")
    page.get_by_text("<script>window.harmed=true</script>").first.wait_for()
    page.wait_for_timeout(300)
    assert page.evaluate("window.harmed") is None
    assert page.locator("main img, main script, main b").count() == 0
    assert page.title().startswith(("Overview", "Log", "Samples", "Config"))
    if part == "/log":
        text = page.locator(".log").inner_text()
        assert "\x1b" not in text and "red plain" in text and "[2J" not in text
        assert "U+202E" in text and "\u202e" not in text
        assert page.locator(".ansi-1").inner_text() == "red"
    if part == "/samples":
        assert page.locator("article.sample").count() == 6
        assert page.get_by_text("characters").first.is_visible()


# --- samples --------------------------------------------------------------------------------------------------


def test_samples_are_sorted_marked_folded_and_coloured(open_page: Callable[..., Any], site: Site):
    page = open_page(f"/runs/{LONG}/samples")
    page.locator("article.sample").first.wait_for()
    assert page.locator("article.sample details:not([open])").count() > 0
    assert page.locator(".rewards").first.get_attribute("aria-label").startswith("Rewards of the group")
    page.get_by_label("Order").select_option("worst")
    until(lambda: "Reward 0" in page.locator("article.sample").first.inner_text(), "the worst first")
    page.get_by_label("Mark").select_option("truncated")
    until(lambda: page.locator(".tag.warn").count() == 20, "only truncated ones")
    page.get_by_role("button", name="Next").click()
    page.wait_for_url(re.compile("offset=20"))
    run = site.runs["grpo"]
    until(lambda: json.loads(site.flash("status", run, "--json"))["state"] == "done", "the run is done")
    page.goto(f"{site.base}/runs/{run}/samples?colour=logprob&kind=rollout")
    page.locator(".token").first.wait_for()
    assert "log-probability" in page.locator(".token").first.get_attribute("title")
    page.get_by_label("Colour tokens by").select_option("advantage")
    until(lambda: "advantage" in (page.locator(".token").first.get_attribute("title") or ""), "by advantage")


# --- comparing and environments -------------------------------------------------------------------------------


def test_runs_are_compared_on_shared_axes(open_page: Callable[..., Any], site: Site):
    page = open_page()
    for run in (LONG, site.runs["grpo"]):
        page.get_by_role("checkbox", name=f"Pick {run} for comparison").check()
    page.get_by_role("button", name="Compare 2").click()
    page.locator('[data-metric="reward"] path.curve').nth(1).wait_for(state="attached")
    assert "train.steps" in page.get_by_role("region", name="Configs").first.inner_text()
    page.get_by_label("Along").select_option("time")
    assert "x=time" in page.url
    page.goto(f"{site.base}/compare?runs={LONG}")
    page.get_by_text("One run is chosen.").wait_for()


def test_environments_show_what_is_in_them(open_page: Callable[..., Any], site: Site):
    page = open_page("/environments")
    page.get_by_role("link", name="local/arithmetic").click()
    page.get_by_label("environment.py", exact=True).wait_for()
    assert "# changed" in page.get_by_label("environment.py", exact=True).inner_text()
    page.get_by_role("link", name="Differences").click()
    page.locator(".diff .plus").first.wait_for()
    assert "+# changed" in page.locator(".diff").first.inner_text() or page.get_by_text("+# changed").count()
    page.get_by_role("navigation", name="Parts of the environment").get_by_role("link", name="Runs").click()
    page.get_by_role("link", name=site.runs["grpo"]).wait_for()
    page.goto(f"{site.base}/environment?id=local/flawed&view=rows")
    page.get_by_text("2 problems").wait_for()
    assert "no `input`" in page.locator("main").inner_text()


# --- from a form to a chat ------------------------------------------------------------------------------------


def test_a_run_is_started_followed_deployed_and_asked(open_page: Callable[..., Any]):
    page = open_page("/start?environment=local/arithmetic")
    page.get_by_text("What it comes to").wait_for()
    page.get_by_label("batch_size", exact=True).fill("none")
    until(lambda: page.locator('[aria-invalid="true"]').count() == 1, "the problem stands at its key")
    assert "train.batch_size" in page.locator("[id='wrong-train.batch_size']").inner_text()
    page.get_by_label("batch_size", exact=True).fill("8")
    page.get_by_label("max_steps", exact=True).fill("40")
    page.get_by_label("max_examples", exact=True).fill("320")
    page.get_by_label("save_every", exact=True).fill("20")
    until(lambda: "40 of" in page.get_by_role("complementary").inner_text(), "the plan follows the form")
    page.get_by_role("button", name="Start the run").click()
    page.wait_for_url(re.compile(r"/runs/flash-\d+-[0-9a-f]{8}$"))
    run = page.url.rpartition("/")[2]
    seen = set()

    def done() -> bool:
        seen.add(page.locator("h1 .state").inner_text())
        return "done" in seen

    page.locator("h1 .state").wait_for()
    until(done, "the run ends, seen without a reload")
    assert len(seen) > 1, seen
    page.locator('[data-metric="loss"] path.curve').wait_for()
    until(lambda: page.get_by_role("button", name="Deploy").count() == 2, "two checkpoints")
    page.get_by_role("button", name="Deploy").first.click()
    page.locator(".tag", has_text="live").first.wait_for()
    page.get_by_role("link", name="Playground").first.click()
    page.locator("#answers section").nth(1).wait_for()
    page.get_by_label("Message", exact=True).fill("What is 3 + 4?")
    page.keyboard.press("Enter")
    page.locator("#answers").get_by_text("first after").nth(1).wait_for()
    assert run in page.locator("#answers section").nth(0).inner_text()
    assert "flash/nano" in page.locator("#answers section").nth(1).inner_text()
    page.get_by_role("navigation", name="Pages").get_by_role("link", name="Models").click()
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Undeploy").click()
    page.get_by_text("Nothing is deployed.").wait_for()


def test_an_admin_sees_to_keys(open_page: Callable[..., Any]):
    page = open_page("/account")
    page.get_by_label("Name", exact=True).fill("a <b>program</b>")
    page.get_by_label("Role").select_option("read-only")
    page.get_by_label("Most unfinished runs").fill("2")
    page.get_by_role("button", name="Make a key").click()
    page.get_by_label("The new key").wait_for()
    secret = page.get_by_label("The new key").inner_text()
    row = page.get_by_label("Keys", exact=True).get_by_role("row").filter(has_text="a <b>program</b>")
    row.wait_for()
    assert "read-only" in row.inner_text() and secret not in row.inner_text()
    page.on("dialog", lambda dialog: dialog.accept())
    row.get_by_role("button", name="Revoke").click()
    until(lambda: "revoked" in row.inner_text(), "it is revoked")
    assert page.get_by_label("Audit log").get_by_role("row").count() > 2


# --- everyone -------------------------------------------------------------------------------------------------

PAGES = [
    "", f"/runs/{LONG}", f"/runs/{FAILED}", f"/runs/{LONG}/samples?colour=logprob", f"/runs/{HOSTILE}/log",
    f"/runs/{FAILED}/config", f"/compare?runs={LONG},{FAILED}", "/environments",
    "/environment?id=local/flawed&view=rows", "/environment?id=local/arithmetic&view=diff",
    "/models", "/playground", "/start", "/account", "/absent", "/runs/flash-1-00000000",
]  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_problem(open_page: Callable[..., Any], site: Site, scheme: str):
    source = browsing.axe_source()
    page = open_page(color_scheme=scheme)
    for path in PAGES:
        page.goto(site.base + path)
        page.locator("h1").wait_for()
        page.wait_for_load_state("networkidle")
        # Dark pages are the light ones in other colours.
        assert browsing.axe_problems(page, source, rule=None if scheme == "light" else "color-contrast") == [], path


def test_a_phone_shows_everything_without_sideways_scrolling(open_page: Callable[..., Any], site: Site):
    page = open_page(viewport={"width": 360, "height": 740})
    for path in PAGES:
        page.goto(site.base + path)
        page.locator("h1").wait_for()
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, path


def test_times_are_the_readers_own(open_page: Callable[..., Any], site: Site):
    page = open_page(f"/runs/{LONG}", timezone_id="Asia/Tokyo", locale="en-GB")
    page.locator("dd time").first.wait_for()
    assert "15 Nov 2023, 07:13:20" in page.locator("dd time").first.inner_text()
    page.goto(f"{site.base}/account")
    page.get_by_text("Asia/Tokyo").wait_for()


def test_keys_reach_everything(open_page: Callable[..., Any]):
    page = open_page()
    page.get_by_role("link", name=LONG).wait_for()
    page.locator("body").press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-current')") == "page"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Environments", exact=True).wait_for()
    until(lambda: page.evaluate("document.activeElement.tagName") == "H1", "focus goes to what is new")
    theme = page.get_by_role("button", name=re.compile("Colours"))
    theme.click()
    theme.click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.go_back()
    page.get_by_role("heading", name="Runs", exact=True).wait_for()


def test_a_hidden_page_asks_nothing(open_page: Callable[..., Any]):
    page = open_page()
    page.get_by_role("link", name=LONG).wait_for()
    page.evaluate("Object.defineProperty(document, 'hidden', {get: () => true, configurable: true})")
    page.wait_for_timeout(6000)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(6000)
    assert asked == []
    page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    until(lambda: asked or page.wait_for_timeout(100), "it asks again")


def test_a_server_that_is_gone_is_said_to_be(open_page: Callable[..., Any], site: Site):
    page = open_page()
    page.get_by_role("link", name=LONG).wait_for()
    local_server.stop(site.home)
    page.get_by_role("alert").filter(has_text="can't be reached").wait_for()
    assert "flash dashboard" in page.get_by_role("alert").first.inner_text()
    site.flash("server", "start")
    until(lambda: not page.get_by_role("alert").first.inner_text(), "the trouble is over")
