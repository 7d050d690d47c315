"""Weights & Biases as a sink that can't fail or slow a run.

The `wandb` package runs in a process of its own, fed over a pipe through a bounded queue: when it hangs,
crashes or refuses the key, lines are dropped and counted, one warning is reported, and training never waits.
The key goes to that process over the pipe, never in argv. Run as `python -m flash.worker.wandb_sink`.

`sinks_for` decides whether a run is logged: the key switches it on, the spec's `[wandb]` names the place.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flash.catalog.catalog import flash_home
from flash.config.secrets import WANDB_KEY
from flash.records import Claim, EventKind, WorkerEvent
from flash.worker.environment_host import PASSED_ON
from flash.worker.reporting import AttemptSink, Warn
from flash.worker.settings import WorkerSettings

DEFAULT_PROJECT = "flash"  # where the key alone switches logging on
_QUEUE = 10_000            # lines held for a slow W&B before new ones are dropped
_END: None = None


class WandbSink:
    """Forwards metrics and the evaluation to W&B; every method returns at once, except `close` with its limit."""

    def __init__(
        self,
        *,
        key: str,
        project: str,
        run_name: str,
        run_id: str,
        config: Mapping[str, Any],
        folder: Path,
        environ: Mapping[str, str],
        warn: Warn,
        python: str = sys.executable,
        finish_s: float = 60.0,
    ) -> None:
        self._warn = warn
        self._dropped = 0
        self._failed = threading.Lock()  # taken by the first who tells of the failure
        self._lines: queue.Queue[str | None] = queue.Queue(_QUEUE)
        folder.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [python, "-P", "-m", "flash.worker.wandb_sink"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=(folder / "wandb.log").open("wb"),
            cwd=folder,
            env={**environ, "WANDB_DIR": str(folder), "WANDB_SILENT": "true"},
            start_new_session=True,
        )
        self.pid = self._process.pid
        first = {
            "key": key, "project": project, "run_name": run_name, "run_id": run_id, "config": dict(config),
            "finish_s": finish_s,
        }  # fmt: skip
        self._put(json.dumps(first))
        self._thread = threading.Thread(target=self._write, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._put(json.dumps({"step": step, "values": dict(values)}))

    def summary(self, values: Mapping[str, float]) -> None:
        self._put(json.dumps({"summary": dict(values)}))

    def __call__(self, event: WorkerEvent) -> None:
        """Takes from a run's events what W&B is meant to show."""
        if event.kind is EventKind.METRICS:
            self.log(event.data["step"], event.data["values"])
        elif event.kind is EventKind.EVAL:
            self.summary({f"eval/{name}": value for name, value in event.data.items()})

    def end(self) -> None:
        """No more lines will come: W&B may begin to finish while others still work."""
        while True:
            try:
                return self._lines.put_nowait(_END)
            except queue.Full:  # a line makes room: without the end, W&B's process would wait for more
                with contextlib.suppress(queue.Empty):
                    self._lines.get_nowait()
                    self._dropped += 1

    def close(self, wait_s: float) -> None:
        """Ends the stream and waits up to `wait_s`; what W&B still has to send goes on behind us, bounded by
        the `finish_s` of its own process."""
        self.end()
        if self._dropped:
            self._warn("wandb_dropped", f"Weights & Biases fell behind: {self._dropped} lines were not sent")
            self._dropped = 0
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process.wait(wait_s) != 0:
                self._tell_failure()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _put(self, line: str) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def _tell_failure(self) -> None:
        if self._failed.acquire(blocking=False):
            self._warn("wandb_failed", "Weights & Biases logging failed; the run is not affected (see wandb.log)")

    def _write(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        try:
            while (line := self._lines.get()) is not None:
                pipe.write(line.encode() + b"\n")
                pipe.flush()
        except OSError:  # W&B's process is gone before its time
            self._tell_failure()
        with contextlib.suppress(OSError):
            pipe.close()


def available() -> bool:
    """Whether the `wandb` package is installed; looks without importing it. A mere folder of that name, which
    W&B itself leaves in working directories, does not count."""
    found = importlib.util.find_spec("wandb")
    return found is not None and found.origin is not None


def sinks_for(
    claim: Claim, work_dir: Path, settings: WorkerSettings, warn: Warn, *, environ: Mapping[str, str]
) -> list[AttemptSink]:
    """The W&B logger of a run whose submitter has a key; none otherwise. `environ` is the worker's own."""
    key = claim.secrets.get(WANDB_KEY)
    if key is None:
        return []
    if not available():
        warn(
            "wandb_missing",
            f"{WANDB_KEY} is set, but the wandb package is not installed where this run trains, so nothing is "
            "logged to W&B; the run trains on (pip install 'flash-lora[wandb]' there)",
        )
        return []
    table = claim.spec.get("wandb") or {}
    kept = {name: value for name, value in environ.items() if name in (*PASSED_ON, "HOME", "WANDB_BASE_URL")}
    variables = {**kept, **claim.spec.get("worker_env", {})}
    offline = variables.get("WANDB_MODE") in ("offline", "dryrun")
    # Offline, these files are all there is, so they lie where they outlast the attempt's own folder.
    folder = flash_home() / "wandb" / f"{claim.run_id}.{claim.epoch}" if offline else work_dir / "wandb"
    return [
        WandbSink(
            key=key,
            project=table.get("project") or DEFAULT_PROJECT,
            run_name=table.get("run_name") or claim.run_id,
            run_id=claim.run_id,
            config=claim.spec,
            folder=folder,
            environ=variables,
            warn=warn,
            finish_s=settings.logger_finish_s,
        )
    ]


def main() -> None:
    first = json.loads(sys.stdin.readline())
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    # A thread reads on while W&B may hang, so that this process ends `finish_s` after the run, whatever W&B does.
    threading.Thread(target=_read, args=(lines, float(first["finish_s"])), daemon=True).start()
    os.environ["WANDB_API_KEY"] = first["key"]
    import wandb  # type: ignore[import-not-found,unused-ignore]  # optional, and slow to import

    # With the run's id, a later attempt goes on where the one before stopped; offline, W&B can't and says so.
    run = wandb.init(
        project=first["project"], name=first["run_name"], id=first["run_id"], resume="allow", config=first["config"]
    )
    while (line := lines.get()) is not None:
        message = json.loads(line)
        if "summary" in message:
            run.summary.update(message["summary"])
        else:
            run.log(message["values"], step=message["step"])
    run.finish()


def _read(lines: queue.SimpleQueue[str | None], finish_s: float) -> None:
    for line in sys.stdin:
        lines.put(line)
    lines.put(None)
    threading.Event().wait(finish_s)
    os._exit(1)


if __name__ == "__main__":
    main()
