"""The recipe: every value that a user may leave out, in one table, and `resolve`, which fills them in.

Owns the defaults and their sources. Pure: a config, a catalog entry and a source adapter in, a RunSpec
out; no file beyond the catalog, no server.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from flash.catalog.catalog import Catalog, ModelEntry, load_catalog
from flash.config.run import (
    ADAPTER_REF,
    Algorithm,
    EnvironmentSpec,
    Recipe,
    RunConfig,
    RunSpec,
    TrainSpec,
    WandbSpec,
    keys_of,
)
from flash.errors import ConfigError

# Sources, as named in the comments below:
#   regret   "LoRA Without Regret" (Thinking Machines Lab, 2025): all linear layers, about ten times full
#            fine-tuning's learning rate, small batches
#   lora     Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"
#   dr_grpo  Liu et al. 2025, "Understanding R1-Zero-Like Training": constant normaliser, no std scaling
#   grpo     Shao et al. 2024, "DeepSeekMath"
#   tis      Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training":
#            truncated importance sampling between sampler and trainer
#   contract this project's own product contract, where no publication settles a value
#   nano     measured on flash/nano in this repository


@dataclass(frozen=True)
class Defaults:
    """Defaults of `[train]` for one algorithm; a pair is (without thinking, with thinking)."""

    learning_rate: float
    batch_size: int
    save_every: int
    max_length: tuple[int, int]  # SFT: of an example; GRPO: of prompt and earlier turns, beside max_tokens
    epochs: int | None = None
    steps: int | None = None
    group_size: int | None = None
    max_tokens: tuple[int, int] = (0, 0)


SFT = Defaults(
    learning_rate=3e-4,  # regret; contract
    batch_size=32,  # regret: LoRA loses to full fine-tuning at large batches
    save_every=50,  # contract
    max_length=(1024, 2048),  # contract
    epochs=2,  # contract
)
GRPO = Defaults(
    learning_rate=2e-5,  # contract; regret: ten times the 1e-6 to 3e-6 usual without LoRA
    batch_size=16,  # contract
    save_every=20,  # contract
    max_length=(2048, 2048),  # contract: max_length = 2048 + max_tokens
    steps=150,  # configuration reference
    group_size=8,  # contract
    max_tokens=(320, 1536),  # contract
)
TABLE: dict[Algorithm, dict[str | None, Defaults]] = {
    "sft": {
        None: SFT,
        "flash/nano": Defaults(
            learning_rate=1.5e-3,  # nano: 3e-3 stops learning at 0.82 on the arithmetic example
            batch_size=32,
            save_every=125,  # an epoch of the arithmetic example
            max_length=(256, 256),  # nano: its longest rows with a trace stay below
            epochs=3,  # nano: one reaches 0.91 on the arithmetic example, three 0.99
        ),
    },
    "grpo": {
        None: GRPO,
        "flash/nano": Defaults(
            learning_rate=5e-4,  # nano: 2e-4 is slow, 1e-3 noisy, 3e-3 collapses
            batch_size=32,  # nano: 8 is noisier and no sooner done
            save_every=25,
            max_length=(256, 256),  # nano
            steps=150,  # configuration reference
            group_size=8,
            max_tokens=(32, 96),  # nano
        ),
    },
}

_COMMON: dict[str, Any] = {
    "optimizer": "adamw",
    "adam_beta1": 0.9,  # contract; usual for language models
    "adam_beta2": 0.95,  # contract; reacts faster than 0.999 over short runs
    "adam_epsilon": 1e-8,  # Kingma & Ba 2015
    "weight_decay": 0.0,  # regret: none; the low rank regularises
    "max_grad_norm": 1.0,  # contract
    "lora_dropout": 0.0,  # contract; and expert layers allow none
    "lora_targets": "all-linear",  # regret: MLP layers matter most
    "gpu_dtype": "bfloat16",  # contract; fp16 gives NaN gradients in Gated DeltaNet
    "cpu_dtype": "float32",  # contract
    "micro_batch_tokens": 16_384,  # memory only: the gradient does not depend on the split
}
RECIPES: dict[Algorithm, Recipe] = {
    "sft": Recipe(
        **_COMMON,
        lr_schedule="linear",
        warmup_ratio=0.03,  # contract
    ),
    "grpo": Recipe(
        **_COMMON,
        lr_schedule="constant",  # contract
        warmup_ratio=0.0,
        loss="dr_grpo",  # dr_grpo
        top_p=1.0,  # contract; below 1 the sampler's distribution is no longer the policy's
        clip_epsilon=0.2,  # grpo; idle with one update a batch, kept for resumed batches
        importance_cap=2.0,  # tis
        updates_per_batch=1,  # contract
    ),
}


@dataclass(frozen=True)
class AdapterSource:
    """The adapter that a run starts from, as the server knows it."""

    run_id: str
    step: int
    base_model: str
    rank: int
    alpha: int


def defaults_for(algorithm: Algorithm, model: str) -> Defaults:
    rows = TABLE[algorithm]
    return rows.get(model, rows[None])


def train_defaults(algorithm: Algorithm, model: str, thinking: bool, max_tokens: int | None = None) -> dict[str, Any]:
    """Every key of `[train]` that has a default under this algorithm.

    `max_tokens` is the user's own, where given: GRPO's max_length is room for a prompt beside it.
    """
    row = defaults_for(algorithm, model)
    common = {"learning_rate": row.learning_rate, "batch_size": row.batch_size, "save_every": row.save_every}
    if algorithm == "sft":
        return common | {
            "max_length": row.max_length[thinking],
            "epochs": row.epochs,
            "max_steps": 0,
            "max_examples": 0,
        }
    tokens = row.max_tokens[thinking]
    return common | {
        "max_length": row.max_length[thinking] + (max_tokens or tokens),
        "steps": row.steps,
        "group_size": row.group_size,
        "temperature": 1.0,  # contract; off-policy otherwise
        "max_tokens": tokens,
        "kl_penalty_coef": 0.0,  # dr_grpo; contract
        "thinking_length_penalty_coef": 0.0,
        "stop_sequences": (),
    }


def resolve(
    config: RunConfig,
    *,
    seed: int = 0,
    source: AdapterSource | None = None,
    catalog: Catalog | None = None,
) -> RunSpec:
    """Decides everything that the config leaves open.

    `source` describes `train.init_from_adapter` and is required of a server, which knows it; without it
    (`--dry-run`) rank and alpha stay at their defaults and `dry_run_document` shows `from <run-id>`.
    Raises ConfigError for a model that is not in the catalog, a rank above its cap, thinking on a model
    without it, or a source that does not fit.
    """
    catalog = load_catalog() if catalog is None else catalog
    problems = model_problems(config, catalog)
    problems += source_problems(config, source) if source else []
    if problems:
        raise ConfigError([line for _, line in problems])

    given = config.given()
    train = _filled_train(config, catalog.get(config.model), source)
    filled = [f"train.{key}" for key, value in train.items() if value is not None]
    return RunSpec(
        model=config.model,
        algorithm=config.algorithm,
        thinking=config.thinking,
        seed=seed,
        environment=EnvironmentSpec(**dict(config.environment)),
        train=TrainSpec(**train),
        worker_env=config.worker_env,
        wandb=WandbSpec(**dict(config.wandb)) if config.wandb else None,
        recipe=RECIPES[config.algorithm],
        defaulted=tuple(key for key in ("algorithm", "thinking", *filled) if key not in given),
    )


def _filled_train(config: RunConfig, entry: ModelEntry, source: AdapterSource | None) -> dict[str, Any]:
    foreign = keys_of("grpo" if config.algorithm == "sft" else "sft")
    values = {key: None if key in foreign else value for key, value in config.train}
    defaults = train_defaults(config.algorithm, config.model, config.thinking, values.get("max_tokens"))
    values |= {key: default for key, default in defaults.items() if values[key] is None}

    rank = source.rank if source else min(config.train.lora_rank, entry.rank_cap)
    alpha = source.alpha if source else config.train.lora_alpha
    decided = {"lora_rank": rank, "lora_alpha": alpha}
    given = config.given()
    return values | {key: value for key, value in decided.items() if f"train.{key}" not in given}


def model_problems(config: RunConfig, catalog: Catalog) -> list[tuple[str, str]]:
    """What the catalog has against this config, as (key, line)."""
    if config.model not in catalog:
        hint = catalog.remedy(config.model)
        return [("model", f"model = {json.dumps(config.model[:80])}: is not in the catalog; {hint}")]
    entry = catalog.get(config.model)
    problems = []
    if config.thinking and not entry.thinking:
        problems.append(
            (
                "thinking",
                f"thinking = true: {entry.id} has no reasoning mode; set it to false, or pick a model that "
                "`flash models` marks as thinking",
            )
        )
    rank = config.train.lora_rank
    if rank > entry.rank_cap and "train.lora_rank" in config.given():
        problems.append(
            (
                "train.lora_rank",
                f"train.lora_rank = {rank}: must be at most {entry.rank_cap}, the deployable cap of "
                f"{entry.id}; lower it",
            )
        )
    return problems


def source_problems(config: RunConfig, source: AdapterSource) -> list[tuple[str, str]]:
    """Where `train.init_from_adapter` does not fit this config, as (key, line)."""
    ref, train = config.train.init_from_adapter, config.train
    problems = []
    if source.base_model != config.model:
        problems.append(
            (
                "model",
                f"model = {json.dumps(config.model)}: {ref} was trained on {source.base_model}; "
                "set model to that, or leave train.init_from_adapter out",
            )
        )
    if "train.lora_rank" in config.given() and train.lora_rank != source.rank:
        problems.append(
            (
                "train.lora_rank",
                f"train.lora_rank = {train.lora_rank}: {ref} has rank {source.rank}; "
                "leave it out to take over the source's",
            )
        )
    return problems


def dry_run_document(spec: RunSpec, warnings: list[str]) -> dict[str, Any]:
    """What `flash train --dry-run` prints as JSON.

    `spec` mirrors the config's tables, filled; `spec.defaulted` names what the user left out. Where the
    source adapter will decide, rank and alpha read "from <run-id>".
    """
    document = spec.model_dump(mode="json")
    if spec.train.init_from_adapter:
        match = ADAPTER_REF.fullmatch(spec.train.init_from_adapter)
        run_id = match["run_id"] if match else spec.train.init_from_adapter
        for key in ("lora_rank", "lora_alpha"):
            if f"train.{key}" in spec.defaulted:
                document["train"][key] = f"from {run_id}"
    return {"state": "dry_run", "spec": document, "warnings": warnings}
