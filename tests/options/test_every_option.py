"""No key of a config is ignored: one table of every key, what it does, and the tests that show it.

The table fails when the schema gains or loses a key, and when a test that it names is no longer there.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from pydantic import BaseModel

from flash.config.run import RunConfig, Section

TESTS = Path(__file__).resolve().parents[1]


class Row(NamedTuple):
    """What changes where a user can see it, and "folder/test_file.py::test" for each proof."""

    effect: str
    tests: tuple[str, ...]


EACH_SFT_KEY = "training/test_options.py::test_each_sft_key_alone_changes_what_it_is_for"
EACH_GRPO_KEY = "training/test_options.py::test_each_grpo_key_alone_changes_what_it_is_for"
INERT_KEYS = "training/test_options.py::test_keys_said_to_have_no_effect_have_none"
GRPO_KEYS = "training/test_grpo.py::test_every_grpo_key_reaches_the_rollouts"

TABLE = {
    "model": Row(
        "the base that is loaded and named in the adapter's files",
        (
            "worker/test_trainer.py::test_the_model_is_the_one_that_the_config_names",
            "training/test_sft.py::test_flash_json_and_the_card_say_where_the_adapter_comes_from",
        ),
    ),
    "algorithm": Row(
        "which training runs: targets are imitated, or completions sampled and scored",
        ("worker/test_trainer.py::test_the_algorithm_decides_what_is_trained_on",),
    ),
    "thinking": Row(
        "the rendered prompt, what counts as the answer, and the recipe's lengths",
        (
            "training/test_options.py::test_thinking_changes_the_prompt",
            "training/test_sft.py::test_thinking_without_traces_warns",
            "inference/test_chat.py::test_with_thinking_off_text_without_a_closing_tag_is_all_answer",
        ),
    ),
    "environment.id": Row(
        "the package that the worker opens, pinned when the run is submitted",
        (
            "control_plane/test_routes.py::test_a_submit_is_validated_resolved_and_pinned",
            "control_plane/test_github.py::test_a_reference_is_pinned_to_its_commit_and_reaches_the_worker",
            "worker/test_supervisor.py::test_an_attempt_from_claim_to_last_word",
        ),
    ),
    "environment.params": Row(
        "the factory's arguments, and which packaged file is read",
        (
            "environments/test_loading.py::test_params_reach_the_factory",
            "environments/test_rows.py::test_params_split_chooses_the_file",
            "environments/test_rows.py::test_dataset_path_is_read_in_every_form",
        ),
    ),
    "environment.pip": Row(
        "packages that the environment's code can import and the trainer never sees",
        (
            "worker/test_packages.py::test_packages_stand_in_front_of_the_training_stack_for_the_host_alone",
            "environments/test_strangers.py::test_a_package_that_clashes_with_the_training_stack_harms_nobody_else",
        ),
    ),
    "environment.secrets": Row(
        "variables in the environment's process, redacted everywhere else",
        (
            "worker/test_supervisor.py::test_secrets_reach_the_environment_and_nothing_else",
            "control_plane/test_routes.py::test_secrets_reach_the_claim_and_nothing_else",
        ),
    ),
    "train.lora_rank": Row("the shapes of the adapter's matrices", (EACH_SFT_KEY, EACH_GRPO_KEY)),
    "train.lora_alpha": Row(
        "the scale of the adapter's output",
        (EACH_SFT_KEY, EACH_GRPO_KEY, "training/test_sft.py::test_a_warm_start_may_change_alpha"),
    ),
    "train.learning_rate": Row(
        "the size of each update",
        (EACH_SFT_KEY, EACH_GRPO_KEY, "training/test_sft.py::test_the_learning_rate_rises_then_falls_to_its_last_step"),
    ),
    "train.batch_size": Row(
        "examples in a step, or prompts that are sampled in one",
        (
            EACH_SFT_KEY,
            "training/test_sft.py::test_epochs_max_steps_batch_size_and_max_examples_decide_the_steps",
            "training/test_grpo.py::test_batch_and_group_size_set_how_many_are_scored",
        ),
    ),
    "train.max_length": Row(
        "where rows are cut off, and which prompts leave room for an answer",
        (
            EACH_SFT_KEY,
            "training/test_sft.py::test_long_rows_are_cut_off_and_counted_and_rows_without_trained_tokens_dropped",
            "training/test_grpo.py::test_prompts_without_room_are_dropped_and_counted_and_none_left_is_an_error",
            "training/test_rollouts.py::test_the_transcripts_budget_ends_an_episode_and_it_is_scored",
        ),
    ),
    "train.save_every": Row(
        "which steps leave a checkpoint, and that each is uploaded",
        (
            "training/test_sft.py::test_save_every_and_the_end_leave_complete_checkpoints",
            "training/test_grpo.py::test_checkpoints_come_as_asked_and_the_last_is_final",
            "worker/test_uploading.py::test_while_one_is_in_flight_the_newest_waiting_wins",
        ),
    ),
    "train.init_from_adapter": Row(
        "the weights that training starts from, and their rank and alpha",
        (
            "training/test_sft.py::test_a_warm_start_takes_the_weights_and_nothing_else",
            "training/test_grpo.py::test_a_warm_start_takes_the_weights",
            "control_plane/test_routes.py::test_a_warm_start_takes_weights_rank_and_alpha_of_its_source",
        ),
    ),
    "train.epochs": Row("passes over the rows", ("training/test_options.py::test_epochs_repeat_the_rows", INERT_KEYS)),
    "train.max_steps": Row("the last step", (EACH_SFT_KEY, INERT_KEYS)),
    "train.max_examples": Row(
        "how many rows of the file's head are trained on",
        ("training/test_sft.py::test_max_examples_keeps_the_head_of_the_file", EACH_SFT_KEY, INERT_KEYS),
    ),
    "train.steps": Row("the last step", (EACH_GRPO_KEY, INERT_KEYS)),
    "train.group_size": Row(
        "completions of one prompt, which are compared",
        (EACH_GRPO_KEY, "training/test_grpo.py::test_batch_and_group_size_set_how_many_are_scored", INERT_KEYS),
    ),
    "train.temperature": Row(
        "how varied the sampled completions are",
        (
            EACH_GRPO_KEY,
            "training/test_grpo.py::test_temperature_changes_what_is_sampled_and_zero_is_honoured_with_a_warning",
        ),
    ),
    "train.max_tokens": Row(
        "the longest completion, and the advice when most hit it",
        (EACH_GRPO_KEY, GRPO_KEYS, "training/test_grpo.py::test_completions_that_hit_the_limit_are_advised_on"),
    ),
    "train.kl_penalty_coef": Row(
        "how far the policy moves from its base",
        (EACH_GRPO_KEY, "training/test_grpo.py::test_a_penalty_holds_the_policy_near_its_base"),
    ),
    "train.advantage_clip": Row(
        "nothing, by its documentation, and a warning that says so",
        ("config/test_load.py::test_grpo_warnings", INERT_KEYS),
    ),
    "train.thinking_length_penalty_coef": Row(
        "what a trace costs of the reward",
        (
            "training/test_options.py::test_the_length_penalty_takes_from_rewards_while_thinking",
            "training/test_rollouts.py::test_the_answer_is_what_follows_the_last_think_tag_and_its_trace_costs",
        ),
    ),
    "train.stop_sequences": Row(
        "where completions end, with the stop's text kept for the reward",
        (
            EACH_GRPO_KEY,
            "training/test_grpo.py::test_stop_sequences_end_completions",
            "training/test_rollouts.py::test_stop_sequences_stay_in_what_is_scored",
        ),
    ),
    "worker_env": Row(
        "variables in the environment's process and in the W&B logger's",
        (
            "worker/test_supervisor.py::test_worker_env_reaches_the_environment",
            "worker/test_supervisor.py::test_the_key_alone_logs_metrics_and_evaluation",
        ),
    ),
    "wandb.project": Row("the W&B project", ("worker/test_supervisor.py::test_a_wandb_table_names_the_place",)),
    "wandb.run_name": Row("the W&B run's name", ("worker/test_supervisor.py::test_a_wandb_table_names_the_place",)),
}


def keys_of(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Every key that a user can set, dotted; tables of the user's own making (params, worker_env) are one key."""
    found: set[str] = set()
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
        found |= keys_of(section, f"{prefix}{name}.") if section else {prefix + name}
    return found


def test_the_table_has_every_key_and_no_other() -> None:
    assert set(TABLE) == keys_of(RunConfig)


@cache
def functions_of(file: Path) -> frozenset[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("key", TABLE)
def test_every_proof_is_there(key: str) -> None:
    row = TABLE[key]
    assert row.effect and row.tests
    for test in row.tests:
        file, _, name = test.partition("::")
        assert name.startswith("test_") and name in functions_of(TESTS / file), f"{key}: no {test}"
