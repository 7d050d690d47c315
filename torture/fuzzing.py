"""Calls made up from the server's own OpenAPI schema: never a 5xx, and nothing of another organisation's.

The ids of a finished run, of an open one and of another organisation's run are mixed in, so that not all of it
ends at "not found".
"""

from __future__ import annotations

import itertools
import math
import random
import tempfile
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from starlette.testclient import TestClient

from flash.artifacts.manifests import write_checkpoint
from flash.storage import environments, identity, runs
from torture.plane import Plane
from torture.tally import Tally


@schemathesis.serializer("application/gzip")
def _as_it_is(_: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")


CANARY = "canary-of-another-organisation"
STREAM = "/api/runs/{run_id}/events/stream"


def calls(count: int, seed_: int) -> Tally:
    chance = random.Random(seed_)
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        plane = Plane(Path(folder) / "home", devices=())
        done = _finished(plane, Path(folder))
        theirs = _other_org(plane, Path(folder))
        open_ = plane.submit()
        admin = _admin(plane)
        schema = schemathesis.openapi.from_asgi("/openapi.json", plane.app)
        operations = [found.ok() for found in schema.get_all_operations()]
        with TestClient(plane.app, raise_server_exceptions=False) as http:
            for operation in operations:
                # A stream of an open run has no end to wait for.
                ids = [done, theirs] if operation.path == STREAM else [done, theirs, open_]
                _fuzz(operation, http, admin, ids, math.ceil(count / len(operations)), chance, tally)
        plane.close()
    tally.note = f"{len(operations)} operations"
    return tally


def _fuzz(
    operation: Any, http: TestClient, token: str, ids: list[str], examples: int, chance: random.Random, tally: Tally
) -> None:
    numbers = itertools.count()

    @seed(chance.getrandbits(64))
    @settings(
        max_examples=examples, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(operation.as_strategy())
    def one(case: Any) -> None:
        number = next(numbers)
        if "run_id" in case.path_parameters and number % 2:
            case.path_parameters["run_id"] = ids[number // 2 % len(ids)]
        if "attempt_id" in case.path_parameters and number % 2:
            case.path_parameters["attempt_id"] = f"{ids[number // 2 % len(ids)]}.1"
        if "namespace" in case.path_parameters and number % 3 == 0:
            case.path_parameters["namespace"] = ("local", "others")[number % 2]
        headers = {} if number % 50 == 0 else {"Authorization": f"Bearer {token}"}
        request = case.as_transport_kwargs(base_url="http://testserver", headers=headers)
        request = {name: value for name, value in request.items() if name in _TAKEN}
        answer = http.request(**request)
        leaked = CANARY in answer.text and CANARY not in str(request)
        what = f"{request['method']} {request['url']}: {answer.status_code}"
        tally.count(answer.status_code < 500 and not leaked, f"{what}{' leaks' if leaked else ''}")

    one()


_TAKEN = ("method", "url", "params", "headers", "cookies", "json", "data", "content", "files")


def _admin(plane: Plane) -> str:
    """A key that may do all within its org; the owner's, which the laptop has, may look into every other."""
    token = identity.new_token()
    with plane.services.database.write() as connection:
        identity.add_key(connection, org="local", token=token, name="admin", role=identity.Role.ADMIN)
    return token


def _finished(plane: Plane, folder: Path) -> str:
    plane.launcher._devices = ("cpu",)
    run_id = plane.submit()
    plane.settle()
    worker = plane.worker(run_id, 1)
    worker.claim()
    worker.tell(20)
    (folder / "saved" / "adapter").mkdir(parents=True)
    (folder / "saved" / "adapter" / "weights").write_bytes(b"weights")
    _, sha256 = write_checkpoint(plane.services.store, run_id, 3, folder / "saved", True, {})
    worker.report(3, True, sha256)
    worker.finish("done")
    plane.launcher.die(worker.attempt_id)
    plane.settle()
    plane.launcher._devices = ()
    return run_id


def _other_org(plane: Plane, folder: Path) -> str:
    """A run, an environment and a checkpoint that this key must never see."""
    with plane.services.database.write() as connection:
        identity.add_key(connection, org="others", token=identity.new_token(), name=CANARY)
        environments.push(
            connection, org="others", namespace="others", name="task", sha256="ab" * 32, size=1, files=[CANARY], now=1.0
        )
        return runs.insert_run(
            connection,
            runs.NewRun(
                org="others", config={"canary": CANARY}, spec={"model": CANARY, "algorithm": "sft"}, seed=0,
                environment_namespace="others", environment_name="task", environment_sha256="ab" * 32,
            ),
            now=1.0,
        )  # fmt: skip
