"""Answers that follow a JSON schema: the grammar a schema becomes, and the tokens it allows next.

A thin face over llguidance. Grammars allow no optional white space, so that a small model can't stall in
blanks. Knows no model and no HTTP.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import fill_next_token_bitmask
from numpy.typing import NDArray

from flash.errors import InvalidInput

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_MOST_KEPT = 64  # compiled grammars
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
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # llguidance's Rust side, on schemas that it can't even quote
            raise
        fault, messages = True, ["it is not a schema"]
    if fault:
        reason = " ".join(messages[0].split()) if messages else "it is not valid"
        raise InvalidInput(f"the JSON schema can't be followed: {reason}", remedy="simplify the schema")
    return grammar


def after_thinking(grammar: str, *, opened: bool) -> str:
    """The same answer, after reasoning that says what it likes up to `</think>`.

    `opened` says that the prompt has opened the trace already; else it may open with `<think>`, or not come at
    all. Both tags must be tokens of the model's own.
    """
    schema = json.loads(grammar)["grammars"][0]["json_schema"]
    trace = "thought </think> gap" if opened else "(<think> thought </think> gap)?"
    rules = [
        f"start: {trace} answer",
        "thought: /(?s:.*)/",
        r"gap: /\n{0,2}/",
        f"answer: %json {json.dumps(schema)}",
    ]
    return json.dumps({"grammars": [{"lark_grammar": "\n".join(rules)}]})


class Grammars:
    """Compiles grammars for one tokenizer, and keeps those used last. For many threads."""

    def __init__(self, tokenizer: Any, *, vocabulary: int, stop_ids: Sequence[int]) -> None:
        """`vocabulary`: how many logits the model has, which may be more than there are tokens."""
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._stop_ids = list(stop_ids)
        self._lock = threading.Lock()
        self._own: LLTokenizer | None = None  # built for the first grammar: it takes a second for large vocabularies
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def matcher(self, grammar: str) -> LLMatcher:
        """A fresh matcher. Raises InvalidInput for a grammar that is too large or broken."""
        with self._lock:
            if grammar not in self._compiled:
                self._compiled[grammar] = self._compile(grammar)
                if len(self._compiled) > _MOST_KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return self._compiled[grammar].deep_copy()

    def _compile(self, grammar: str) -> LLMatcher:
        if self._own is None:
            if not getattr(self._tokenizer, "is_fast", False):
                raise InvalidInput("this model's tokenizer can't follow a JSON schema: it is not a fast one")
            self._own = from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=self._stop_ids)
        matcher = LLMatcher(self._own, grammar, log_level=0)
        if matcher.is_error():
            raise InvalidInput(f"the grammar can't be followed: {' '.join(matcher.get_error().split())}")
        return matcher


def banned(matchers: Sequence[LLMatcher | None], vocabulary: int) -> NDArray[np.bool_]:
    """(rows, vocabulary): true for tokens that a row's matcher forbids next; rows without one are all false."""
    allowed = np.full((len(matchers), (vocabulary + 31) // 32), -1, dtype=np.int32)
    for row, matcher in enumerate(matchers):
        if matcher is not None:
            fill_next_token_bitmask(matcher, allowed, row)
    bits = np.unpackbits(allowed.view(np.uint8), axis=1, bitorder="little")[:, :vocabulary]
    return bits == 0
