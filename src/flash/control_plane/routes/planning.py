"""Before a run: what a config may hold, and what one would come to. Nothing is recorded here.

The form for a new run is made from the same declaration as the validation (`flash.config.reference`).
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from flash.catalog.catalog import load_catalog
from flash.catalog.cost import Dataset, plan
from flash.catalog.hardware import gpu_classes
from flash.config.load import parse_config
from flash.config.recipes import resolve, train_defaults
from flash.config.reference import all_keys, json_schema
from flash.control_plane.auth import Me, Plane, Reader
from flash.control_plane.estimating import packaged_rows, plan_run
from flash.control_plane.submitting import find_source, pin_environment
from flash.errors import FlashError

router = APIRouter(prefix="/api", tags=["pages"])


class ModelView(BaseModel):
    id: str
    size: str
    params: int
    thinking: bool
    rank_cap: int
    context: int
    licence: str | None
    note: str | None


class ModelList(BaseModel):
    models: list[ModelView]


@router.get("/models")
def models(me: Me, plane: Plane) -> ModelList:
    """The base models that this server trains and serves."""
    return ModelList(
        models=[
            ModelView(
                id=entry.id,
                size=entry.size,
                params=entry.params,
                thinking=entry.thinking,
                rank_cap=entry.rank_cap,
                context=entry.context,
                licence=entry.licence,
                note=entry.note,
            )
            for entry in load_catalog(plane.settings.home)
        ]
    )


class KeyView(BaseModel):
    section: str
    name: str
    type: str
    default: Any
    required: bool
    algorithm: str | None
    text: str
    rule: str


class Form(BaseModel):
    # Not `schema`: Pydantic's models have a method of that name.
    json_schema_: dict[str, Any] = Field(serialization_alias="schema")
    keys: list[KeyView]
    recipes: dict[str, dict[str, dict[str, Any]]]  # algorithm → model ("" for all others) → train defaults


@router.get("/config/form")
def form(me: Me, plane: Plane) -> Form:
    """Every key of a config: type, rule, text, and what the recipes fill in."""
    names = ["", *load_catalog(plane.settings.home).ids]
    return Form(
        json_schema_=json_schema(),
        keys=[
            KeyView(
                section=key.section,
                name=key.name,
                type=key.type,
                default=key.default,
                required=key.required,
                algorithm=key.algorithm,
                text=key.text,
                rule=key.rule,
            )
            for key in all_keys()
        ],
        recipes={
            "sft": {name: train_defaults("sft", name, False) for name in names},
            "grpo": {name: train_defaults("grpo", name, False) for name in names},
        },
    )


class PlanRequest(BaseModel):
    config: dict[str, Any]
    seed: int = Field(default=0, ge=0, lt=2**63)


class Plan(BaseModel):
    """What `--dry-run` and `--cost` say, for this server's own devices and data."""

    spec: dict[str, Any]
    warnings: list[str]
    estimate: dict[str, Any] | None  # on the slowest device here that fits; none where nothing can be told
    wall_clock_limit_s: float | None
    alternatives: list[dict[str, Any]]  # reference GPUs, cheapest first
    problem: str | None = None  # why a submit would be refused all the same


@router.post("/plan")
def make_plan(body: PlanRequest, me: Reader, plane: Plane) -> Plan:
    """Checks a config as a submit would, and says what the run would come to."""
    catalog = load_catalog(plane.settings.home)
    config, warnings = parse_config(body.config, catalog=catalog)
    problem: str | None = None
    source = size = None
    try:
        with plane.database.read() as connection:
            source = find_source(connection, me, config)
            package = pin_environment(connection, me, config) if config.environment.ref.kind != "github" else None
        if package is not None:
            size = packaged_rows(plane, package.sha256, package.size, config.environment.params)
    except FlashError as error:
        problem = str(error)
    spec = resolve(config, seed=body.seed, source=source, catalog=catalog)
    entry = catalog.get(spec.model)
    dataset = None
    if size is not None:
        characters = size.input + (size.output if spec.algorithm == "sft" else 0.0)
        dataset = Dataset.of_text(entry, size.rows, characters)
    estimate, limit = None, None
    try:
        planned = plan_run(plane, spec, entry, size)
        estimate, limit = planned.estimate, planned.wall_clock_limit_s
    except FlashError as error:
        problem = problem or str(error)
    return Plan(
        spec=spec.model_dump(mode="json"),
        warnings=warnings,
        estimate=estimate,
        wall_clock_limit_s=limit,
        alternatives=_alternatives(spec, entry, dataset),
        problem=problem,
    )


def _alternatives(spec: Any, entry: Any, dataset: Dataset | None) -> list[dict[str, Any]]:
    names = ("hardware", "usd_per_hour", "seconds_per_step", "wall_clock_s", "usd", "memory_bytes")
    try:
        chosen, others = plan(spec, entry, [gpu.hardware for gpu in gpu_classes()], dataset)
    except FlashError:  # it fits none of them, or the model has no shape
        return []
    documents = [each.document() for each in (chosen, *others)]
    return [{name: document[name] for name in names} for document in documents]
