"""The spool, its sender, and the intake of output, redacted."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash.errors import Conflict, InvalidInput, Unavailable
from flash.records import EventAck, EventKind
from flash.redaction import REDACTED, Redactor
from flash.worker.reporting import EventSpool, LogIntake, Sender
from flash.worker.settings import WorkerSettings

FAST = WorkerSettings(retry_first_s=0.005, retry_most_s=0.02, event_interval_s=0.005)
NOTHING = Redactor([])
SECRET = "abcabcabd-9f8e7d"


# --- output, line by line -------------------------------------------------------------------------------


def collected(redactor=NOTHING, settings=FAST, clock=time.monotonic):
    lines = []
    return LogIntake(lines.append, redactor, settings, clock=clock), lines


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from([SECRET, "abc", "abcabcab", "\n", "x", "ab", "\r"]), max_size=12).map("".join),
    st.lists(st.integers(min_value=1, max_value=9), min_size=1, max_size=40),
)
def test_a_stream_is_redacted_wherever_it_is_cut(text, cuts):
    intake, lines = collected(Redactor([SECRET]))
    data, position = text.encode(), 0
    for cut in cuts:
        intake.feed(data[position : position + cut])
        position += cut
    intake.feed(data[position:])
    intake.close()
    whole = Redactor([SECRET]).text(text).replace("\r", "\n").split("\n")
    assert lines == [line for line in whole if line.strip()]


def test_a_secret_over_several_lines_is_redacted_in_a_stream():
    key = "-----BEGIN KEY-----\nMIIabcdefgh\nijklmnopqr\n-----END KEY-----"
    intake, lines = collected(Redactor([key]))
    for character in f"key: {key} end\n":
        intake.feed(character.encode())
    assert "MIIabcdefgh" not in "".join(lines) and lines[-1].endswith(" end")


# --- the intake ---------------------------------------------------------------------------------------


def test_broken_utf8_is_shown_and_split_characters_are_kept():
    intake, lines = collected()
    intake.feed("naïve".encode()[:3])
    intake.feed("naïve".encode()[3:] + b"\nbad \xff byte\nnul \0\n")
    assert lines == ["naïve", "bad \ufffd byte", "nul \ufffd"]


def test_a_long_line_is_split_not_lost():
    intake, lines = collected(settings=WorkerSettings(log_line_chars=10))
    intake.feed(b"0123456789abcdefghijKLM")
    intake.close()
    assert lines == ["0123456789", "abcdefghij", "KLM"]


def test_progress_bars_become_lines():
    intake, lines = collected()
    intake.feed(b"10%\r20%\r")
    intake.feed(b"\nend\r\n")
    assert lines == ["10%", "20%", "end"]


def test_a_flood_is_counted_to_the_line():
    now = [0.0]
    settings = WorkerSettings(log_burst_bytes=10_000, log_bytes_per_s=1_000, log_line_chars=100)
    intake, lines = collected(settings=settings, clock=lambda: now[0])
    intake.feed(b"flood\n" * 5_000)
    assert len(lines) < 200 and intake.dropped == 5_000 - len(lines)
    dropped = intake.dropped
    now[0] += 5
    intake.tick()  # the note comes without further output
    assert lines[-1] == f"… {dropped} lines dropped: more output than the log keeps"
    intake.feed(b"after\n")
    assert lines[-1] == "after"


def test_a_gap_at_the_end_is_shown():
    intake, lines = collected(settings=WorkerSettings(log_burst_bytes=100, log_bytes_per_s=0))
    intake.feed(b"x\n" * 10)
    intake.close()
    assert lines == ["x", "… 9 lines dropped: more output than the log keeps"]


# --- the spool ----------------------------------------------------------------------------------------


def log(spool, text):
    return spool.append(EventKind.LOG, {"stream": "trainer", "text": text})


def texts(events):
    return [event.data["text"] for event in events]


def test_events_come_back_in_order_until_they_are_acknowledged(tmp_path):
    spool = EventSpool(tmp_path / "events.jsonl", NOTHING)
    for number in range(10):
        log(spool, f"line {number}")
    assert spool.unacknowledged(events=5, size=1e6) == ()  # what isn't synced isn't sent
    spool.sync()
    assert [event.n for event in spool.unacknowledged(events=4, size=1e6)] == [1, 2, 3, 4]
    assert len(spool.unacknowledged(events=10, size=1)) == 1  # one at least
    spool.acknowledge(3)
    assert [event.n for event in spool.unacknowledged(events=2, size=1e6)] == [4, 5]
    spool.acknowledge(99)  # a plane that claims more than there is gets no credit for the future
    assert spool.pending == 0
    log(spool, "later")
    spool.sync()
    assert texts(spool.unacknowledged(events=9, size=1e6)) == ["later"]


def test_a_spool_goes_on_where_a_crash_left_it(tmp_path):
    path = tmp_path / "events.jsonl"
    spool = EventSpool(path, NOTHING)
    log(spool, "whole")
    spool.sync()
    with path.open("ab") as file:
        file.write(b'{"n": 2, "time"')  # torn
    again = EventSpool(path, NOTHING)
    assert log(again, "next").n == 2
    again.sync()
    assert texts(again.unacknowledged(events=9, size=1e6)) == ["whole", "next"]


def test_what_json_or_a_database_cannot_hold_is_made_fit(tmp_path):
    spool = EventSpool(tmp_path / "events.jsonl", NOTHING)
    event = spool.append(EventKind.METRICS, {"step": 1, "values": {"loss": math.nan, "rate": 0.5, "norm": math.inf}})
    assert event.data == {"step": 1, "values": {"rate": 0.5}, "non_finite": {"loss": "nan", "norm": "inf"}}
    assert spool.append(EventKind.SAMPLE, {"reward": -math.inf}).data == {"reward": None}
    assert log(spool, "lone \ud800 surrogate, nul \0").data["text"] == "lone ? surrogate, nul \ufffd"
    spool.sync()
    assert len(spool.unacknowledged(events=9, size=1e6)) == 3


def test_a_sink_sees_every_event_and_cannot_fail_the_run(tmp_path):
    seen = []

    def breaks(event):
        raise RuntimeError("the sink's own trouble")

    spool = EventSpool(tmp_path / "events.jsonl", Redactor([SECRET]), sinks=[breaks, seen.append])
    log(spool, f"one {SECRET}")
    log(spool, "two")
    assert texts(seen) == [f"one {REDACTED}", "two"]


# --- the sender ---------------------------------------------------------------------------------------


class Plane:
    """Remembers events as the control plane does, and fails as told."""

    def __init__(self, faults=()):
        self.texts, self.faults, self.batches = [], list(faults), []

    def send_events(self, batch):
        self.batches.append([event.n for event in batch.events])
        if self.faults and (fault := self.faults.pop(0)):
            if fault == "answer lost":
                self._take(batch)
                raise Unavailable("the answer was lost")
            raise fault
        for event in batch.events:
            if event.data.get("text") == "poison":
                raise InvalidInput("no")
        self._take(batch)
        return EventAck(acknowledged=len(self.texts))

    def _take(self, batch):
        for event in batch.events:
            if event.n == len(self.texts) + 1:
                self.texts.append(event.data["text"])


@pytest.fixture
def sending(tmp_path):
    spool = EventSpool(tmp_path / "events.jsonl", NOTHING)
    senders = []

    def start(plane, settings=FAST, on_fenced=lambda error: None):
        sender = Sender(spool, plane, 1, settings, on_fenced=on_fenced)
        senders.append(sender)
        sender.start()
        return spool, sender

    yield start
    for sender in senders:
        sender.end()
        sender.join(5)


def test_nothing_is_lost_doubled_or_reordered_while_the_plane_fails(sending):
    plane = Plane([Unavailable("down"), None, "answer lost", Unavailable("down"), "answer lost"])
    spool, sender = sending(plane, WorkerSettings(retry_first_s=0.002, event_interval_s=0.002, event_batch=7))
    threads = [
        threading.Thread(target=lambda mark=mark: [log(spool, f"{mark}{i}") for i in range(50)]) for mark in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sender.flush(5)
    assert len(plane.texts) == 200
    for mark in "abcd":
        assert [text for text in plane.texts if text[0] == mark] == [f"{mark}{i}" for i in range(50)]


def test_an_event_that_is_refused_leaves_a_note_and_holds_up_nothing(sending):
    plane = Plane()
    spool, sender = sending(plane)
    for text in ("one", "two", "poison", "three"):
        log(spool, text)
    assert sender.flush(5)
    assert plane.texts == ["one", "two", "a log event was refused: no", "three"]


def test_a_fenced_sender_says_so_once_and_ends(sending):
    fenced = []
    spool, sender = sending(Plane([Conflict("stale")]), on_fenced=fenced.append)
    log(spool, "too late")
    sender.join(5)
    assert not sender.is_alive() and len(fenced) == 1
    assert not sender.flush(0.05)


def test_a_full_disk_keeps_whole_events_or_none_and_says_so(tmp_path):
    """The process may write files of 2,000 bytes only, which the system treats as it does a full disk."""
    code = f"""
        import resource, signal
        from pathlib import Path
        from flash.errors import Unavailable
        from flash.records import EventKind
        from flash.worker.reporting import EventSpool, Redactor

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        spool = EventSpool(Path({str(tmp_path)!r}) / "events.jsonl", Redactor([]))
        kept = 0
        while True:
            try:
                spool.append(EventKind.LOG, {{"text": "x" * 300}})
                kept += 1
            except Unavailable as error:
                assert "events can't be kept" in str(error), error
                break
        spool.append(EventKind.LOG, {{"text": "s"}})  # a short one still fits, and follows on
        assert spool.last == kept + 1
        spool.sync()
        assert [event.n for event in spool.unacknowledged(events=99, size=1e9)] == list(range(1, kept + 2))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["n"] for line in lines] == list(range(1, len(lines) + 1))


def test_what_was_appended_outlives_a_kill(tmp_path):
    code = f"""
        import os, signal
        from pathlib import Path
        from flash.records import EventKind
        from flash.worker.reporting import EventSpool, Redactor

        spool = EventSpool(Path({str(tmp_path)!r}) / "events.jsonl", Redactor([]))
        for number in range(5):
            spool.append(EventKind.LOG, {{"text": str(number)}})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False).returncode == -9
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 5
