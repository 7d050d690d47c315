"""`flash chat`: one question to a deployed run, answered as it comes."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flash.cli.connection import connect
from flash.cli.output import INTERRUPTED, Globals, globals_of, note, say_json
from flash.errors import FlashError

if TYPE_CHECKING:
    from flash.client.client import FlashClient

app = typer.Typer(add_completion=False, rich_markup_mode=None)
HINT_S = 2.0  # without a sign, after which a person is told what for
PATIENCE_S = 1800.0  # for an engine that has to start or to wait for a device


@app.command()
def chat(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="RUN_ID", help="A deployed run, RUN_ID/step-N, or a base model.")
    ],
    message: Annotated[str, typer.Option("--message", "-m", metavar="MESSAGE", help="What to say.")],
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system message.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", min=1, help="Length of the answer.")] = 512,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", min=0.0, max=2.0, help="0 takes the likeliest token.")
    ] = 0.0,
) -> None:
    """Ask a deployed run.

    The answer is printed as it comes, a reasoning trace on stderr; Ctrl-C cancels it. An idle engine is started.
    """
    options = globals_of(ctx)
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": message})
    request = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": temperature}
    with connect() as client:
        try:
            _converse(client, request, options)
        except KeyboardInterrupt:
            note("\ncancelled")
            raise typer.Exit(INTERRUPTED) from None


def _converse(client: FlashClient, request: dict[str, Any], options: Globals) -> None:
    """Asks until an engine is there; says once what it waits for."""
    give_up_at, told = time.monotonic() + PATIENCE_S, ""
    while True:
        answer = Answer(options)
        hint = threading.Timer(HINT_S, note, ["waiting for the engine ..."])
        if options.human():
            hint.start()
        try:
            with client.chat(request) as stream:
                hint.cancel()
                for chunk in stream.chunks:
                    answer.take(chunk)
            answer.end(request, stream.checkpoint)
            return
        except FlashError as error:
            hint.cancel()
            answer.break_line()
            if error.retry_after_s is None or answer.begun or time.monotonic() >= give_up_at:
                raise
            if error.message != told:
                note(f"{error.message}; trying again ...")
            told = error.message
            time.sleep(error.retry_after_s)
        finally:
            hint.cancel()


class Answer:
    """What came so far, printed piece by piece unless JSON is asked for."""

    def __init__(self, options: Globals) -> None:
        self._json = options.json
        self._content = ""
        self._reasoning = ""
        self._finish: str | None = None
        self._usage: dict[str, Any] | None = None

    @property
    def begun(self) -> bool:
        return bool(self._content or self._reasoning)

    def take(self, chunk: dict[str, Any]) -> None:
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk.get("choices", ()):
            delta = choice.get("delta", {})
            self._add(delta.get("reasoning_content") or "", delta.get("content") or "")
            self._finish = choice.get("finish_reason") or self._finish

    def _add(self, reasoning: str, content: str) -> None:
        if reasoning and not self._json:
            print(reasoning, end="", file=sys.stderr, flush=True)
        if content and not self._json:
            if self._reasoning and not self._content:
                print(file=sys.stderr, flush=True)
            print(content, end="", flush=True)
        self._reasoning += reasoning
        self._content += content

    def break_line(self) -> None:
        """So that what follows an answer, whole or broken off, stands on a line of its own."""
        if self._content and not self._json:
            print(flush=True)

    def end(self, request: dict[str, Any], checkpoint: str | None) -> None:
        if self._json:
            say_json(
                {
                    "model": request["model"],
                    "checkpoint": checkpoint,
                    "content": self._content,
                    "reasoning_content": self._reasoning or None,
                    "finish_reason": self._finish,
                    "usage": self._usage,
                }
            )
            return
        self.break_line()
        if self._finish == "length":
            note(f"(cut off at {request['max_tokens']} tokens: --max-tokens)")
