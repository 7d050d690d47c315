"""Chat messages to token ids, and which of the ids are trained; reasoning apart from the answer.

Owns what is done around a tokenizer's chat template: messages made fit for it, the generation prompt, a
target's trained tokens, `</think>`. The template itself is the model's. Knows nothing of environments
or training loops.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from flash.errors import InvalidInput

Message = dict[str, Any]
_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class RenderedTarget:
    """One training example: its token ids, and from which position on they are trained."""

    tokens: tuple[int, ...]
    trained_from: int  # == len(tokens) when nothing is

    @property
    def trained(self) -> tuple[bool, ...]:
        return tuple(position >= self.trained_from for position in range(len(self.tokens)))

    def truncated(self, max_length: int) -> RenderedTarget:
        """The first `max_length` tokens."""
        if len(self.tokens) <= max_length:
            return self
        return RenderedTarget(self.tokens[:max_length], min(self.trained_from, max_length))


class ChatRenderer:
    """Renders messages with one tokenizer's chat template, thinking on or off."""

    def __init__(self, tokenizer: Any, *, thinking: bool = False) -> None:
        self.tokenizer = tokenizer
        self.thinking = thinking
        self._opens: bool | None = None

    def render_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        where: str = "the messages",
    ) -> list[int]:
        """Token ids up to where the assistant's turn begins.

        Raises InvalidInput, naming `where`, for messages that the template or Flash can't render.
        """
        return self._encode(self.prompt_text(messages, tools=tools, where=where))

    def render_prompts(self, prompts: Sequence[tuple[Sequence[Mapping[str, Any]], str]]) -> list[list[int]]:
        """`render_prompt` of many (messages, where), each step for all of them at once."""
        fitted = [fit_messages(messages, where=where) for messages, where in prompts]
        if not fitted:
            return []
        try:
            texts = self._texts(fitted, None, "the messages", prompt=True)
        except InvalidInput:  # of one of them: by itself it is named
            return [self.render_prompt(messages, where=where) for messages, where in prompts]
        ids = self._ids(dict.fromkeys(texts))
        return [list(ids[text]) for text in texts]

    def prompt_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        where: str = "the messages",
    ) -> str:
        return self._text(fit_messages(messages, where=where), tools, where, prompt=True)

    def render_target(
        self,
        prompt: Sequence[Mapping[str, Any]],
        completion: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        where: str = "the messages",
    ) -> RenderedTarget:
        """The whole conversation, trained after the longest token prefix shared with the rendered prompt.

        So a `<think>` that the template opens by itself counts as prompt, and user and tool turns inside
        the target are trained. An empty trace that the prompt ends with, but the template leaves out of the finished
        turn, is put there: the answer is trained after the prompt that it will be sampled after.
        """
        [texts] = self._target_texts([_fit_target(prompt, completion, where)], tools, where)
        prompt_tokens, tokens = (self._encode(text) for text in texts)
        return RenderedTarget(tuple(tokens), _shared_prefix(prompt_tokens, tokens))

    def render_targets(
        self, targets: Sequence[tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]], str]]
    ) -> list[RenderedTarget]:
        """`render_target` of many (prompt, completion, where), each step for all of them at once; what a prompt and its
        conversation begin with alike is tokenised only once."""
        fitted = [_fit_target(prompt, completion, where) for prompt, completion, where in targets]
        try:
            pairs = self._target_texts(fitted, None, "the messages")
        except InvalidInput:  # of one of them: by itself it is named
            return [self.render_target(prompt, completion, where=where) for prompt, completion, where in targets]
        parts = []
        for opening, whole in pairs:
            cut = self._cut(opening) if whole.startswith(opening) else 0
            parts.append((opening[:cut], opening[cut:], whole[cut:]))
        ids = self._ids(dict.fromkeys(text for part in parts for text in part))
        return [
            RenderedTarget((*ids[head], *ids[rest]), len(ids[head]) + _shared_prefix(ids[opening], ids[rest]))
            for head, opening, rest in parts
        ]

    def _target_texts(
        self,
        targets: Sequence[tuple[list[Message], list[Message]]],
        tools: Sequence[Mapping[str, Any]] | None,
        where: str,
    ) -> list[tuple[str, str]]:
        """Of each (opening, target) the prompt as it is sampled after, and the whole conversation."""
        prompts = self._texts([opening for opening, _ in targets], tools, where, prompt=True)
        wholes = self._texts([opening + target for opening, target in targets], tools, where, prompt=False)
        return [(prompt, _with_empty_trace(prompt, whole)) for prompt, whole in zip(prompts, wholes, strict=True)]

    @property
    def opens_thinking(self) -> bool:
        """Whether the generation prompt ends inside an open `<think>`."""
        if self._opens is None:
            text = self._text([{"role": "user", "content": "?"}], None, "the chat template", prompt=True)
            self._opens = text.rfind(_THINK_OPEN) > text.rfind(_THINK_CLOSE)
        return self._opens

    def split_thinking(self, text: str) -> tuple[str, str]:
        """A completion's (thinking, answer), by how this template opens the assistant's turn.

        With thinking off, text without a `</think>` is all answer, whatever it opens with.
        """
        if not self.thinking and _THINK_CLOSE not in text:
            return "", text
        return split_thinking(text, opened=self.opens_thinking)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text as it was sampled, special tokens included."""
        return self._decode(tokens, skip_special_tokens=False)

    def answer_text(self, tokens: Sequence[int], stop_ids: Sequence[int]) -> str:
        """A completion's text without the token that ended its turn."""
        kept = list(tokens)
        while kept and kept[-1] in stop_ids:
            kept.pop()
        return self._decode(kept, skip_special_tokens=True)

    def marked(self, target: RenderedTarget) -> str:
        """The example's text with what is trained between ⟦ and ⟧."""
        before = self.decode(target.tokens[: target.trained_from])
        return f"{before}⟦{self.decode(target.tokens[target.trained_from:])}⟧"

    def _text(
        self, messages: list[Message], tools: Sequence[Mapping[str, Any]] | None, where: str, *, prompt: bool
    ) -> str:
        [text] = self._texts([messages], tools, where, prompt=prompt)
        return text

    def _texts(
        self,
        conversations: list[list[Message]],
        tools: Sequence[Mapping[str, Any]] | None,
        where: str,
        *,
        prompt: bool,
    ) -> list[str]:
        if not all(conversations):
            raise InvalidInput(f"{where}: there are no messages")
        try:
            return list(
                self.tokenizer.apply_chat_template(
                    conversations,
                    tools=list(tools) if tools else None,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    enable_thinking=self.thinking,
                )
            )
        except (TemplateError, TypeError, KeyError, AttributeError, ValueError) as error:
            raise InvalidInput(f"{where}: the chat template refuses these messages: {error}") from error

    def _decode(self, tokens: Sequence[int], *, skip_special_tokens: bool) -> str:
        return str(
            self.tokenizer.decode(
                list(tokens), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _ids(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """`_encode` of many different texts. Past the tokenizer's own call: that also tells which characters each
        token is of, which takes a third of its time."""
        texts = list(texts)
        self._encode("")  # leaves the backend to neither truncate nor pad, as every such call does
        encodings = self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return {text: encoding.ids for text, encoding in zip(texts, encodings, strict=True)}

    def _cut(self, text: str) -> int:
        """A place in the text, as late as can be told, before which tokens are the same whatever comes after it."""
        found = self._border.match(text) if self._border else None
        return found.start(1) if found else 0

    @cached_property
    def _border(self) -> re.Pattern[str] | None:
        """Matches up to the last token that the tokenizer takes out of the raw text before all else, so that what is on
        either side of it never meets. None where it has no such token.

        Its first character stands inside no other such token, which could begin before it, and belongs to no word.
        """
        backend = self.tokenizer.backend_tokenizer
        added = backend.get_added_tokens_decoder().values()
        if backend.encode_special_tokens or any(token.lstrip or token.single_word for token in added):
            return None  # a token may not be one, or take spaces from before it
        inner = {character for token in added for character in token.content[1:]}
        borders = [
            re.escape(token.content)
            for token in added
            if not token.normalized and re.match(r"[^\w\s]", token.content) and token.content[0] not in inner
        ]
        return re.compile(f"(?s:.*)({'|'.join(borders)})") if borders else None


def _fit_target(
    prompt: Sequence[Mapping[str, Any]], completion: Sequence[Mapping[str, Any]], where: str
) -> tuple[list[Message], list[Message]]:
    opening, target = fit_messages(prompt, where=where), fit_messages(completion, where=where)
    if not target:
        raise InvalidInput(f"{where}: the target has no messages")
    return opening, target


def _with_empty_trace(prompt: str, whole: str) -> str:
    """The whole conversation after exactly this prompt, if all that parts them is an empty trace at its end."""
    trace = re.search(rf"{_THINK_OPEN}\s*{_THINK_CLOSE}\s*$", prompt)
    if trace is None or not whole.startswith(prompt[: trace.start()]):
        return whole
    rest = whole[trace.start() :]
    return whole if rest.startswith(_THINK_OPEN) else prompt + rest


def split_thinking(text: str, *, opened: bool = False) -> tuple[str, str]:
    """(thinking, answer): the answer is what follows the last `</think>`.

    `opened` says that the prompt had already opened a `<think>`. A trace that was opened and never closed
    has no answer; text without any trace is all answer. Line breaks around the trace belong to neither.
    """
    head, closed, answer = text.rpartition(_THINK_CLOSE)
    if closed:
        return head.replace(_THINK_OPEN, "", 1).strip("\n"), answer.lstrip("\n")
    before, opening, trace = text.partition(_THINK_OPEN)
    if opening and not before.strip():
        return trace.strip("\n"), ""
    if opened:
        return text.strip("\n"), ""
    return "", text


def fit_messages(messages: Sequence[Mapping[str, Any]], *, where: str = "the messages") -> list[Message]:
    """Copies of the messages in the one form that every supported template renders alike.

    Content becomes a string (lists of text parts are joined: some templates turn them into nothing),
    `developer` becomes `system`, and tool calls' arguments become mappings (some templates raise on
    strings). Raises InvalidInput for images and for what is no message.
    """
    return [_fit(message, f"{where}, message {number}") for number, message in enumerate(messages, start=1)]


def _fit(message: Mapping[str, Any], where: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidInput(f"{where}: a message is an object with `role` and `content`")
    fitted: Message = dict(message)
    if fitted["role"] == "developer":
        fitted["role"] = "system"
    fitted["content"] = _text_content(fitted.get("content"), where)
    if calls := fitted.get("tool_calls"):
        if not isinstance(calls, list | tuple):
            raise InvalidInput(f"{where}: `tool_calls` is {type(calls).__name__}, but must be a list")
        fitted["tool_calls"] = [_fit_call(call, where) for call in calls]
    return fitted


def _text_content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part_text(part, where) for part in content)
    raise InvalidInput(f"{where}: `content` is {type(content).__name__}, but must be text")


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type", "unknown") if isinstance(part, Mapping) else type(part).__name__
    raise InvalidInput(f"{where}: content of type {kind!r} is not supported: text only")


def _fit_call(call: Any, where: str) -> Message:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidInput(f"{where}: a tool call needs a function `name` and `arguments`")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            arguments = None
    if arguments is None or not isinstance(arguments, Mapping):
        raise InvalidInput(
            f"{where}: the arguments of tool call {function['name']!r} are not a JSON object"
        )
    return {**call, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def _shared_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    for position, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return position
    return min(len(first), len(second))
