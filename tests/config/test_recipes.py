"""What `resolve` fills in, and what it refuses."""

from __future__ import annotations

import json

import pytest

from flash.catalog.catalog import load_catalog
from flash.config.load import parse_config
from flash.config.recipes import AdapterSource, dry_run_document, resolve
from flash.config.run import RunSpec, TrainSpec, keys_of

RUN = "flash-1760000000-0a1b2c3d"


def config(train=None, **top):
    tables = {"model": "Qwen/Qwen3.5-4B", "environment": {"id": "a/b"}, "train": train or {}, **top}
    return parse_config(tables)[0]


def spec(train=None, **top):
    return resolve(config(train, **top))


def source(**change):
    return AdapterSource(**{"run_id": RUN, "step": 3, "base_model": "Qwen/Qwen3.5-4B", "rank": 8, "alpha": 24} | change)


def test_sft_defaults():
    found = spec()
    train = found.train
    assert (train.learning_rate, train.batch_size, train.epochs, train.max_length, train.save_every) == (
        3e-4, 32, 2, 1024, 50,
    )  # fmt: skip
    assert (train.lora_rank, train.lora_alpha, train.max_steps, train.max_examples) == (32, 64, 0, 0)
    assert (found.recipe.lr_schedule, found.recipe.warmup_ratio, found.recipe.loss) == ("linear", 0.03, None)
    assert spec(thinking=True).train.max_length == 2048
    assert all(getattr(train, key) is None for key in keys_of("grpo"))


def test_grpo_defaults():
    found = spec(algorithm="grpo")
    train = found.train
    assert (train.learning_rate, train.batch_size, train.group_size, train.steps, train.save_every) == (
        2e-5, 16, 8, 150, 20,
    )  # fmt: skip
    assert (train.temperature, train.max_tokens, train.max_length, train.kl_penalty_coef) == (1.0, 320, 2368, 0.0)
    assert (train.thinking_length_penalty_coef, train.stop_sequences, train.advantage_clip) == (0.0, (), None)
    assert (found.recipe.lr_schedule, found.recipe.loss, found.recipe.top_p) == ("constant", "dr_grpo", 1.0)
    thinking = spec(algorithm="grpo", thinking=True).train
    assert (thinking.max_tokens, thinking.max_length) == (1536, 2048 + 1536)
    assert all(getattr(train, key) is None for key in keys_of("sft"))


def test_both_recipes_agree_with_the_contract():
    for algorithm in ("sft", "grpo"):
        recipe = spec(algorithm=algorithm).recipe
        assert (recipe.adam_beta1, recipe.adam_beta2, recipe.max_grad_norm) == (0.9, 0.95, 1.0)
        assert recipe.lora_dropout == 0.0
        assert (recipe.gpu_dtype, recipe.cpu_dtype, recipe.lora_targets) == ("bfloat16", "float32", "all-linear")


def test_max_length_follows_a_given_max_tokens():
    assert spec({"max_tokens": 100}, algorithm="grpo").train.max_length == 2148
    assert spec({"max_tokens": 100, "max_length": 500}, algorithm="grpo").train.max_length == 500


def test_nano_has_its_own_row():
    sft, grpo = spec(model="flash/nano"), spec(model="flash/nano", algorithm="grpo")
    assert sft.train.learning_rate > spec().train.learning_rate
    assert grpo.train.learning_rate > spec(algorithm="grpo").train.learning_rate
    assert grpo.train.max_length <= load_catalog().get("flash/nano").context


@pytest.mark.parametrize("algorithm", ["sft", "grpo"])
def test_every_given_value_is_kept(algorithm):
    given = {
        "lora_rank": 5, "lora_alpha": 6, "learning_rate": 0.5, "batch_size": 7, "max_length": 801, "save_every": 8,
        "epochs": 9, "max_steps": 10, "max_examples": 11, "steps": 12, "group_size": 13, "temperature": 0.0,
        "max_tokens": 14, "kl_penalty_coef": 0.25, "advantage_clip": 3.0, "thinking_length_penalty_coef": 0.75,
        "stop_sequences": ["x"], "init_from_adapter": f"{RUN}/step-3",
    }  # fmt: skip
    assert set(given) == set(TrainSpec.model_fields)
    train = json.loads(spec(given, algorithm=algorithm).model_dump_json())["train"]
    other = keys_of("grpo" if algorithm == "sft" else "sft")
    assert train == {key: None if key in other else value for key, value in given.items()}


def test_given_zeros_are_not_replaced():
    train = spec({"temperature": 0.0, "kl_penalty_coef": 0}, algorithm="grpo").train
    assert (train.temperature, train.kl_penalty_coef) == (0.0, 0.0)


def test_defaulted_names_exactly_what_was_left_out():
    found = spec({"epochs": 2, "lora_rank": 32})
    assert "train.epochs" not in found.defaulted and "train.lora_rank" not in found.defaulted
    assert set(found.defaulted) == {
        "algorithm", "thinking", "train.lora_alpha", "train.learning_rate", "train.batch_size", "train.max_length",
        "train.save_every", "train.max_steps", "train.max_examples",
    }  # fmt: skip


def test_a_spec_round_trips_through_json():
    found = resolve(
        config(
            {"stop_sequences": ["a"], "learning_rate": 1e-7},
            algorithm="grpo",
            environment={"id": "a/b", "params": {"x": [1, {"y": None}]}, "pip": ["p"], "secrets": ["KEY"]},
            worker_env={"A": "b"},
            wandb={"project": "p"},
        ),
        seed=2**62,
    )
    assert RunSpec.model_validate(json.loads(json.dumps(found.model_dump(mode="json")))) == found
    assert found.environment.ref.namespace == "a"
    assert found.seed == 2**62


def test_a_dry_run_mirrors_the_tables():
    document = dry_run_document(spec({"epochs": 5}), ["careful"])
    assert document["state"] == "dry_run" and document["warnings"] == ["careful"]
    assert document["spec"]["train"]["lora_rank"] == 32 and document["spec"]["train"]["epochs"] == 5
    assert document["spec"]["environment"]["id"] == "a/b"
    assert "train.lora_rank" in document["spec"]["defaulted"]
    json.dumps(document)


# --- warm start ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ref", [RUN, f"{RUN}/step-20"])
def test_a_dry_run_says_what_the_source_decides(ref):
    train = dry_run_document(spec({"init_from_adapter": ref}), [])["spec"]["train"]
    assert train["lora_rank"] == train["lora_alpha"] == f"from {RUN}"
    train = dry_run_document(spec({"init_from_adapter": ref, "lora_rank": 16}), [])["spec"]["train"]
    assert (train["lora_rank"], train["lora_alpha"]) == (16, f"from {RUN}")


def test_rank_and_alpha_come_from_the_source():
    warm = config({"init_from_adapter": RUN})
    train = resolve(warm, source=source()).train
    assert (train.lora_rank, train.lora_alpha) == (8, 24)
    train = resolve(config({"init_from_adapter": RUN, "lora_alpha": 9, "lora_rank": 8}), source=source()).train
    assert (train.lora_rank, train.lora_alpha) == (8, 9)


def test_a_source_that_does_not_fit_is_refused(problems):
    warm = config({"init_from_adapter": RUN, "lora_rank": 16})
    lines = problems(lambda: resolve(warm, source=source(base_model="Qwen/Qwen3.5-2B")))
    assert lines[0].startswith('model = "Qwen/Qwen3.5-4B": ') and "Qwen/Qwen3.5-2B" in lines[0]
    assert lines[1].startswith("train.lora_rank = 16: ") and "rank 8" in lines[1]


@pytest.mark.parametrize(
    "ref",
    ["", "x", "flash-1-0a1b2c3", f"{RUN}/", f"{RUN}/step-0", f"{RUN}/step-x", f"{RUN}/step-01", f"{RUN}/step-1/adapter",
     f"runs/{RUN}", f"org/{RUN}/step-1", f"hf://{RUN}", f"{RUN}:step-1", RUN.upper()],
)  # fmt: skip
def test_longer_refs_are_refused(ref, problems):
    [line] = problems(lambda: config({"init_from_adapter": ref}))
    assert line.startswith("train.init_from_adapter = ") and "<run-id>/step-N" in line


# --- the catalog's say --------------------------------------------------------------------------------


def test_a_default_rank_stays_below_a_small_cap(home):
    (home / "models.toml").write_text(
        '[[model]]\nid = "small"\nparams = 1\nlayout = "llama"\ncontext = 512\nrank_cap = 8\n', encoding="utf-8"
    )
    assert spec(model="small").train.lora_rank == 8


def test_resolve_checks_the_model_itself(problems):
    unknown, _ = parse_config({"model": "x/y", "environment": {"id": "a/b"}}, check_model=False)
    assert problems(lambda: resolve(unknown))[0].startswith('model = "x/y": is not in the catalog')
