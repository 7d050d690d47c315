"""Where the caller's server is and who the caller is: environment variables, `config.json`, `$FLASH_HOME`.

Owns the order in which they are asked. Knows nothing of HTTP, and reads no run configuration.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from flash.errors import InvalidInput

API_URL = "FLASH_API_URL"
API_KEY = "FREESOLO_API_KEY"


@dataclass(frozen=True)
class Settings:
    """`api_url` None means the local server, which has a token of its own."""

    home: Path
    api_url: str | None = None
    api_key: str | None = None


def flash_home() -> Path:
    """`$FLASH_HOME`, or `~/.flash`."""
    return Path(os.environ.get("FLASH_HOME") or "~/.flash").expanduser().resolve()


def load() -> Settings:
    """The settings in force: each of URL and key from the environment, else from `flash login`'s file.

    A key that was saved for one server is never sent to another one that the environment names.
    """
    home = flash_home()
    saved = _read(home / "config.json")
    url = _url(os.environ.get(API_URL, "")) or _url(saved.get("api_url", ""))
    key = os.environ.get(API_KEY, "").strip()
    if not key and url == _url(saved.get("api_url", "")):
        key = saved.get("api_key", "")
    if url and not key:
        raise InvalidInput(f"no API key for {url}", remedy=f"set {API_KEY}, or run: flash login --api-url {url}")
    return Settings(home=home, api_url=url, api_key=key or None) if url else Settings(home=home)


def save_login(home: Path, api_url: str, api_key: str) -> Path:
    """Writes `config.json`, readable by its owner only, and returns its path."""
    home.mkdir(parents=True, exist_ok=True)
    path = home / "config.json"
    temporary = path.with_name(f".config.json.{os.getpid()}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        json.dump({**_read(path), "api_url": normalise_url(api_url), "api_key": api_key}, out, indent=2)
    temporary.replace(path)
    return path


def forget_login(home: Path) -> bool:
    """Drops the saved server and key; False when there was none."""
    path = home / "config.json"
    rest = _read(path)
    had = rest.pop("api_url", None) is not None
    rest.pop("api_key", None)
    if had:
        path.write_text(json.dumps(rest, indent=2))
    return had


def normalise_url(url: str) -> str:
    """The base URL without a trailing slash; raises `InvalidInput` for anything but http(s)."""
    trimmed = url.strip().rstrip("/")
    if not trimmed.startswith(("http://", "https://")) or trimmed.endswith(":/"):
        raise InvalidInput(f"server address {url!r} is not an http(s) URL", remedy="e.g. https://flash.example.org")
    return trimmed


def _url(text: str) -> str | None:
    return normalise_url(text) if text.strip() else None


def _read(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} can't be read: {error}", remedy="delete it and run: flash login") from error
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise InvalidInput(f"{path} is not a table of strings", remedy="delete it and run: flash login")
    return found
