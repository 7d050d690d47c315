"""Answers that follow a JSON schema: the grammar a schema becomes, and the tokens it allows next.

A thin face over llguidance. Grammars allow no optional white space, so that a small model can't stall in
blanks. Knows no model and no HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher

from flash.errors import InvalidInput

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_RULES: JsonCompileOptions = {"whitespace_flexible": False, "coerce_one_of": False, "lenient": False}


def compile_schema(schema: Mapping[str, Any] | bool | None) -> str:
    """The grammar of a JSON schema, for `Sampling.grammar`; None is any JSON object (`json_object`).

    Needs no tokenizer. Raises InvalidInput, one line, for what is no schema or can't be followed.
    """
    wanted = _ANY_OBJECT if schema is None else schema
    try:
        grammar: str = LLMatcher.grammar_from_json_schema(json.dumps(wanted), overrides=_RULES)
        fault, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    except (TypeError, ValueError, RecursionError) as error:
        fault, messages = True, [str(error)]
    if fault:
        reason = " ".join(messages[0].split()) if messages else "it is not valid"
        raise InvalidInput(f"the JSON schema can't be followed: {reason}", remedy="simplify the schema")
    return grammar
