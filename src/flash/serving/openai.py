"""OpenAI's vocabulary: what a request may say, and what an error looks like.

Owns the forms on the wire and their limits. Fields that change nothing here are ignored (`user`, `metadata`, ...);
one that would change the answer and is not supported is refused unless it has its neutral value. Knows no
engine, no tokenizer and no server, so that the control plane may use it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator
from pydantic_core import PydanticCustomError

from flash.errors import Busy, FlashError, InvalidInput

MAX_CHOICES = 128       # of one prompt
MAX_PROMPTS = 256       # in one request
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_TOOLS = 128
MAX_INTEGER = 2**63 - 1

# --- errors -----------------------------------------------------------------------------------------------


class ApiError(FlashError):
    """An error with the fields that OpenAI's clients read."""

    code = "invalid_request"

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status  # type: ignore[misc]
        self.type = type
        self.param = param
        self.api_code = code
        self.retry_after_s = retry_after_s


class ErrorFields(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """What every failed request is answered with."""

    error: ErrorFields


def as_api_error(error: Exception) -> ApiError:
    """Any error in OpenAI's terms: 400 for a request that can't be served, 429 for a full queue, else 5xx."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return ApiError(
            str(error), status=429, type="rate_limit_error", code="rate_limit_exceeded",
            retry_after_s=error.retry_after_s,
        )
    if isinstance(error, InvalidInput):
        return ApiError(str(error))
    if isinstance(error, FlashError):
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        return ApiError(str(error), status=error.status, type=kind, code=error.code)
    return ApiError("a defect in Flash's engine; its log says more", status=500, type="server_error", code="internal")


def error_body(error: ApiError) -> dict[str, Any]:
    return {"error": {"message": str(error), "type": error.type, "param": error.param, "code": error.api_code}}


def error_headers(error: ApiError) -> dict[str, str]:
    if error.retry_after_s is not None:
        return {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
    return {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}


def validation_error(problems: Sequence[Any]) -> ApiError:
    """Pydantic's findings as one error that names the first field. Values are left out: they may be long."""
    if any(problem["type"] == "json_invalid" for problem in problems):
        return ApiError("the body is not valid JSON")
    first = problems[0]
    places = [str(part) for part in first["loc"] if part not in ("body", "header")]
    param = first.get("ctx", {}).get("param") or (places[0] if places else None)
    if first["type"] == _REFUSED:
        return ApiError(first["msg"], param=param)
    if param in _CHOICES:  # pydantic would name one of the choices only
        return ApiError(f"{param}: {_CHOICES[param]}", param=param)
    where = ".".join(places) or param or "the body"
    return ApiError(f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}", param=param)


_CHOICES = {
    "prompt": f"must be a text, token ids, or a list of up to {MAX_PROMPTS} of either, none empty",
    "stop": f"must be a text or a list of up to {MAX_STOPS} texts, none empty",
}


_REFUSED = "refused"


def _refused(param: str, words: str) -> PydanticCustomError:
    return PydanticCustomError(_REFUSED, "{words}", {"words": words, "param": param})


# --- requests ---------------------------------------------------------------------------------------------

# Fields that would change the answer, with the values at which they don't.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0), "presence_penalty": (None, 0), "repetition_penalty": (None, 1),
    "length_penalty": (None, 1), "logit_bias": (None, {}), "top_k": (None, -1, 0), "min_p": (None, 0),
    "min_tokens": (None, 0), "ignore_eos": (None, False), "use_beam_search": (None, False),
    "stop_token_ids": (None, []), "bad_words": (None, []), "logits_processors": (None, []),
    "allowed_token_ids": (None, []), "prompt_logprobs": (None, 0), "truncate_prompt_tokens": (None,),
    "guided_json": (None,), "guided_regex": (None,), "guided_choice": (None,), "guided_grammar": (None,),
    "structured_outputs": (None,), "suffix": (None, ""), "prompt_embeds": (None,),
    "functions": (None, []), "function_call": (None, "none", "auto"), "audio": (None,),
    "modalities": (None, ["text"]), "web_search_options": (None,), "reasoning_effort": (None,),
    "verbosity": (None, "medium"), "chat_template": (None,), "documents": (None, []),
    "continue_final_message": (None, False), "add_generation_prompt": (None, True),
}
_INSTEAD = {
    "reasoning_effort": "use chat_template_kwargs.enable_thinking",
    "guided_json": "use response_format", "structured_outputs": "use response_format",
    "functions": "use tools", "function_call": "use tools",
}  # fmt: skip

Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Count = Annotated[int, Field(ge=1, le=MAX_INTEGER)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INTEGER)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = False


class _Request(BaseModel):
    """What both endpoints share."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())

    model: str = Field(min_length=1, max_length=1000)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] | None = 1.0
    seed: Annotated[int, Field(ge=-MAX_INTEGER - 1, le=MAX_INTEGER)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, given: Any) -> Any:
        if isinstance(given, dict):
            for name in given.keys() & _NEUTRAL.keys():
                if given[name] not in _NEUTRAL[name]:
                    instead = f"; {_INSTEAD[name]}" if name in _INSTEAD else "; leave it out"
                    raise _refused(name, f"{name} is not supported{instead}")
        return given

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage_wanted(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(_Request):
    """`POST /v1/completions`. Prompts are texts or token ids; `echo` with `logprobs` scores them."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=MAX_INTEGER)] | None = 16
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise _refused("best_of", "best_of other than n is not supported; leave it out")
        if self.max_tokens == 0 and not self.echo:
            raise _refused("max_tokens", "max_tokens = 0 needs echo: without it the answer would be empty")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class JsonSchema(BaseModel):
    model_config = ConfigDict(strict=True, populate_by_name=True, protected_namespaces=())

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """`json_schema` is followed to the letter, whatever `strict` says."""

    model_config = ConfigDict(strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise _refused("response_format", "response_format: json_schema goes with its own type only")
        if self.json_schema is not None and self.json_schema.schema_ is None:
            raise _refused("response_format", "response_format: json_schema.schema is missing")
        return self


class TemplateArguments(BaseModel):
    """The allowlist: nothing else reaches a chat template."""

    model_config = ConfigDict(strict=True, extra="forbid")

    enable_thinking: bool | None = None


class Function(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    name: str = Field(min_length=1, max_length=200)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["function"]
    function: Function


class ChatRequest(_Request):
    """`POST /v1/chat/completions`. Without a limit, an answer may fill what the context leaves, up to 8,192 tokens."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=100_000)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = True
    chat_template_kwargs: TemplateArguments | None = None

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _only_own_choice(cls, given: Any) -> Any:
        if given not in (None, "none", "auto"):
            raise _refused("tool_choice", "tool_choice: only none and auto are supported; calls can't be forced")
        return given

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise _refused("top_logprobs", "top_logprobs needs logprobs = true")
        if self.constrained and self.offered_tools:
            raise _refused("response_format", "response_format goes with no tools: leave one of them out")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def constrained(self) -> bool:
        return self.response_format is not None and self.response_format.type != "text"

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_unset=True) for tool in self.tools or []]
