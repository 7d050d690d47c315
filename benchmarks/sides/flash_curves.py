"""Every point of `curves`, in one process: a few steps of each in turn, as often as the job says.

Reads a job (JSON on stdin), prints one JSON line: seconds of every step, by curve and point.
"""

import json
import queue
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from flash_side import Clock, Questions, loaded, spec_of

from flash.environments.protocol import SFTTarget
from flash.inference.continuous import ContinuousEngine
from flash.inference.engine import Failed, Request, Sampled, Sampling
from flash.inference.lora import save_adapter
from flash.training import grpo, sft


class Answered(Questions):
    """With an answer to imitate."""

    def targets(self, split: str, indices: Sequence[int]) -> list[SFTTarget]:
        answer = [{"role": "assistant", "content": "It is the sum of the two."}]
        return [SFTTarget(start.messages, answer) for start in self.start(split, indices, seed=0)]


def main() -> None:
    job = json.load(sys.stdin)
    points = {curve: {str(at): [] for at in values} for curve, values in job["curves"].items()}
    with tempfile.TemporaryDirectory() as folder:
        engine = serving(job, Path(folder))
        for turn in range(job["turns"] + 1):
            for curve, found in points.items():
                for at, seconds in found.items():
                    work = decoding(engine, job, int(at)) if curve == "adapters" else training(job, curve, int(at))
                    if turn:  # the first one warms up
                        seconds += work
        engine.close()
    print(json.dumps(points))


def training(job: Mapping[str, Any], curve: str, at: int) -> list[float]:
    """Seconds of each step but the first."""
    algorithm = "sft" if curve == "rank" else "grpo"
    train = {**job[algorithm], "lora_rank": job["lora_rank"], "lora_alpha": 64, "learning_rate": 1e-4}
    train["lora_rank" if curve == "rank" else curve] = at
    clock, base = Clock(), loaded(job, endless=True)
    with tempfile.TemporaryDirectory() as folder:
        run = sft.train if algorithm == "sft" else grpo.train
        run(spec_of(train, algorithm=algorithm), base, Answered(job["inputs"]), clock, work_dir=Path(folder))
    return [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]


def serving(job: Mapping[str, Any], folder: Path) -> ContinuousEngine:
    """An engine with as many random adapters as the curve goes up to."""
    base = loaded(job, endless=True)
    count = max(job["curves"]["adapters"])
    engine = ContinuousEngine(base, max_device_adapters=count)
    for number in range(count):
        adapter = base.adapters.create("made", rank=job["lora_rank"], alpha=64, seed=number)
        for pair in adapter.pairs.values():
            pair.B.data = torch.randn(pair.B.shape, generator=torch.Generator().manual_seed(number)) * 0.02
        save_adapter(adapter, folder / str(number), base_model=job["model"])
        engine.load_adapter(str(number), folder / str(number))
    return engine


def decoding(engine: ContinuousEngine, job: Mapping[str, Any], adapters: int) -> list[float]:
    """Seconds a token of the whole batch, its requests spread over so many adapters."""
    rows, tokens = job["serving"]["rows"], job["serving"]["tokens"]
    news: queue.SimpleQueue[Any] = queue.SimpleQueue()
    began = time.perf_counter()
    for number in range(rows):
        prompt = tuple(range(100 + number, 132 + number))
        request = Request(prompt, Sampling(tokens, seed=number), adapter=str(number % adapters))
        engine.submit(request, news.put)
    left = rows
    while left:
        told = news.get()
        if isinstance(told, Failed):
            raise told.error
        left -= isinstance(told, Sampled) and told.finish_reason is not None
    return [(time.perf_counter() - began) / tokens]


if __name__ == "__main__":
    main()
