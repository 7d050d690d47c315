"""The starter environment works as it stands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flash.config.load import load_config
from flash.environments.checking import check
from flash.environments.package import pack
from flash.environments.scaffold import write_scaffold
from flash.errors import InvalidInput


def test_the_starter_passes_its_own_check_and_config(tmp_path: Path) -> None:
    folder = tmp_path / "My Env"
    names = write_scaffold(folder)
    assert sorted(names) == sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    report = check(folder)
    assert report.problems == []
    assert report.warnings == []
    assert set(report.splits) == {"train", "eval"}
    assert report.gold is not None
    assert report.gold.mean == 1.0
    assert load_config(folder / "config.toml").config.environment.id == "local/my-env"
    assert "{{" not in (folder / "README.md").read_text() + (folder / "TRAINING.md").read_text()
    assert {"environment.py", "dataset/train.jsonl", "dataset/eval.jsonl"} <= set(pack(folder).files)


def test_no_row_is_in_both_splits(tmp_path: Path) -> None:
    write_scaffold(tmp_path / "env")
    train, evaluation = (
        set((tmp_path / "env" / "dataset" / name).read_text().splitlines()) for name in ("train.jsonl", "eval.jsonl")
    )
    assert not train & evaluation


@pytest.mark.slow
def test_the_starter_s_own_tests_pass(tmp_path: Path) -> None:
    write_scaffold(tmp_path / "env")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_reward.py"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tmp_path / "env", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "environment.py").write_text("mine")
    with pytest.raises(InvalidInput, match="is there already"):
        write_scaffold(tmp_path, "x")
    assert [path.name for path in tmp_path.iterdir()] == ["environment.py"]
    write_scaffold(tmp_path, "x", force=True)
    assert "TicketRouting" in (tmp_path / "environment.py").read_text()
