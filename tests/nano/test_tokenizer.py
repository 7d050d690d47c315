"""The shipped tokenizer keeps every byte, splits every digit, and renders chats prefix by prefix."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from nano.tokenizer import MARKUP_TOKENS, SPECIAL_TOKENS, build_tokenizer
from nano.train import MIXTURE

QUESTION = {"role": "user", "content": "What is 47 + 38?"}
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


def render(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def prompt_of(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    return render(tokenizer, messages, add_generation_prompt=True, **options)


@settings(max_examples=200)
@given(text=st.text())
def test_any_text_survives_a_round_trip(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    plain = text
    assert tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == plain


@settings(max_examples=100)
@given(text=st.from_regex(r"[0-9a-z +\-\n]{0,40}", fullmatch=True))
def test_digits_and_line_breaks_are_single_tokens(tokenizer: Any, text: str) -> None:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))
    for symbol in "0123456789":
        assert tokens.count(symbol) == text.count(symbol)
    assert tokens.count("Ċ") == text.count("\n")


def test_every_byte_is_in_the_vocabulary(tokenizer: Any) -> None:
    assert all(len(tokenizer.encode(chr(code), add_special_tokens=False)) >= 1 for code in range(256))
    assert len([token for token in tokenizer.get_vocab() if len(token) == 1]) == 256


def test_chat_marks_are_special_and_markup_is_not(tokenizer: Any) -> None:
    for token in (*SPECIAL_TOKENS, *MARKUP_TOKENS):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    text = "".join(MARKUP_TOKENS)
    ids = tokenizer.encode(text + "".join(SPECIAL_TOKENS), add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)


def test_the_shipped_tokenizer_is_what_the_script_builds(tokenizer: Any) -> None:
    built = build_tokenizer(MIXTURE)
    assert built.get_vocab() == tokenizer.get_vocab()
    assert built.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    ("options", "ending"),
    [
        ({"enable_thinking": True}, "<|im_start|>assistant\n<think>\n"),
        ({"enable_thinking": False}, "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        ({}, "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    ],
)
def test_the_generation_prompt_follows_enable_thinking(tokenizer: Any, options: dict[str, bool], ending: str) -> None:
    expected = f"<|im_start|>user\nWhat is 47 + 38?<|im_end|>\n{ending}"
    assert prompt_of(tokenizer, [QUESTION], **options) == expected


CONVERSATIONS: list[list[dict[str, Any]]] = [
    [QUESTION, {"role": "assistant", "content": "85"}],
    [{"role": "system", "content": "Be brief."}, QUESTION, {"role": "assistant", "content": "85"}],
    [
        QUESTION,
        {"role": "assistant", "content": "85"},
        {"role": "user", "content": "Add 1"},
        {"role": "assistant", "content": "86"},
    ],
    [
        QUESTION,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "add", "arguments": {"a": 47, "exact": True, "unit": "kg"}}}],
        },
        {"role": "tool", "content": "85"},
        {"role": "tool", "content": "done"},
        {"role": "assistant", "content": "85"},
    ],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("thinking", [False, True])
def test_a_prompt_is_a_token_prefix_of_its_supervised_text(
    tokenizer: Any, messages: list[dict[str, Any]], thinking: bool
) -> None:
    if thinking:
        messages = [
            {**message, "reasoning_content": "7+8=15\n4+3+1=8"} if message["role"] == "assistant" else message
            for message in messages
        ]
    whole = tokenizer.encode(render(tokenizer, messages, tools=[TOOL]), add_special_tokens=False)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        text = prompt_of(tokenizer, messages[:index], enable_thinking=thinking, tools=[TOOL])
        prompt = tokenizer.encode(text, add_special_tokens=False)
        assert whole[: len(prompt)] == prompt


def test_reasoning_given_apart_or_inside_the_content_renders_alike(tokenizer: Any) -> None:
    apart = {"role": "assistant", "reasoning_content": "7+8=15", "content": "85"}
    inside = {"role": "assistant", "content": "<think>\n7+8=15\n</think>\n\n85"}
    assert render(tokenizer, [QUESTION, apart]) == render(tokenizer, [QUESTION, inside])
    assert render(tokenizer, [QUESTION, apart]).endswith("<think>\n7+8=15\n</think>\n\n85<|im_end|>\n")


def test_tools_are_listed_and_calls_and_results_rendered(tokenizer: Any) -> None:
    text = render(tokenizer, CONVERSATIONS[3], tools=[TOOL])
    assert '"name": "add"' in text.split("</tools>")[0]
    assert "<tool_call>\n<function=add>\n<parameter=a>\n47\n</parameter>\n<parameter=exact>\ntrue\n" in text
    assert "<parameter=unit>\nkg\n</parameter>\n</function>\n</tool_call><|im_end|>" in text
    results = "<tool_response>\n85\n</tool_response>\n<tool_response>\ndone\n</tool_response><|im_end|>"
    assert f"<|im_start|>user\n{results}" in text


def test_content_in_text_parts_is_joined(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "47 + 38?"}]
    assert render(tokenizer, [{"role": "user", "content": parts}]) == render(tokenizer, [QUESTION])


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([], "at least one message"),
        ([{"role": "developer", "content": "x"}], "Unknown role developer"),
        ([QUESTION, {"role": "system", "content": "x"}], "must come first"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "text only"),
        (
            [QUESTION, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
            "must be a mapping",
        ),
    ],
)
def test_what_cannot_be_rendered_is_refused(tokenizer: Any, messages: list[dict[str, Any]], fault: str) -> None:
    with pytest.raises((TemplateError, ValueError), match=fault):
        render(tokenizer, messages)
