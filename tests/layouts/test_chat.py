"""The catalog's chat templates, with the traps that they are known for, through the one renderer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.layouts.checkpoints import Layout
from transformers import AutoTokenizer

from flash.catalog.catalog import load_catalog
from flash.errors import InvalidInput
from flash.inference.chat import ChatRenderer
from flash.inference.loading import BaseModel

texts = st.text(st.characters(codec="utf-8", exclude_characters="<>|\0&"), min_size=1, max_size=12).filter(
    lambda text: text == text.strip() and text
)  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
CALL = {
    "role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "id": "1", "function": {"name": "add", "arguments": '{"a": 1, "b": true}'}}
    ],
}  # fmt: skip
either_way = pytest.mark.parametrize("thinking", [False, True])


@pytest.fixture
def tokenizer(folder: Any) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@either_way
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(system=st.none() | texts, user=texts, answer=texts, trace=texts)
def test_an_answer_is_trained_after_the_very_prompt_it_is_sampled_after(
    tokenizer: Any, thinking: bool, system: str | None, user: str, answer: str, trace: str
) -> None:
    renderer = ChatRenderer(tokenizer, thinking=thinking)
    opening = [{"role": "system", "content": system}] if system else []
    opening.append({"role": "user", "content": user})
    content = f"<think>\n{trace}\n</think>\n\n{answer}" if thinking else answer
    target = renderer.render_target(opening, [{"role": "assistant", "content": content}])
    prompt = renderer.render_prompt(opening)
    own = tokenizer.apply_chat_template(
        opening, add_generation_prompt=True, enable_thinking=thinking, tokenize=False
    )  # fmt: skip
    assert prompt == tokenizer(own, add_special_tokens=False)["input_ids"]
    assert list(target.tokens[: target.trained_from]) == prompt
    written = f"{trace}\n</think>\n\n{answer}" if thinking else answer
    assert renderer.decode(target.tokens[target.trained_from :]) == f"{written}<|im_end|>\n"


def test_the_templates_opening_token_is_not_doubled(tokenizer: Any) -> None:
    prompt = ChatRenderer(tokenizer).render_prompt([{"role": "user", "content": "hi"}])
    if tokenizer.bos_token_id is not None:
        assert prompt.count(tokenizer.bos_token_id) == (1 if "<s>" in tokenizer.chat_template else 0)


def test_what_some_templates_drop_or_refuse_is_made_fit(tokenizer: Any) -> None:
    renderer = ChatRenderer(tokenizer)
    text = renderer.prompt_text(
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "plus one?"}]},
            CALL,
            {"role": "tool", "content": [{"type": "text", "text": "2"}]},
        ],
        tools=TOOLS,
    )
    assert "Be brief." in text and "one plus one?" in text and '"name": "add"' in text
    assert "<tool_response>\n2\n</tool_response>" in text and "None" not in text


def test_tool_results_that_follow_each_other_share_a_turn(tokenizer: Any) -> None:
    results = [{"role": "tool", "content": str(number)} for number in (2, 3)]
    text = ChatRenderer(tokenizer).prompt_text([{"role": "user", "content": "?"}, CALL, *results])
    assert text.count("<tool_response>") == 2 and text.count("<|im_start|>user") == 2


def test_calls_inside_a_target_are_trained_in_the_models_own_form(layout: Layout, tokenizer: Any) -> None:
    target = ChatRenderer(tokenizer).render_target(
        [{"role": "user", "content": "1+1?"}],
        [CALL, {"role": "tool", "content": "2"}, {"role": "assistant", "content": "2."}],
        tools=TOOLS,
    )
    trained = ChatRenderer(tokenizer).decode(target.tokens[target.trained_from :])
    if layout.layout == "llama":
        written = '<function name="add"><param name="a">1</param><param name="b">true</param></function>'
        assert trained.startswith(written)
    else:
        assert "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>" in trained
    assert "<tool_response>\n2" in trained and trained.endswith("2.<|im_end|>\n")


def test_reasoning_before_the_last_question_is_dropped_and_after_it_is_kept(layout: Layout, tokenizer: Any) -> None:
    earlier = {"role": "assistant", "content": "A", "reasoning_content": "old thought"}
    later = {**CALL, "reasoning_content": "new thought"}
    text = ChatRenderer(tokenizer, thinking=True).prompt_text(
        [{"role": "user", "content": "q"}, earlier, {"role": "user", "content": "r"}, later,
         {"role": "tool", "content": "2"}]
    )  # fmt: skip
    assert "new thought" in text
    assert ("old thought" in text) == (layout.name == "flash/nano")  # its template drops nothing


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([{"role": "user", "content": "q"}, {"role": "system", "content": "late"}], "beginning|must come first"),
        ([{"role": "robot", "content": "q"}], "user query|role robot"),
    ],
)
def test_what_the_strict_templates_refuse_names_its_row(
    messages: list[dict[str, Any]], why: str, layout: Layout, tokenizer: Any
) -> None:
    renderer = ChatRenderer(tokenizer)
    if layout.layout == "llama":  # renders anything
        assert renderer.render_prompt(messages)
        return
    with pytest.raises(InvalidInput, match=rf"row 7.*({why})"):
        renderer.render_prompt(messages, where="row 7")


def test_catalog_facts_are_the_checkpoints(layout: Layout, base: BaseModel, tokenizer: Any) -> None:
    """What the template does when it is not told about thinking, and the tokens that end a turn."""
    asked = [{"role": "user", "content": "q"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    told = {
        thinking: tokenizer.apply_chat_template(
            asked, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        for thinking in (True, False)
    }
    default = next((thinking for thinking, other in told.items() if text == other), "model")
    assert default == layout.default_thinking
    ends = {base.tokenizer.convert_ids_to_tokens(token) for token in base.stop_ids}
    assert "<|im_end|>" in ends and len(ends) == 2
    entry = load_catalog().get(layout.models[-1])
    assert entry.chat.default_thinking == layout.default_thinking or layout.name == "Qwen3.5"  # 4B and up: on
    assert len(entry.chat.stop_ids) == 2
