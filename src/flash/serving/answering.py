"""From a request to what the engine is asked, and from the engine's news to OpenAI's answers.

Owns rendering, limits, sampling defaults, how tokens are grouped into choices and chunks, log-probabilities' two
shapes, and usage. A streamed answer and a whole one come out of the same machine. Knows no HTTP and no adapters'
files; the engine only by what it takes and tells.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from flash.errors import InvalidInput
from flash.inference.chat import ChatRenderer
from flash.inference.engine import Failed, Prefilled, Request, Sampled, Sampling, Scored
from flash.inference.structured import after_thinking, compile_schema
from flash.serving.openai import ApiError, ChatRequest, CompletionRequest
from flash.serving.text import Characters, StopCutter, ThinkingSplitter, ToolCall, ToolCalls, Vocabulary

News = Prefilled | Sampled | Failed
# Without a limit of its own, an answer may fill what the context leaves, up to this: engines reserve room for the
# longest possible answer, and a context of 262,144 tokens reserved for each would leave room for one.
_UNASKED_TOKENS = 8192
_LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's own stand-in


@dataclass(frozen=True)
class Served:
    """What answers depend on, of the base that the engine has loaded."""

    model: str
    revision: str | None
    tokenizer: Any
    stop_ids: tuple[int, ...]
    context_length: int  # tokens
    vocabulary_size: int  # token ids are below this

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer)

    @cached_property
    def template(self) -> str:
        return str(self.tokenizer.chat_template)

    @cached_property
    def renderers(self) -> dict[bool, ChatRenderer]:
        return {thinking: ChatRenderer(self.tokenizer, thinking=thinking) for thinking in (False, True)}

    @cached_property
    def has_thinking_tokens(self) -> bool:
        return {"<think>", "</think>"} <= set(self.tokenizer.get_vocab())

    def fingerprint(self, adapter: str | None) -> str:
        """Names base, revision and adapter: the same as long as all three are."""
        identity = json.dumps([self.model, self.revision, adapter])
        return "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Target:
    """Who is asked, and for whom."""

    name: str                   # the model as the user named it
    adapter: str | None = None  # the digest under which the engine has it
    scope: str = ""             # the org
    thinking: bool = False      # what the adapter was trained for; holds when a request doesn't say


# --- what the engine is asked -----------------------------------------------------------------------------


def chat_answer(served: Served, request: ChatRequest, target: Target) -> ChatAnswer:
    """Renders and checks a chat request. Raises ApiError for what can't be served."""
    asked = request.chat_template_kwargs.enable_thinking if request.chat_template_kwargs else None
    if asked and "enable_thinking" not in served.template:
        raise ApiError(f"{served.model} has no thinking mode: leave enable_thinking out", param="chat_template_kwargs")
    thinking = target.thinking if asked is None else asked
    tools = request.offered_tools
    _check_text([request.messages, tools], "messages")
    renderer = served.renderers[thinking]
    try:
        prompt = renderer.prompt_text(request.messages, tools=tools or None)
        tokens = tuple(served.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    except InvalidInput as error:
        raise ApiError(str(error), param="messages") from None
    limit = _limit(served, len(tokens), request.limit, "messages")
    sampling = _sampling(
        request,
        max_tokens=limit,
        top_logprobs=request.top_logprobs or 0,
        grammar=_grammar(served, request, thinking=thinking),
    )
    asked_of_engine = Request(
        tokens, sampling, n=request.n or 1, adapter=target.adapter, cache_scope=target.scope
    )
    return ChatAnswer(served, request, target, [asked_of_engine], opened=renderer.opens_thinking if thinking else None)


def completion_answer(served: Served, request: CompletionRequest, target: Target) -> CompletionAnswer:
    """Tokenises and checks a completion request. Raises ApiError for what can't be served."""
    _check_text([request.prompt], "prompt")
    requests, echoed = [], []
    for prompt in request.prompts:
        if isinstance(prompt, str):
            tokens = tuple(served.tokenizer(prompt)["input_ids"])
        else:
            tokens = tuple(prompt)
        if not tokens:
            raise ApiError("prompt: it has no tokens; give at least one character", param="prompt")
        if max(tokens) >= served.vocabulary_size:
            raise ApiError(
                f"prompt: {max(tokens)} is no token of {served.model}: ids are below {served.vocabulary_size}",
                param="prompt",
            )
        limit = 16 if request.max_tokens is None else request.max_tokens
        scored = request.logprobs is not None and bool(request.echo)
        limit = _limit(served, len(tokens), limit, "prompt")
        sampling = _sampling(request, max_tokens=limit, top_logprobs=request.logprobs or 0, grammar=None)
        requests.append(
            Request(
                tokens,
                sampling,
                n=request.n or 1,
                adapter=target.adapter,
                prompt_logprobs=scored or limit == 0,
                cache_scope=target.scope,
            )
        )
        echoed.append(prompt if isinstance(prompt, str) else None)
    return CompletionAnswer(served, request, target, requests, echoed)


def _check_text(value: Any, param: str) -> None:
    """JSON can write halves of characters, and nest without end; no tokenizer takes either."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(f"{param}: it has half of a surrogate pair, which is no text", param=param) from None
    except RecursionError:
        raise ApiError(f"{param}: it is nested too deeply", param=param) from None


def _limit(served: Served, prompt: int, asked: int | None, param: str) -> int:
    """How many tokens may be sampled."""
    left = served.context_length - prompt
    if asked is None and left >= 1:
        return min(left, _UNASKED_TOKENS)
    if asked is None or asked > left:
        wanted = f"{prompt} in the {param}" + (f", {asked} in the completion" if asked is not None else "")
        raise ApiError(
            f"this model's context is {served.context_length} tokens, but {prompt + (asked or 1)} were requested "
            f"({wanted}); shorten the {param}"
            + (f" or lower max_tokens to at most {left}" if asked and left > 0 else ""),
            param=param,
            code="context_length_exceeded",
        )
    return asked


def _sampling(
    request: ChatRequest | CompletionRequest, *, max_tokens: int, top_logprobs: int, grammar: str | None
) -> Sampling:
    top_p = 1.0 if request.top_p is None else request.top_p
    temperature = 1.0 if request.temperature is None else request.temperature
    return Sampling(
        max_tokens=max_tokens,
        temperature=temperature if top_p > 0 else 0.0,  # an empty nucleus leaves the likeliest token
        top_p=top_p or 1.0,
        stop=request.stops,
        seed=secrets.randbelow(2**63) if request.seed is None else request.seed,
        top_logprobs=top_logprobs,
        grammar=grammar,
    )


def _grammar(served: Served, request: ChatRequest, *, thinking: bool) -> str | None:
    if request.response_format is None or not request.constrained:
        return None
    wanted = request.response_format.json_schema
    try:
        grammar = compile_schema(wanted.schema_ if wanted else None)
    except InvalidInput as error:
        raise ApiError(str(error), param="response_format") from None
    if not thinking:
        return grammar
    if not served.has_thinking_tokens:
        raise ApiError(
            f"response_format needs thinking off on {served.model}: set chat_template_kwargs.enable_thinking to false",
            param="response_format",
        )
    return after_thinking(grammar, opened=served.renderers[True].opens_thinking)


# --- one sample -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shown:
    """A token whose text has been shown: where that begins (in characters), and the scores of the token.

    `logprob` is None for a prompt's first token.
    """

    token: int
    offset: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Delta:
    """What one choice has more than before."""

    choice: int
    opening: bool = False  # nothing came before it
    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def empty(self) -> bool:
        return not (self.opening or self.text or self.reasoning or self.calls or self.shown or self.finish_reason)

    @classmethod
    def joined(cls, deltas: Sequence[Delta]) -> Delta:
        """One choice's deltas, in order, as one."""
        whole = cls(deltas[0].choice, deltas[0].opening)
        whole.text = "".join(delta.text for delta in deltas)
        whole.reasoning = "".join(delta.reasoning for delta in deltas)
        whole.calls = [call for delta in deltas for call in delta.calls]
        whole.shown = [shown for delta in deltas for shown in delta.shown]
        whole.finish_reason = deltas[-1].finish_reason
        return whole


class _Sample:
    """One choice in the making: tokens in, deltas out."""

    def __init__(
        self,
        served: Served,
        choice: int,
        stops: Sequence[str],
        *,
        scored: bool,
        end_token: bool,
        thinking: ThinkingSplitter | None = None,
        calls: ToolCalls | None = None,
        one_call: bool = False,
    ) -> None:
        """`scored` keeps tokens' scores; `end_token` keeps those of the token that ends a turn as well."""
        self._stop_ids = served.stop_ids
        self._choice = choice
        self._characters = Characters(served.vocabulary)
        self._cutter = StopCutter(stops)
        self._thinking = thinking
        self._calls = calls
        self._one_call = one_call
        self._scored = scored
        self._end_token = end_token
        self._waiting: list[Shown] = []
        self.begins_at = 0  # characters of the choice's text before its own (an echoed prompt)
        self._decoded = 0  # characters
        self._released = 0  # of them
        self._called = False
        self.tokens = 0
        self.reasoning_tokens = 0
        self.finished = False

    def add(self, news: Sampled) -> Delta:
        token = news.scored.token
        self.tokens += 1
        self.reasoning_tokens += self._thinking is not None and self._thinking.state == "thinking"
        ends = news.finish_reason == "stop" and token in self._stop_ids
        if self._scored and (self._end_token or not ends):
            self._waiting.append(Shown(token, self.begins_at + self._decoded, news.scored.logprob, news.scored.top))
        text = "" if ends else self._characters.add(token)
        if news.finish_reason is not None:
            text += self._characters.end()
        self._decoded += len(text)
        shown = self._cutter.add(text)
        finish: str | None = news.finish_reason
        if self._cutter.cut:
            finish = "stop"
        elif finish is not None:
            shown += self._cutter.end()
        self._released += len(shown)
        return self._delta(shown, finish)

    def _delta(self, text: str, finish: str | None) -> Delta:
        delta = Delta(self._choice, shown=self._release(finish), finish_reason=finish)
        answer = text
        if self._thinking is not None:
            delta.reasoning, answer = self._thinking.add(text)
            if finish is not None:
                reasoning, rest = self._thinking.end()
                delta.reasoning += reasoning
                answer += rest
        if self._calls is not None:
            answer, calls = self._calls.add(answer)
            if finish is not None:
                answer += self._calls.end()
            if self._one_call:
                calls = [] if self._called else calls[:1]
            self._called |= bool(calls)
            delta.calls = calls
            if finish == "stop" and self._called:
                delta.finish_reason = "tool_calls"
        delta.text = answer
        self.finished = finish is not None
        return delta

    def _release(self, finish: str | None) -> list[Shown]:
        """The tokens whose text begins in what is shown by now; at the end, all but those that a stop cut off."""
        everything = finish is not None and not self._cutter.cut
        end = self.begins_at + self._released
        count = 0
        while count < len(self._waiting) and (everything or self._waiting[count].offset < end):
            count += 1
        released, self._waiting = self._waiting[:count], self._waiting[count:]
        return released


# --- answers ----------------------------------------------------------------------------------------------


class Answer:
    """One request's answer as it grows: `take` the engine's news, then send a `chunk` of what is new, or `keep` it
    for the `body`. So a stream holds nothing of what was sent.
    """

    def __init__(self, served: Served, name: str, adapter: str | None, prefix: str, requests: list[Request]) -> None:
        self.requests = requests
        self._served = served
        self._head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": name,
            "system_fingerprint": served.fingerprint(adapter),
        }
        self._samples: list[_Sample] = []
        self._kept: dict[int, list[Delta]] = {}
        self._cached_tokens = 0

    @property
    def finished(self) -> bool:
        return all(sample.finished for sample in self._samples)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)

    @property
    def completion_tokens(self) -> int:
        return sum(sample.tokens for sample in self._samples)

    def take(self, number: int, news: News) -> list[Delta]:
        """What the news about request `number` adds. Raises what made the engine give it up."""
        if isinstance(news, Failed):
            raise news.error
        first = number * self.requests[number].n
        if isinstance(news, Prefilled):
            self._cached_tokens += news.cached_tokens
            deltas = [self._opening(number, first + k, news) for k in range(self.requests[number].n)]
        else:
            sample = self._samples[first + news.sample]
            deltas = [] if sample.finished else [sample.add(news)]  # a stop may be seen here before the engine sees it
        return [delta for delta in deltas if not delta.empty]

    def joined(self, news: Iterable[tuple[int, News]]) -> list[Delta]:
        """What all of it adds, one delta a choice."""
        deltas: dict[int, list[Delta]] = {}
        for number, item in news:
            for delta in self.take(number, item):
                deltas.setdefault(delta.choice, []).append(delta)
        return [each[0] if len(each) == 1 else Delta.joined(each) for each in deltas.values()]

    def keep(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            self._kept.setdefault(delta.choice, []).append(delta)

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }

    def body(self) -> dict[str, Any]:
        choices = [self._choice(Delta.joined(self._kept[number])) for number in range(len(self._samples))]
        return {**self._head, "object": self.whole, "choices": choices, "usage": self.usage()}

    def chunk(self, delta: Delta, *, usage_wanted: bool) -> dict[str, Any]:
        chunk = {**self._head, "object": self.part, "choices": [self._part(delta)]}
        return {**chunk, "usage": None} if usage_wanted else chunk

    def usage_chunk(self) -> dict[str, Any]:
        return {**self._head, "object": self.part, "choices": [], "usage": self.usage()}

    whole: str
    part: str

    def _opening(self, number: int, choice: int, news: Prefilled) -> Delta:
        raise NotImplementedError

    def _choice(self, kept: Delta) -> dict[str, Any]:
        raise NotImplementedError

    def _part(self, delta: Delta) -> dict[str, Any]:
        raise NotImplementedError


class ChatAnswer(Answer):
    whole, part = "chat.completion", "chat.completion.chunk"

    def __init__(
        self, served: Served, request: ChatRequest, target: Target, requests: list[Request], *, opened: bool | None
    ) -> None:
        """`opened` says whether the prompt ends inside a trace; None that thinking is off."""
        super().__init__(served, target.name, target.adapter, "chatcmpl", requests)
        self._logprobs = bool(request.logprobs)
        self._calls_sent = [0] * requests[0].n
        tools = request.offered_tools
        readable = tools and ToolCalls.readable(served.template)
        self._samples = [
            _Sample(
                served,
                choice,
                request.stops,
                scored=self._logprobs,
                end_token=False,
                thinking=None if opened is None else ThinkingSplitter(opened=opened),
                calls=ToolCalls(served.template, tools) if readable else None,
                one_call=request.parallel_tool_calls is False,
            )
            for choice in range(requests[0].n)
        ]

    def usage(self) -> dict[str, Any]:
        reasoning = sum(sample.reasoning_tokens for sample in self._samples)
        return {**super().usage(), "completion_tokens_details": {"reasoning_tokens": reasoning}}

    def _opening(self, number: int, choice: int, news: Prefilled) -> Delta:
        return Delta(choice, opening=True)

    def _choice(self, kept: Delta) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": kept.text, "refusal": None}
        if kept.reasoning:
            message["reasoning_content"] = kept.reasoning
        if kept.calls:
            message["tool_calls"] = [_call(call) for call in kept.calls]
            message["content"] = kept.text or None
        return {
            "index": kept.choice,
            "message": message,
            "logprobs": self._scores(kept),
            "finish_reason": kept.finish_reason,
        }

    def _part(self, delta: Delta) -> dict[str, Any]:
        fields: dict[str, Any] = {"role": "assistant", "content": ""} if delta.opening else {}
        if delta.text:
            fields["content"] = delta.text
        if delta.reasoning:
            fields["reasoning_content"] = delta.reasoning
        if delta.calls:
            sent = self._calls_sent[delta.choice]
            fields["tool_calls"] = [{"index": sent + k, **_call(call)} for k, call in enumerate(delta.calls)]
            self._calls_sent[delta.choice] += len(delta.calls)
        return {
            "index": delta.choice,
            "delta": fields,
            "logprobs": self._scores(delta) if delta.shown else None,
            "finish_reason": delta.finish_reason,
        }

    def _scores(self, delta: Delta) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        scores = [
            {**self._score(each.token, each.logprob), "top_logprobs": [self._score(*other) for other in each.top]}
            for each in delta.shown
        ]
        return {"content": scores, "refusal": None}

    def _score(self, token: int, logprob: float | None) -> dict[str, Any]:
        vocabulary = self._served.vocabulary
        label, data = vocabulary.label(token), list(vocabulary.bytes_of(token))
        return {"token": label, "logprob": _finite(logprob), "bytes": data}


class CompletionAnswer(Answer):
    whole = part = "text_completion"

    def __init__(
        self,
        served: Served,
        request: CompletionRequest,
        target: Target,
        requests: list[Request],
        echoed: list[str | None],
    ) -> None:
        """`echoed` has the prompts that were given as text."""
        super().__init__(served, target.name, target.adapter, "cmpl", requests)
        self._echo = bool(request.echo)
        self._echoed = echoed
        self._logprobs = request.logprobs is not None
        self._samples = [
            _Sample(served, choice, request.stops, scored=self._logprobs, end_token=True)
            for choice in range(sum(each.n for each in requests))
        ]

    def _opening(self, number: int, choice: int, news: Prefilled) -> Delta:
        delta = Delta(choice)
        if self._echo:
            delta.text, delta.shown = self._prompt(number, news.prompt or ())
            self._samples[choice].begins_at = len(delta.text)
        if self.requests[number].sampling.max_tokens == 0:
            delta.finish_reason = "length"
            self._samples[choice].finished = True
        return delta

    def _prompt(self, number: int, scores: Sequence[Scored]) -> tuple[str, list[Shown]]:
        tokens = self.requests[number].prompt
        characters = Characters(self._served.vocabulary, special=True)
        text, shown = "", []
        for place, token in enumerate(tokens):
            scored = scores[place - 1] if scores and place else None
            if self._logprobs:
                logprob, top = (scored.logprob, scored.top) if scored else (None, ())
                shown.append(Shown(token, len(text), logprob, top))
            text += characters.add(token)
        text += characters.end()
        given = self._echoed[number]
        return (text if given is None else given), shown

    def _choice(self, kept: Delta) -> dict[str, Any]:
        return self._part(kept)

    def _part(self, delta: Delta) -> dict[str, Any]:
        return {
            "index": delta.choice,
            "text": delta.text,
            "logprobs": self._scores(delta) if self._logprobs else None,
            "finish_reason": delta.finish_reason,
        }

    def _scores(self, delta: Delta) -> dict[str, Any]:
        label = self._served.vocabulary.label
        return {
            "tokens": [label(each.token) for each in delta.shown],
            "token_logprobs": [_finite(each.logprob) for each in delta.shown],
            "top_logprobs": [
                None if each.logprob is None else {label(token): _finite(logprob) for token, logprob in each.top}
                for each in delta.shown
            ],
            "text_offset": [each.offset for each in delta.shown],
        }


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _finite(logprob: float | None) -> float | None:
    return logprob if logprob is None else max(logprob, _LEAST_LOGPROB)
