"""The main job through the real command: push, train, follow, look, cancel, export, stop.

One server, two small runs; nothing here knows what lies behind the command line.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ENVIRONMENT = '''
from freesolo.environments import EnvironmentSingleTurn, RewardResult


class Echo(EnvironmentSingleTurn):
    """Says back the word it was given."""

    def build_prompt_messages(self, example, prompt_text):
        return [{"role": "user", "content": example.input}]

    def score_response(self, example, response):
        return RewardResult(score=float(response.strip() == example.output))


def load_environment():
    return Echo()
'''

CONFIG = """
model = "flash/nano"
[environment]
id = "local/echo"
[train]
batch_size = 4
save_every = 2
max_length = 128
"""

WORDS = ("red", "blue", "green", "grey")


class Machine:
    """A person's machine: a home, a project folder, and the `flash` command."""

    def __init__(self, root: Path, **variables: str) -> None:
        self.home, self.project = root / "home", root / "project"
        (self.project / "echo" / "dataset").mkdir(parents=True)
        (self.project / "echo" / "environment.py").write_text(ENVIRONMENT)
        for split, count in (("train", 16), ("eval", 4)):
            rows = [{"input": f"Say {WORDS[i % 4]}.", "output": WORDS[i % 4]} for i in range(count)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (self.project / "echo" / "dataset" / f"{split}.jsonl").write_text(text)
        (self.project / "echo.toml").write_text(CONFIG)
        hidden = ("FLASH_", "FREESOLO_", "WANDB_")
        self.variables = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
        self.variables |= {"FLASH_HOME": str(self.home), "FLASH_SERVER_IDLE_EXIT_S": "120", "OMP_NUM_THREADS": "1"}
        self.variables |= variables

    def begin(self, *arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "flash.cli.main", *map(str, arguments)],
            cwd=self.project, env=self.variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def flash(self, *arguments: object, code: int = 0) -> str:
        """The command's standard output; its exit code must be `code`."""
        process = self.begin(*arguments)
        out, err = process.communicate(timeout=110)
        assert process.returncode == code, f"{arguments}: {process.returncode}\n{out}\n{err}"
        return out

    def status(self, run_id: str) -> dict[str, object]:
        return json.loads(self.flash("status", run_id))

    def processes(self, module: str | None = None) -> list[psutil.Process]:
        """Whatever lives with this home in its environment, and runs that module."""
        found = []
        for process in psutil.process_iter():
            try:
                own = process.environ().get("FLASH_HOME") == str(self.home)
                if own and (module is None or module in process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture(scope="module", params=["laptop", pytest.param("team", marks=pytest.mark.slow)])
def machine(request, tmp_path_factory) -> Iterator[Machine]:
    """The same with a laptop's folders and processes, and with a team's Postgres, bucket and cluster."""
    backing = request.getfixturevalue("team_profile") if request.param == "team" else {}
    machine = Machine(tmp_path_factory.mktemp("machine"), **backing)
    yield machine
    machine.flash("server", "stop")
    for process in (left := machine.processes()):
        process.kill()
    assert not left, f"left behind: {left}"


@pytest.fixture(scope="module")
def submitted(machine) -> list[str]:
    """Two long runs, submitted at once: that which gets the device first, and the other one, cancelled."""
    machine.flash("env", "push", "--name", "echo", "echo")
    machine.flash("server", "stop")  # so that both submits find none and start it together
    arguments = ("train", "echo.toml", "--background", "--json", "--set", "train.epochs=100000", "--seed")
    both = [machine.begin(*arguments, seed) for seed in (0, 1)]
    answers = [process.communicate(timeout=90) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    runs = [json.loads(out) for out, _ in answers]
    assert all(run["state"] in ("queued", "provisioning", "running") for run in runs)
    ids = [run["run_id"] for run in runs]
    until(lambda: any(machine.status(run_id)["state"] != "queued" for run_id in ids))
    ids.sort(key=lambda run_id: machine.status(run_id)["state"] == "queued")
    machine.flash("cancel", ids[1])
    return ids


@pytest.fixture(scope="module")
def trained(machine, submitted) -> str:
    """A short run, followed to its end."""
    machine.flash("cancel", submitted[0])
    said = machine.flash("train", "echo.toml", "--background", "--json", "--set", "train.max_steps=4", "--seed", 0)
    run_id = str(json.loads(said)["run_id"])
    machine.flash("status", run_id, "-f")  # exit code 0: it ended done
    return run_id


OPEN = ("queued", "provisioning", "running")


def until(holds: Callable[[], object], limit_s: float = 180) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.3)


def test_two_submits_while_the_server_starts_are_two_runs_on_one_server(machine, submitted):
    assert len(set(submitted)) == 2
    assert {run["run_id"] for run in json.loads(machine.flash("runs", "--json"))["runs"]} >= set(submitted)
    assert (machine.home / "logs" / "server.log").read_text().count("listening on") == 2  # one for the push


def test_ctrl_c_leaves_a_followed_run_alone(machine, submitted):
    follower = machine.begin("status", submitted[0], "-f")
    assert follower.stdout.readline().startswith("queued")
    follower.send_signal(signal.SIGINT)
    _, err = follower.communicate(timeout=30)
    assert follower.returncode == 130, err
    assert f"flash status {submitted[0]} -f" in err
    assert machine.status(submitted[0])["state"] in OPEN


def test_a_trained_run_tells_everything(machine, trained):
    status = machine.status(trained)
    assert (status["state"], status["step"], status["total_steps"]) == ("done", 4, 4)
    assert status["adapter_ref"] == f"{trained}/step-4"
    assert status["spec"]["train"]["max_steps"] == 4
    assert set(status["metrics"]["eval"]) >= {"base", "adapter", "n"}
    assert status["metrics"]["eval"]["n"] == 4
    assert status["error"] is None
    assert machine.flash("checkpoints", trained).splitlines() == [
        f"step {step} {trained}/step-{step}" for step in (2, 4)
    ]
    log = machine.flash("log", trained)
    assert "⟦" in log
    events = [json.loads(line) for line in machine.flash("log", trained, "--json").splitlines()]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))


def test_a_run_cancelled_before_it_began_is_over(machine, submitted):
    until(lambda: machine.status(submitted[1])["state"] not in OPEN)
    assert machine.status(submitted[1])["state"] == "cancelled", machine.status(submitted[1])
    machine.flash("status", submitted[1], "-f", code=1)


@pytest.mark.slow
def test_a_cancelled_run_keeps_its_checkpoints(machine, trained):
    follower = machine.begin("train", "echo.toml", "--set", "train.epochs=100000", "--seed", 2)
    seen = []
    for line in follower.stdout:
        seen.append(line)
        if line.startswith("checkpoint "):
            break
    follower.send_signal(signal.SIGINT)
    _, err = follower.communicate(timeout=30)
    assert follower.returncode == 130, (seen, err)
    run_id = json.loads(machine.flash("runs", "--json"))["runs"][0]["run_id"]
    assert f"flash status {run_id} -f" in err
    assert machine.status(run_id)["state"] == "running", "Ctrl-C must only detach"
    machine.flash("cancel", run_id)
    machine.flash("status", run_id, "-f", code=1)
    status = machine.status(run_id)
    assert status["state"] == "cancelled"
    assert status["seed"] == 2
    assert status["checkpoints"]


@pytest.mark.parametrize("suffix", ["", "/step-2"])
def test_an_adapter_is_copied_out(machine, trained, tmp_path, suffix):
    folder = tmp_path / "adapter"
    done = json.loads(machine.flash("export", "--adapter-id", trained + suffix, "--output", folder, "--json"))
    assert {"adapter_model.safetensors", "adapter_config.json", "flash.json", "README.md"} <= set(done["files"])
    assert {path.name for path in folder.iterdir()} == set(done["files"])
    assert done["step"] == (2 if suffix else 4)
    assert json.loads((folder / "flash.json").read_text())["step"] == done["step"]


def test_a_profile_says_where_the_time_went(machine, trained, tmp_path):
    until(lambda: machine.status(trained)["attempts"][0]["ended_at"])
    said = json.loads(machine.flash("profile", trained, "--output", tmp_path / "trace.json", "--json"))
    trace = json.loads((tmp_path / "trace.json").read_text())
    spans = [entry for entry in trace["traceEvents"] if entry["ph"] == "X"]
    assert said["spans"] == len(spans)
    names = [span["name"] for span in spans]
    for name in (
        "queued", "provisioning", "running", "launching", "starting worker", "preparing environment", "loading model",
        "preparing data", "training", "step 1", "step 4", "forward and backward", "optimizer", "held-out loss",
        "checkpoint", "evaluating", "upload step 2", "upload step 4",
    ):  # fmt: skip
        assert name in names, names
    for track in {(span["pid"], span["tid"]) for span in spans}:
        open_until: list[int] = []
        for span in [each for each in spans if (each["pid"], each["tid"]) == track]:  # as written: parts after wholes
            start, end = span["ts"], span["ts"] + span["dur"]
            while open_until and start >= open_until[-1]:
                open_until.pop()
            assert start <= end and all(end <= each for each in open_until), span

    status, phases = machine.status(trained), [span for span in spans if span["cat"] == "phase"]
    attempt = status["attempts"][0]
    claimed = sum(span["dur"] for span in phases if span["name"] != "launching")
    assert claimed == pytest.approx(1e6 * (attempt["ended_at"] - attempt["started_at"]), abs=1e6)
    for span in spans:  # a step is as long as its parts, and about as long as it was measured
        if span["cat"] == "step":
            parts = [each for each in spans if each["cat"] == "part of a step" and each["ts"] >= span["ts"]]
            assert sum(part["dur"] for part in parts[:2]) == pytest.approx(span["dur"], abs=3)
            assert span["dur"] <= 1e6 * span["args"]["seconds"] + 2
    seconds = said["seconds"]
    training = sum(value for name, value in seconds.items() if name.startswith("training: "))
    assert 0 < training <= seconds["training"] + 0.01
    assert trace["otherData"]["seconds"] == seconds


def test_a_profile_that_cannot_be_written_is_one_line(machine, trained, tmp_path):
    process = machine.begin("profile", trained, "--output", tmp_path / "nowhere" / "trace.json")
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.count("\n")) == (1, 1)
    assert "No such file" in err and "--output FILE" in err


def test_the_service_stops_and_comes_back_with_everything(machine, trained):
    before = json.loads(machine.flash("server", "status", "--json"))
    machine.flash("server", "stop")
    until(lambda: not machine.processes(), limit_s=20)
    assert machine.status(trained)["state"] == "done"
    after = json.loads(machine.flash("server", "status", "--json"))
    assert after["pid"] != before["pid"]
    assert after["base_url"] == before["base_url"]
