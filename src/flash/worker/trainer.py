"""The trainer: a process with model and data and without secrets, which runs one training and says how it went.

`python -m flash.worker.trainer --fd N`. Owns the way from the `job` frame to the `outcome` frame: repeatable
settings, loading the base, choosing the algorithm, naming the failure. It reports over the channel alone, and
ends when the channel does. torch and transformers are imported before the job is there: that takes longer than
anything the supervisor does meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import functools
import gc
import json
import os
import queue
import random
import resource
import socket
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import psutil

from flash.catalog.catalog import ModelEntry, flash_home, load_catalog
from flash.catalog.facts import differences
from flash.config.run import RunSpec
from flash.errors import FlashError, InternalError, OutOfMemory, Unavailable
from flash.failpoints import failpoint
from flash.records import EvalReport, Phase
from flash.worker.channel import Channel, ChannelClosed, Frame
from flash.worker.environment_host import RemoteEnvironment

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OUT_OF_MEMORY_STATUS = 12  # ENOMEM: the exit status when memory ran out, should the outcome frame not get through


class ChannelReporter:
    """training's `Reporter`, as report frames to the supervisor. Safe to use from several threads."""

    def __init__(self, channel: Channel, stop: threading.Event) -> None:
        self._channel = channel
        self._stop = stop
        self._total_steps: int | None = None

    def phase(self, phase: Phase, *, total_steps: int | None = None) -> None:
        self._total_steps = total_steps if total_steps is not None else self._total_steps
        self._report("phase", {"phase": phase.value, "total_steps": self._total_steps})

    def progress(self) -> None:
        self._report("progress", {})

    def fetched(self, done: int, total: int) -> None:
        """Progress of a download, in bytes."""
        self._report("progress", {"done_bytes": done, "total_bytes": total})

    def log(self, text: str) -> None:
        self._report("log", {"text": text})

    def warn(self, code: str, text: str) -> None:
        self._report("warning", {"code": code, "text": text})

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        numbers = {name: float(value) for name, value in values.items()} | {"memory_gb": _memory() / 1e9}
        self._report("metrics", {"step": step, "total_steps": self._total_steps, "values": numbers})
        failpoint("trainer.step")

    def checkpoint(
        self, folder: Path, *, step: int, final: bool, metrics: Mapping[str, float], seconds: float
    ) -> None:
        values = {"seconds_checkpoint": seconds}
        self._report("metrics", {"step": step, "total_steps": self._total_steps, "values": values})
        data = {"folder": str(folder), "step": step, "final": final, "metrics": dict(metrics)}
        self._report("checkpoint", data)
        failpoint("trainer.saved")

    def evaluation(self, report: EvalReport) -> None:
        self._report("eval", report.model_dump())

    def sample(self, step: int, sample: Mapping[str, Any]) -> None:
        self._report("sample", {**sample, "step": step})

    def should_stop(self) -> bool:
        return self._stop.is_set()

    def _report(self, kind: str, data: Mapping[str, Any]) -> None:
        self._channel.send({"type": "report", "kind": kind, "data": data})


def run(job: Mapping[str, Any], channel: Channel, stop: threading.Event) -> Frame:
    """Carries out one job; every way that it may go becomes an outcome frame."""
    try:
        return {"type": "outcome", "outcome": _train(job, channel, stop)}
    except ChannelClosed:
        raise
    except Exception as error:
        return {"type": "outcome", "outcome": "failed", "error": named(error).to_wire()}


def named(error: Exception) -> FlashError:
    """What went wrong as a person will read it; the traceback goes along where the line alone explains nothing."""
    if isinstance(error, FlashError):
        return error
    from flash.inference.memory import is_out_of_memory

    detail = "".join(traceback.format_exception(error))
    if is_full_disk(error):
        return Unavailable(f"the disk is full: {_first_line(error)}", remedy="free space", detail=detail)
    if is_out_of_memory(error):
        return OutOfMemory(f"the device ran out of memory: {_first_line(error)}", detail=detail)
    return InternalError(f"training failed: {type(error).__name__}: {_first_line(error)}", detail=detail)


def is_full_disk(error: Exception) -> bool:
    """Whether a write failed for want of space, as Python or a library in Rust (safetensors) says it."""
    if isinstance(error, OSError):
        return error.errno in _NO_SPACE
    return any(f"(os error {number})" in str(error) for number in _NO_SPACE)


def _train(job: Mapping[str, Any], channel: Channel, stop: threading.Event) -> str:
    from flash.inference.fetching import locate
    from flash.inference.lanes import share_cpus
    from flash.inference.loading import load_checked
    from flash.inference.torch_engine import TorchEngine
    from flash.training.checkpoints import ADAPTER
    from flash.training.evaluation import evaluate

    failpoint("trainer.job")
    spec = RunSpec.model_validate(job["spec"])
    reporter = ChannelReporter(channel, stop)
    environment = RemoteEnvironment(channel)
    make_repeatable(spec.seed, threads=int(job["threads"]))
    reporter.phase(Phase.LOADING_MODEL)
    entry = load_catalog().get(spec.model)
    found = locate(entry.source, revision=_revision(entry, job), label=entry.id, progress=reporter.fetched)
    if found.note is not None:
        reporter.warn("hub", found.note)
    for line in differences(entry, found.folder):
        reporter.warn("model_facts", line)
    base, fallback = load_checked(
        found.folder, name=entry.id, revision=found.commit or entry.revision, device=job["device"]
    )
    if fallback is not None:
        reporter.warn("device", fallback)
    gc.freeze()  # what is there by now stays
    gc.enable()
    base = dataclasses.replace(base, lanes=share_cpus(base.model, int(job["threads"])))
    failpoint("trainer.loaded")
    train = _algorithm(spec.algorithm)
    result = train(
        spec,
        base,
        environment,
        reporter,
        work_dir=Path(job["work_dir"]),
        resume_from=_path(job.get("resume_from")),
        init_from=_path(job.get("init_from")),
        micro_batch_divisor=int(job.get("micro_batch_divisor", 1)),
        environment_digest=str(job.get("environment_digest") or ""),
    )
    if result.stopped:
        return "stopped"
    failpoint("trainer.trained")
    reporter.metrics(result.step, {"peak_memory_bytes": peak_memory(base.device.type)})
    evaluate(
        spec,
        base,
        TorchEngine(base, divisor=int(job.get("micro_batch_divisor", 1))),
        environment,
        reporter,
        result.checkpoint / ADAPTER,
        step=result.step,
    )
    return "done"


def _revision(entry: ModelEntry, job: Mapping[str, Any]) -> str | None:
    """The commit to load: a run goes on with the one it began with; a pin of the catalog's is next; an adapter that a
    run only starts from keeps its own where there is none."""
    if entry.path is not None:
        return None
    resumed = _base_revision(_path(job.get("resume_from")), "adapter")
    return resumed or entry.revision or _base_revision(_path(job.get("init_from")), ".")


def _base_revision(folder: Path | None, below: str) -> str | None:
    """What an adapter's own `flash.json` says it was trained on; the files are verified, but may be older ones."""
    if folder is None:
        return None
    try:
        recorded = json.loads((folder / below / "flash.json").read_text(encoding="utf-8")).get("base_revision")
    except (OSError, ValueError, AttributeError):
        return None
    return recorded if isinstance(recorded, str) else None


def _algorithm(name: str) -> Any:
    if name == "sft":
        from flash.training import sft

        return functools.partial(sft.train, kept_rows=flash_home() / "cache" / "rows")
    from flash.training import grpo

    return grpo.train


def make_repeatable(seed: int, *, threads: int) -> None:
    """One seed, one thread count and deterministic kernels: two equal jobs take equal steps on one machine."""
    # what cuBLAS needs to repeat its sums; read once, when a GPU is first used
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms does this, and imports the compiler


def _memory() -> int:
    """Bytes held now: of a GPU what torch reserves, else of this process in memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.memory_reserved())
    return int(psutil.Process().memory_info().rss)


def peak_memory(device: str) -> int:
    """Bytes that this process has held at most: of a GPU what torch reserved, else in memory."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_reserved()
    with contextlib.suppress(OSError, IndexError):  # Linux, whose ru_maxrss begins with the peak of what started this
        return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split(maxsplit=1)[0])
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else 1024 * resident


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:500]


def _import_training() -> None:
    """The slow imports, while the supervisor prepares the environment."""
    try:
        import flash.inference.torch_engine
        import flash.training.evaluation
        import flash.training.sft  # noqa: F401
    except ImportError:
        pass  # the job will fail with it, and say so


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True)
    fd = parser.parse_args().fd
    os.set_inheritable(fd, False)
    serve(socket.socket(fileno=fd))


def serve(sock: socket.socket) -> NoReturn:
    """One training for the supervisor at the other end; ends the process."""
    stop = threading.Event()
    jobs: queue.SimpleQueue[Frame] = queue.SimpleQueue()

    def on_frame(frame: Frame) -> None:
        if frame.get("type") == "job":
            jobs.put(frame)
        elif frame.get("type") == "stop":
            stop.set()

    gc.disable()  # imports make many objects and no garbage: looking for it would take a fourth of their time
    channel = Channel(sock, on_frame=on_frame, on_close=lambda: os._exit(1)).start()
    _import_training()
    outcome = run(jobs.get(), channel, stop)
    sys.stdout.flush()
    sys.stderr.flush()
    failpoint("trainer.outcome")
    try:
        channel.send(json.loads(json.dumps(outcome, default=str)))
    finally:
        failed_for_memory = outcome.get("error", {}).get("code") == OutOfMemory.code
        os._exit(OUT_OF_MEMORY_STATUS if failed_for_memory else 0)  # no thread of a library holds up the end


if __name__ == "__main__":
    main()
