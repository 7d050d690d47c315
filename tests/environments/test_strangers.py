"""Environments as strangers write them: each trains through a real host and trainer, or is refused in one line.

`flash env check` is asked first, every time, and must have said what the run then meets.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import textwrap
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flash.catalog.catalog import load_catalog
from flash.cli.preview import Preview
from flash.config.load import parse_config
from flash.config.recipes import resolve
from flash.environments.checking import CheckReport, check
from flash.environments.package import pack, unpack
from flash.errors import FlashError
from flash.worker.channel import Channel
from flash.worker.environment_host import EnvironmentHost, HostSpec
from flash.worker.packages import prepare
from flash.worker.trainer import run as run_trainer

ROWS = [{"input": f"{n}+{n}", "output": str(n + n)} for n in range(4)]


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def code(body: str = "", *, top: str = "", factory: str = "def load_environment():\n    return Env()") -> str:
    """A single-turn environment; `body` is more of its class, `top` what stands above it."""
    return f"""{textwrap.dedent(top)}
from freesolo.environments import EnvironmentSingleTurn, RewardResult

class Env(EnvironmentSingleTurn):
    def build_prompt_messages(self, example, prompt_text):
        return [{{"role": "user", "content": str(example.input)}}]

    def score_response(self, example, response_text):
        return RewardResult(score=float(response_text.strip() == str(example.output)))
{textwrap.indent(textwrap.dedent(body), "    ")}
{textwrap.dedent(factory)}
"""


@dataclass
class Told:
    """What a run said: its outcome, the example that it showed, warnings, the environment's prints."""

    outcome: dict[str, Any]
    example: str = ""
    warnings: list[str] = field(default_factory=list)
    printed: list[str] = field(default_factory=list)
    steps: int = 0

    @property
    def error(self) -> str:
        return str(self.outcome["error"]["message"])


Run = Callable[..., Told]
Write = Callable[[dict[str, str]], Path]


@pytest.fixture(scope="module")
def render() -> Iterator[Callable[..., str]]:
    """What `flash env check` renders with, in one process for all tests."""
    preview = Preview(load_catalog().get("flash/nano"), thinking=False, max_length=None)
    yield preview.render
    preview.close()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(files: dict[str, str]) -> Path:
        folder = tmp_path / "theirs"
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return folder

    return make


@pytest.fixture
def train(tmp_path: Path) -> Run:
    """train(folder, **params): packed, opened and trained on for two steps, as a worker does it."""

    def start(folder: Path, *, python: str = sys.executable, **params: Any) -> Told:
        unpack(pack(folder).data, tmp_path / "environment")
        (tmp_path / "work").mkdir()
        config, _ = parse_config(
            {
                "model": "flash/nano",
                "environment": {"id": "local/theirs", "params": params},
                "train": {"max_steps": 2, "batch_size": 2, "lora_rank": 2},
            }
        )
        printed: list[str] = []
        host = EnvironmentHost(
            HostSpec(
                folder=tmp_path / "environment", work_dir=tmp_path / "work", params=params, variables={}, python=python
            ),
            on_output=lambda stream, line: printed.append(line),
        )
        frames: list[dict[str, Any]] = []
        ours, theirs = socket.socketpair()
        supervisor = Channel(theirs, on_call=host.call, on_frame=frames.append).start()
        channel = Channel(ours).start()
        spec = resolve(config).model_dump(mode="json")
        job = {"spec": spec, "threads": 1, "device": "cpu", "work_dir": str(tmp_path / "work")}
        try:
            host.start()
            outcome = run_trainer(job, channel, threading.Event())
        except FlashError as error:  # as the supervisor ends an attempt whose environment can't be loaded
            outcome = {"outcome": "failed", "error": error.to_wire()}
        finally:
            channel.close()
            supervisor.wait_closed(5)
            host.close()

        def reported(kind: str) -> list[dict[str, Any]]:
            return [frame["data"] for frame in frames if frame["kind"] == kind]

        shown = [data["text"] for data in reported("log") if "trained tokens" in data["text"]]
        return Told(
            outcome,
            example=shown[0].partition("\n")[2] if shown else "",
            warnings=[data["text"] for data in reported("warning")],
            printed=printed,
            steps=sum("loss" in data["values"] for data in reported("metrics")),
        )

    return start


def trained(told: Told) -> str:
    """The trained part of the example that a run showed; the run must have come to its end."""
    assert told.outcome["outcome"] == "done", told.outcome
    assert told.steps == 2
    return told.example.rpartition("⟦")[2].partition("⟧")[0]


def sound(report: CheckReport) -> CheckReport:
    assert report.problems == []
    return report


# --- what works ---------------------------------------------------------------------------------------


def test_sibling_modules_sidecars_and_a_nested_dataset(write: Write, train: Run, render) -> None:
    folder = write(
        {
            "environment.py": code(
                "def build_prompt_messages(self, example, prompt_text):\n"
                "    return [{'role': 'user', 'content': f'{GREETING} {WORDS[0]} {example.input}'}]\n",
                top="""
                    import csv, json
                    from pathlib import Path
                    from helpers import GREETING
                    HERE = Path(__file__).parent
                    WORDS = json.loads((HERE / "words.json").read_text())
                    ROWS = list(csv.reader((HERE / "dataset" / "deep" / "extra.csv").open()))
                """,
            ),
            "helpers.py": "from constants import GREETING\n",
            "constants.py": "GREETING = 'Solve'\n",
            "words.json": '["please:"]',
            "dataset/deep/extra.csv": "a,b\n",
            "dataset/train.jsonl": jsonl(ROWS),
        }
    )
    assert "Solve please: 0+0" in (sound(check(folder, render=render)).rendered or "")
    told = train(folder)
    assert trained(told).startswith("0") and "Solve please: 0+0" in told.example


def test_of_several_splits_the_one_asked_for_is_trained(write: Write, train: Run, render) -> None:
    files = {
        f"dataset/{split}.jsonl": jsonl([{"input": f"{split} {n}", "output": f"{n}"} for n in range(4)])
        for split in ("train", "test", "eval")
    }
    folder = write({"environment.py": code(), **files})
    report = sound(check(folder, {"split": "test"}, render=render))
    assert report.splits == {"test": 4, "train": 4, "eval": 4}
    told = train(folder, split="test")
    assert trained(told) and "test 0" in told.example


def test_a_dataset_path_names_any_file_of_the_package(write: Write, train: Run, render) -> None:
    files = {"environment.py": code(), "dataset/hard.json": json.dumps(ROWS), "dataset/train.jsonl": jsonl(ROWS[:1])}
    folder = write(files)
    assert sound(check(folder, {"dataset_path": "dataset/hard.json"}, render=render)).splits["train"] == 4
    assert trained(train(folder, dataset_path="dataset/hard.json"))


def test_rows_built_in_code(write: Write, train: Run, render) -> None:
    body = 'dataset = [{"input": f"{n} squared", "output": str(n * n)} for n in range(2, 6)]'
    folder = write({"environment.py": code(body)})
    assert sound(check(folder, render=render)).splits == {"train": 4}
    told = train(folder)
    assert trained(told).startswith("4") and "2 squared" in told.example


def test_packaged_rows_win_over_rows_in_code_and_both_counts_are_told(write: Write, train: Run, render) -> None:
    body = 'dataset = [{"input": "in code", "output": "x"}] * 3'
    folder = write({"environment.py": code(body), "dataset/train.jsonl": jsonl(ROWS)})
    report = sound(check(folder, render=render))
    told = train(folder)
    assert trained(told) and "in code" not in told.example
    for warnings in (report.warnings, told.warnings):
        assert any(re.search(r"\b4\b.*\b3\b|\b3\b.*\b4\b", text) for text in warnings), warnings


def test_a_target_of_messages_with_tool_calls_is_trained_to_its_last_turn(write: Write, train: Run, render) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
    target = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
    ]
    body = (
        "def score_response(self, example, response_text):\n"
        "    return RewardResult(score=float('4' in response_text))"
    )
    rows = [{"input": "2+2", "output": target}] * 4
    folder = write({"environment.py": code(body), "dataset/train.jsonl": jsonl(rows)})
    rendered = sound(check(folder, render=render)).rendered or ""
    told = train(folder)
    part = trained(told)
    assert "add" in part and "It is 4." in part
    assert part == rendered.rpartition("⟦")[2].partition("⟧")[0], "check and run show the same"


def test_inputs_that_are_objects(write: Write, train: Run, render) -> None:
    rows = [{"input": {"a": n, "b": [n, None]}, "output": {"sum": n}} for n in range(4)]
    body = """
        def build_prompt_messages(self, example, prompt_text):
            import json
            value = example.input if isinstance(example.input, dict) else json.loads(example.input)
            return [{"role": "user", "content": f"a is {value['a']}"}]

        def score_response(self, example, response_text):
            return RewardResult(score=float("sum" in response_text))
    """
    folder = write({"environment.py": code(body), "dataset/train.jsonl": jsonl(rows)})
    sound(check(folder, render=render))
    told = train(folder)
    assert "sum" in trained(told) and "a is 0" in told.example


def test_a_target_of_the_environment_s_own_making(write: Write, train: Run, render) -> None:
    body = """
        def sft_completion(self, example):
            return [{"role": "assistant", "content": f"<answer>{example.output}</answer>"}]

        def score_response(self, example, response_text):
            return RewardResult(score=float(response_text == f"<answer>{example.output}</answer>"))
    """
    folder = write({"environment.py": code(body), "dataset/train.jsonl": jsonl(ROWS)})
    gold = sound(check(folder, render=render)).gold
    assert gold is not None and gold.mean == 1.0
    assert trained(train(folder)).startswith("<answer>0</answer>")


def test_other_keys_of_a_row_are_named_once(write: Write, train: Run, render) -> None:
    rows = [{**row, "difficulty": 3, "source": "web"} for row in ROWS]
    folder = write({"environment.py": code(), "dataset/train.jsonl": jsonl(rows)})
    report = sound(check(folder, render=render))
    told = train(folder)
    assert trained(told)
    for warnings in (report.warnings, told.warnings):
        assert len([text for text in warnings if "difficulty" in text and "source" in text]) == 1


@pytest.mark.parametrize("place", ["param", "file"])
def test_a_contract_text_leads_every_prompt(write: Write, train: Run, render, place: str) -> None:
    files = {"environment.py": code(), "dataset/train.jsonl": jsonl(ROWS)}
    text = "Answer with the number alone."
    params = {"contract_text": text} if place == "param" else {}
    folder = write(files | ({} if place == "param" else {"TRAINING_CONTRACT.md": text}))
    assert text in (sound(check(folder, params, render=render)).rendered or "")
    told = train(folder, **params)
    assert trained(told) and text in told.example


def test_an_environment_of_bad_manners(write: Write, train: Run, render) -> None:
    """It prints everywhere, changes directory, leaves threads behind and swaps its own output."""
    top = """
        import os, sys, threading, time
        print("imported", flush=True)
        os.write(1, b"straight to the descriptor\\n")
        os.chdir("/")
        threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
        print("a warning of theirs", file=sys.stderr)
    """
    body = """
        def sft_completion(self, example):
            print("x" * 10_000)
            print("no newline", end="")
            os.chdir(os.path.expanduser("~"))
            threading.Thread(target=print, args=("from a thread",)).start()
            return [{"role": "assistant", "content": str(example.output)}]
    """
    folder = write({"environment.py": code(body, top=top), "dataset/train.jsonl": jsonl(ROWS)})
    sound(check(folder, render=render))
    told = train(folder)
    assert trained(told).startswith("0")
    printed = "\n".join(told.printed)
    assert all(text in printed for text in ("imported", "straight to", "from a thread", "a warning of theirs"))


# --- packages -----------------------------------------------------------------------------------------


def wheel(folder: Path, name: str, version: str, module: str) -> str:
    """A wheel of one module; the requirement that installs it."""
    path, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", module)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return f"{name} @ file://{path}"


def test_a_package_that_clashes_with_the_training_stack_harms_nobody_else(
    write: Write, train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    wanted = [
        wheel(tmp_path, "safetensors", "99.0", "VERSION = 'theirs'\n"),
        wheel(tmp_path, "tokenizers", "99.0", "raise RuntimeError('no trainer may import this')\n"),
    ]
    top = "import safetensors\nassert safetensors.VERSION == 'theirs'\n"
    folder = write({"environment.py": code(top=top), "dataset/train.jsonl": jsonl(ROWS)})
    python = prepare(wanted, cache_dir=tmp_path / "cache")
    assert trained(train(folder, python=python)).startswith("0")
    [weights] = (tmp_path / "work").rglob("step-2/adapter/adapter_model.safetensors")  # saved by the trainer's own
    assert weights.stat().st_size > 0


# --- what is refused, in one line, and by check as by a run ---------------------------------------------

GOOD = {"environment.py": code(), "dataset/train.jsonl": jsonl(ROWS)}


@pytest.mark.parametrize(
    ("files", "params", "says"),
    [
        ({"environment.py": code(top="import nowhere_to_be_found")}, {}, "nowhere_to_be_found"),
        ({"environment.py": code(top="import sys; sys.exit(3)")}, {}, "sys.exit"),
        ({"environment.py": code(top="raise SystemExit")}, {}, "sys.exit"),
        ({"environment.py": code("def __init__(self):\n    raise KeyError('no such table')")}, {}, "no such table"),
        ({"environment.py": code(factory="def load_environment():\n    return None")}, {}, "load_environment"),
        ({"environment.py": code(factory="def load_environment(a):\n    return Env()")}, {}, "a"),
        ({"environment.py": code()}, {"unknown": 1}, "unknown"),
        ({"dataset/train.jsonl": '{"input": "a"}\n{"output": "b"}\n'}, {}, "train.jsonl line 2"),
        ({"dataset/train.jsonl": '{"input": "a", "output": "b"}\n{"input": \n'}, {}, "train.jsonl line 2"),
        ({"dataset/train.jsonl": ""}, {}, "no rows"),
        ({"dataset/train.jsonl": jsonl([{"input": "a", "output": "b", "image": "x.png"}])}, {}, "image"),
        ({}, {"split": "test"}, "'test' is missing"),
        ({}, {"dataset_path": "dataset/none.jsonl"}, "none.jsonl"),
        ({}, {"dataset_path": "../../etc/passwd"}, "passwd"),
        ({"environment.py": code("def build_prompt_messages(self, e, p):\n    return 'text'")}, {}, "start_episode"),
        ({"environment.py": code("def build_prompt_messages(self, e, p):\n    exit(1)")}, {}, "sys.exit"),
        ({"environment.py": code("def sft_completion(self, e):\n    return [{'role': 'user'}]")}, {}, "sft_completion"),
        ({"environment.py": code("def sft_completion(self, e):\n    1 / 0")}, {}, "ZeroDivisionError"),
    ],
)  # fmt: skip
def test_a_fault_is_one_line_that_check_has_said_before(
    write: Write, train: Run, render, files: dict[str, str], params: dict[str, Any], says: str
) -> None:
    folder = write(GOOD | files)
    report = check(folder, params, render=render)
    told = train(folder, **params)
    assert told.outcome["outcome"] == "failed"
    assert says in told.error and "\n" not in told.error
    assert told.outcome["error"]["code"] != "internal"
    assert any(told.error in problem for problem in report.problems), (told.error, report.problems)


def test_a_reward_that_fails_is_said_by_check_and_costs_an_sft_run_nothing(write: Write, train: Run, render) -> None:
    files = {
        **GOOD,
        "environment.py": code("def score_response(self, example, response_text):\n    raise ValueError('no judge')"),
        "dataset/eval.jsonl": jsonl(ROWS),
    }
    folder = write(files)
    assert "no judge" in check(folder, render=render).problems[0]
    told = train(folder)
    assert trained(told)
    assert any("no judge" in text for text in told.warnings)
