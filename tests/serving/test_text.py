"""Tokens become text: however an answer is cut into pieces, the pieces together are the same."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flash.catalog.catalog import load_catalog
from flash.serving.text import Characters, StopCutter, ThinkingSplitter, ToolCall, ToolCalls, Vocabulary


@pytest.fixture(scope="module")
def nano():
    return AutoTokenizer.from_pretrained(load_catalog().get("flash/nano").source)


@pytest.fixture(scope="module")
def llama():
    """A vocabulary in Llama's manner: "▁" for a space, and a token for each byte."""
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Hel", "lo", "▁", "▁wörld", "!", "日"]
    model = models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def read(vocabulary: Vocabulary, tokens: list[int]) -> list[str]:
    characters = Characters(vocabulary)
    return [*(characters.add(token) for token in tokens), characters.end()]


def whole(tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", ["plain", "Grüße, 日本語 und 🙂🙃!", "é" * 5, "a <think>b</think> c"])
def test_text_comes_back_in_whole_characters(nano, text):
    vocabulary = Vocabulary(nano)
    tokens = nano(text, add_special_tokens=False)["input_ids"]
    pieces = read(vocabulary, tokens)
    assert "".join(pieces) == text
    assert "�" not in "".join(pieces)
    assert b"".join(vocabulary.bytes_of(token) for token in tokens) == text.encode()


def test_random_tokens_read_as_the_tokenizer_decodes_them(nano):
    vocabulary, draw = Vocabulary(nano), random.Random(5)
    for _ in range(200):
        tokens = [draw.randrange(len(nano)) for _ in range(draw.randrange(1, 40))]
        assert "".join(read(vocabulary, tokens)) == whole(nano, tokens)


def test_a_vocabulary_with_byte_tokens(llama):
    vocabulary = Vocabulary(llama)
    ids = llama.convert_tokens_to_ids(["▁Hel", "lo", "▁wörld", "<0xE6>", "<0x97>", "<0xA5>", "!", "</s>"])
    pieces = read(vocabulary, ids)
    assert "".join(pieces) == whole(llama, ids) == "Hello wörld日!"
    assert pieces[3:6] == ["", "", "日"]


def test_labels_name_half_a_character_by_its_bytes(nano):
    vocabulary = Vocabulary(nano)
    halves = nano("日", add_special_tokens=False)["input_ids"]
    assert "".join(vocabulary.label(token) for token in halves) == "bytes:\\xe6bytes:\\x97bytes:\\xa5"
    assert vocabulary.label(nano.convert_tokens_to_ids("<think>")) == "<think>"


# --- pieces of any size -----------------------------------------------------------------------------------


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = sorted({cut % (len(text) + 1) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


CUTS = st.lists(st.integers(0, 200), max_size=12)


@settings(max_examples=200)
@given(
    text=st.text("ab#\n", max_size=40),
    stops=st.lists(st.text("ab#\n", min_size=1, max_size=4), max_size=3),
    cuts=CUTS,
)
def test_a_stop_cuts_alike_however_the_text_comes(text, stops, cuts):
    def run(pieces: list[str]) -> str:
        cutter = StopCutter(stops)
        shown = "".join(cutter.add(piece) for piece in pieces)
        assert not any(stop in shown for stop in stops)
        return shown if cutter.cut else shown + cutter.end()

    assert run(pieces_of(text, cuts)) == run(list(text))
    if not any(stop in text for stop in stops):
        assert run([text]) == text


def split(pieces: list[str], *, opened: bool) -> tuple[str, str]:
    splitter = ThinkingSplitter(opened=opened)
    parts = [splitter.add(piece) for piece in pieces] + [splitter.end()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("\n2+2 is 4.\n</think>\n\n4", True, ("2+2 is 4.", "4")),
        ("<think>\nsum\n\n</think>\n\nfour\n", False, ("sum", "four\n")),
        ("  <think>a</think>b", False, ("a", "b")),
        ("no trace at all <think>", False, ("", "no trace at all <think>")),
        ("never closed </thi", True, ("never closed </thi", "")),
        ("<thin", False, ("", "<thin")),
        ("a\n\nb</think>c</think>d", True, ("a\n\nb", "c</think>d")),
        ("</think>\n", True, ("", "")),
    ],
)
def test_reasoning_is_apart_from_the_answer(text, opened, expected):
    for size in (1, 2, 3, 7, len(text)):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert split(pieces, opened=opened) == expected


@settings(max_examples=200)
@given(
    parts=st.lists(st.sampled_from(["<think>", "</think>", "\n", "<", "a", " ", "think>"]), max_size=12),
    opened=st.booleans(),
    cuts=CUTS,
)
def test_reasoning_splits_alike_however_the_text_comes(parts, opened, cuts):
    text = "".join(parts)
    assert split(pieces_of(text, cuts), opened=opened) == split([text], opened=opened)


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
TAGGED = "... <tool_call> ..."
BARE = '... <function name="...'


def call(pieces: list[str], template: str) -> tuple[str, list[ToolCall]]:
    reader = ToolCalls(template, [WEATHER])
    found = [reader.add(piece) for piece in pieces]
    return "".join(text for text, _ in found) + reader.end(), [each for _, calls in found for each in calls]


@pytest.mark.parametrize(
    ("text", "template", "left", "calls"),
    [
        (
            "Let me look.\n\n<tool_call>\n<function=weather>\n<parameter=city>\n12\n</parameter>\n"
            "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
            TAGGED,
            "Let me look.",
            [ToolCall("weather", '{"city": "12", "days": 3}')],
        ),
        (
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
            '<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>',
            TAGGED,
            "",
            [ToolCall("weather", '{"city": "Köln"}'), ToolCall("weather", '{"city": "Ulm"}')],
        ),
        (
            '<function name="weather"><param name="city"><![CDATA[a<b]]></param>'
            '<param name="days">2</param></function>',
            BARE,
            "",
            [ToolCall("weather", '{"city": "a<b", "days": 2}')],
        ),
        ("<tool_call>nonsense</tool_call>", TAGGED, "<tool_call>nonsense</tool_call>", []),
        ('<tool_call>{"name": "x", "arguments": {"a": NaN}}</tool_call>', TAGGED, None, []),
        ("half <tool_call>{", TAGGED, "half <tool_call>{", []),
        ("a < b <tool", TAGGED, "a < b <tool", []),
        ("two\n\nlines\n", TAGGED, "two\n\nlines\n", []),
    ],
)
def test_tool_calls_are_apart_from_the_text(text, template, left, calls):
    for size in (1, 2, 5, len(text)):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        shown, found = call(pieces, template)
        assert found == calls
        assert shown == (text if left is None else left)


def test_a_true_is_read_as_some_templates_print_it():
    reader = ToolCalls(TAGGED, [])
    _, calls = reader.add("<tool_call><function=f><parameter=on>True</parameter></function></tool_call>")
    assert calls == [ToolCall("f", '{"on": true}')]
