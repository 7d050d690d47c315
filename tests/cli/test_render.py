"""What is drawn on a terminal, at the width of a small one."""

from __future__ import annotations

import pytest
from rich.console import Console

from flash.cli import render
from flash.cli.progress import Progress
from flash.records import Event, RunStatus, RunSummary

RUN = "flash-1700000000-0123abcd"


def run_status(**changes) -> RunStatus:
    base = {
        "run_id": RUN, "state": "failed", "phase": "finished", "step": 7, "total_steps": 20,
        "summary": "failed at step 7 of 20: the reward [raised]", "next": "start again from step 5",
        "spec": {"model": "flash/nano", "algorithm": "sft", "environment": {"id": "local/arithmetic"}},
        "seed": 0, "created_at": 100.0, "updated_at": 165.0, "finished_at": 165.0, "attempts": [],
        "metrics": {"loss": 0.5, "eval": {"base": 0.2, "adapter": 0.9, "n": 200}},
        "checkpoints": [f"{RUN}/step-5"], "adapter_ref": None, "deployment": None, "estimated_cost_usd": None,
        "cost_usd": None, "warnings": ["targets lack [think]"], "managed": {"device": "cpu"},
        "error": {"code": "user_code", "message": "the reward [raised]", "remedy": "look at line 3",
                  "detail": "\n".join(f"frame {n}" for n in range(20))},
    }  # fmt: skip
    return RunStatus.model_validate(base | changes)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")


def test_a_failed_run_says_what_happened_what_comes_next_and_where(capsys):
    render.print_status(run_status(), verbose=False)
    shown = capsys.readouterr().out
    for part in (
        RUN, "failed", "failed at step 7 of 20: the reward [raised]", "Next: start again from step 5", "step 7/20",
        "base 0.200 → adapter 0.900 on 200", f"{RUN}/step-5", "1 min 05 s", "warning: targets lack [think]",
        "error: the reward [raised] (look at line 3)", "frame 19", "-v",
    ):  # fmt: skip
        assert part in shown
    assert "frame 1\n" not in shown
    render.print_status(run_status(), verbose=True)
    assert "frame 1\n" in capsys.readouterr().out


def test_an_ended_run_shows_its_estimate_beside_what_it_took(capsys):
    metrics = {"loss": 0.5, "peak_memory_bytes": 17_400_000_000}
    managed = {"device": "cuda:0", "estimated_s": 3700.0, "active_s": 2900.0, "memory_needed_bytes": 18_500_000_000}
    ended = run_status(
        state="done", error=None, metrics=metrics, managed=managed, cost_usd=2.375, estimated_cost_usd=3.0
    )
    render.print_status(ended, verbose=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert "estimate 1 h 01 min on a device; used 48 min 20 s, $2.38 of $3.00" in shown
    assert "memory 18 GB estimated; 17 GB at its peak" in shown
    render.print_status(run_status(managed=managed, finished_at=None), verbose=False)
    assert "estimate" not in capsys.readouterr().out  # it is not over yet


def test_runs_stay_one_line_each_with_whole_ids(capsys):
    runs = [
        RunSummary(
            run_id=RUN, state="provisioning", phase=None, step=0, total_steps=1_000_000, model="openbmb/" + "M" * 40,
            algorithm="grpo", environment="some-organisation/" + "e" * 60, created_at=0.0, updated_at=0.0,
        )
    ] * 2  # fmt: skip
    render.print_runs(runs)
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert len(lines) == 3
    assert all(RUN in line for line in lines[1:])
    render.print_runs([])
    assert "flash train" in capsys.readouterr().out


def test_a_frame_of_the_live_display():
    progress = Progress(RUN)

    def happens(seq, kind, time=0.0, **data):
        progress.apply(Event(run_id=RUN, seq=seq, time=time, kind=kind, data=data))

    happens(1, "state", to="running")
    happens(2, "phase", phase="training", total_steps=20)
    for step in range(1, 6):
        happens(2 + step, "metrics", 1e12 + step, step=step, total_steps=20, values={"loss": 0.25, "tokens_per_s": 9e3})
    happens(8, "warning", code="x", text="rows were [cut]")
    happens(9, "log", stream="trainer", text="hello [world]")
    console = Console(width=120, highlight=False)
    with console.capture() as captured:
        console.print(render.live_display(progress, run_status(state="running")).get_renderable())
    shown = captured.get()
    for part in (
        RUN, "running", "training  step 5/20  loss 0.25  tokens/s 9,000  about", " left", " so far",
        "warning: rows were [cut]", "hello [world]",
    ):  # fmt: skip
        assert part in shown


def test_a_dry_run_cuts_no_value_short(capsys):
    words = [f"stop-{n}" for n in range(40)]
    spec = {"model": "m", "train": {"stop_sequences": words}, "recipe": {"top_p": 1.0}, "defaulted": []}
    render.print_dry_run({"spec": spec, "warnings": ["mind [this]"]})
    shown = capsys.readouterr().out
    assert all(word in shown for word in words)
    assert "train.stop_sequences" in shown
    assert "warning: mind [this]" in shown
