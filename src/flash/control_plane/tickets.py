"""A worker's way in where its launch is written down for others to read: a ticket in place of its token.

Owns what a ticket is: the token, sealed under the vault's key for this worker alone. Nothing is recorded, so any server
of the database can open it, also one that was started in between, and again when an answer got lost. What it is good
for, and how long, is the route's.
"""

from __future__ import annotations

import base64
import binascii

from flash.errors import InternalError, Unauthorized
from flash.storage.vault import Vault

_NAME = "launch"  # under which the vault seals


def seal_ticket(vault: Vault, worker_id: str, token: str) -> str:
    return base64.urlsafe_b64encode(vault.seal(worker_id, _NAME, token)).decode()


def open_ticket(vault: Vault, worker_id: str, ticket: str) -> str:
    """The token in it. Raises Unauthorized."""
    try:
        return vault.unseal(worker_id, _NAME, base64.b64decode(ticket, altchars=b"-_", validate=True))
    except (InternalError, binascii.Error, ValueError):
        raise Unauthorized("the ticket is not this worker's") from None
