"""GRPO end to end on a tiny random model: what a user can observe of every setting."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flash.config.recipes import resolve
from flash.config.run import RunConfig, RunSpec
from flash.environments.loading import LocalEnvironment
from flash.environments.protocol import EpisodeStart, Score
from flash.errors import InternalError, InvalidInput, UserCodeError
from flash.inference.lanes import Lanes
from flash.inference.loading import BaseModel
from flash.training.grpo import limits_of, row_at, train
from flash.training.policy import build_policy
from flash.training.reporter import RecordingReporter
from flash.training.rollouts import Episode, Group, Prompt
from flash.training.samples import pieces
from flash.training.sft import TrainResult
from flash.training.updating import Updater

# The prompts of `package` have 43 to 47 tokens, and completions 8: some rows fit, some don't.
ROOM_FOR_SOME = 53
DIGITS = "len([c for c in response_text if c.isdigit()]) / max(len(response_text), 1)"


def package(folder: Path, reward: str = DIGITS, *, rows: int = 12, multi_turn: bool = False) -> Path:
    """An environment whose reward is an expression over `response_text` and `example`."""
    base, hook = "EnvironmentSingleTurn", "score_response(self, example, response_text)"
    extra = ""
    if multi_turn:
        base, hook = "EnvironmentMultiTurn", "score_episode(self, example, episode)"
        reward = reward.replace("response_text", "episode.response_text")
        extra = """
    def start_episode(self, example, prompt_text):
        return self.build_prompt_messages(example, prompt_text)
    def max_episode_turns(self, example):
        return 2
    def step_episode(self, example, messages, assistant_response):
        return EnvironmentStepResult(done=False, messages=({"role": "user", "content": "again"},))
"""
    (folder / "dataset").mkdir(parents=True)
    (folder / "environment.py").write_text(f"""
from freesolo.environments import *
from freesolo.environments.types import RewardMetric
class Task({base}):
    def build_prompt_messages(self, example, prompt_text):
        return [{{"role": "user", "content": example.input}}]
    def {hook}:
        score = {reward}
        return RewardResult(score=float(score), metrics=(RewardMetric(name="twice", score=2 * float(score)),))
{extra}
def load_environment():
    return Task()
""")
    lines = [json.dumps({"input": f"say {i}" + "!" * (i % 5), "output": str(i)}) for i in range(rows)]
    (folder / "dataset" / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def grpo_spec(*, seed: int = 0, thinking: bool = False, **train_keys: object) -> RunSpec:
    settings = {
        "lora_rank": 4, "lora_alpha": 16, "learning_rate": 2e-2, "batch_size": 3, "group_size": 4, "steps": 4,
        "max_tokens": 8, "max_length": 120, "save_every": 100,
    } | train_keys  # fmt: skip
    config = RunConfig.model_validate(
        {"model": "flash/nano", "algorithm": "grpo", "thinking": thinking, "environment": {"id": "org/task"},
         "train": settings}
    )  # fmt: skip
    return resolve(config, seed=seed)


@pytest.fixture
def run(base: BaseModel, tmp_path: Path) -> Callable[..., tuple[TrainResult, RecordingReporter]]:
    def start(spec: RunSpec, reward: str = DIGITS, *, name: str = "work", reporter=None, rows=12, **options):
        reporter = reporter or RecordingReporter()
        folder = tmp_path / name
        folder.mkdir()
        multi_turn = options.pop("multi_turn", False)
        model = replace(base, lanes=Lanes(options.pop("lanes", 1)))
        environment = LocalEnvironment(
            package(folder / "package", reward, rows=rows, multi_turn=multi_turn), {}, folder
        )
        try:
            return train(spec, model, environment, reporter, work_dir=folder, **options), reporter
        finally:
            environment.close()

    return start


def steps(reporter: RecordingReporter) -> list[dict[str, float]]:
    return [data["values"] for data in reporter.of("metrics")]


def warnings(reporter: RecordingReporter) -> dict[str, str]:
    return {data["code"]: data["text"] for data in reporter.of("warning")}


def weights(result: TrainResult) -> bytes:
    return (result.checkpoint / "adapter" / "adapter_model.safetensors").read_bytes()


def digest(result: TrainResult) -> str:
    return hashlib.sha256(weights(result)).hexdigest()


def without_times(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if "second" not in name and name != "tokens_per_s"}


def test_it_learns_and_reports_every_step(run) -> None:
    result, reporter = run(grpo_spec(steps=25, group_size=8, batch_size=4))
    values = steps(reporter)
    assert result.step == len(values) == 25 and not result.stopped
    first, last = (sum(v["reward"] for v in part) / 5 for part in (values[:5], values[-5:]))
    assert last > first + 0.2
    assert {
        "reward", "reward_std", "equal_groups", "length", "truncated", "entropy", "kl", "mismatch_kl", "clipped",
        "loss", "grad_norm", "learning_rate", "seconds", "seconds_sampling", "seconds_scoring", "seconds_update",
        "tokens_per_s", "groups_dropped", "prompts_dropped", "success", "env/twice",
    } <= values[0].keys()  # fmt: skip
    assert all(v["env/twice"] == pytest.approx(2 * v["reward"]) for v in values)
    assert values[0]["kl"] == pytest.approx(0, abs=1e-6) and values[-1]["kl"] > 1e-3
    assert all(v["mismatch_kl"] < 1e-6 for v in values)
    assert all(1 <= v["length"] <= 8 for v in values)


def test_several_turns_are_trained_too(run) -> None:
    _, reporter = run(grpo_spec(steps=16, group_size=8, max_tokens=4), multi_turn=True)
    values = steps(reporter)
    assert {v["turns"] for v in values} == {2.0}
    assert all(v["mismatch_kl"] < 1e-6 for v in values)
    assert sum(v["reward"] for v in values[-4:]) > sum(v["reward"] for v in values[:4]) + 0.4


def test_one_seed_gives_the_same_rollouts_and_the_same_bytes(run) -> None:
    (first, one), (second, two) = (run(grpo_spec(seed=3), name=name) for name in ("first", "second"))
    other, three = run(grpo_spec(seed=4), name="other")
    assert digest(first) == digest(second) != digest(other)
    assert one.of("sample") == two.of("sample") != three.of("sample")
    assert [without_times(v) for v in steps(one)] == [without_times(v) for v in steps(two)]
    for name in ("adapter_config.json", "flash.json", "README.md"):
        paths = [result.checkpoint / "adapter" / name for result in (first, second)]
        assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_lanes_change_the_speed_alone(penalty: float, run) -> None:
    spec = grpo_spec(batch_size=8, group_size=8, steps=3, kl_penalty_coef=penalty)  # enough work for three lanes
    (first, one), (second, two) = (run(spec, lanes=3, name=name) for name in ("first", "second"))
    assert digest(first) == digest(second)
    assert one.of("sample") == two.of("sample")
    assert [without_times(v) for v in steps(one)] == [without_times(v) for v in steps(two)]
    _, alone = run(spec, name="alone")
    opening, other = without_times(steps(alone)[0]), without_times(steps(one)[0])
    assert opening == pytest.approx(other, rel=1e-3, abs=1e-6)  # sums in another order, nothing else
    assert all(v["mismatch_kl"] < 1e-6 for v in steps(one))


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_stopped_run_resumes_to_the_bytes_of_an_uninterrupted_one(stop_at: int, run) -> None:
    spec = grpo_spec(steps=5, max_length=ROOM_FOR_SOME)  # some prompts are too long: their count is part of the state
    whole, reporter = run(spec, name="whole")
    part, _ = run(spec, name="part", reporter=RecordingReporter(stop_at=stop_at))
    assert part.stopped and part.step == stop_at and part.checkpoint.name == f"step-{stop_at}"
    torch.manual_seed(99)  # whatever ran in between must not matter
    rest, after = run(spec, name="rest", resume_from=part.checkpoint)
    assert not rest.stopped and rest.step == whole.step
    assert digest(rest) == digest(whole)
    assert [without_times(v) for v in steps(after)] == [without_times(v) for v in steps(reporter)[stop_at:]]
    assert steps(reporter)[-1]["prompts_dropped"] > 0


def test_a_run_stopped_while_sampling_keeps_the_step_before(run) -> None:
    class Impatient(RecordingReporter):
        asked = 0

        def should_stop(self) -> bool:
            self.asked += len(self.of("metrics")) == 2
            return self.asked > 1  # the first time is between two steps

    whole, _ = run(grpo_spec(), name="whole")
    part, reporter = run(grpo_spec(), name="part", reporter=Impatient())
    assert part.stopped and part.step == 2
    assert [data["step"] for data in reporter.of("checkpoint")] == [2]
    rest, _ = run(grpo_spec(), name="rest", resume_from=part.checkpoint)
    assert digest(rest) == digest(whole)


def test_stopping_before_the_first_step_leaves_no_checkpoint(run) -> None:
    class Stop(RecordingReporter):
        def should_stop(self) -> bool:
            return True

    result, _ = run(grpo_spec(), reporter=Stop())
    assert result == TrainResult(0, None, True)


def test_checkpoints_come_as_asked_and_the_last_is_final(run) -> None:
    _, reporter = run(grpo_spec(steps=5, save_every=2))
    assert [(data["step"], data["final"]) for data in reporter.of("checkpoint")] == [(2, False), (4, False), (5, True)]
    for data in reporter.of("checkpoint"):
        assert not [name for name in data["metrics"] if "second" in name]
        assert data["metrics"]["reward"] == steps(reporter)[data["step"] - 1]["reward"]


def test_a_warm_start_takes_the_weights(run) -> None:
    source, _ = run(grpo_spec(steps=16, group_size=8), name="source")
    _, after = run(grpo_spec(steps=1), name="warm", init_from=source.checkpoint / "adapter")
    _, cold = run(grpo_spec(steps=1), name="cold")
    assert steps(after)[0]["reward"] > steps(cold)[0]["reward"] + 0.2
    assert steps(after)[0]["kl"] > 1e-3  # against the base, not against the source


# --- keys and what they do ---------------------------------------------------------------------------


def test_every_grpo_key_reaches_the_rollouts(base: BaseModel) -> None:
    spec = grpo_spec(
        group_size=5, max_tokens=7, max_length=90, temperature=0.4, stop_sequences=["</a>"],
        thinking_length_penalty_coef=0.25,
    )  # fmt: skip
    limits = limits_of(spec, base)
    assert (limits.group_size, limits.max_tokens, limits.max_length) == (5, 7, 90)
    assert (limits.temperature, limits.top_p, limits.stop, limits.thinking_penalty) == (0.4, 1.0, ("</a>",), 0.25)
    assert limits_of(grpo_spec(temperature=0.0), base).temperature == 0.0
    assert limits_of(grpo_spec(max_length=10**6), base).max_length == base.context_length


def test_batch_and_group_size_set_how_many_are_scored(run) -> None:
    _, reporter = run(grpo_spec(steps=1, batch_size=2, group_size=5, save_every=1))
    kept = [data["sample"] for data in reporter.of("sample")]
    assert len({sample["row"] for sample in kept}) == 2
    assert {len(sample["rewards"]) for sample in kept} == {5}


@pytest.mark.parametrize("multi_turn", [False, True])
def test_samples_tell_each_token_and_who_wrote_it(run, multi_turn: bool) -> None:
    spec = grpo_spec(steps=1, batch_size=2, group_size=5, save_every=1, max_length=200)
    _, reporter = run(spec, multi_turn=multi_turn)
    for data in reporter.of("sample"):
        sample = data["sample"]
        assert "".join(piece[0] for piece in sample["pieces"]) == sample["text"]
        own = [piece for piece in sample["pieces"] if len(piece) == 2]
        assert all(logprob <= 0 for _, logprob in own)
        assert 0 < len(own) <= sample["tokens"]
        assert (len(own) < len(sample["pieces"])) == multi_turn
        mean = sum(sample["rewards"]) / 5
        assert sample["advantage"] == pytest.approx(sample["reward"] - mean)
    kept = [data["sample"] for data in reporter.of("sample")]
    rewards = kept[0]["rewards"]
    assert {max(rewards), min(rewards)} <= {each["reward"] for each in kept if each["rewards"] == rewards}


def test_characters_of_several_tokens_stay_whole() -> None:
    text = "a😀é".encode()
    prompt = Prompt(0, 0, EpisodeStart([{"role": "user", "content": "x"}], max_turns=1), (0,))
    episode = Episode.opened(prompt)
    episode.tokens += list(text)
    episode.sampled += [True] * len(text)
    episode.logprobs += [-0.5] * len(text)
    found = pieces(episode, lambda tokens: bytes(tokens).decode("utf-8", "replace"))
    assert found == [["a", -0.5], ["😀", -2.0], ["é", -1.0]]


def test_a_penalty_holds_the_policy_near_its_base(run) -> None:
    far, near = (run(grpo_spec(steps=12, group_size=8, kl_penalty_coef=coef), name=str(coef))[1] for coef in (0.0, 2.0))
    assert steps(near)[-1]["kl"] < 0.5 * steps(far)[-1]["kl"]
    assert steps(near)[-1]["loss"] != steps(far)[-1]["loss"]


def test_stop_sequences_end_completions(run) -> None:
    _, free = run(grpo_spec(steps=1, max_tokens=30), name="free")
    text = free.of("sample")[0]["sample"]["text"]
    stop = text[3]
    _, ended = run(grpo_spec(steps=1, max_tokens=30, stop_sequences=[stop]), name="ended")
    shown = ended.of("sample")[0]["sample"]
    assert shown["text"].index(stop) == len(shown["text"]) - 1 and not shown["truncated"]
    assert steps(ended)[0]["length"] < steps(free)[0]["length"]


def test_temperature_changes_what_is_sampled_and_zero_is_honoured_with_a_warning(run) -> None:
    _, hot = run(grpo_spec(steps=1, temperature=1.0), name="hot")
    _, cold = run(grpo_spec(steps=1, temperature=0.0), name="cold")
    assert steps(cold)[0]["entropy"] < steps(hot)[0]["entropy"]
    assert steps(cold)[0]["equal_groups"] == 1.0 and "temperature = 0" in warnings(cold)["no_gradient"]
    _, warm = run(grpo_spec(steps=3, temperature=0.6), name="warm")
    assert all(v["mismatch_kl"] < 1e-6 for v in steps(warm)) and steps(warm)[0]["grad_norm"] > 0


def test_a_group_of_one_warns(run) -> None:
    _, reporter = run(grpo_spec(steps=1, group_size=1))
    assert "group_size = 1" in warnings(reporter)["no_gradient"]


def test_equal_groups_change_nothing_but_the_step_counts(run) -> None:
    result, reporter = run(grpo_spec(steps=6), "0.0")
    values = steps(reporter)
    assert result.step == 6 and {v["equal_groups"] for v in values} == {1.0}
    assert {v["grad_norm"] for v in values} == {0.0}
    assert all(v["kl"] < 1e-9 and v["mismatch_kl"] < 1e-9 for v in values)
    assert "raise train.group_size" in warnings(reporter)["reward_flat_low"]
    _, solved = run(grpo_spec(steps=6), "1.0", name="solved")
    assert "solved" in warnings(solved)["reward_flat_high"]


def test_completions_that_hit_the_limit_are_advised_on(run) -> None:
    _, reporter = run(grpo_spec(steps=6, max_tokens=2))
    assert steps(reporter)[0]["truncated"] > 0.5
    assert "train.max_tokens (now 2)" in warnings(reporter)["mostly_truncated"]


def test_rows_are_shuffled_once_a_pass_by_the_seed_alone() -> None:
    passes = [[row_at(7, place, seed=1) for place in range(start, start + 7)] for start in (0, 7)]
    assert all(sorted(each) == list(range(7)) for each in passes) and passes[0] != passes[1]
    assert passes[0] != [row_at(7, place, seed=2) for place in range(7)]


def test_prompts_without_room_are_dropped_and_counted_and_none_left_is_an_error(run) -> None:
    _, reporter = run(grpo_spec(steps=3, max_length=ROOM_FOR_SOME))
    assert steps(reporter)[-1]["prompts_dropped"] > 0
    assert "raise train.max_length" in warnings(reporter)["prompts_dropped"]
    with pytest.raises(InvalidInput, match=r"none of the 12 prompts.*max_length = 20"):
        run(grpo_spec(max_length=20), name="none")


# --- user code that fails -------------------------------------------------------------------------------


def test_a_reward_that_always_fails_ends_the_run_with_its_traceback(run) -> None:
    reporter = RecordingReporter()
    with pytest.raises(UserCodeError, match="ZeroDivisionError") as caught:
        run(grpo_spec(steps=9), "1 / 0", reporter=reporter)
    assert "Traceback" in caught.value.detail
    values = steps(reporter)
    assert len(values) == 3 and [v["groups_dropped"] for v in values] == [3.0] * 3
    assert not any("reward" in v for v in values)
    assert "have no reward" in warnings(reporter)["groups_dropped"]


@pytest.mark.parametrize("bad", ["float('nan')", "float('inf')", "1e300", "None", "1 / 0"])
def test_a_reward_that_sometimes_fails_costs_its_groups_only(bad: str, run) -> None:
    """One row in twelve fails: under the bound, so the run goes on and never learns from a made-up zero."""
    reward = f"1.0 if example.input != 'say 3!!!' else {bad}"
    result, reporter = run(grpo_spec(steps=4), reward)
    values = steps(reporter)
    assert result.step == 4 and sum(v["groups_dropped"] for v in values) == 1.0
    assert all(v["reward"] == 1.0 for v in values)


# --- the canary --------------------------------------------------------------------------------------


def scored(base: BaseModel, logprob: float) -> Group:
    prompt = Prompt(0, 0, EpisodeStart([], 1), (1, 2, 3))
    group = Group(prompt, [Episode.opened(prompt) for _ in range(2)], [Score(0.0), Score(1.0)])
    for number, episode in enumerate(group.episodes):
        episode.tokens += [40 + number, 50]
        episode.sampled += [True, True]
        episode.logprobs += [logprob, logprob]
    return group


def test_rollouts_from_another_policy_fail_the_run(base: BaseModel) -> None:
    policy = build_policy(base, rank=4, alpha=8, seed=0)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    before = [parameter.clone() for parameter in policy.parameters()]
    with pytest.raises(InternalError, match="do not come from the policy"):
        Updater(grpo_spec(), policy, optimizer).update([scored(base, -0.1)], step=1)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    loose = Updater(grpo_spec(), policy, optimizer, mismatch_limit=1e3)
    metrics: dict[str, Any] = loose.update([scored(base, -0.1)], step=1)
    assert metrics["mismatch_kl"] > 0.1
