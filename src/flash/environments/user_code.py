"""The boundary around user code: whatever it raises becomes one `UserCodeError` with its own traceback.

Knows exceptions and tracebacks, nothing of environments.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from flash.errors import FlashError, UserCodeError

MAX_DETAIL_CHARS = 16_000
MAX_MESSAGE_CHARS = 500


@contextmanager
def user_code(doing: str, folder: Path) -> Iterator[None]:
    """Runs user code; `doing` names what it was asked, e.g. "score_responses". Flash's own errors pass through.

    `sys.exit` counts as raising. Only Ctrl-C is let through.
    """
    try:
        yield
    except (FlashError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise describe(error, doing, folder) from None


def describe(error: BaseException, doing: str, folder: Path) -> UserCodeError:
    """The exception as one line (place, type, text), with the traceback from the user's first frame on."""
    place = _place(error, folder)
    text = " ".join(str(error).split())[:MAX_MESSAGE_CHARS]
    remedy = None
    if isinstance(error, SystemExit):
        what = f"called sys.exit({text})"
        remedy = "environment code must return or raise"
    elif isinstance(error, SyntaxError):
        what = f"{type(error).__name__}: {error.msg}"
    else:
        what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, ModuleNotFoundError):
        remedy = "a third-party package belongs in `environment.pip`; a file of yours must ship with the package"
    return UserCodeError(f"{place} in {doing}: {what}", remedy=remedy, detail=_detail(error, folder))


def _inside(filename: str, folder: Path) -> str | None:
    if filename.startswith("<"):  # no file, e.g. <string>; resolved, it would seem to lie in the working directory
        return None
    try:
        return str(Path(filename).resolve().relative_to(folder.resolve()))
    except (ValueError, OSError):
        return None


def _place(error: BaseException, folder: Path) -> str:
    if isinstance(error, SyntaxError) and error.filename and (name := _inside(error.filename, folder)):
        return f"{name} line {error.lineno}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if name := _inside(frame.filename, folder):
            return f"{name} line {frame.lineno}"
    return "environment.py"


def _detail(error: BaseException, folder: Path) -> str:
    unread = isinstance(error, SyntaxError)  # nothing of it ran: every frame is the importer's
    trace = None if unread else _from_user_frame(error.__traceback__, folder)
    text = "".join(traceback.format_exception(type(error), error, trace))
    if len(text) > MAX_DETAIL_CHARS:
        half = MAX_DETAIL_CHARS // 2
        text = f"{text[:half]}\n  … {len(text) - 2 * half:,} characters left out …\n{text[-half:]}"
    return text


def _from_user_frame(trace: TracebackType | None, folder: Path) -> TracebackType | None:
    step = trace
    while step is not None:
        if _inside(step.tb_frame.f_code.co_filename, folder):
            return step
        step = step.tb_next
    return trace
