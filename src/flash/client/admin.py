"""Orgs, keys and the audit log through the HTTP API: what `flash admin` asks of a server."""

from __future__ import annotations

from typing import Any

from flash.client.client import FlashClient
from flash.records import AuditEntry, Key, KeyRequest, NewKey, Org, OrgRequest, ShareRequest


class AdminClient:
    """The same calls as the server's own `Administration`, with the key of `client`."""

    def __init__(self, client: FlashClient) -> None:
        self._client = client

    def create_org(self, name: str) -> Org:
        body = OrgRequest(name=name).model_dump(mode="json")
        return Org.model_validate(self._client.json("POST", "/api/orgs", json=body))

    def orgs(self) -> list[Org]:
        return [Org.model_validate(found) for found in self._client.json("GET", "/api/orgs")["orgs"]]

    def revoke_org(self, name: str) -> Org:
        return Org.model_validate(self._client.json("DELETE", "/api/orgs", name))

    def set_share(self, name: str, share: float) -> Org:
        body = ShareRequest(share=share).model_dump(mode="json")
        return Org.model_validate(self._client.json("PATCH", "/api/orgs", name, json=body))

    def create_key(self, request: KeyRequest) -> NewKey:
        body = request.model_dump(mode="json")
        return NewKey.model_validate(self._client.json("POST", "/api/keys", json=body))

    def keys(self, org: str | None) -> list[Key]:
        answer = self._client.json("GET", "/api/keys", params=_given(org=org))
        return [Key.model_validate(found) for found in answer["keys"]]

    def revoke_key(self, which: str, org: str | None) -> Key:
        return Key.model_validate(self._client.json("DELETE", "/api/keys", which, params=_given(org=org)))

    def audit(self, org: str | None, limit: int, before: int | None) -> list[AuditEntry]:
        answer = self._client.json("GET", "/api/audit", params=_given(org=org, limit=limit, before=before))
        return [AuditEntry.model_validate(found) for found in answer["entries"]]

    def note(self, action: str, about: str) -> None:
        """The server keeps the record itself."""

    def close(self) -> None:
        self._client.close()


def _given(**parameters: Any) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if value is not None}
