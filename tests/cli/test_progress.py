from __future__ import annotations

from flash.cli.progress import Progress, duration, headline, plain_lines
from flash.records import Event


def event(seq: int, kind: str, time: float = 0.0, **data) -> Event:
    return Event(run_id="flash-1-00000000", seq=seq, time=time, kind=kind, data=data)


def metrics(step: int, time: float, **values) -> Event:
    return event(step, "metrics", time, step=step, total_steps=100, values=values)


def test_the_newest_of_everything_is_kept():
    progress = Progress("flash-1-00000000")
    for each in [
        event(1, "state", to="running", reason="attempt 1 started"),
        event(2, "phase", phase="training", total_steps=100),
        event(3, "log", stream="trainer", text="a\n\nb"),
        event(4, "warning", code="x", text="careful"),
        metrics(5, 1.0, loss=1.5),
        event(6, "checkpoint", step=5, ref="flash-1-00000000/step-5", final=False),
        event(7, "eval", base=0.25, adapter=0.75, n=4),
    ]:
        progress.apply(each)
    assert (progress.state, progress.phase, progress.step, progress.total_steps) == ("running", "training", 5, 100)
    assert list(progress.recent) == ["a", "b"]
    assert progress.warnings == ["careful"]
    assert progress.values == {"loss": 1.5}
    assert progress.checkpoint == "flash-1-00000000/step-5"
    assert progress.evaluation == {"base": 0.25, "adapter": 0.75, "n": 4}


def test_the_time_left_follows_the_recent_pace():
    progress = Progress("r")
    progress.apply(metrics(1, 100.0))
    assert progress.seconds_left(100.0) is None
    for step in range(2, 91):
        progress.apply(metrics(step, 100.0 + 2.0 * step))
    assert progress.seconds_left(280.0) == 20.0
    assert progress.seconds_left(281.0) == 19.0
    assert progress.seconds_left(9999.0) == 0.0


def test_another_attempt_starts_the_estimate_afresh():
    progress = Progress("r")
    progress.apply(metrics(10, 10.0))
    progress.apply(metrics(20, 20.0))
    progress.apply(event(3, "attempt", epoch=1, state="ended", failure="infrastructure"))
    progress.apply(metrics(11, 500.0))
    assert progress.seconds_left(500.0) is None


def test_a_download_shows_how_far_it_is():
    progress = Progress("r")
    download = event(1, "phase", phase="loading model", done_bytes=1_240_000_000, total_bytes=9_300_000_000)
    progress.apply(download)
    assert (progress.phase, progress.download) == ("loading model", "1.2 of 9.3 GB")
    assert plain_lines(download) == ["loading model: 1.2 of 9.3 GB fetched"]
    assert plain_lines(event(2, "phase", phase="loading model", done_bytes=10, total_bytes=2_000_000)) == [
        "loading model: 0.0 of 2.0 MB fetched"
    ]
    progress.apply(event(3, "phase", phase="preparing data"))
    assert progress.download == ""


def test_an_event_as_lines():
    assert plain_lines(metrics(3, 0.0, loss=0.5, tokens_per_s=1234.4, other=9.0)) == [
        "step 3/100  loss 0.5  tokens/s 1,234"
    ]
    assert plain_lines(event(1, "state", to="done", reason="complete")) == ["done: complete"]
    assert plain_lines(event(1, "log", stream="environment", text="a\nb")) == ["environment | a", "environment | b"]
    assert plain_lines(event(1, "eval", base=0.25, adapter=0.75, n=4)) == [
        "evaluation: base 0.250 → adapter 0.750 on 4 held-out rows"
    ]
    ended = {"epoch": 2, "failure": "stall", "message": "no progress for 9 s"}
    assert plain_lines(event(1, "attempt", state="ended", **ended)) == ["attempt 2 ended (stall): no progress for 9 s"]
    assert plain_lines(event(1, "attempt", state="ending", **ended)) == []
    assert plain_lines(event(1, "sample", step=1)) == []


def test_numbers_read_well():
    assert headline({"reward": 0.0, "learning_rate": 3e-4, "x": "y"}) == [("reward", "0"), ("lr", "3.00e-04")]
    assert [duration(each) for each in (0.4, 59.6, 185, 7440)] == ["0 s", "1 min 00 s", "3 min 05 s", "2 h 04 min"]
