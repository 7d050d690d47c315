"""The supervisor, as a process: what the control plane, the store and the process table see of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from flash.artifacts.manifests import object_key, write_checkpoint
from flash.artifacts.store import Store

ENVIRONMENT = """
from freesolo.environments import EnvironmentSingleTurn

class Sums(EnvironmentSingleTurn):
    dataset = [{"input": "1+1=", "output": "2"}]

    def build_prompt_messages(self, example, prompt_text):
        return [{"role": "user", "content": example.input}]

    def score_response(self, example, response):
        return 0.0

def load_environment():
    return Sums()
"""


def test_an_attempt_from_claim_to_last_word(plane, attempt):
    run = attempt("train")
    assert run.wait() == 0, run.said()
    assert plane.finish == {"epoch": 1, "outcome": "done", "failure": None, "error": None}
    assert [event["n"] for event in plane.events] == list(range(1, len(plane.events) + 1))
    assert [data["step"] for data in plane.data("metrics")] == [1, 2, 3, 4]
    assert [data["phase"] for data in plane.data("phase")][:3] == ["preparing environment", "loading model", "training"]
    assert '"multi_turn": false' in plane.logged("trainer")
    assert "environment loaded" in plane.logged("environment")
    [report] = plane.checkpoints
    assert (report["step"], report["final"]) == (4, True)
    assert (plane.store / "runs/flash-1700000000-0000abcd/checkpoints/step-4.json").is_file()
    # Nothing is said after the last word, and that comes after the last event.
    assert plane.requests[-1] == "finish" or plane.requests[-2:] == ["finish", "heartbeat"]
    assert plane.heartbeats[-1]["step"] == 4
    assert run.children() == []


# --- how a trainer may end ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "failure", "says"),
    [
        ("die", "infrastructure", "killed by SIGKILL"),
        ("exit", "internal", "ended with status 7"),
        ("out-of-memory", "out_of_memory", "no room left"),
        ("invalid", "invalid_input", "no row fits"),
        ("no-adapter", "internal", "left no final adapter"),
    ],
)
def test_a_failure_is_named(plane, attempt, script, failure, says):
    run = attempt(script)
    assert run.wait() == 0, run.said()
    assert (plane.finish["outcome"], plane.finish["failure"]) == ("failed", failure)
    assert says in plane.finish["error"]["message"]
    assert says in plane.logged("supervisor")


def test_last_words_of_a_broken_trainer_are_kept(plane, attempt):
    attempt("exit").wait()
    assert "something odd happened" in plane.finish["error"]["detail"]
    assert "something odd happened" in plane.logged("trainer")


def test_a_checkpoint_with_other_bytes_ends_the_attempt_by_name_and_at_once(plane, attempt, tmp_path):
    run_id, store, saved = "flash-1700000000-0000abcd", Store(f"file://{plane.store}"), tmp_path / "saved"
    (saved / "state").mkdir(parents=True)
    (saved / "state" / "optimizer").write_bytes(b"as it was")
    manifest, _ = write_checkpoint(store, run_id, 2, saved, False, {})
    store.put_bytes(object_key(run_id, manifest.files[0].sha256), b"as it is!")
    plane.resume_from = manifest.model_dump(mode="json")
    run = attempt("train", download_patience_s=60.0)  # which is for stores that fail, not for this
    assert run.wait() == 0, run.said()
    assert (plane.finish["outcome"], plane.finish["failure"]) == ("failed", "infrastructure")
    assert plane.finish["error"]["code"] == "damaged"
    assert "state/optimizer has other bytes" in plane.finish["error"]["message"]


def test_a_package_that_cannot_be_imported_is_the_users_error(plane, attempt):
    plane.ship("import nowhere_to_be_found\ndef load_environment(): ...\n")
    assert attempt("train").wait() == 0
    assert (plane.finish["outcome"], plane.finish["failure"]) == ("failed", "user_code")
    assert "nowhere_to_be_found" in plane.finish["error"]["message"]
    assert "Traceback" in plane.logged("environment")


def test_an_archive_that_is_none_is_refused(plane, attempt):
    plane.environment = b"no archive"
    assert attempt("train").wait() == 0
    assert plane.finish["failure"] == "invalid_input"


def test_a_spec_that_is_none_is_told(plane, attempt):
    plane.spec = {"model": "flash/nano"}
    assert attempt("train").wait() == 0
    assert (plane.finish["outcome"], plane.finish["failure"]) == ("failed", "internal")


def test_a_call_that_hangs_costs_that_call_alone(plane, attempt):
    run = attempt("slow-call")
    assert run.wait() == 0, run.said()
    assert plane.finish["outcome"] == "done"
    slow, after = (json.loads(text.split(": ", 1)[1]) for text in plane.logged("trainer").splitlines())
    assert slow["error"]["code"] == "user_code" and "longer than 0.3 s" in slow["error"]["message"]
    assert after["result"]["multi_turn"] is False
    assert plane.logged("environment").count("environment loaded") == 2  # the host was started anew


# --- being told to stop -------------------------------------------------------------------------------


def test_cancel_lets_the_trainer_save(plane, attempt, until):
    """Here and below a second checkpoint may be saved once the first has arrived: a waiting one gives way to it."""
    run = attempt("obey", stop_grace_s=10)
    until(lambda: "waiting" in plane.logged() and plane.checkpoints)
    plane.desired = "cancel"
    assert run.wait() == 0, run.said()
    assert plane.finish["outcome"] == "cancelled"
    assert [report["step"] for report in plane.checkpoints] == [1, 2]


def test_cancel_kills_a_trainer_that_does_not_listen(plane, attempt, until):
    run = attempt("hang", stop_grace_s=0.3)
    until(lambda: "hanging" in plane.logged())
    plane.desired = "cancel"
    assert run.wait() == 0, run.said()
    assert plane.finish["outcome"] == "cancelled"
    assert [report["step"] for report in plane.checkpoints] == [1]
    assert run.children() == []


def test_cancel_does_not_wait_for_an_environment_that_loads(plane, attempt, until):
    plane.ship("import time\nprint('loading')\ntime.sleep(60)\ndef load_environment(): ...\n")
    run = attempt("ask", stop_grace_s=60)
    until(lambda: "loading" in plane.logged())
    plane.desired = "cancel"
    assert run.wait(10) == 0, run.said()
    assert plane.finish["outcome"] == "cancelled"
    assert run.children() == []


def test_sigterm_saves_and_reports_a_preemption(plane, attempt, until):
    run = attempt("obey", preempt_grace_s=10)
    until(lambda: "waiting" in plane.logged() and plane.checkpoints)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 0, run.said()
    assert (plane.finish["outcome"], plane.finish["failure"]) == ("failed", "preempted")
    assert [report["step"] for report in plane.checkpoints] == [1, 2]


# --- the lease ----------------------------------------------------------------------------------------


def test_a_fenced_attempt_ends_at_once_and_says_no_more(plane, attempt, until):
    run = attempt("hang")
    until(lambda: "hanging" in plane.logged())
    plane.fault = lambda route: 409
    assert run.wait() == 3
    assert plane.finish is None
    assert run.children() == []


def test_a_claim_that_is_refused_starts_nothing(plane, attempt):
    plane.fault = lambda route: 409
    run = attempt("train")
    assert run.wait() == 3
    assert plane.requests == ["claim"]
    assert not (run.work_dir / "trainer").exists()


def test_a_plane_that_is_away_for_a_while_misses_nothing(plane, attempt, until):
    down_until = [0.0]
    plane.fault = lambda route: 503 if time.monotonic() < down_until[0] else None
    run = attempt("obey", stop_grace_s=10)
    until(lambda: plane.heartbeats)
    down_until[0] = time.monotonic() + 0.7
    until(lambda: "waiting" in plane.logged() and plane.checkpoints)
    plane.desired = "cancel"
    assert run.wait() == 0, run.said()
    assert plane.finish["outcome"] == "cancelled"
    assert [report["step"] for report in plane.checkpoints] == [1, 2]
    assert [event["n"] for event in plane.events] == list(range(1, len(plane.events) + 1))


def test_a_worker_that_cannot_renew_stops_before_its_lease_ends(plane, attempt, until):
    plane.lease_s = 1.5
    run = attempt("hang")
    until(lambda: "hanging" in plane.logged())
    last = time.monotonic()
    plane.fault = lambda route: 503
    until(lambda: run.children() == [])
    assert time.monotonic() - last < plane.lease_s
    assert run.wait() == 4
    assert plane.finish is None


def test_a_supervisor_that_slept_past_its_lease_writes_nothing_more(plane, attempt, until):
    plane.lease_s = 0.6
    run = attempt("hang")
    until(lambda: "hanging" in plane.logged())
    run.process.send_signal(signal.SIGSTOP)
    time.sleep(0.7)
    plane.fault = lambda route: 409
    asked = len(plane.requests)
    run.process.send_signal(signal.SIGCONT)
    assert run.wait() in (3, 4)
    assert plane.finish is None and "finish" not in plane.requests[asked:]
    assert run.children() == []


def test_no_orphans_when_the_supervisor_is_killed(plane, attempt, until):
    run = attempt("hang")
    until(lambda: "hanging" in plane.logged())
    assert len(run.children()) >= 2  # trainer and host
    os.kill(run.process.pid, signal.SIGKILL)
    until(lambda: run.children() == [], 5)


# --- what is printed, and what must not be ------------------------------------------------------------


def test_a_flood_of_output_is_capped_and_shown_as_a_gap(plane, attempt):
    run = attempt("flood", log_burst_bytes=50_000, log_bytes_per_s=10_000)
    assert run.wait() == 0, run.said()
    assert plane.finish["outcome"] == "done"
    text = plane.logged("trainer")
    assert len(text) < 120_000
    shown = text.count("x" * 99)
    dropped = sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("… "))
    assert shown + dropped + ("the end of it" in text) in (50_000, 50_001) and dropped > 40_000


def test_secrets_reach_the_environment_and_nothing_else(plane, attempt, tmp_path):
    run = attempt("whisper")
    assert run.wait() == 0, run.said()
    secrets = (plane.secrets["SERVICE_KEY"].encode(), plane.token.encode(), b"hf_operators_own_token")
    assert b"[redacted]" in json.dumps(plane.events).encode()
    everything = json.dumps([plane.events, plane.finish, plane.heartbeats]).encode() + run.said().encode()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            everything += path.read_bytes()
    assert not [secret for secret in secrets if secret in everything]
    assert "environment loaded with [redacted]" in plane.logged("environment")  # it had the secret
    assert "a secret [redacted] in pieces" in plane.logged("trainer")
    printed = next(line for line in plane.logged("trainer").splitlines() if line.startswith("the environment:"))
    variables = json.loads(printed.removeprefix("the environment:"))
    assert "SERVICE_KEY" not in variables and "DATABASE_PASSWORD" not in variables
    assert {name for name in variables if "TOKEN" in name} == {"HF_TOKEN", "TOKENIZERS_PARALLELISM"}


def test_worker_env_reaches_the_environment(plane, attempt):
    plane.spec["worker_env"] = {"FEATURE_FLAG": "enabled"}
    plane.ship("import os\nprint('flag:', os.environ['FEATURE_FLAG'])\n" + ENVIRONMENT)
    run = attempt("train")
    assert run.wait() == 0, run.said()
    assert "flag: enabled" in plane.logged("environment")


# --- checkpoints --------------------------------------------------------------------------------------


def test_the_final_checkpoint_is_waited_for_and_older_folders_go(plane, attempt):
    run = attempt("saves")
    assert run.wait() == 0, run.said()
    assert plane.finish["outcome"] == "done"
    assert plane.checkpoints[-1] == {**plane.checkpoints[-1], "step": 6, "final": True}
    assert [path.name for path in (run.work_dir / "checkpoints").iterdir()] == ["step-6"]


def test_without_its_final_adapter_a_run_is_not_done(plane, attempt, until):
    plane.fault = lambda route: 503 if route == "checkpoints" else None
    run = attempt("saves", upload_patience_s=0.5)
    assert run.wait() == 0, run.said()
    assert (plane.finish["outcome"], plane.finish["failure"]) == ("failed", "infrastructure")
    assert "final adapter could not be uploaded" in plane.finish["error"]["message"]


def test_a_download_is_progress_and_shows_at_each_fiftieth(plane, attempt):
    running = attempt("fetch")
    assert running.wait(60) == 0, running.said()
    shown = [data for data in plane.data("phase") if "total_bytes" in data]
    assert {data["phase"] for data in shown} == {"loading model"} and {data["total_bytes"] for data in shown} == {5_000}
    assert [data["done_bytes"] for data in shown] == list(range(0, 5_001, 100))
    seen = [beat["progress"] for beat in plane.heartbeats if beat["phase"] == "loading model"]
    assert seen == sorted(seen) and plane.heartbeats[-1]["progress"] > 500  # each report keeps the stall away


def test_an_unusable_start_line_is_one_clear_line():
    command = [sys.executable, "-m", "flash.worker.supervisor"]
    ended = subprocess.run(command, input=b"{}\n", capture_output=True, timeout=20, check=False)
    assert ended.returncode == 2
    assert ended.stderr.decode().count("\n") == 1 and "attempt_id" in ended.stderr.decode()


def test_a_supervisor_is_light():
    probe = (
        "import sys, flash.worker.supervisor;"
        "print({'torch', 'transformers', 'numpy', 'sqlalchemy', 'fastapi'} & set(sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=20, check=True)
    assert ended.stdout == "set()\n"


# --- Weights & Biases -----------------------------------------------------------------------------------

WANDB_KEY_VALUE = "0123456789abcdef0123456789abcdef01234567"


def logged_offline(run) -> bytes:
    """Everything that the real package wrote of this attempt, in a folder that outlasts it."""
    folder = run.home / "wandb" / "flash-1700000000-0000abcd.1"
    return b"".join(path.read_bytes() for path in folder.rglob("*.wandb"))


def stand_in(plane, folder, body: str) -> None:
    """Another `wandb` package in front of the real one. No config may set PYTHONPATH; a spec of a test can."""
    (folder / "stand-in").mkdir()
    (folder / "stand-in" / "wandb.py").write_text(body)
    plane.spec["worker_env"] = {"PYTHONPATH": str(folder / "stand-in")}


def test_the_key_alone_logs_metrics_and_evaluation(plane, attempt):
    plane.secrets["WANDB_API_KEY"] = WANDB_KEY_VALUE
    plane.spec["worker_env"] = {"WANDB_MODE": "offline"}
    run = attempt("train", logger_wait_s=60)
    assert run.wait(90) == 0, run.said()
    assert plane.finish["outcome"] == "done"
    assert plane.data("warning") == []
    written = logged_offline(run)
    for part in (b"flash", b"flash-1700000000-0000abcd", b"loss", b"eval/adapter", b"lora_rank"):
        assert part in written, part
    assert WANDB_KEY_VALUE.encode() not in written
    assert "WANDB" not in plane.logged("environment")


def test_a_wandb_table_names_the_place(plane, attempt):
    plane.secrets["WANDB_API_KEY"] = WANDB_KEY_VALUE
    plane.spec["wandb"] = {"project": "my-project", "run_name": "my-name"}
    plane.spec["worker_env"] = {"WANDB_MODE": "offline"}
    run = attempt("train", logger_wait_s=60)
    assert run.wait(90) == 0, run.said()
    assert b"my-project" in logged_offline(run) and b"my-name" in logged_offline(run)


def test_without_a_key_nothing_is_logged(plane, attempt):
    plane.spec["wandb"] = {"project": "my-project", "run_name": None}
    run = attempt("train")
    assert run.wait() == 0, run.said()
    assert not (run.work_dir / "wandb").exists()


def test_a_wandb_that_hangs_costs_the_run_nothing(plane, attempt, tmp_path, until):
    stand_in(plane, tmp_path, "import time\ndef init(**kwargs): time.sleep(600)\n")
    plane.secrets["WANDB_API_KEY"] = WANDB_KEY_VALUE
    run = attempt("train", logger_wait_s=0.1, logger_finish_s=0.1)
    assert run.wait() == 0, run.said()
    assert plane.finish["outcome"] == "done"
    until(lambda: run.children() == [], 5)  # W&B's own process lives on for `logger_finish_s`


def test_a_wandb_that_fails_is_a_warning(plane, attempt, tmp_path):
    stand_in(plane, tmp_path, "def init(**kwargs): raise RuntimeError('no such account')\n")
    plane.secrets["WANDB_API_KEY"] = WANDB_KEY_VALUE
    run = attempt("train", logger_wait_s=20)
    assert run.wait(40) == 0, run.said()
    assert plane.finish["outcome"] == "done"
    assert [data["code"] for data in plane.data("warning")] == ["wandb_failed"]


def test_a_missing_wandb_package_is_a_warning(plane, attempt):
    plane.secrets["WANDB_API_KEY"] = WANDB_KEY_VALUE
    run = attempt("train", without="wandb")
    assert run.wait() == 0, run.said()
    assert plane.finish["outcome"] == "done"
    assert [data["code"] for data in plane.data("warning")] == ["wandb_missing"]
