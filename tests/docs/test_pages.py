"""What the pages claim, held against the code; and the site that is built of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from flash import errors
from flash.catalog.catalog import load_catalog
from flash.cli.main import COMMANDS, app
from flash.config.load import parse_config
from flash.control_plane.reconciler import RETRIED
from flash.environments.checking import check
from flash.records import FailureKind

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SCAFFOLD = ROOT / "src" / "flash" / "environments" / "scaffold" / "starter"


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def fenced(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text(name), re.DOTALL | re.MULTILINE)


def test_generated_pages_are_current():
    done = subprocess.run(
        [sys.executable, DOCS / "generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_stale_page_is_noticed_and_refreshed(tmp_path):
    pages = ("configuration.md", "cli.md", "server.md", "models.md", "troubleshooting.md", "performance.md")
    for name in (*(path.name for path in DOCS.iterdir() if path.suffix in (".py", ".json")), *pages):
        (tmp_path / name).write_bytes((DOCS / name).read_bytes())
    (tmp_path / "cli.md").write_text(text("cli.md").replace("--background", "--behind"))

    def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, tmp_path / "generate.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    checked = generate("--check")
    assert checked.returncode == 1
    assert "docs/cli.md is stale" in checked.stdout
    assert "--behind" in (tmp_path / "cli.md").read_text(), "a check writes nothing"
    assert generate().returncode == 0
    assert "--behind" not in (tmp_path / "cli.md").read_text()


def test_every_result_has_its_tables_and_pictures():
    page, results = text("benchmarks.md"), ROOT / "benchmarks" / "results"
    for path in results.glob("*.json"):
        result = json.loads(path.read_text())
        assert f"`python benchmarks/run.py {path.stem}`" in page
        assert f"Python {result['machine']['python']}" in page
    pictures = re.findall(r"\]\(images/([^)]+\.svg)\)", page + text("performance.md"))
    assert {"profile-sft.svg", "profile-grpo.svg"} < set(pictures)
    for name in pictures:
        drawn = ElementTree.parse(DOCS / "images" / name).getroot()
        assert drawn.tag.endswith("svg")


def test_every_command_is_in_the_reference():
    page = text("cli.md")
    for name in COMMANDS:
        assert f"### flash {name}\n" in page


def test_pages_name_commands_that_there_are():
    for page in [ROOT / "README.md", *DOCS.glob("*.md"), *SCAFFOLD.glob("*.md")]:
        shown = re.findall(r"(?:`|^|\()flash ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert [name for name in shown if name not in COMMANDS] == [], page.name


def test_the_list_of_what_is_missing_names_no_command_that_there_is():
    [missing] = re.findall(r"^## What is not there yet\n(.*)", text("how-it-works.md"), re.DOTALL | re.MULTILINE)
    assert [name for name in COMMANDS if f"`{name}`" in missing or f"`flash {name}" in missing] == []


# --- troubleshooting --------------------------------------------------------------------------------------


def test_every_code_has_its_heading():
    headings = set(re.findall(r"^## (\w+)$", text("troubleshooting.md"), re.MULTILINE))
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src" / "flash").rglob("*.py"))
    codes = set(re.findall(r'^    code(?:: ClassVar\[str\])? = "(\w+)"$', sources, re.MULTILINE))
    assert codes >= {kind.code for kind in (errors.FlashError, errors.ConfigError, errors.InternalError)}
    assert codes <= headings


def test_messages_with_a_remedy_are_listed_with_it():
    page = text("troubleshooting.md")
    for words in (
        "secrets without a value",  # a plain one
        "the package index can't be reached",
        "none of the … rows of split … has a trained token",  # one with values in it
        "more than … of the groups failed",  # one whose remedy is only known at run time, or a default
        "`reward_flat_low`",
        "`wandb_failed`",
    ):
        assert words in page


def test_verbose_errors_link_to_the_page(tmp_path):
    (tmp_path / "run.toml").write_text('model = "flash/nano"\n')
    arguments = ["train", str(tmp_path / "run.toml"), "--dry-run"]
    assert "docs/" not in CliRunner().invoke(app, arguments).stderr
    said = CliRunner().invoke(app, ["-v", *arguments]).stderr
    page, anchor = re.findall(r"^more: (\S+)#(\w+)$", said, re.MULTILINE)[0]
    assert f"\n## {anchor}\n" in (ROOT / page).read_text()


def test_every_lost_attempt_is_explained_as_the_reconciler_treats_it():
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*) \|", text("troubleshooting.md"), re.MULTILINE))
    assert set(rows) >= {kind.value for kind in FailureKind}
    for kind in FailureKind:
        goes_on = rows[kind.value].strip() in ("the same", "goes on from the newest checkpoint")
        assert goes_on == (kind in RETRIED), kind


# --- what the pages show ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["datasets.md", "environments.md", "training.md"])
def test_toml_is_part_of_a_sound_config(name):
    for block in fenced(name, "toml"):
        shown = tomllib.loads(block)
        environment = {"id": "local/task", **shown.pop("environment", {})}
        parse_config({"model": "flash/nano", "environment": environment, **shown})


def test_the_catalog_entry_is_sound(tmp_path):
    [entry] = fenced("models.md", "toml")
    (tmp_path / "models.toml").write_text(entry)
    assert "me/my-base" in load_catalog(tmp_path)


@pytest.mark.parametrize("place", [0, 1], ids=["one turn", "several turns"])
def test_the_environments_pass_their_check(tmp_path, place):
    code = fenced("environments.md", "python")[place]
    if "def load_environment" not in code:
        name = re.findall(r"^class (\w+)", code, re.MULTILINE)[-1]
        code += f"\n\ndef load_environment():\n    return {name}()\n"
    (tmp_path / "dataset").mkdir()
    (tmp_path / "environment.py").write_text(code)
    (tmp_path / "dataset" / "train.jsonl").write_text('{"input": "France", "output": "7"}\n')
    report = check(tmp_path)
    assert report.problems == []
    assert report.gold is not None
    assert report.gold.mean == 1.0


def test_rows_are_json():
    for row in fenced("datasets.md", "json"):
        assert "input" in json.loads(row)


# --- the site ---------------------------------------------------------------------------------------------


def test_the_site_is_built_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(list(DOCS.glob("*.md")))
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=[\"']?https?://[^>]*", html), page


def test_links_in_the_readme_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(targets) > 5
    for target in targets:
        assert (ROOT / target).exists(), target


def test_the_picture_is_small_and_self_contained():
    picture = (DOCS / "images" / "demo.svg").read_text(encoding="utf-8")
    assert len(picture) < 100_000
    assert "held-out reward" in picture
    elsewhere = re.findall(r"(?:href|src|url\(|@import)[^>]{0,40}", picture)
    assert elsewhere == []
    assert re.findall(r"https?://[^\"]+", picture) == ["http://www.w3.org/2000/svg"]
