"""SFT end to end on a tiny random model: what a user can observe of every setting."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flash.environments.loading import LocalEnvironment
from flash.errors import InvalidInput, ModelError
from flash.inference.lanes import Lanes
from flash.inference.loading import BaseModel, load_base
from flash.records import Phase
from flash.training.reporter import RecordingReporter
from flash.training.sft import TrainResult, train


@pytest.fixture
def run(base: BaseModel, environment: LocalEnvironment, tmp_path: Path) -> Callable[..., tuple]:
    def start(spec, reporter=None, *, name="work", environment=environment, base=base, **options):
        reporter = reporter or RecordingReporter()
        work_dir = tmp_path / name
        work_dir.mkdir(exist_ok=True)
        return train(spec, base, environment, reporter, work_dir=work_dir, **options), reporter

    return start


def digest(result: TrainResult) -> str:
    return hashlib.sha256((result.checkpoint / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def steps(reporter: RecordingReporter) -> list[dict]:
    return [data["values"] for data in reporter.of("metrics") if "loss" in data["values"]]


def warnings(reporter: RecordingReporter) -> dict[str, str]:
    return {data["code"]: data["text"] for data in reporter.of("warning")}


def test_it_learns_and_reports_every_step(run, spec) -> None:
    result, reporter = run(spec(epochs=8, save_every=1000))
    values = steps(reporter)
    assert result.step == len(values) == 48 and not result.stopped
    assert values[-1]["loss"] < 0.6 * values[0]["loss"]
    assert {"loss", "learning_rate", "grad_norm", "tokens", "tokens_per_s", "epoch", "seconds"} <= values[0].keys()
    assert values[-1]["epoch"] == pytest.approx(8.0)
    phases = reporter.of("phase")
    assert [data["phase"] for data in phases] == [Phase.PREPARING_DATA, Phase.TRAINING]
    assert phases[1]["total_steps"] == 48


def test_the_log_shows_an_example_with_its_trained_tokens_before_the_first_step(run, spec) -> None:
    _, reporter = run(spec(max_steps=1))
    kinds = [kind for kind, _ in reporter.reports]
    text = reporter.of("log")[0]["text"]
    assert "What is 0+0?" in text and "⟦0<|im_end|>\n⟧" in text
    assert kinds.index("log") < kinds.index("metrics")


def test_two_runs_with_one_seed_give_the_same_bytes_and_another_seed_does_not(run, spec) -> None:
    first, _ = run(spec(seed=3), name="first")
    second, _ = run(spec(seed=3), name="second")
    other, _ = run(spec(seed=4), name="other")
    assert digest(first) == digest(second) != digest(other)
    for name in ("adapter_config.json", "flash.json", "README.md"):
        paths = [result.checkpoint / "adapter" / name for result in (first, second)]
        assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_a_stopped_run_resumes_to_the_bytes_of_an_uninterrupted_one(stop_at, run, spec) -> None:
    whole, reporter = run(spec(epochs=2), name="whole")
    part, _ = run(spec(epochs=2), RecordingReporter(stop_at=stop_at), name="part")
    assert part.stopped and part.step == stop_at
    assert part.checkpoint.name == f"step-{stop_at}"
    torch.manual_seed(99)  # whatever ran in between must not matter
    rest, after = run(spec(epochs=2), name="rest", resume_from=part.checkpoint)
    assert not rest.stopped and rest.step == whole.step
    assert digest(rest) == digest(whole)
    assert [v["loss"] for v in steps(after)] == [v["loss"] for v in steps(reporter)[stop_at:]]
    assert steps(after)[-1]["tokens"] == steps(reporter)[-1]["tokens"]


def test_resuming_a_finished_run_does_nothing(run, spec) -> None:
    whole, _ = run(spec(), name="whole")
    again, reporter = run(spec(), name="again", resume_from=whole.checkpoint)
    assert again == TrainResult(whole.step, whole.checkpoint, False)
    assert not reporter.of("metrics")


def test_a_warm_start_takes_the_weights_and_nothing_else(run, spec) -> None:
    source, before = run(spec(epochs=6), name="source")
    warm, after = run(spec(), name="warm", init_from=source.checkpoint / "adapter")
    assert steps(after)[0]["loss"] < 0.8 * steps(before)[0]["loss"]
    assert steps(after)[0]["epoch"] < 1 and warm.step == 6
    with pytest.raises(ModelError, match="rank"):
        run(spec(lora_rank=2), name="wrong", init_from=source.checkpoint / "adapter")


def test_a_warm_start_may_change_alpha(run, spec) -> None:
    source, _ = run(spec(epochs=2), name="source")
    warm, _ = run(spec(lora_alpha=16, learning_rate=1e-12), name="warm", init_from=source.checkpoint / "adapter")
    config = json.loads((warm.checkpoint / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 16)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"epochs": 1}, 6),
        ({"epochs": 3}, 18),
        ({"epochs": 3, "max_steps": 4}, 4),
        ({"epochs": 1, "max_steps": 100}, 6),
        ({"epochs": 1, "batch_size": 21}, 1),
        ({"epochs": 1, "batch_size": 64}, 1),
        ({"epochs": 2, "max_examples": 5}, 4),
    ],
)
def test_epochs_max_steps_batch_size_and_max_examples_decide_the_steps(settings, expected, run, spec) -> None:
    result, reporter = run(spec(**settings))
    assert result.step == expected == len(steps(reporter))


def test_max_examples_keeps_the_head_of_the_file(run, spec, make_environment) -> None:
    result, _ = run(spec(max_examples=4), name="capped")
    shorter = make_environment("shorter", rows=4)
    same, _ = run(spec(), name="short", environment=shorter)
    assert digest(result) == digest(same)


def test_save_every_and_the_end_leave_complete_checkpoints(run, spec) -> None:
    _, reporter = run(spec(save_every=4))
    saves = reporter.of("checkpoint")
    assert [(save["step"], save["final"]) for save in saves] == [(4, False), (6, True)]
    for save in saves:
        files = sorted(str(path.relative_to(save["folder"])) for path in save["folder"].rglob("*") if path.is_file())
        assert files == [
            "adapter/README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
            "adapter/flash.json", "state/extra.safetensors", "state/optimizer.safetensors",
            "state/rng.safetensors", "state/state.json",
        ]


def test_held_out_loss_comes_with_each_save_where_there_is_an_eval_split(run, spec, make_environment) -> None:
    environment = make_environment("with-eval", rows=21, eval_rows=5)
    result, reporter = run(spec(save_every=4), name="held-out", environment=environment)
    losses = {d["step"]: d["values"]["eval_loss"] for d in reporter.of("metrics") if "eval_loss" in d["values"]}
    assert losses.keys() == {4, 6} and losses[6] < losses[4]
    saved = json.loads((result.checkpoint / "adapter" / "flash.json").read_text())
    assert saved["metrics"]["eval_loss"] == losses[6]
    without = make_environment("without", rows=21)
    plain, reporter = run(spec(save_every=4), name="plain", environment=without)
    assert not [d for d in reporter.of("metrics") if "eval_loss" in d["values"]]
    assert digest(plain) == digest(result)  # measuring changes nothing


def test_lanes_change_the_speed_alone(run, spec, base) -> None:
    from safetensors.torch import load_file

    wide = spec(batch_size=21)  # enough rows for three lanes
    alone, one = run(wide, name="alone")
    first, two = run(wide, name="first", base=replace(base, lanes=Lanes(3)))
    second, _ = run(wide, name="second", base=replace(base, lanes=Lanes(3)))
    assert digest(first) == digest(second)
    weights = [load_file(r.checkpoint / "adapter" / "adapter_model.safetensors") for r in (alone, first)]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-5) for name in weights[0])
    assert steps(one)[0]["loss"] == pytest.approx(steps(two)[0]["loss"], rel=1e-5)


def test_any_micro_batch_split_trains_the_same_adapter(run, spec, base) -> None:
    from safetensors.torch import load_file

    whole, _ = run(spec(), name="whole")
    split, _ = run(spec(), name="split", micro_batch_divisor=16_384)  # one row at a time
    one, other = (load_file(result.checkpoint / "adapter" / "adapter_model.safetensors") for result in (whole, split))
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_long_rows_are_cut_off_and_counted_and_rows_without_trained_tokens_dropped(run, spec, make_environment) -> None:
    lines = [json.dumps({"input": "a", "output": "b" * n}) for n in (1, 2, 40)]
    lines.append(json.dumps({"input": "a" * 80, "output": "b"}))
    environment = make_environment("long", lines=lines)
    result, reporter = run(spec(max_length=70), environment=environment)
    texts = warnings(reporter)
    assert "2 of 4 rows" in texts["truncated_rows"] and "max_length = 70" in texts["truncated_rows"]
    assert "1 of 4 rows" in texts["dropped_rows"]
    assert steps(reporter)[-1]["epoch"] == 1.0 and result.step == 1
    with pytest.raises(InvalidInput, match=r"none of the 4 rows.*max_length = 8"):
        run(spec(max_length=8), environment=environment)


def test_thinking_without_traces_warns(run, spec, make_environment) -> None:
    lines = [json.dumps({"input": "a", "output": text}) for text in ("<think>\nhm\n</think>\n\nb", "c", "d")]
    environment = make_environment("traces", lines=lines)
    _, reporter = run(spec(thinking=True), environment=environment)
    assert "2 of 3 targets" in warnings(reporter)["targets_without_thinking"]
    _, reporter = run(spec(thinking=False), environment=environment)
    assert "targets_without_thinking" not in warnings(reporter)


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_ruins_the_adapter(run, spec, base, tmp_path) -> None:
    with torch.no_grad():
        base.model.model.norm.weight.fill_(float("inf"))
    with pytest.raises((InvalidInput, ModelError)):
        run(spec())
    assert not (tmp_path / "work" / "checkpoints").exists()


def test_the_learning_rate_rises_then_falls_to_its_last_step(run, spec) -> None:
    _, reporter = run(spec(epochs=20, learning_rate=1e-3, max_examples=8))  # 40 steps, 2 of warm-up
    rates = [values["learning_rate"] for values in steps(reporter)]
    assert rates.index(max(rates)) == 2 and max(rates) == pytest.approx(1e-3)
    assert 0 < rates[0] < rates[1] < rates[2] and 0 < rates[-1] < 1e-4


def test_flash_json_and_the_card_say_where_the_adapter_comes_from(run, spec) -> None:
    result, _ = run(spec(seed=5, max_steps=2), environment_digest="ab" * 32)
    document = json.loads((result.checkpoint / "adapter" / "flash.json").read_text())
    assert document["step"] == 2 and document["environment_digest"] == "ab" * 32
    assert document["spec"]["seed"] == 5 and document["spec"]["train"]["lora_rank"] == 4
    assert document["metrics"]["loss"] > 0 and "seconds" not in document["metrics"]
    card = (result.checkpoint / "adapter" / "README.md").read_text()
    assert card.startswith("---\nbase_model: flash/nano\n") and "org/sums" in card


def test_a_torn_checkpoint_is_refused(run, spec) -> None:
    result, _ = run(spec(max_steps=2))
    shutil.rmtree(result.checkpoint / "state")
    with pytest.raises(ModelError, match="can't be resumed"):
        run(spec(), name="again", resume_from=result.checkpoint)


def test_a_warm_started_base_is_left_as_it_was(run, spec, base, tiny_folder) -> None:
    run(spec())
    fresh = load_base(tiny_folder, device="cpu")
    ours, theirs = base.model.state_dict(), fresh.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_faulty_held_out_rows_cost_the_held_out_loss_and_not_the_run(run, spec, make_environment) -> None:
    faulty = json.dumps({"input": "a", "output": {"messages": [{"role": "robot"}]}, "metadata": {}})
    environment = make_environment("faulty", rows=4, eval_lines=[faulty, "{torn"])
    result, reporter = run(spec(), environment=environment)
    assert result.step == 1 and "no held-out loss" in warnings(reporter)["held_out_rows"]
