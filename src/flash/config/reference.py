"""What people and editors read about the configuration, made from the models themselves.

Owns three renderings: the JSON Schema (`flash config schema`), the reference page
(`docs/configuration.md`) and the starter TOML (`flash env setup`). The sentences are the docstrings below
the fields of `run.py`; it adds none about single keys.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from textwrap import wrap
from typing import Any, Literal, get_origin

from flash.config import run
from flash.config.recipes import RECIPES, TABLE, train_defaults
from flash.config.run import ALGORITHMS, Algorithm, RunConfig, Section, keys_of, section_of, unwrapped
from flash.config.secret_rules import RESERVED


@dataclass(frozen=True)
class Key:
    """One key of the reference."""

    section: str  # "", "environment", "train", "wandb"
    name: str
    type: str  # "string", "int", "float", "bool", "table", "list[string]"
    default: Any  # None: none, or the recipe's
    required: bool
    algorithm: Algorithm | None  # the one that reads it; None: both
    text: str
    rule: str  # its range in words, or ""

    @property
    def dotted(self) -> str:
        return f"{self.section}.{self.name}" if self.section else self.name


@cache
def all_keys() -> tuple[Key, ...]:
    """Every key that a config may set, in the order of the page. Sections themselves are none."""
    return tuple(_keys(RunConfig, ""))


def _keys(section: type[Section], name: str) -> Iterator[Key]:
    texts = _docstrings()[section.__name__]
    inner: list[tuple[type[Section], str]] = []
    for field_name, field in section.model_fields.items():
        if below := section_of(field.annotation):
            inner.append((below, field_name))
            continue
        yield Key(
            section=name,
            name=field_name,
            type=_type_name(unwrapped(field.annotation)),
            default=None if field.is_required() else field.get_default(call_default_factory=True),
            required=field.is_required(),
            algorithm=next((each for each in ALGORITHMS if name == "train" and field_name in keys_of(each)), None),
            text=texts[field_name],
            rule=_range(section, field_name),
        )
    for below, below_name in inner:
        yield from _keys(below, below_name)


@cache
def _docstrings() -> dict[str, dict[str, str]]:
    """{class: {field: the string below it}} of `run.py`."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(run)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        texts = found.setdefault(node.name, {})
        for field, below in zip(node.body, node.body[1:], strict=False):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
                texts[field.target.id] = " ".join(str(below.value.value).split())  # type: ignore[attr-defined]
    return found


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "string"
    if get_origin(annotation) is dict:
        return "table"
    if get_origin(annotation) is tuple:
        return "list[string]"
    return {str: "string", int: "int", float: "float", bool: "bool"}[annotation]


def _range(section: type[Section], name: str) -> str:
    """A number's range in words, from its constraints."""
    schema = _properties(section)[name]
    low, above, high = (schema.get(word) for word in ("minimum", "exclusiveMinimum", "maximum"))
    if above is not None:
        return f"above {above:g}"
    if low is not None and high is not None and high < run.LARGEST_INT:
        return f"{low:g} to {high:g}"
    return f"at least {low:g}" if low is not None else ""


# --- JSON Schema --------------------------------------------------------------------------------------


def json_schema() -> dict[str, Any]:
    """A JSON Schema of the TOML file, for editors: `flash config schema`."""
    schema = _section_schema(RunConfig, "")
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Flash training run", **schema}


def _section_schema(section: type[Section], name: str) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for field_name, field in section.model_fields.items():
        if below := section_of(field.annotation):
            properties[field_name] = _section_schema(below, field_name)
        else:
            key = next(key for key in all_keys() if (key.section, key.name) == (name, field_name))
            properties[field_name] = _properties(section)[field_name] | {"description": _sentence(key)}
            if key.default not in (None, (), {}):
                properties[field_name]["default"] = key.default
    required = [field for field, info in section.model_fields.items() if info.is_required()]
    return {
        "type": "object",
        "description": " ".join((section.__doc__ or "").split()),
        "properties": properties,
        "additionalProperties": False,
        **({"required": required} if required else {}),
    }


@cache
def _properties(section: type[Section]) -> dict[str, dict[str, Any]]:
    """Pydantic's schema of each plain field, without null (TOML has none) and without what we write ourselves."""
    bare: dict[str, dict[str, Any]] = {}
    for name, found in section.model_json_schema()["properties"].items():
        options = [each for each in found.get("anyOf", [found]) if each.get("type") != "null"]
        bare[name] = {
            word: value
            for word, value in options[0].items()
            if word not in ("title", "default", "description", "algorithm", "$ref")
        }
    if "stop_sequences" in bare:  # the one list that a lone string may stand for
        bare["stop_sequences"] = {"anyOf": [{"type": "string"}, bare["stop_sequences"]]}
    if "worker_env" in bare:
        bare["worker_env"] = {"type": "object", "additionalProperties": {"type": "string"}}
    if "algorithm" in bare:  # read in any case, and empty for the default
        bare["algorithm"] = {"type": "string", "pattern": "^([sS][fF][tT]|[gG][rR][pP][oO]|)$"}
    return bare


def _sentence(key: Key) -> str:
    only = f" ({key.algorithm.upper()} only.)" if key.algorithm else ""
    return key.text + only


# --- the reference page -------------------------------------------------------------------------------


def markdown() -> str:
    """The page `docs/configuration.md`."""
    return "\n".join(_page()).rstrip() + "\n"


def _page() -> Iterator[str]:
    yield "<!-- Generated from src/flash/config by `make docs`; edit the docstrings there. -->"
    yield "# Configuration"
    yield ""
    yield (
        "A run is one TOML file, given to `flash train`. Only `model` and `environment.id` are required. "
        "`flash train config.toml --dry-run` checks the file without a server and shows every value that "
        "the run would use; `flash config schema` prints a JSON Schema for your editor."
    )
    yield from ("", "```toml", starter_toml("your-org/your-env", brief=True).rstrip(), "```")
    yield from ("", "An unknown key is an error everywhere, with the nearest valid key as a hint.")
    yield from ("", "## Top level", "", *_table("", None))
    yield from ("", "## `[environment]`", "", *_table("environment", None), "", *_ENVIRONMENT)
    yield from ("", "## `[train]`", "", "For both algorithms:", "", *_table("train", None))
    for algorithm in ALGORITHMS:
        yield from ("", f"### {algorithm.upper()}", "", *_table("train", algorithm))
    yield from ("", *_OTHER_ALGORITHM)
    yield from ("", "## Recipe", "", *_recipe())
    yield from ("", "## `[worker_env]`", "", *_WORKER_ENV)
    yield from ("", "## `[wandb]`", "", *_WANDB, "", *_table("wandb", None))
    yield from ("", "## Not in the file", "", *_NOT_HERE)
    yield from ("", "## Overlays and overrides", "", *_COMPOSITION)


def _table(section: str, algorithm: Algorithm | None) -> Iterator[str]:
    yield "| Key | Type | Default | Description |"
    yield "| --- | --- | --- | --- |"
    for key in all_keys():
        if key.section == section and key.algorithm == algorithm:
            rule = f" Range: {key.rule}." if key.rule else ""
            yield f"| `{key.name}` | {key.type} | {_default_cell(key)} | {key.text}{rule} |"


def _default_cell(key: Key) -> str:
    if key.required:
        return "(required)"
    if key.section == "train" and key.default is None:
        return _recipe_cell(key)
    if key.default is None:
        return "–"
    return f"`{_toml(key.default)}`"


def _recipe_cell(key: Key) -> str:
    """What the recipe fills in: for one algorithm its value, for both a pair."""
    if key.algorithm:
        return _filled_cell(key.algorithm, "", key.name)
    cells = {each: _filled_cell(each, "", key.name) for each in ALGORITHMS}
    return ", ".join(f"{each.upper()} {cell}" for each, cell in cells.items() if cell != "–") or "–"


def _filled_cell(algorithm: Algorithm, model: str, name: str) -> str:
    plain, thinking = (train_defaults(algorithm, model, on).get(name) for on in (False, True))
    if plain is None:
        return "–"
    return f"`{_toml(plain)}`" + (f" (thinking: `{_toml(thinking)}`)" if thinking != plain else "")


def _recipe() -> Iterator[str]:
    yield (
        "What you leave out is filled in from one table. `--dry-run` shows the result, and marks what was "
        "filled in. Models with a row of their own:"
    )
    yield ""
    own = [(algorithm, model) for algorithm, rows in TABLE.items() for model in rows if model]
    names = [key.name for key in all_keys() if key.section == "train" and key.default is None]
    yield f"| Key | {' | '.join(f'`{model}`, {algorithm.upper()}' for algorithm, model in own)} |"
    yield "| --- |" + " --- |" * len(own)
    for name in names:
        cells = [_filled_cell(algorithm, model, name) for algorithm, model in own]
        if cells != [_filled_cell(algorithm, "", name) for algorithm, _ in own]:
            yield f"| `{name}` | {' | '.join(cells)} |"
    yield ""
    yield (
        "For GRPO, `max_length` is the default of `max_tokens` or your own, plus room for the prompt and "
        "earlier turns. What no key sets:"
    )
    yield ""
    yield "| | SFT | GRPO |"
    yield "| --- | --- | --- |"
    for name in type(RECIPES["sft"]).model_fields:
        cells = [getattr(RECIPES[algorithm], name) for algorithm in ALGORITHMS]
        yield f"| `{name}` | {' | '.join('–' if cell is None else f'`{_toml(cell)}`' for cell in cells)} |"


_ENVIRONMENT = (
    "A run pins the version of the environment that it was submitted with. `pip` is the place for packages "
    "that your environment imports: `pyproject.toml`, `requirements.txt` and lock files are not shipped with it.",
    "",
    "Each name in `secrets` must have a value when you submit: in your shell, else in `.env.local`, else in "
    "`.env`, looked for in the working directory and then beside the config. Environment code reads it from "
    "`os.environ`. Never put a value into `params` or `[worker_env]`: both are stored with the run, and what "
    "looks like a key, token or password there is refused.",
    "",
    f"These names are Flash's own and can't be declared: {', '.join(f'`{name}`' for name in sorted(RESERVED))}, "
    "and every `FLASH_*`.",
)
_OTHER_ALGORITHM = ("A key of the other algorithm is accepted, does nothing, and is named in a warning.",)
_WORKER_ENV = (
    f"{_docstrings()['RunConfig']['worker_env']} Values are strings.",
    "",
    "```toml",
    "[worker_env]",
    'FEATURE_FLAG = "enabled"',
    "```",
    "",
    "Names and values that look secret are refused, as are names that steer the process (`PATH`, `PYTHON*`, "
    "`LD_*`, `DYLD_*`, `CUDA_*`, `FLASH_*`) or belong to Flash.",
)
_WANDB = (f"{run.WandbSection.__doc__} It works for both algorithms, and a failure of W&B never fails or slows a run.",)
_NOT_HERE = (
    "The seed: `flash train --seed N` (0 by default), recorded with the run.",
    "",
    "What Flash decides for you: the device, retries, the wall-clock limit, where checkpoints and artifacts "
    "are kept. `flash status` shows them.",
)
_COMPOSITION = (
    "Any value can be set when you submit. The file comes first, then each `--config` overlay in order (tables "
    "merge deeply; scalars and lists replace), then each `--set` in order.",
    "",
    "<!-- not run: the order of composition has tests of its own -->",
    "```bash",
    "flash train config.toml --set train.epochs=3 --set train.lora_rank=16",
    "flash train base.toml --config overlay.toml",
    "```",
    "",
    "`--set KEY=VALUE` splits at the first `=`, and missing tables are created. A string key keeps VALUE as it "
    "is; elsewhere VALUE is read as TOML, `true` and `false` in any case are bools, `[a,b]` is a list of "
    "bare words, and anything else is a string.",
)


# --- starter TOML -------------------------------------------------------------------------------------


def starter_toml(
    environment: str, *, algorithm: Algorithm = "sft", model: str = "flash/nano", brief: bool = False
) -> str:
    """A config to start from, valid as it is.

    Every key that this algorithm reads is there, commented out at its default; `brief` leaves those out.
    """
    lines = (
        [] if brief else ["# Every commented key shows its default. `flash train FILE --dry-run` checks this file.", ""]
    )
    lines += [
        f"model = {_toml(model)}",
        f"algorithm = {_toml(algorithm)}",
        "",
        "[environment]",
        f"id = {_toml(environment)}",
    ]
    if brief:
        return "\n".join(lines) + "\n"
    lines += _commented("environment", {"pip": [], "secrets": []})
    lines += ["", *_PARAMS, "", "[train]", *_commented("train", _starter_defaults(algorithm, model))]
    return "\n".join(lines) + "\n"


_PARAMS = ("# Keyword arguments for `load_environment`.", "# [environment.params]", '# split = "train"')


def _starter_defaults(algorithm: Algorithm, model: str) -> dict[str, Any]:
    filled = train_defaults(algorithm, model, False)
    return {
        key.name: key.default if key.default is not None else filled[key.name]
        for key in all_keys()
        if key.section == "train" and (key.default is not None or key.name in filled)
    }


def _commented(section: str, values: dict[str, Any]) -> Iterator[str]:
    texts = {key.name: key.text for key in all_keys() if key.section == section}
    for name, value in values.items():
        yield ""
        yield from (f"# {line}" for line in wrap(texts[name], 98))
        yield f"# {name} = {_toml(value)}"


def _toml(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-") if 0 < value < 1e-3 else repr(value)
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return json.dumps(value, ensure_ascii=False)
