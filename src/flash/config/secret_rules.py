"""Names and values that are secret, or must not be set.

Owns the rules for `environment.secrets`, `[worker_env]` and `environment.params`: pure functions over
strings. It reads no environment and no file; `secrets.py` does.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import pairwise

RESERVED = frozenset(
    {
        "FREESOLO_API_KEY",
        "FREESOLO_INTERNAL_KEY",
        "GITHUB_TOKEN",
        "HF_REPO",
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "RUNPOD_API_KEY",
        "RUN_ID",
    }
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_STEERING = re.compile(r"PATH|PYTHON.*|LD_.*|DYLD_.*|CUDA_.*", re.IGNORECASE)
_SECRET_WORDS = frozenset(
    {
        "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS", "APIKEY",
        "PRIVATEKEY", "PAT",
    }
)  # fmt: skip
_KEY_COMPANIONS = frozenset(
    {
        "API", "SECRET", "PRIVATE", "ACCESS", "AUTH", "SIGNING", "ENCRYPTION", "SSH", "DEPLOY", "SERVICE",
        "MASTER", "CLIENT", "ACCOUNT", "HMAC", "JWT", "GPG", "PGP", "RSA", "WEBHOOK", "LICENSE",
    }
)  # fmt: skip


# --- names --------------------------------------------------------------------------------------------


def _form_fault(name: str) -> str | None:
    if not _NAME.fullmatch(name):
        return f"{name!r:.60} can't name an environment variable; use letters, digits and _, no digit first"
    return None


def _reserved_fault(name: str) -> str | None:
    if name.upper() in RESERVED or name.upper().startswith("FLASH_"):
        return f"{name} is reserved: Flash sets it itself; remove it, or pass yours under another name"
    if _STEERING.fullmatch(name):
        return f"{name} steers the worker's own process; remove it, or use another name"
    return None


def secret_name_fault(name: str) -> str | None:
    """Why this may not stand in `environment.secrets`, as "rule; remedy"; None when it may."""
    return _form_fault(name) or _reserved_fault(name)


def environment_name_fault(name: str) -> str | None:
    """Why this may not be a key of `[worker_env]`, as "rule; remedy"; None when it may."""
    if fault := _form_fault(name) or _reserved_fault(name):
        return fault
    if name_looks_secret(name):
        return (
            "has a name that looks secret, and worker_env is stored with the run; "
            "name it under environment.secrets instead"
        )
    return None


def name_looks_secret(name: str) -> bool:
    """True for API_KEY, GITHUB_PAT, DB_PASSWORD; false for SORT_KEY and MAX_TOKENS."""
    words = name.upper().split("_")
    return bool(_SECRET_WORDS.intersection(words)) or ("KEY" in words and bool(_KEY_COMPANIONS.intersection(words)))


# --- values -------------------------------------------------------------------------------------------

_START = r"(?<![A-Za-z0-9_-])"
# What follows a known prefix: long enough, and with a digit unless it is longer than a word ("sk-learn").
_BODY = r"(?:(?=[A-Za-z]*[0-9])[A-Za-z0-9]{12,}|[A-Za-z0-9]{20,})"
_KNOWN = (
    ("a private key", re.compile(r"-----BEGIN [A-Z0-9 ]{1,60}-----")),
    ("a JSON web token", re.compile(_START + r"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*")),
    (
        "an API key",
        re.compile(
            _START
            + r"(?:(?:sk|pk|rk)[-_](?:[A-Za-z0-9]{1,40}[-_]){0,6}"  # OpenAI, Anthropic, Stripe and those who copy them
            + r"|gh[pousr]_|github_pat_|glpat-|hf_|npm_|pypi-|dop_v1_|SG\.|ya29\.|AIza|xox[abeoprs]-(?:\d{1,20}-){0,4}"
            + r"|(?:gsk|xai|tvly|nvapi|rpa|r8|pcsk|lsv2|wandb)[-_](?:[A-Za-z0-9]{1,40}[-_]){0,6})"
            + _BODY
            + r"|(?:AKIA|ASIA)[A-Z0-9]{16}"
        ),
    ),
    (
        "a password in an address",
        re.compile(r"(?<![a-z0-9+.-])[a-z][a-z0-9+.-]{0,30}://[^\s/:@]{0,200}:[^\s/:@]{1,200}@", re.I),
    ),
)


def secret_value_fault(value: str) -> str | None:
    """What secret a value looks like ("an API key"), by its form alone; None when by none."""
    return next((what for what, pattern in _KNOWN if pattern.search(value)), None)


def worker_value_fault(value: str) -> str | None:
    """As `secret_value_fault`, plus long random-looking strings."""
    return secret_value_fault(value) or ("a long random key" if _has_random_run(value) else None)


_RUN = re.compile(r"[A-Za-z0-9+/=_-]{32,}")
_UNBROKEN_RUN = re.compile(r"[a-z0-9]{32,}|[A-Z0-9]{32,}")


def _has_random_run(text: str) -> bool:
    """Whether 32 or more characters in a row look drawn at random: hex or base-36, or base-64.

    Base-64 changes between upper case, lower case and digit at about 60% of its places; names and paths
    written by people do so far more rarely.
    """
    for run in _UNBROKEN_RUN.findall(text):
        if any(c.isdigit() for c in run) and any(c.isalpha() for c in run) and _entropy(run) >= 3.0:
            return True
    return any(_entropy(run) >= 3.5 and _class_changes(run) >= 0.4 for run in _RUN.findall(text))


def _entropy(text: str) -> float:
    """Shannon entropy of the text's own character frequencies, in bits a character."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


def _class_changes(text: str) -> float:
    kinds = ["d" if c.isdigit() else "u" if c.isupper() else "l" if c.islower() else "-" for c in text]
    return sum(a != b for a, b in pairwise(kinds)) / (len(kinds) - 1)
