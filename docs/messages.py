"""Collects what Flash can say went wrong, from its source: error messages with remedies, and warnings.

Owns the reading of `src/flash` as syntax trees. What it can't read off as text is written `…`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import flash
from flash import errors

SOURCE = Path(flash.__file__).parent
GAP = "…"


@dataclass(frozen=True)
class Message:
    code: str
    text: str
    remedy: str | None = None


@cache
def error_messages() -> list[Message]:
    """Every error with a remedy of its own, by code and then by text, without repeats."""
    found = {message for tree in _trees() for message in _errors(tree)}
    return sorted(found, key=lambda message: (message.code, message.text, message.remedy or ""))


@cache
def warnings() -> list[Message]:
    """Every warning that a run can report, by code."""
    found = {message for tree in _trees() for message in _warnings(tree)}
    return sorted(found, key=lambda message: (message.code, message.text))


@cache
def codes() -> dict[str, str]:
    """The error classes and their codes: those of `flash.errors`, and what other modules derive from them."""
    found = {
        name: kind.code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.FlashError)
    }
    classes = [node for tree in _trees() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    for node in classes:
        for base in node.bases:
            if node.name not in found and _name(base) in found:
                found[node.name] = _own_code(node) or found[_name(base)]
    return found


def _own_code(node: ast.ClassDef) -> str | None:
    for line in node.body:
        if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant) and _name(line.targets[0]) == "code":
            return str(line.value.value)
    return None


@cache
def _trees() -> list[ast.Module]:
    paths = sorted(path for path in SOURCE.rglob("*.py") if "scaffold/starter" not in path.as_posix())
    return [ast.parse(path.read_text(encoding="utf-8")) for path in paths]


def _errors(tree: ast.Module) -> Iterator[Message]:
    for call in _calls(tree):
        code = codes().get(_name(call.func))
        remedy = next((word.value for word in call.keywords if word.arg == "remedy"), None)
        if code is None or remedy is None or not call.args:
            continue
        for text in _texts(call.args[0]):
            for advice in _texts(remedy):
                if text.strip(GAP + " :") and advice.strip(GAP + " :"):
                    yield Message(code, text, advice)


def _warnings(tree: ast.Module) -> Iterator[Message]:
    for call in _calls(tree):
        if _name(call.func) in ("warn", "_warn") and len(call.args) == 2 and isinstance(call.args[0], ast.Constant):
            for text in _texts(call.args[1]):
                if text.strip(GAP + " :"):
                    yield Message(str(call.args[0].value), text)
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name == "_sicknesses":
            for entry in ast.walk(function):
                if isinstance(entry, ast.Tuple) and len(entry.elts) == 3 and isinstance(entry.elts[0], ast.Constant):
                    yield Message(str(entry.elts[0].value), _texts(entry.elts[2])[0])


def _calls(tree: ast.Module) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _texts(node: ast.expr) -> list[str]:
    """What the expression can read as, with a gap for each value that only a run knows."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.Constant(value=None):
            return []
        case ast.JoinedStr(values=parts):
            return ["".join(part.value if isinstance(part, ast.Constant) else GAP for part in parts)]
        case ast.BinOp(left=left, right=right):
            return [first + second for first in _texts(left) for second in _texts(right)]
        case ast.IfExp(body=one, orelse=other):
            return [*_texts(one), *_texts(other)]
        case ast.BoolOp(values=values):
            return [text for value in values for text in _texts(value)]
        case _:
            return [GAP]
