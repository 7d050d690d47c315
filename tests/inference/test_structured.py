"""Answers under a JSON schema: they parse, they validate, and they come to an end."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher
from tests.inference.test_continuous import engine_of, serve

import flash.catalog.nano as nano
from flash.errors import InvalidInput
from flash.inference.continuous import ContinuousEngine
from flash.inference.engine import Request, Sampling
from flash.inference.loading import load_base
from flash.inference.structured import Grammars, banned, compile_schema

NANO = Path(nano.__path__[0])
WORDS = ("red", "green", "naïve", "a b", 'say "hi"', "back\\slash", "日本", "line\nbreak", "")


def bounded_schema(draw: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema whose every answer is short: all strings, numbers, lists and objects have an upper bound."""
    kinds = ["enum", "const", "integer", "number", "boolean", "null", "string", "pattern", "format", "ref"]
    if depth:
        kinds += ["array", "object", "object", "object", "anyOf", "allOf"]
    kind = draw.choice(kinds)
    if kind == "enum":
        return {"enum": draw.sample([*WORDS, 1, -2.5, True, None, [1], {"k": "v"}], draw.randrange(1, 5))}
    if kind == "const":
        return {"const": draw.choice([*WORDS, 7, False])}
    if kind == "integer":
        low = draw.randrange(-1000, 1000)
        return {"type": "integer", "minimum": low, "maximum": low + draw.randrange(0, 500)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "maximum": draw.randrange(1, 100), "multipleOf": 0.25}
    if kind in ("boolean", "null"):
        return {"type": kind}
    if kind == "string":
        least = draw.randrange(0, 4)
        return {"type": "string", "minLength": least, "maxLength": least + draw.randrange(0, 12)}
    if kind == "pattern":
        return {"type": "string", "pattern": draw.choice(["^[a-f]{2,6}$", "^(yes|no|maybe)$", r"^\d{3}-\d{4}$"])}
    if kind == "format":
        return {"type": "string", "format": draw.choice(["date", "uuid"])}
    if kind == "ref":
        definitions = {"t": {"type": ["boolean", "null"]}}
        return {"$defs": definitions, "type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 3}
    if kind == "array":
        least = draw.randrange(0, 3)
        return {
            "type": "array", "items": bounded_schema(draw, depth - 1), "minItems": least,
            "maxItems": least + draw.randrange(0, 3),
        }  # fmt: skip
    if kind == "object":
        names = draw.sample(["name", "id", "größe", "a", "b c", "tags", 'q"'], draw.randrange(0, 5))
        return {
            "type": "object", "properties": {name: bounded_schema(draw, depth - 1) for name in names},
            "required": [name for name in names if draw.random() < 0.7], "additionalProperties": False,
        }  # fmt: skip
    if kind == "anyOf":
        return {"anyOf": [bounded_schema(draw, depth - 1) for _ in range(draw.randrange(1, 4))]}
    return {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": draw.randrange(3, 90)}]}


def check_schemas(count: int, seed: int) -> None:
    draw = random.Random(seed)
    base = load_base(NANO, device="cpu")
    schemas, requests = [], []
    while len(schemas) < count:
        schema = bounded_schema(draw)
        if "$ref" in json.dumps(schema) and "$defs" not in schema:
            continue  # definitions belong to the top
        number = len(schemas)
        prompt = base.tokenizer(f"Answer in JSON, case {number}: ").input_ids
        sampling = Sampling(
            400, temperature=(0.0, 1.0, 1.5)[number % 3], top_p=(1.0, 0.9)[number % 2], seed=number,
            grammar=compile_schema(schema),
        )  # fmt: skip
        schemas.append(schema)
        requests.append(Request(tuple(prompt), sampling, n=1 + number % 2))
    stopped = total = 0
    with engine_of(base, max_waiting=count) as engine:
        for schema, group in zip(schemas, serve(engine, requests), strict=True):
            for completion in group:
                total += 1
                if completion.finish_reason != "stop":
                    continue
                stopped += 1
                assert completion.tokens[-1] in base.stop_ids
                text = base.tokenizer.decode(completion.tokens[:-1])
                jsonschema_rs.validate(schema, json.loads(text))
    assert stopped >= 0.95 * total


def test_answers_validate_and_stop() -> None:
    check_schemas(60, seed=1)


@pytest.mark.slow
def test_a_thousand_schemas() -> None:
    check_schemas(1000, seed=2)


def test_schemas_and_free_text_share_a_batch() -> None:
    base = load_base(NANO, device="cpu")
    prompt = tuple(base.tokenizer("Tell me: ").input_ids)
    yes_or_no = Sampling(20, seed=5, top_logprobs=2, grammar=compile_schema({"enum": ["yes", "no"]}))
    free = Request(prompt, Sampling(20, seed=5, temperature=0.8), n=2)
    with engine_of(base) as engine:
        [alone] = serve(engine, [free])
        bound, beside = serve(engine, [Request(prompt, yes_or_no, n=8), free])
    assert [completion.tokens for completion in beside] == [completion.tokens for completion in alone]
    answers = {base.tokenizer.decode(completion.tokens[:-1]) for completion in bound}
    assert answers == {'"yes"', '"no"'}


def test_any_object_is_an_object() -> None:
    base = load_base(NANO, device="cpu")
    request = Request((5, 6), Sampling(300, seed=1, grammar=compile_schema(None)), n=4)
    with engine_of(base) as engine:
        [group] = serve(engine, [request])
    stopped = [completion for completion in group if completion.finish_reason == "stop"]
    for completion in stopped:
        assert isinstance(json.loads(base.tokenizer.decode(completion.tokens[:-1])), dict)
    for completion in group:
        assert base.tokenizer.decode(completion.tokens).startswith("{")


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "banana"}, "banana"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"$ref": "http://127.0.0.1:9/schema"}, "retriev"),
        ({"type": "array", "items": {}, "uniqueItems": True}, "uniqueItems"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "oneOf"),
        ({"type": "array", "minItems": 5, "maxItems": 3}, "minItems"),
        ({"x-guidance": {"lenient": True}, "if": {}, "then": {}}, "if"),
        (True, "object"),
    ],
)
def test_what_cannot_be_followed_is_one_clear_line(schema: Any, says: str) -> None:
    with pytest.raises(InvalidInput, match=says) as refused:
        compile_schema(schema)
    assert "\n" not in str(refused.value) and "simplify" in str(refused.value)


KEYS = ["type", "properties", "items", "enum", "anyOf", "$ref", "pattern", "required", "minLength"]
nonsense = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=12,
)


@given(nonsense)
def test_nonsense_is_refused_or_compiled_and_never_crashes(schema: Any) -> None:
    try:
        assert not LLMatcher.validate_grammar(compile_schema(schema))
    except InvalidInput as refused:
        assert "\n" not in str(refused)


def test_forbidden_tokens_are_those_that_a_matcher_does_not_accept() -> None:
    base = load_base(NANO, device="cpu")
    size = 640
    grammars = Grammars(base.tokenizer, vocabulary=size, stop_ids=base.stop_ids)
    matcher = grammars.matcher(compile_schema({"type": "integer", "minimum": 10, "maximum": 99}))
    table = banned([None, matcher], size)
    assert table.shape == (2, size) and not table[0].any()
    for token in range(size):
        assert table[1, token] == (not grammars.matcher(
            compile_schema({"type": "integer", "minimum": 10, "maximum": 99})
        ).consume_token(token))  # fmt: skip
    # after a whole answer only the end is left, by any of the model's end tokens
    [one, nine] = (base.tokenizer.convert_tokens_to_ids(digit) for digit in "19")
    assert matcher.consume_token(one) and matcher.consume_token(nine)
    allowed = {token for token, forbidden in enumerate(banned([matcher], size)[0]) if not forbidden}
    assert allowed == set(base.stop_ids)


def test_a_tokenizer_that_is_not_fast_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(InvalidInput, match="tokenizer"):
        Grammars(Slow(), vocabulary=9, stop_ids=(1,)).matcher(compile_schema(None))


def test_the_engine_refuses_a_broken_grammar() -> None:
    base = load_base(NANO, device="cpu")
    engine = ContinuousEngine(base)
    with pytest.raises(InvalidInput, match="grammar"):
        engine.submit(Request((1,), Sampling(3, grammar="start: ((")), print)
    engine.close()
