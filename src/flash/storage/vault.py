"""Secrets at rest: sealed with AES-256-GCM under a key file, gone when the run (or engine) ends.

Owns the key and the sealing. A sealed value is bound to its owner and name: moved to another
row, it won't open.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import Connection, delete, insert, select

from flash.errors import InternalError
from flash.storage import schema
from flash.storage.private_files import found_or_made

_NONCE_BYTES = 12


class Vault:
    def __init__(self, key: bytes) -> None:
        if len(key) != 32:
            raise InternalError(
                f"the vault's key has {len(key)} bytes: it must have 32",
                remedy="restore vault.key, or remove it when no run with secrets is unfinished",
            )
        self._cipher = AESGCM(key)
        self._mac_key = hmac.digest(key, b"idempotency", "sha256")

    @classmethod
    def open(cls, path: Path) -> Vault:
        """The vault under the key file at `path`, made (0600) if there is none."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return cls(found_or_made(path, secrets.token_bytes(32)))

    def store(self, connection: Connection, run_id: str, values: Mapping[str, str]) -> None:
        for name, value in values.items():
            sealed = self.seal(run_id, name, value)
            connection.execute(insert(schema.secrets).values(run_id=run_id, name=name, sealed=sealed))

    def open_all(self, connection: Connection, run_id: str) -> dict[str, str]:
        """The run's secrets, opened."""
        rows = connection.execute(select(schema.secrets).where(schema.secrets.c.run_id == run_id))
        return {row.name: self.unseal(run_id, row.name, row.sealed) for row in rows}

    def seal(self, owner: str, name: str, value: str) -> bytes:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, value.encode(), _binding(owner, name))

    def unseal(self, owner: str, name: str, sealed: bytes) -> str:
        """What `seal` sealed for this owner under this name."""
        nonce, body = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        try:
            return self._cipher.decrypt(nonce, body, _binding(owner, name)).decode()
        except InvalidTag:
            raise InternalError(
                f"the secret {name} of {owner} does not open: vault.key is not the one that sealed it",
                remedy="restore the key file, or submit the run again",
            ) from None

    def mac(self, message: bytes) -> str:
        """A keyed digest of a request that may hold secrets, for comparing repeats without keeping them."""
        return hmac.new(self._mac_key, message, hashlib.sha256).hexdigest()


def forget(connection: Connection, run_id: str) -> None:
    """Deletes a run's secrets."""
    connection.execute(delete(schema.secrets).where(schema.secrets.c.run_id == run_id))


def _binding(owner: str, name: str) -> bytes:
    return f"{owner}\0{name}".encode()
