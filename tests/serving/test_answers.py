"""OpenAI's requests and answers, by OpenAI's own client, over an engine that says what a script says."""

from __future__ import annotations

import json

import openai
import pytest
from tests.serving.sites import made_up_adapter

from flash.serving.hello import MODEL_HEADER, SCOPE_HEADER

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


def chat(site, headers=None, **options):
    return site.openai(headers).chat.completions.create(model="flash/nano", messages=HI, **options)


def told(stream):
    """Content, reasoning and finish reason of a stream with one choice, and its usage."""
    content, reasoning, finish, usage, first = "", "", None, None, True
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert (choice.delta.role == "assistant") == first
            first = False
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            finish = choice.finish_reason or finish
    return content, reasoning, finish, usage


# --- chat -------------------------------------------------------------------------------------------------


def test_an_answer_and_its_usage(scripted):
    site = scripted("Grüße, 日本 🙂")
    answer = chat(site, {MODEL_HEADER: "flash-1-a%2Fb"})
    assert answer.object == "chat.completion"
    assert answer.model == "flash-1-a/b"
    assert answer.system_fingerprint.startswith("fp_")
    assert answer.system_fingerprint == chat(site).system_fingerprint
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Grüße, 日本 🙂")
    assert choice.finish_reason == "stop"
    request = site.engine.requests[0]
    assert answer.usage.prompt_tokens == len(request.prompt)
    assert answer.usage.completion_tokens == len(site.tokenizer("Grüße, 日本 🙂")["input_ids"]) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert request.sampling.max_tokens == 4096 - len(request.prompt), "an answer may fill what the context leaves"


def test_a_limit_that_no_one_asked_for_is_bounded(scripted):
    site = scripted("ok", context_length=262_144)
    chat(site)
    chat(site, max_tokens=200_000)
    assert [request.sampling.max_tokens for request in site.engine.requests] == [8192, 200_000]


def test_a_stream_says_the_same(scripted):
    site = scripted("Grüße, 日本 🙂")
    stream = chat(site, stream=True, stream_options={"include_usage": True})
    content, _, finish, usage = told(stream)
    assert (content, finish) == ("Grüße, 日本 🙂", "stop")
    assert usage == chat(site).usage.model_copy(update={"prompt_tokens_details": usage.prompt_tokens_details})


def test_a_stream_is_server_sent_events(scripted):
    body = {"model": "m", "messages": HI, "stream": True}
    answer = scripted("ok").http.post(CHAT, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


def test_samples_are_choices(scripted):
    site = scripted(["one", "two", "three"])
    answer = chat(site, n=3, seed=11)
    assert [choice.message.content for choice in answer.choices] == ["one", "two", "three"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert site.engine.requests[0].sampling.seed == 11
    texts = {0: "", 1: "", 2: ""}
    for chunk in chat(site, n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {0: "one", 1: "two", 2: "three"}


@pytest.mark.parametrize("stream", [False, True])
def test_text_ends_before_a_stop(scripted, stream):
    site = scripted("First.\nSecond.\nThird.")
    if stream:
        content, _, finish, _ = told(chat(site, stop=["\nTh", "d.\n"], stream=True))
    else:
        [choice] = chat(site, stop=["\nTh", "d.\n"]).choices
        content, finish = choice.message.content, choice.finish_reason
    assert (content, finish) == ("First.\nSecon", "stop")


def test_an_answer_that_is_cut_by_its_limit(scripted):
    site = scripted("日本日本")
    answer = chat(site, max_completion_tokens=4)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content == "日�", "the last character is not whole, and will not be"
    assert answer.usage.completion_tokens == 4


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_apart(scripted, stream):
    site = scripted("2 and 2.\n</think>\n\nFour.")
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    if stream:
        content, reasoning, _, usage = told(
            chat(site, extra_body=thinking, stream=True, stream_options={"include_usage": True})
        )
    else:
        answer = chat(site, extra_body=thinking)
        message, usage = answer.choices[0].message, answer.usage
        content, reasoning = message.content, message.reasoning_content
    assert (reasoning, content) == ("2 and 2.", "Four.")
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    assert site.tokenizer.decode(site.engine.requests[0].prompt).endswith("<think>\n")


def test_thinking_is_what_the_adapter_was_trained_for(scripted, tmp_path):
    site = scripted("trace</think>answer")
    thinker = made_up_adapter(site.store, tmp_path, 1, thinking=True)
    plain = made_up_adapter(site.store, tmp_path, 2)
    assert chat(site, thinker.headers).choices[0].message.reasoning_content == "trace"
    assert chat(site, plain.headers).choices[0].message.content == "trace</think>answer"
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert chat(site, thinker.headers, extra_body=off).choices[0].message.content == "trace</think>answer"
    assert [request.adapter for request in site.engine.requests] == [thinker.digest, plain.digest, thinker.digest]


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"days": {"type": "integer"}, "city": {"type": "string"}}},
    },
}
CALL = "<tool_call>\n<function=weather>\n<parameter=city>\nKöln\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls(scripted, stream):
    site = scripted(f"Let me look.\n{CALL}\n{CALL}")
    if stream:
        calls, text = {}, ""
        for chunk in chat(site, tools=[TOOL], stream=True):
            text += chunk.choices[0].delta.content or ""
            for call in chunk.choices[0].delta.tool_calls or []:
                calls[call.index] = call
            finish = chunk.choices[0].finish_reason
        calls = [calls[0], calls[1]]
    else:
        [choice] = chat(site, tools=[TOOL]).choices
        text, calls, finish = choice.message.content, choice.message.tool_calls, choice.finish_reason
    assert text == "Let me look."
    assert finish == "tool_calls"
    assert [(call.type, call.function.name, call.function.arguments) for call in calls] == [
        ("function", "weather", '{"city": "Köln"}')
    ] * 2
    assert calls[0].id != calls[1].id
    assert "weather" in site.tokenizer.decode(site.engine.requests[0].prompt)


def test_tools_may_be_held_back(scripted):
    site = scripted(f"{CALL}\n{CALL}")
    assert len(chat(site, tools=[TOOL], parallel_tool_calls=False).choices[0].message.tool_calls) == 1
    message = chat(site, tools=[TOOL], tool_choice="none").choices[0].message
    assert message.tool_calls is None
    assert message.content == f"{CALL}\n{CALL}"
    assert "weather" not in site.tokenizer.decode(site.engine.requests[1].prompt)


def test_a_conversation_with_a_tool_goes_on(scripted):
    site = scripted("Sunny.")
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sun"}]},
    ]
    answer = site.openai().chat.completions.create(model="m", messages=messages, tools=[TOOL])
    assert answer.choices[0].message.content == "Sunny."
    assert "sun" in site.tokenizer.decode(site.engine.requests[0].prompt)


def test_log_probabilities_of_a_chat(scripted):
    site = scripted("a日")
    [choice] = chat(site, logprobs=True, top_logprobs=2).choices
    scores = choice.logprobs.content
    written = b"".join(bytes(score.bytes) for score in scores).decode()
    assert written == "a日", "the token that ends the turn is no content"
    assert [score.token for score in scores] == ["a", "bytes:\\xe6", "bytes:\\x97", "bytes:\\xa5"]
    assert all(score.logprob == -1.0 for score in scores)
    assert [len(score.top_logprobs) for score in scores] == [2] * 4
    assert scores[0].top_logprobs[0].token == "a"
    streamed = [
        score
        for chunk in chat(site, logprobs=True, top_logprobs=2, stream=True)
        if chunk.choices[0].logprobs
        for score in chunk.choices[0].logprobs.content
    ]
    assert [score.token for score in streamed] == [score.token for score in scores]


def test_log_probabilities_end_where_a_stop_cuts(scripted):
    site = scripted("ab cd")
    scores = chat(site, logprobs=True, stop="b c").choices[0].logprobs.content
    assert [score.token for score in scores] == ["a"]


def test_cached_tokens_are_an_organisations_own(scripted):
    site = scripted("ok")
    first, again, other = (chat(site, {SCOPE_HEADER: org}).usage for org in ("a", "a", "b"))
    assert first.prompt_tokens_details.cached_tokens == 0
    assert again.prompt_tokens_details.cached_tokens == again.prompt_tokens - 1
    assert other.prompt_tokens_details.cached_tokens == 0


def test_a_schema_reaches_the_engine_as_a_grammar(scripted):
    site = scripted('{"a":1}')
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}}
    assert chat(site, response_format=wanted).choices[0].message.content == '{"a":1}'
    chat(site, response_format={"type": "json_object"})
    chat(site, response_format={"type": "text"})
    grammars = [request.sampling.grammar for request in site.engine.requests]
    assert grammars[0]
    assert grammars[1]
    assert grammars[0] != grammars[1]
    assert grammars[2] is None


# --- completions ------------------------------------------------------------------------------------------


def text(site, prompt, **options):
    return site.openai().completions.create(model="flash/nano", prompt=prompt, **options)


def test_a_completion(scripted):
    site = scripted(" world")
    answer = text(site, "hello")
    assert (answer.object, answer.choices[0].text, answer.choices[0].finish_reason) == (
        "text_completion", " world", "stop",
    )  # fmt: skip
    assert site.engine.requests[0].sampling.max_tokens == 16, "OpenAI's default"
    assert "".join(chunk.choices[0].text for chunk in text(site, "hello", stream=True)) == " world"


def test_prompts_as_texts_and_as_token_ids(scripted):
    site = scripted(lambda request, sample: f"{len(request.prompt)}{'ab'[sample]}")
    ids = site.tokenizer("日本")["input_ids"]
    assert [choice.text for choice in text(site, ids).choices] == [f"{len(ids)}a"]
    answer = text(site, [ids, ids[:1]], n=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "6a"), (1, "6b"), (2, "1a"), (3, "1b")]
    assert answer.usage.prompt_tokens == 7
    assert [choice.text for choice in text(site, ["日", "日本"]).choices] == ["3a", "6a"]


def test_echo_scores_the_prompt(scripted):
    site = scripted("!")
    ids = site.tokenizer("a日 b")["input_ids"]
    [choice] = text(site, [ids], echo=True, logprobs=1, max_tokens=1, temperature=0).choices
    assert choice.text == "a日 b!"
    scores = choice.logprobs
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == len(ids) + 1
    assert scores.token_logprobs == [None, *[-1.0] * len(ids)]
    assert scores.top_logprobs[0] is None
    assert scores.top_logprobs[1] == {scores.tokens[1]: -1.0}
    assert scores.text_offset[0] == 0
    assert scores.text_offset[-1] == len("a日 b")


def test_a_likelihood_alone(scripted):
    site = scripted("never said")
    answer = text(site, "a b", echo=True, logprobs=0, max_tokens=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("a b", "length")
    assert answer.choices[0].logprobs.token_logprobs[1:] == [-1.0] * (answer.usage.prompt_tokens - 1)
    assert answer.usage.completion_tokens == 0
    assert text(site, "a b", echo=True, max_tokens=0).choices[0].text == "a b"


def test_the_end_of_a_turn_has_a_score_too(scripted):
    site = scripted("")
    [choice] = text(site, "a", echo=True, logprobs=1, max_tokens=1).choices
    assert choice.finish_reason == "stop"
    assert choice.logprobs.tokens == ["a", "<|im_end|>"], "lm-eval drops the last of them, whatever it is"


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"top_k": 40}, "top_k"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1.0}, "n"),
        ({"stop": [""]}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "alien", "content": "hi"}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"chat_template_kwargs": {"now": "then"}}, "chat_template_kwargs"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(scripted, change, param):
    site = scripted("ok")
    answer = site.http.post(CHAT, content=json.dumps({"model": "m", "messages": HI, **change}))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert param in error["message"] or param == "messages"
    assert not site.engine.requests


def test_what_changes_nothing_is_ignored(scripted):
    site = scripted("ok")
    more = {"user": "u", "metadata": {"a": "b"}, "store": True, "presence_penalty": 0, "logit_bias": None, "top_k": -1}
    body = {"model": "m", "messages": HI, "n": None, "stop": None, "temperature": None, "top_p": 0, **more}
    assert site.http.post(CHAT, json=body).status_code == 200
    assert site.engine.requests[0].sampling.temperature == 0, "an empty nucleus is the likeliest token"


def test_a_request_past_the_context(scripted):
    site = scripted("ok", context_length=64)
    error = site.refused(CHAT, {"model": "m", "messages": [{"role": "user", "content": "x" * 100}]}, 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    error = site.refused(TEXT, {"model": "m", "prompt": [5] * 60, "max_tokens": 5}, 400)
    assert error["code"] == "context_length_exceeded"
    assert "64" in error["message"]
    assert "at most 4" in error["message"]
    with pytest.raises(openai.BadRequestError, match="context"):
        text(site, [5] * 65)


@pytest.mark.parametrize(
    "prompt", ["", [], [""], [[]], [640], [-1], ["a", 5], "\ud800", {"a": 1}, None, [[1], "a"], [True]]
)
def test_prompts_that_are_none(scripted, prompt):
    answer = scripted("ok").http.post(TEXT, content=json.dumps({"model": "m", "prompt": prompt}))
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "prompt"


def test_a_schema_that_can_not_be_followed(scripted):
    site = scripted("{}")
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {"type": "object"}}}}
    error = site.refused(CHAT, {"model": "m", "messages": HI, "response_format": schema}, 400)
    assert error["param"] == "response_format"


def test_strangers_and_wrong_places(scripted):
    site = scripted("ok")
    with pytest.raises(openai.AuthenticationError):
        site.openai().with_options(api_key="another").completions.create(model="m", prompt="a")
    assert site.refused("/v1/nothing", {}, 404)["type"] == "invalid_request_error"
    assert site.http.get(CHAT).status_code == 405
    answer = site.http.post(CHAT, content=b"{", headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "the body is not valid JSON")
    assert site.http.post(CHAT, content=b"[" * 100_000).status_code == 400


def test_adapters_that_can_not_be_had(scripted, tmp_path):
    site = scripted("ok")
    body = {"model": "m", "messages": HI}
    known = made_up_adapter(site.store, tmp_path, 1)
    other = made_up_adapter(site.store, tmp_path, 2)
    assert site.refused(CHAT, body, 404, {**known.headers, "X-Flash-Adapter-Manifest": "runs/x/y.json"})
    assert site.refused(CHAT, body, 404, {**known.headers, "X-Flash-Adapter": other.digest})
    assert site.refused(CHAT, body, 400, {**known.headers, "X-Flash-Adapter": "../../x"})
    assert site.refused(CHAT, body, 400, {"X-Flash-Adapter": known.digest})
    assert site.http.post(CHAT, json=body, headers=known.headers).status_code == 200
    assert site.room.traffic.in_flight == 0


def test_metrics_and_health(scripted):
    site = scripted("ok")
    chat(site)
    page = site.http.get("/metrics").text
    assert 'flash_engine_requests_total{endpoint="/v1/chat/completions",status="200"} 1' in page
    assert "flash_engine_first_token_seconds_count 1" in page
    assert "flash_engine_waiting 0" in page
    assert site.http.get("/health").json()["status"] == "ready"
    assert site.http.get("/metrics", headers={"Authorization": ""}).status_code == 401
