"""Tokens become text, one by one: whole characters, nothing of a stop sequence, reasoning and tool calls apart.

Four small machines, each fed piece by piece, so that a streamed answer is the whole one cut into pieces:
`Vocabulary` (a token's bytes), `Characters` (bytes to text), `StopCutter`, `ThinkingSplitter`, `ToolCalls`.
None knows an engine, a request's form or HTTP.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# --- bytes and characters ---------------------------------------------------------------------------------


class Vocabulary:
    """What each token of one tokenizer contributes to a text, in bytes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[int, bytes] = {}
        self.size = len(tokenizer)
        added = tokenizer.added_tokens_decoder
        self._added = {int(token): str(each.content) for token, each in added.items()}
        named = (token for token, each in added.items() if each.special)
        self.special = frozenset(int(token) for token in [*tokenizer.all_special_ids, *named])
        kinds = _decoder_kinds(tokenizer)
        self._byte_level = "ByteLevel" in kinds
        self._spaced = bool(kinds & {"Metaspace", "Replace"})  # "▁" stands for a space
        self.drops_first_space = "Strip" in kinds or "Metaspace" in kinds

    def bytes_of(self, token: int) -> bytes:
        """A token's bytes; a special token's are those of its name."""
        found = self._cache.get(token)
        if found is None:
            found = self._cache[token] = self._bytes(token)
        return found

    def label(self, token: int) -> str:
        """How log-probabilities name the token: its text or, for a part of a character, `bytes:\\xe4`."""
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # an id that only the head's padding has
            return b""
        if self._byte_level:
            table = _byte_table()
            return bytes(table[mark] for mark in piece if mark in table)
        if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
            return bytes([int(byte[1], 16)])
        if self._spaced:
            return str(piece).replace("▁", " ").encode()
        return str(self._tokenizer.decode([token])).encode()


def _decoder_kinds(tokenizer: Any) -> set[str]:
    """The kinds of steps in the tokenizer's decoder; none for tokenizers without a Rust side."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return set()
    state = json.loads(backend.decoder.__getstate__())
    return {step["type"] for step in [state, *state.get("decoders", [])]}


_BYTES: dict[str, int] = {}


def _byte_table() -> dict[str, int]:
    """The byte behind each character of a byte-level vocabulary (GPT-2's printable alphabet for bytes)."""
    if not _BYTES:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        _BYTES.update({chr(byte): byte for byte in printable})
        _BYTES.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return _BYTES


class Characters:
    """A sample's text as it grows; half a character waits for its other half.

    Special tokens are silent, unless `special` asks for their names (a prompt's own).
    """

    def __init__(self, vocabulary: Vocabulary, *, special: bool = False) -> None:
        self._vocabulary = vocabulary
        self._silent = frozenset() if special else vocabulary.special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = vocabulary.drops_first_space

    def add(self, token: int) -> str:
        if token in self._silent:
            return ""
        return self._fit(self._decoder.decode(self._vocabulary.bytes_of(token)))

    def end(self) -> str:
        return self._fit(self._decoder.decode(b"", final=True))

    def _fit(self, text: str) -> str:
        if text and self._drop_space:
            self._drop_space = False
            return text.removeprefix(" ")
        return text


# --- stops ------------------------------------------------------------------------------------------------


class StopCutter:
    """Ends a text before the first stop sequence; holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.cut = False

    def add(self, text: str) -> str:
        """What may be shown now."""
        if self.cut or not self._stops:
            return "" if self.cut else text
        text = self._held + text
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:  # the one that was complete first, as if the text had come letter by letter
            self.cut, self._held = True, ""
            return text[: min(found)[1]]
        shown = len(text) - max(_overlap(text, stop) for stop in self._stops)
        self._held = text[shown:]
        return text[:shown]

    def end(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, tag: str) -> int:
    """How many characters at the text's end may be the beginning of the tag."""
    for size in range(min(len(text), len(tag) - 1), 0, -1):
        if tag.startswith(text[-size:]):
            return size
    return 0


# --- reasoning --------------------------------------------------------------------------------------------


class ThinkingSplitter:
    """Reasoning, up to the first `</think>`, apart from the answer; line breaks around it belong to neither.

    `opened` says that the prompt has opened the trace already; else it begins with a `<think>` or not at all.
    """

    _OPEN, _CLOSE = "<think>", "</think>"

    def __init__(self, *, opened: bool) -> None:
        self.state: Literal["opening", "thinking", "closed", "answer"] = "thinking" if opened else "opening"
        self._held = ""
        self._began = False

    def add(self, text: str) -> tuple[str, str]:
        """The new (reasoning, answer)."""
        if self.state == "answer":
            return "", text
        self._held += text
        reasoning = ""
        if self.state == "opening":
            stripped = self._held.lstrip()
            if self._OPEN.startswith(stripped[: len(self._OPEN)]) and len(stripped) < len(self._OPEN):
                return "", ""
            if stripped.startswith(self._OPEN):
                self.state, self._held = "thinking", stripped.removeprefix(self._OPEN)
            else:
                self.state = "answer"
                return "", self._take(len(self._held))
        if self.state == "thinking":
            reasoning = self._reason()
        if self.state == "closed":
            self._held = self._held.lstrip("\n")
            if self._held:
                self.state = "answer"
                return reasoning, self._take(len(self._held))
        return reasoning, ""

    def end(self) -> tuple[str, str]:
        rest = self._take(len(self._held))
        return (rest.strip("\n"), "") if self.state == "thinking" else ("", rest if self.state != "closed" else "")

    def _reason(self) -> str:
        if not self._began:
            self._held = self._held.lstrip("\n")
            self._began = bool(self._held)
        place = self._held.find(self._CLOSE)
        if place >= 0:
            reasoning = self._take(place).rstrip("\n")
            self._take(len(self._CLOSE))
            self.state = "closed"
            return reasoning
        shown = len(self._held) - _overlap(self._held, self._CLOSE)
        return self._take(len(self._held[:shown].rstrip("\n")))

    def _take(self, size: int) -> str:
        taken, self._held = self._held[:size], self._held[size:]
        return taken


# --- tool calls -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: str  # a JSON object, as text


class ToolCalls:
    """Tool calls in the template's own form, apart from the text around them.

    Known forms: JSON or `<function=NAME>` with `<parameter=KEY>` inside `<tool_call>` (Qwen, flash/nano), and
    `<function name="NAME">` with `<param name="KEY">` (MiniCPM). A call that can't be read stays text.
    """

    def __init__(self, template: str, tools: Sequence[Mapping[str, Any]]) -> None:
        self._types = {tool["function"]["name"]: _parameter_types(tool["function"]) for tool in tools}
        tagged = "<tool_call>" in template
        self._open, self._close = ("<tool_call>", "</tool_call>") if tagged else ("<function name=", "</function>")
        self._held = ""
        self._inside = False

    @staticmethod
    def readable(template: str) -> bool:
        """Whether a chat template writes calls in a form that this class reads."""
        return "<tool_call>" in template or "<function name=" in template

    def add(self, text: str) -> tuple[str, list[ToolCall]]:
        """The new (text, whole calls)."""
        self._held += text
        shown = ""
        calls: list[ToolCall] = []
        while True:
            if self._inside:
                end = self._held.find(self._close)
                if end < 0:
                    return shown, calls
                end += len(self._close)
                written, self._held = self._held[:end], self._held[end:]
                call = self._read(written)
                if call is None:
                    shown += written
                else:
                    calls.append(call)
                self._inside = False
            start = self._held.find(self._open)
            if start < 0:
                keep = _overlap(self._held, self._open)
                # line breaks before a call belong to the call
                visible = self._held[: len(self._held) - keep].rstrip("\n")
                shown += visible
                self._held = self._held[len(visible) :]
                return shown, calls
            shown += self._held[:start].rstrip("\n")
            self._held = self._held[start:]
            self._inside = True

    def end(self) -> str:
        held, self._held = self._held, ""
        return held

    def _read(self, written: str) -> ToolCall | None:
        inner = written.removeprefix("<tool_call>").removesuffix("</tool_call>").strip()
        if inner.startswith("{"):
            return _read_json(inner)
        if whole := re.fullmatch(r"<function=([^>\n]+)>(.*)</function>", inner, re.DOTALL):
            pairs = re.findall(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", whole[2], re.DOTALL)
        elif whole := re.fullmatch(r'<function name="([^"]+)">(.*)</function>', inner, re.DOTALL):
            found = re.findall(r'<param name="([^"]+)">(.*?)</param>', whole[2], re.DOTALL)
            pairs = [(key, re.sub(r"^<!\[CDATA\[(.*)\]\]>$", r"\1", value, flags=re.DOTALL)) for key, value in found]
        else:
            return None
        types = self._types.get(whole[1], {})
        return _call(whole[1], {key: _typed(value, types.get(key)) for key, value in pairs})


def _parameter_types(function: Mapping[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    if not isinstance(properties, Mapping):
        return {}
    return {key: value.get("type") for key, value in properties.items() if isinstance(value, Mapping)}


def _read_json(text: str) -> ToolCall | None:
    try:
        call = json.loads(text)
        name, arguments = call["name"], call.get("arguments", {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return _call(name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


def _call(name: str, arguments: dict[str, Any]) -> ToolCall | None:
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        f"{name}{text}".encode()
    except (ValueError, RecursionError):  # not a number, half a character
        return None
    return ToolCall(name, text)


def _typed(value: str, kind: Any) -> Any:
    """A value written without quotes, by the tool's own schema: text where that says so, else JSON if it is."""
    if kind == "string":
        return value
    plain = value.strip()
    plain = {"True": "true", "False": "false", "None": "null"}.get(plain, plain)  # as some templates print them
    try:
        return json.loads(plain)
    except (ValueError, RecursionError):
        return value
