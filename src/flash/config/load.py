"""From files, overlays and overrides to a RunConfig, or to every problem at once.

Owns reading, the order of composition, and the rules between keys. Rules on single keys are in `run.py`,
their wording in `problems.py`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flash.catalog.catalog import Catalog, load_catalog
from flash.config.overrides import apply_override, merge
from flash.config.problems import dotted, path_of, problem_lines, sound_part
from flash.config.recipes import model_problems, train_defaults
from flash.config.run import Algorithm, RunConfig, TrainSection, keys_of
from flash.errors import ConfigError


@dataclass(frozen=True)
class LoadedConfig:
    config: RunConfig
    warnings: list[str]


def load_config(
    path: Path | str,
    overlays: Sequence[Path | str] = (),
    overrides: Sequence[str] = (),
    *,
    catalog: Catalog | None = None,
    check_model: bool = True,
) -> LoadedConfig:
    """Reads `path`, merges each overlay over it in order, then each `KEY=VALUE` of `overrides` in order.

    Raises ConfigError with every problem found. See `parse_config` for `catalog` and `check_model`.
    """
    documents, problems = [], []
    for file in (path, *overlays):
        try:
            documents.append(read_toml(Path(file)))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)

    tables: dict[str, Any] = {}
    for document in documents:
        tables = merge(tables, document)
    for override in overrides:
        try:
            tables = apply_override(tables, override)
        except ValueError as error:
            problems.append(str(error))
    try:
        config, warnings = parse_config(tables, catalog=catalog, check_model=check_model)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return LoadedConfig(config, warnings)


def parse_config(
    tables: Mapping[str, Any], *, catalog: Catalog | None = None, check_model: bool = True
) -> tuple[RunConfig, list[str]]:
    """Validates tables as TOML or JSON gives them; returns the config and its warnings.

    The model is checked against `catalog` (by default the shipped one with the operator's); a client of
    a server with a catalog of its own passes `check_model=False`. Raises ConfigError with every problem.
    """
    catalog = (load_catalog() if catalog is None else catalog) if check_model else None
    try:
        config = RunConfig.model_validate(dict(tables))
    except ValidationError as error:
        details = error.errors(include_url=False)
        sound = sound_part(tables, details)
        lines = problem_lines(details, sound)
        if sound:
            faulty = {dotted(path_of(detail)) for detail in details}
            lines += [line for key, line in cross_problems(sound, catalog) if key not in faulty]
        raise ConfigError(list(dict.fromkeys(lines))) from None
    if problems := cross_problems(config, catalog):
        raise ConfigError([line for _, line in problems])
    return config, config_warnings(config)


def cross_problems(config: RunConfig, catalog: Catalog | None) -> list[tuple[str, str]]:
    """Faults between keys, and with the catalog where there is one, as (key, line)."""
    twice = [
        (
            f"worker_env.{name}",
            f"worker_env.{name}: is also named under environment.secrets; remove it from one of the two",
        )
        for name in config.environment.secrets
        if name in config.worker_env
    ]
    return twice + (model_problems(config, catalog) if catalog else [])


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of one file; a ConfigError of one line where it can't be read."""
    text = ""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        return tomllib.loads(text)
    except FileNotFoundError:
        problem = "no such file; `flash env setup` writes one to start from"
    except IsADirectoryError:
        problem = "is a folder; name the TOML file in it"
    except OSError as error:
        problem = f"can't be read: {error.strerror or error}"
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte {error.start}); save it as UTF-8"
    except RecursionError:
        problem = "is not valid TOML: nested too deeply; flatten it"
    except ValueError as error:  # broken TOML, or a number with thousands of digits
        lines = text.split("\n")
        end = f"at line {len(lines)}, column {len(lines[-1]) + 1}"
        reason = " ".join(str(error).replace("at end of document", end).split())
        problem = f"is not valid TOML: {reason[:200]}; correct that place"
    raise ConfigError([f"{path}: {problem}"])


# --- warnings -----------------------------------------------------------------------------------------


def config_warnings(config: RunConfig) -> list[str]:
    """What is accepted but will not do what its writer may expect."""
    other: Algorithm = "grpo" if config.algorithm == "sft" else "sft"
    inert = keys_of(other)
    warnings = [
        f"train.{key}: has no effect, as it belongs to {other} and this run's algorithm is {config.algorithm}"
        for key in TrainSection.model_fields
        if key in inert and f"train.{key}" in config.given()
    ]
    return warnings + (_grpo_warnings(config) if config.algorithm == "grpo" else [])


def _grpo_warnings(config: RunConfig) -> list[str]:
    train, warnings = config.train, []
    if train.advantage_clip is not None:
        warnings.append("train.advantage_clip: is recorded and has no effect; the importance ratio is clipped instead")
    if train.group_size == 1:
        warnings.append("train.group_size = 1: a lone completion has none to be better than, so there is no gradient")
    if train.temperature == 0:
        warnings.append("train.temperature = 0: all completions of a prompt are the same, so there is no gradient")
    if train.thinking_length_penalty_coef and not config.thinking:
        warnings.append("train.thinking_length_penalty_coef: has no effect without thinking = true")
    defaults = train_defaults("grpo", config.model, config.thinking, train.max_tokens)
    max_tokens = train.max_tokens or defaults["max_tokens"]
    if train.max_length and train.max_length <= max_tokens:
        warnings.append(
            f"train.max_length = {train.max_length}: leaves no room for a prompt beside train.max_tokens = "
            f"{max_tokens}, so every row would be dropped; raise it or lower train.max_tokens"
        )
    return warnings
