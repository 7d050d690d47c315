# ruff: noqa: E501  (templates are one line each)
"""Chat rendering against `apply_chat_template`, for templates of every catalog layout's manner."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flash.catalog.catalog import load_catalog
from flash.errors import InvalidInput
from flash.inference.chat import ChatRenderer, fit_messages, split_thinking

# Own reductions of how the catalog's layouts write an assistant's turn.
_HEAD = """{%- for m in messages -%}{%- if m.role == 'tool' -%}<|im_start|>user
<tool_response>{{ m.content }}</tool_response><|im_end|>
{% elif m.role != 'assistant' -%}{%- if m.role not in ('system', 'user') -%}{{ raise_exception('no such role') }}{%- endif -%}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% else -%}{{ '<|im_start|>assistant\n' }}"""
_CALLS = """{%- for c in m.tool_calls or [] -%}<tool_call>{{ c.function.name }}{%- for k, v in c.function.arguments.items() -%}<{{ k }}={{ v }}>{%- endfor -%}</tool_call>{%- endfor -%}<|im_end|>
{% endif -%}{%- endfor -%}"""
_SPLIT = """{%- if '</think>' in m.content -%}{%- set think = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}{%- set text = m.content.split('</think>')[-1].lstrip('\\n') -%}{%- else -%}{%- set think = m.reasoning_content or '' -%}{%- set text = m.content -%}{%- endif -%}"""
TEMPLATES = {
    # think block in every turn; the prompt opens the trace itself when thinking is on
    "qwen3_5": _HEAD + _SPLIT + "{{ '<think>\\n' + think + '\\n</think>\\n\\n' + text }}" + _CALLS
    + "{%- if add_generation_prompt -%}<|im_start|>assistant\n{% if enable_thinking -%}{{ '<think>\\n' }}"
      "{%- else -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}{%- endif -%}",
    # think block in the last turn only; the model opens its trace
    "qwen3": _HEAD + _SPLIT + "{%- if loop.last or think -%}{{ '<think>\\n' + think + '\\n</think>\\n\\n' }}{%- endif -%}{{ text }}"
    + _CALLS + "{%- if add_generation_prompt -%}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking -%}"
               "{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}{%- endif -%}",
    # think block only with reasoning: plain targets differ from the thinking-off prompt
    "minicpm5": _HEAD + _SPLIT + "{%- if think -%}{{ '<think>\\n' + think + '\\n</think>\\n\\n' }}{%- endif -%}{{ text }}" + _CALLS
    + "{%- if add_generation_prompt -%}<|im_start|>assistant\n{% if enable_thinking -%}{{ '<think>\\n' }}"
      "{%- else -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}{%- endif -%}",
}


@cache
def tokenizer(layout: str):
    if layout == "nano":
        return AutoTokenizer.from_pretrained(load_catalog().get("flash/nano").source)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: number for number, symbol in enumerate(alphabet)}
    merges = [("Ċ", "Ċ"), ("t", "h"), ("th", "i"), ("thi", "n"), ("thin", "k")]  # a line break merges with the next
    vocab |= {first + second: len(vocab) + number for number, (first, second) in enumerate(merges)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATES[layout]
    return fast


LAYOUTS = ["nano", *TEMPLATES]
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
either_way = pytest.mark.parametrize("thinking", [False, True])
texts = st.text(st.characters(codec="utf-8", exclude_characters="<>|\0"), min_size=1, max_size=12).filter(str.strip)
TOOL_CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]}


def reference(layout: str, messages: list, *, prompt: bool, thinking: bool) -> list[int]:
    """What transformers itself gives for messages that need no fitting."""
    return tokenizer(layout).apply_chat_template(
        messages, add_generation_prompt=prompt, enable_thinking=thinking, return_dict=True
    )["input_ids"]


@every_layout
@either_way
@settings(max_examples=25)
@given(system=st.none() | texts, user=texts, answer=texts, trace=st.none() | texts)
def test_targets_are_the_templates_own_text_trained_after_the_prompt(
    layout: str, thinking: bool, system: str | None, user: str, answer: str, trace: str | None
) -> None:
    renderer = ChatRenderer(tokenizer(layout), thinking=thinking)
    opening = [{"role": "system", "content": system}] if system else []
    opening.append({"role": "user", "content": user})
    content = answer if trace is None else f"<think>\n{trace}\n</think>\n\n{answer}"
    completion = [{"role": "assistant", "content": content}]

    target = renderer.render_target(opening, completion)
    prompt = renderer.render_prompt(opening)

    assert prompt == reference(layout, opening, prompt=True, thinking=thinking)
    if layout == "minicpm5" and not thinking and trace is None:
        # its template leaves out of the finished turn what its prompt ends with: the target has it nevertheless
        whole = tokenizer(layout).apply_chat_template(opening + completion, tokenize=False)
        before = renderer.prompt_text(opening).removesuffix("<think>\n\n</think>\n\n")
        assert whole.startswith(before)
        assert renderer.decode(target.tokens) == renderer.prompt_text(opening) + whole.removeprefix(before)
    else:
        assert list(target.tokens) == reference(layout, opening + completion, prompt=False, thinking=thinking)
    assert list(target.tokens[: target.trained_from]) == prompt[: target.trained_from]
    assert target.trained_from < len(target.tokens)  # never zero trained tokens in silence
    trained = renderer.decode(target.tokens[target.trained_from :])
    assert answer.strip() in trained and trained.rstrip("\n").endswith("<|im_end|>")
    if thinking == (trace is not None):
        assert target.trained_from == len(prompt)  # the supervised prefix is the generation prompt


def odd_tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """Tokenizers that join what others keep apart: words opened with a mark, text rewritten, greedy added tokens."""
    made = {}
    for name, options in {
        "metaspace": {"pre": pre_tokenizers.Metaspace(prepend_scheme="first")},
        "llama 2": {"normalizer": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])},
        "takes spaces before": {"added": AddedToken("<think>", lstrip=True, normalized=False)},
        "takes spaces after": {"added": AddedToken("</think>", rstrip=True, normalized=False)},
        "whole words only": {"added": AddedToken("<think>\n", single_word=True, normalized=False)},
        "normalised": {"added": AddedToken("<think>", normalized=True), "normalizer": normalizers.Prepend("▁")},
        "overlapping": {"added": AddedToken("\n<think", normalized=False)},
        "longer": {"added": AddedToken("<think>\n\n", normalized=False)},
        "split": {"split": True},
    }.items():
        vocab = {character: number for number, character in enumerate("?▁ \nthink1é<>|/_msardueo")}
        merges = [("\n", "<"), ("t", "h"), ("▁", "t"), ("\n", "\n"), ("i", "n"), (" ", " "), ("1", "1"), (">", "\n")]
        vocab |= {first + second: len(vocab) + number for number, (first, second) in enumerate(merges)}
        inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="?"))
        if "pre" in options:
            inner.pre_tokenizer = options["pre"]
        if "normalizer" in options:
            inner.normalizer = options["normalizer"]
        added = [AddedToken(text, normalized=False) for text in ("<|im_end|>", "<|im_start|>", "<think>", "</think>")]
        if "added" in options:
            added = [options["added"], *(token for token in added if token.content != options["added"].content)]
        inner.add_special_tokens(added)
        inner.enable_truncation(7)  # as files may have it; nothing that is trained is cut off by it
        inner.enable_padding(length=5)
        fast = PreTrainedTokenizerFast(tokenizer_object=inner, split_special_tokens=options.get("split", False))
        fast.chat_template = TEMPLATES["qwen3_5"]
        made[name] = fast
    return made


ODD = odd_tokenizers()
fragments = st.lists(
    st.sampled_from(["<think>", "</think>", "t</think>", "<|im_end|>", "<|im_start|>", "<", "|>", " ", "\n", "t", "think",
                     "1", "é", "▁", "\u0301"]), min_size=1, max_size=6,
).map("".join)  # fmt: skip


@pytest.mark.parametrize("name", [*LAYOUTS, *ODD])
@either_way
@settings(max_examples=60)
@given(rows=st.lists(st.tuples(fragments, fragments), max_size=4))
def test_many_targets_are_tokenised_as_one_is(name: str, thinking: bool, rows: list[tuple[str, str]]) -> None:
    renderer = ChatRenderer(ODD[name] if name in ODD else tokenizer(name), thinking=thinking)
    targets = [
        ([{"role": "user", "content": user}], [{"role": "assistant", "content": answer}], f"row {number}")
        for number, (user, answer) in enumerate(rows)
    ]
    together = renderer.render_targets(targets)
    assert together == [renderer.render_target(prompt, completion) for prompt, completion, _ in targets]


def test_of_many_targets_the_wrong_one_is_named() -> None:
    fine, wrong = [{"role": "user", "content": "q"}], [{"role": "nobody", "content": "q"}]
    answer = [{"role": "assistant", "content": "a"}]
    with pytest.raises(InvalidInput, match="row 2: the chat template refuses these messages: no such role"):
        ChatRenderer(tokenizer("qwen3")).render_targets([(fine, answer, "row 1"), (wrong, answer, "row 2")])
    with pytest.raises(InvalidInput, match="row 2"):
        ChatRenderer(tokenizer("qwen3")).render_targets([(fine, answer, "row 1"), ([], answer, "row 2")])


@every_layout
def test_many_prompts_are_each_rendered_as_alone(layout: str) -> None:
    renderer = ChatRenderer(tokenizer(layout), thinking=True)
    system = {"role": "system", "content": "be brief"}
    prompts = [[{"role": "user", "content": text}] for text in ("q", "another", "q")]
    prompts.append([system, *prompts[0], {"role": "assistant", "content": "a"}, *prompts[1]])
    together = renderer.render_prompts([(prompt, "here") for prompt in prompts])
    assert together == [renderer.render_prompt(prompt) for prompt in prompts]
    assert renderer.render_prompts([]) == []


def test_of_many_prompts_the_wrong_one_is_named() -> None:
    fine, wrong = [{"role": "user", "content": "q"}], [{"role": "nobody", "content": "q"}]
    with pytest.raises(InvalidInput, match="row 2: the chat template refuses these messages: no such role"):
        ChatRenderer(tokenizer("qwen3")).render_prompts([(fine, "row 1"), (wrong, "row 2")])
    with pytest.raises(InvalidInput, match="row 2: there are no messages"):
        ChatRenderer(tokenizer("qwen3")).render_prompts([(fine, "row 1"), ([], "row 2")])


@every_layout
def test_a_trace_that_the_template_opens_counts_as_prompt(layout: str) -> None:
    renderer = ChatRenderer(tokenizer(layout), thinking=True)
    target = renderer.render_target(
        [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "<think>\nhm\n</think>\n\na"}]
    )
    trained = renderer.marked(target).split("⟦")[1]
    assert renderer.opens_thinking == (layout != "qwen3")
    assert ("<think>" in trained) == (layout == "qwen3")
    assert trained.endswith("hm\n</think>\n\na<|im_end|>\n⟧")


@every_layout
@either_way
def test_tool_calls_render_and_every_turn_inside_the_target_is_trained(layout: str, thinking: bool) -> None:
    renderer = ChatRenderer(tokenizer(layout), thinking=thinking)
    target = renderer.render_target(
        [{"role": "user", "content": "1+1?"}],
        [TOOL_CALL, {"role": "tool", "content": "2"}, {"role": "assistant", "content": "It is 2."}],
    )
    trained = renderer.decode(target.tokens[target.trained_from :])
    assert "add" in trained and "<tool_response>" in trained and "It is 2." in trained
    assert "1+1?" not in trained


def test_messages_are_made_fit_and_left_as_they_were() -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": ""}]},
        TOOL_CALL,
    ]
    before = repr(messages)
    fitted = fit_messages(messages)
    assert fitted[0] == {"role": "system", "content": "be brief"}
    assert fitted[1]["content"] == "" and fitted[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    assert fitted[2]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert repr(messages) == before


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "text only"),
        ({"role": "user", "content": 3}, "must be text"),
        ({"content": "x"}, "`role` and `content`"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{no"}}]}, "not a JSON object"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "needs a function `name`"),
        ({"role": "robot", "content": "x"}, "chat template refuses.*no such role"),
    ],
)
def test_what_no_template_can_render_names_its_row(message: dict, why: str) -> None:
    renderer = ChatRenderer(tokenizer("qwen3"))
    with pytest.raises(InvalidInput, match=rf"row 7.*{why}"):
        renderer.render_prompt([{"role": "user", "content": "q"}, message], where="row 7")


def test_an_empty_target_is_refused() -> None:
    with pytest.raises(InvalidInput, match="row 2: the target has no messages"):
        ChatRenderer(tokenizer("qwen3")).render_target([{"role": "user", "content": "q"}], [], where="row 2")


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("4", False, ("", "4")),
        (" 4\n", False, ("", " 4\n")),
        ("<think>\n2+2\n</think>\n\n4", False, ("2+2", "4")),
        ("2+2\n</think>\n\n4", True, ("2+2", "4")),
        ("a</think>b</think>c", True, ("a</think>b", "c")),
        ("still going", True, ("still going", "")),
        ("<think>still", False, ("still", "")),
        ("</think>", True, ("", "")),
    ],
)
def test_the_answer_is_what_follows_the_last_closing_tag(text: str, opened: bool, expected: tuple) -> None:
    assert split_thinking(text, opened=opened) == expected


def test_with_thinking_off_text_without_a_closing_tag_is_all_answer() -> None:
    renderer = ChatRenderer(tokenizer("qwen3_5"))
    assert renderer.split_thinking("<think> is a tag") == ("", "<think> is a tag")
    assert renderer.split_thinking("x</think>y") == ("x", "y")
    assert ChatRenderer(tokenizer("qwen3_5"), thinking=True).split_thinking("hm") == ("hm", "")


def test_the_end_token_is_no_part_of_the_answer() -> None:
    renderer = ChatRenderer(tokenizer("qwen3"))
    stop = tokenizer("qwen3").eos_token_id
    tokens = [*tokenizer("qwen3")("42")["input_ids"], stop]
    assert renderer.answer_text(tokens, (stop,)) == "42"


def test_truncation_keeps_the_head() -> None:
    target = ChatRenderer(tokenizer("qwen3")).render_target(
        [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "long answer"}]
    )
    cut = target.truncated(target.trained_from + 2)
    assert cut.tokens == target.tokens[: target.trained_from + 2] and sum(cut.trained) == 2
    assert not any(target.truncated(3).trained) and target.truncated(10_000) is target
