"""From settings to a client: the team server that is configured, or the local one, started if need be.

Owns that choice. Imports the HTTP stack only when a connection is wanted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flash.cli.output import note

if TYPE_CHECKING:
    from flash.client.client import FlashClient


def connect() -> FlashClient:
    """A client of the caller's server; starts the local one when no other is configured."""
    from flash.client import local_server, settings
    from flash.client.client import FlashClient

    found = settings.load()
    if found.api_url and found.api_key:
        return FlashClient(
            found.api_url,
            found.api_key,
            unreachable_remedy=f"is it up? {settings.API_URL} or `flash login` named it",
        )
    server = local_server.ensure(found.home, notice=note)

    def recover() -> None:
        local_server.ensure(found.home)

    return FlashClient(
        server.base_url,
        server.token,
        unreachable_remedy=f"see {local_server.log_path(found.home)}",
        recover=recover,
    )


def is_remote() -> bool:
    """Whether a team server is configured, whose catalog may know models that this machine does not."""
    from flash.client import settings

    return settings.load().api_url is not None


def openai_access(client: FlashClient) -> dict[str, str | None]:
    """How any OpenAI client reaches this server: its base URL, and a file that holds the key and nothing else.

    A team server's key is the caller's own (FREESOLO_API_KEY): there is no such file.
    """
    from flash.client import settings

    found = settings.load()
    return {"base_url": f"{client.base_url}/v1", "token_file": None if found.api_url else str(found.home / "token")}
