"""Everything the command line does without a server."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest

from flash import __version__
from flash.cli.main import COMMANDS, LazyCommands


def errors_of(result) -> list[str]:
    return result.stderr.splitlines()


def test_the_table_of_commands_tells_the_truth():
    for name, entry in COMMANDS.items():
        assert LazyCommands()[name].get_short_help_str(limit=200) == entry.help, name


def test_help_lists_every_command_and_each_command_has_help(flash):
    listed = flash("--help").stdout
    for name in COMMANDS:
        assert f"  {name} " in listed
        assert flash(name, "--help").exit_code == 0


def test_every_command_takes_the_global_options():
    def leaves(command):
        below = getattr(command, "commands", {}).values()
        return [leaf for each in below for leaf in leaves(each)] if below else [command]

    for command in LazyCommands().values():
        for each in leaves(command):
            options = {option for parameter in each.params for option in parameter.opts}
            assert {"--json", "--debug", "-v"} <= options, each.name


@pytest.mark.parametrize("arguments", [["-V"], ["--version"], ["version"]])
def test_the_version(flash, arguments):
    assert __version__ in flash(*arguments).stdout


@pytest.mark.parametrize("arguments", [["--json", "version"], ["version", "--json"]])
def test_json_may_stand_before_or_after_the_command(flash, arguments):
    assert json.loads(flash(*arguments).stdout)["version"] == __version__


@pytest.mark.parametrize(
    "arguments", [["trian"], ["train"], ["train", "--nope", "x"], ["env", "push"], ["status"], ["export"]]
)
def test_wrong_usage_is_exit_code_2(flash, arguments):
    result = flash(*arguments)
    assert result.exit_code == 2
    assert "Usage" in result.stderr


def test_a_near_miss_is_named(flash):
    assert "'train'" in flash("trian").stderr


# --- dry run -------------------------------------------------------------------------------------------


def test_a_piped_dry_run_is_json_with_the_files_own_tables(flash, config):
    result = flash("train", config, "--dry-run", "--seed", 7, "--set", "train.lora_rank=16")
    document = json.loads(result.stdout)
    assert document["state"] == "dry_run"
    assert document["spec"]["train"]["lora_rank"] == 16
    assert document["spec"]["train"]["epochs"] == 3
    assert document["spec"]["seed"] == 7
    assert "train.batch_size" in document["spec"]["defaulted"]
    assert "train.epochs" not in document["spec"]["defaulted"]


def test_a_dry_run_touches_nothing(flash, config, home):
    flash("train", config, "--dry-run")
    assert list(home.iterdir()) == []


def test_overlays_and_overrides_apply_in_order(flash, config, tmp_path):
    overlay = tmp_path / "overlay.toml"
    overlay.write_text("[train]\nepochs = 5\nbatch_size = 4\n")
    result = flash(
        "train", config, "--dry-run", "--config", overlay, "--set", "train.epochs=6", "--set", "train.epochs=7"
    )
    train = json.loads(result.stdout)["spec"]["train"]
    assert (train["epochs"], train["batch_size"]) == (7, 4)


def test_a_dry_run_on_a_terminal_is_a_table_with_the_defaults_marked(config):
    shown = on_terminal("train", str(config), "--dry-run")
    rows = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    assert "default" in rows["train.batch_size"]
    assert "default" not in rows["train.epochs"]
    assert "{" not in rows["train.epochs"]


def test_warnings_are_in_the_document(flash, config):
    result = flash("train", config, "--dry-run", "--set", "train.group_size=4")
    assert any("group_size" in warning for warning in json.loads(result.stdout)["warnings"])


# --- errors --------------------------------------------------------------------------------------------


def test_every_problem_of_a_config_has_its_own_line(flash, config):
    config.write_text(
        'model = "flash/nano"\nlearning = 1\n[environment]\nid = "a/b"\n[train]\nepoch = 3\nlora_rank = 0\n'
    )
    for dry in (["--dry-run"], []):
        result = flash("train", config, *dry)
        lines = errors_of(result)
        assert result.exit_code == 1
        assert all(line.startswith("error: ") for line in lines)
        for key in ("learning", "train.epoch", "train.lora_rank"):
            assert sum(line.startswith((f"error: {key}:", f"error: {key} =")) for line in lines) == 1
        assert len(lines) == 3


def test_a_broken_config_starts_no_server(flash, config, home):
    config.write_text("model = ")
    assert flash("train", config).exit_code == 1
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("content", [None, "model = ", 'model = "x"\n'])
def test_a_file_that_is_no_config_is_clean_errors_only(flash_process, tmp_path, content):
    path = tmp_path / "c.toml"
    if content is not None:
        path.write_text(content)
    done = flash_process("train", path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert all(line.startswith("error: ") for line in done.stderr.splitlines())


def test_a_missing_secret_is_named_before_anything_starts(flash, config, home):
    config.write_text(config.read_text() + "\n[environment.params]\n")
    result = flash("train", config, "--set", 'environment.secrets=["SERVICE_API_KEY"]')
    assert result.exit_code == 1
    assert len(errors_of(result)) == 1
    assert "SERVICE_API_KEY" in result.stderr
    assert list(home.iterdir()) == []


def test_debug_adds_the_traceback(flash, tmp_path):
    assert "Traceback" not in flash("train", tmp_path / "none.toml").stderr
    result = flash("--debug", "train", tmp_path / "none.toml")
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["env", "pull", "Local/x"], "lower-case"),
        (["env", "pull", "github:a/b"], "lower-case"),
        (["env", "delete", "a/..", "-y"], "lower-case"),
        (["env", "delete", "a/b"], "-y"),
        (["env", "push", "--name", "x", "/nonexistent"], "environment.py"),
        (["export", "--adapter-id", "x"], "--output"),
        (["export", "--adapter-id", "x", "--repository", "a"], "OWNER/NAME"),
        (["login"], "--api-url"),
    ],
)
def test_what_can_not_be_is_one_line_with_the_remedy(flash, home, arguments, word):
    result = flash(*arguments)
    assert result.exit_code == 1
    assert len(errors_of(result)) == 1
    assert result.stderr.startswith("error: ")
    assert word in result.stderr
    assert list(home.iterdir()) == []


def test_a_server_that_is_not_there_is_one_line(flash, monkeypatch):
    monkeypatch.setenv("FLASH_API_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("FREESOLO_API_KEY", "fslo_x")
    result = flash("whoami")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: can't reach the server at http://127.0.0.1:9")
    assert "FLASH_API_URL" in result.stderr
    assert len(errors_of(result)) == 1


def test_a_reader_that_leaves_is_no_traceback(flash_process, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "flash.cli.main", "config", "schema"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert "Traceback" not in done.stderr


def test_models_and_schema(flash):
    assert "flash/nano" in flash("models").stdout
    ids = [model["id"] for model in json.loads(flash("models", "--json").stdout)["models"]]
    assert "flash/nano" in ids
    assert "train" in json.loads(flash("config", "schema").stdout)["properties"]
    assert "flash/nano" in on_terminal("models")


def test_completion_knows_the_commands(home):
    done = subprocess.run(
        [sys.executable, "-c", "from flash.cli.main import main; main()"],
        env={**os.environ, "_FLASH_COMPLETE": "complete_bash", "COMP_WORDS": "flash ch", "COMP_CWORD": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert sorted(done.stdout.split()) == ["chat", "checkpoints"]


def on_terminal(*arguments: str) -> str:
    """The command's output on a pseudo-terminal, without colours."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "flash.cli.main", *arguments], stdout=child, stderr=child, stdin=child,
        env={**os.environ, "TERM": "dumb", "COLUMNS": "120"},
    )  # fmt: skip
    os.close(child)
    chunks = []
    try:
        while chunk := os.read(parent, 65536):
            chunks.append(chunk)
    except OSError:  # how a pseudo-terminal says that its other end is closed
        pass
    os.close(parent)
    assert process.wait() == 0
    return b"".join(chunks).decode()
