"""The catalog of base models: what ships, and what the operator of this installation added.

Owns the form of an entry, the merging of both files and the lookup by id. The facts are data in
`models.toml`. It loads no weights and asks no hub.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from flash.errors import InvalidInput, ModelError

PACKAGE_FOLDER = Path(__file__).resolve().parent
_FORM = "docs/models.md shows the form of an entry"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_Size = Annotated[int, Field(ge=1)]


class _Fact(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class LinearAttention(_Fact):
    """Sizes of a Gated-DeltaNet layer."""

    key_heads: _Size
    value_heads: _Size
    head_dim: _Size
    conv: _Size


class Shape(_Fact):
    """The text model's sizes. `ffn` is one expert's width where there are experts."""

    hidden: _Size
    ffn: _Size
    layers: _Size
    full_layers: int = Field(ge=0)  # layers with full attention; the others are linear attention
    heads: _Size
    kv_heads: _Size
    head_dim: _Size
    vocab: _Size
    tied: bool
    linear: LinearAttention | None = None


class Experts(_Fact):
    count: _Size
    active: _Size


class Provenance(_Fact):
    """Who says so, and when it was put together."""

    source: str = Field(min_length=1)
    date: str = Field(pattern=r"^\d{4}-\d{2}$")


class ChatFacts(_Fact):
    """What rendering and stopping need that a tokenizer's files do not reliably say."""

    stop_ids: tuple[int, ...] = ()
    think_open: str = "<think>"
    think_close: str = "</think>"
    default_thinking: bool | Literal["model"] | None = None


class ModelEntry(_Fact):
    id: str = Field(min_length=1)
    title: str | None = None  # the size as its publisher names it: "4.7B"
    params: _Size
    active: _Size | None = None  # parameters at work on one token; None: all
    layout: str
    thinking: bool = False
    rank_cap: _Size = 64
    context: _Size
    revision: str | None = None
    path: str | None = None  # absolute once loaded
    licence: str | None = None
    note: str | None = None
    shape: Shape | None = None
    experts: Experts | None = None
    chat: ChatFacts = ChatFacts()
    facts: Provenance | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> ModelEntry:
        """What one key says must go with what another says."""
        if self.path is None and not _HUB_ID.fullmatch(self.id):
            raise ValueError(f"id = {self.id!r:.80}: without a path it must be a Hugging Face id, \"owner/name\"")
        if self.path is not None and self.revision is not None:
            raise ValueError("revision: a folder has none; give path or revision, not both")
        shape, experts = self.shape, self.experts
        if shape is not None and shape.full_layers > shape.layers:
            raise ValueError(f"shape.full_layers = {shape.full_layers}: must be at most shape.layers, {shape.layers}")
        if shape is not None and shape.heads % shape.kv_heads:
            raise ValueError(f"shape.kv_heads = {shape.kv_heads}: must divide shape.heads, {shape.heads}")
        if experts is not None and experts.active > experts.count:
            raise ValueError(f"experts.active = {experts.active}: must be at most experts.count, {experts.count}")
        return self

    @property
    def source(self) -> str:
        """What to hand to a loader: a folder where there is one, else the Hugging Face id."""
        return self.path or self.id

    @property
    def size(self) -> str:
        """For people: the publisher's name for the size, else computed ("1.1M")."""
        if self.title:
            return self.title
        for unit, scale in (("B", 10**9), ("M", 10**6)):
            if self.params >= scale:
                return f"{self.params / scale:.1f}{unit}"
        return str(self.params)


@dataclass(frozen=True)
class Catalog:
    models: tuple[ModelEntry, ...]

    @cached_property
    def _by_id(self) -> dict[str, ModelEntry]:
        return {entry.id: entry for entry in self.models}

    def __iter__(self) -> Iterator[ModelEntry]:
        return iter(self.models)

    def __contains__(self, model: str) -> bool:
        return model in self._by_id

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self._by_id)

    def get(self, model: str) -> ModelEntry:
        """The entry with this id; a ModelError with the nearest id and `flash models` when there is none."""
        if entry := self._by_id.get(model):
            return entry
        raise ModelError(f"{model!r:.80} is not in the catalog", remedy=self.remedy(model))

    def remedy(self, model: str) -> str:
        """What to tell someone who asked for a model that is not here."""
        return f"{self._hint(model)}`flash models` lists what can be trained; models.toml takes others"

    def _hint(self, model: str) -> str:
        folded = {name.lower(): name for name in self._by_id}
        folded |= {name.rsplit("/", 1)[-1].lower(): name for name in self._by_id}
        near = difflib.get_close_matches(model.strip().lower()[:200], folded, n=1, cutoff=0.6)
        return f"did you mean {folded[near[0]]}? " if near else ""


def flash_home(environ: Mapping[str, str] | None = None) -> Path:
    """`$FLASH_HOME`, by default `~/.flash`."""
    named = (os.environ if environ is None else environ).get("FLASH_HOME")
    return Path(named).expanduser() if named else Path.home() / ".flash"


def load_catalog(home: Path | None = None) -> Catalog:
    """The shipped models, then the operator's from `models.toml` in `home` (default: `$FLASH_HOME`).

    An operator's entry with a shipped id replaces it. A faulty file is an InvalidInput that names file
    and entry.
    """
    entries = {entry.id: entry for entry in _read(PACKAGE_FOLDER / "models.toml")}
    own = (home or flash_home()) / "models.toml"
    if own.is_file():
        entries |= {entry.id: entry for entry in _read(own)}
    return Catalog(tuple(entries.values()))


def _read(path: Path) -> list[ModelEntry]:
    try:
        with path.open("rb") as file:
            document = tomllib.load(file)
    except (OSError, ValueError) as error:  # ValueError: broken TOML, or not UTF-8
        raise InvalidInput(f"{path}: {error}", remedy=_FORM) from None
    unknown = sorted(set(document) - {"model"})
    tables = document.get("model", [])
    if unknown or not isinstance(tables, list):
        fault = unknown[0] if unknown else "model"
        raise InvalidInput(f"{path}: {fault}: only [[model]] tables may stand here", remedy=_FORM)
    entries = [_entry(path, number, table) for number, table in enumerate(tables, start=1)]
    ids = [entry.id for entry in entries]
    if repeated := next((each for number, each in enumerate(ids) if each in ids[:number]), None):
        raise InvalidInput(f"{path}: model {repeated}: stands there twice", remedy="remove one of them")
    return entries


def _entry(path: Path, number: int, table: Any) -> ModelEntry:
    try:
        entry = ModelEntry.model_validate(table)
    except ValidationError as error:
        name = table.get("id", f"number {number}") if isinstance(table, dict) else f"number {number}"
        rule = _rule(error.errors(include_url=False)[0])
        raise InvalidInput(f"{path}: model {name!s:.80}: {rule}", remedy=_FORM) from None
    if entry.path is None:
        return entry
    return entry.model_copy(update={"path": str((path.parent / Path(entry.path).expanduser()).resolve())})


def _rule(detail: ErrorDetails) -> str:
    """The first fault of an entry: its key, what stands there, and why that is wrong."""
    places = [str(part) for part in detail["loc"]]
    key = ".".join(places)
    match detail["type"]:
        case "missing":
            return f"{key}: is required and missing"
        case "extra_forbidden":
            near = difflib.get_close_matches(places[-1], _keys(places[:-1]), n=1)
            return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
        case "model_type":
            return f"{key + ': ' if key else ''}must be a table"
        case "value_error":
            return str(detail["ctx"]["error"])
        case _:
            message = detail["msg"]
            return f"{key} = {detail['input']!r:.80}: {message[:1].lower()}{message[1:]}"


def _keys(places: list[str]) -> list[str]:
    """The keys that may stand in a table of an entry, by the way to it."""
    tables: dict[str, type[BaseModel]] = {
        "shape": Shape, "linear": LinearAttention, "experts": Experts, "chat": ChatFacts, "facts": Provenance,
    }  # fmt: skip
    table = tables.get(places[-1], ModelEntry) if places else ModelEntry
    return list(table.model_fields)
