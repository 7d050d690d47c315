"""Kept token rows: a later run over the same rows trains on the same tokens without asking for them."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest

from flash.environments.loading import LocalEnvironment
from flash.inference.chat import ChatRenderer
from flash.training.prepared import LEAST_ROWS, PreparedRows
from flash.training.reporter import RecordingReporter
from flash.training.sft import train


class Asked(LocalEnvironment):
    """Counts what training asks of it."""

    asked = 0

    def rows(self, *arguments, **options):
        self.asked += 1
        return super().rows(*arguments, **options)

    def targets(self, *arguments):
        self.asked += 1
        return super().targets(*arguments)


@pytest.fixture
def many(environment, tmp_path) -> Asked:
    """The tests' environment with just enough rows to be kept."""
    folder = tmp_path / "many"
    shutil.copytree(environment.folder, folder)
    for path in (folder / "dataset").iterdir():
        path.unlink()
    lines = (json.dumps({"input": f"What is {n}+1?", "output": str(n + 1)}) for n in range(LEAST_ROWS))
    (folder / "dataset" / "train.jsonl").write_text("\n".join(lines))
    return Asked(folder, {}, tmp_path / "host")


def test_the_second_run_asks_for_nothing_and_trains_to_the_same_bytes(base, many, spec, tmp_path):
    digests, asked = [], []
    for name, digest in (("first", "d1"), ("second", "d1"), ("other", "d2")):
        many.asked = 0
        (tmp_path / name).mkdir()
        reporter = RecordingReporter()
        result = train(
            spec(max_steps=2), base, many, reporter, work_dir=tmp_path / name, environment_digest=digest,
            kept_rows=tmp_path / "kept",
        )  # fmt: skip
        weights = result.checkpoint / "adapter" / "adapter_model.safetensors"
        digests.append(hashlib.sha256(weights.read_bytes()).hexdigest())
        asked.append(many.asked)
        assert any("⟦" in data["text"] for data in reporter.of("log"))
    assert asked[0] == asked[2] > 1 and asked[1] == 0
    assert len(set(digests)) == 1
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_what_the_tokens_depend_on_is_in_the_name_and_a_damaged_entry_is_none(base, many, spec, tmp_path):
    renderer = ChatRenderer(base.tokenizer)
    found = train_rows(base, many, spec, tmp_path)
    rows, told = found
    kept = tmp_path / "own"
    PreparedRows(kept, spec(), renderer, "d").keep(rows, told)
    again, said = PreparedRows(kept, spec(max_steps=7, learning_rate=1.0), renderer, "d").find()
    assert said == told and np.array_equal(again.lengths, rows.lengths)
    assert all(again[index] == rows[index] for index in (0, 5, LEAST_ROWS - 1))
    for other in (
        PreparedRows(kept, spec(max_length=33), renderer, "d"),
        PreparedRows(kept, spec(max_examples=3), renderer, "d"),
        PreparedRows(kept, spec(), renderer, "e"),
        PreparedRows(kept, spec(), renderer, ""),
        PreparedRows(None, spec(), renderer, "d"),
    ):
        assert other.find() is None
    [entry] = kept.iterdir()
    tokens = (entry / "rows" / "tokens").read_bytes()
    (entry / "rows" / "tokens").write_bytes(tokens[:-4])
    assert PreparedRows(kept, spec(), renderer, "d").find() is None


def train_rows(base, environment, spec, tmp_path):
    """The rows that a run has kept."""
    (tmp_path / "run").mkdir()
    options = {"environment_digest": "d", "kept_rows": tmp_path / "kept"}
    train(spec(max_steps=1), base, environment, RecordingReporter(), work_dir=tmp_path / "run", **options)
    return PreparedRows(tmp_path / "kept", spec(), ChatRenderer(base.tokenizer), "d").find()
