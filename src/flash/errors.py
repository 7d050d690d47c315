"""The error tree: every error a person can meet says what is wrong, by which rule, and what to do.

Owns the classes and their form on the wire. Knows nothing of HTTP servers, terminals or torch:
`status` is only the number an API answers with, and the CLI prints `str(error)` as one line.
"""

from __future__ import annotations

from typing import Any, ClassVar


class FlashError(Exception):
    """An error meant for a person: one line, with a remedy where there is one.

    `code` is stable and machine-readable; `status` is the HTTP status it travels under.
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 400
    retry_after_s: float | None = None  # when the same request is welcome again, where that can be told

    def __init__(self, message: str, *, remedy: str | None = None, detail: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.detail = detail  # a traceback or a log excerpt; shown under --debug and in the run's log

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message

    def to_wire(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "remedy": self.remedy, "detail": self.detail}


class InvalidInput(FlashError):
    """The request can't be carried out as it stands; nothing was changed."""

    code = "invalid_input"
    status = 422


class ConfigError(InvalidInput):
    """One or more problems in a run's configuration, all reported in one go.

    Each problem is one line that opens with its dotted key.
    """

    code = "invalid_config"

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class PackageError(InvalidInput):
    """An environment package or archive that can't be shipped or opened safely."""

    code = "invalid_package"


class UserCodeError(FlashError):
    """Environment code raised, hung or answered out of contract; `detail` has its traceback. Never retried."""

    code = "user_code"
    status = 422


class ModelError(FlashError):
    """A base model or adapter that can't be found, read or used."""

    code = "model"
    status = 422


class OutOfMemory(FlashError):
    """The device has too little memory; a smaller micro-batch may fit."""

    code = "out_of_memory"
    status = 507


class NotFound(FlashError):
    code = "not_found"
    status = 404


class Conflict(FlashError):
    """The object moved on: a stale epoch, a reused idempotency key, a state that forbids the request."""

    code = "conflict"
    status = 409


class Unauthorized(FlashError):
    code = "unauthorized"
    status = 401


class Forbidden(FlashError):
    """The key is good, but not for this."""

    code = "forbidden"
    status = 403


class BudgetSpent(FlashError):
    """What the key may cost in all is spent, or would be."""

    code = "budget_spent"
    status = 402


class CapReached(FlashError):
    """The key has as much under way as it may; the same request is welcome when some of it has ended."""

    code = "cap_reached"
    status = 429


class Unavailable(FlashError):
    """A server, store or network that can't be reached now; trying again may help."""

    code = "unavailable"
    status = 503


class Busy(FlashError):
    """The queue is full; the same request is welcome after `retry_after_s`."""

    code = "busy"
    status = 429
    retry_after_s: float = 1.0


class InternalError(FlashError):
    """A defect of Flash's own; `detail` has the traceback."""

    code = "internal"
    status = 500


def _tree(root: type[FlashError]) -> list[type[FlashError]]:
    return [root, *(found for child in root.__subclasses__() for found in _tree(child))]


def from_wire(error: dict[str, Any]) -> FlashError:
    """The error that `to_wire` described; an unknown code becomes a plain FlashError."""
    message = str(error.get("message") or "unknown error")
    kind = {cls.code: cls for cls in _tree(FlashError)}.get(str(error.get("code")), FlashError)
    if kind is ConfigError:
        return ConfigError(message.split("\n"))
    return kind(message, remedy=error.get("remedy"), detail=error.get("detail"))
