"""A control plane in this process with several orgs and keys on it, whose workers are played by the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
from fastapi.testclient import TestClient
from torture.machine import ENVIRONMENT, archive

from flash.control_plane.app import create_app
from flash.control_plane.reconciler import Reconciler
from flash.control_plane.services import open_services
from flash.control_plane.settings import ServerSettings
from flash.launching.fake import FakeLauncher
from flash.storage import audit, identity
from flash.storage.identity import Caps, Role

AT_ONCE = {"backoff_first_s": 0.0, "backoff_max_s": 0.0, "clean_budget_s": 600.0}


class Team:
    """`keys[org, role]` are keys; `call` sends one of them."""

    def __init__(self, home: Path, *, devices: tuple[str, ...] = (), **settings: Any) -> None:
        self.settings = ServerSettings(home=home, **{**AT_ONCE, **settings})
        self.launcher = FakeLauncher(devices)
        self.plane = open_services(self.settings, launcher=self.launcher)
        self.app = create_app(self.settings, services=self.plane, reconcile=False)
        self.http = TestClient(self.app, raise_server_exceptions=False, client=("192.0.2.7", 50000))
        self.reconciler = Reconciler(self.plane)
        self.owner = identity.new_token()
        with self.plane.database.write() as connection:
            identity.add_key(connection, org=identity.LOCAL_ORG, token=self.owner, name="this machine")

    def __enter__(self) -> Team:
        self.http.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.__exit__(None, None, None)
        self.plane.close()

    def key(self, org: str, role: Role = Role.MEMBER, *, name: str | None = None, **caps: Any) -> str:
        with self.plane.database.write() as connection:
            if org not in {found.id for found in identity.list_orgs(connection)}:
                identity.create_org(connection, org, now=1.0)
            _, token = identity.create_key(
                connection, org=org, name=name or f"{role.word} of {org}", role=role, caps=Caps(**caps), now=1.0
            )
        return token

    def call(self, key: str | None, method: str, path: str, *, address: str = "", **request: Any) -> httpx.Response:
        """`address`: from where; for refusals by the dozen, of which one address's are only counted in the end."""
        headers = {**({"Authorization": f"Bearer {key}"} if key else {}), **request.pop("headers", {})}
        http = self.http
        if address:
            http = TestClient(self.app, raise_server_exceptions=False, client=(address, 50000))
        answer: Any = http.request(method, path, headers=headers, **request)
        return answer

    def push(self, key: str, org: str, name: str = "echo") -> None:
        body = archive({"environment.py": ENVIRONMENT + f"\n# {org}'s own\n"})
        answer = self.call(key, "POST", f"/api/environments/{org}/{name}", content=body)
        assert answer.status_code == 201, answer.text

    def submit(self, key: str, org: str, **train: Any) -> httpx.Response:
        config = {"model": "flash/nano", "environment": {"id": f"{org}/echo"}, "train": train}
        return self.call(key, "POST", "/api/runs", json={"config": config})

    def run(self, key: str, org: str, **train: Any) -> str:
        answer = self.submit(key, org, **train)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["run_id"])

    def settle(self) -> None:
        for _ in range(30):
            if not self.reconciler.tick():
                return

    def audited(self) -> list[audit.Entry]:
        """Oldest first."""
        with self.plane.database.read() as connection:
            return audit.read(connection, org=None, limit=1000)[::-1]
