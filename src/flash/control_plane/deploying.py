"""What a name answers with: revisions found, tried and made live; names of `/v1` looked up.

A run's name (`RUN_ID`) is moved to a revision by a deploy, and only after a smoke completion through its engine
came out right, so a deploy that fails leaves the one before it live. `RUN_ID/step-N` is pinned: it means that
step for good, and answers while its run is deployed at all. A catalog id means the bare base. Another org's run
is as absent as one that never was. Knows no route; requests reach engines through `calling`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from flash.artifacts.manifests import manifest_key
from flash.catalog.catalog import Catalog, ModelEntry, load_catalog
from flash.config.run import ADAPTER_REF
from flash.control_plane import calling
from flash.control_plane.calling import Host, NotReady, find_host
from flash.control_plane.engines import shares
from flash.control_plane.estimating import reachable, serving_needs
from flash.control_plane.services import Services
from flash.errors import FlashError, InvalidInput, ModelError, NotFound, Unavailable
from flash.records import DeployAnswer, Deployment, DeployRequest, Revision
from flash.serving.hello import (
    ADAPTER_HEADER,
    MANIFEST_HEADER,
    MODEL_HEADER,
    SCOPE_HEADER,
    adapter_digest,
)
from flash.storage import deployments, engines, runs
from flash.storage.identity import Caller

DEPLOY_WAIT_S = 20.0  # how long one request to deploy waits for an engine before it says what it waits for
_SMOKE = {
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 4,
    "temperature": 0.0,
    "logprobs": True,
}
_BUSY = (429, 503)


@dataclass(frozen=True)
class Target:
    """What a request's `model` stands for. `revision` None: the bare base."""

    name: str
    model: str
    org: str
    revision: Revision | None = None
    manifest_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """What an engine's host has to know beside the request."""
        own = {MODEL_HEADER: quote(self.name, safe="/"), SCOPE_HEADER: quote(self.org, safe="")}
        if self.revision is None or self.manifest_key is None:
            return own
        return {**own, ADAPTER_HEADER: self.revision.adapter_sha256, MANIFEST_HEADER: self.manifest_key}


# --- names ------------------------------------------------------------------------------------------------


def find_target(plane: Services, org: str, name: str) -> Target:
    """What `name` means to this org now; NotFound otherwise."""
    match = ADAPTER_REF.fullmatch(name)
    if match is None:
        return Target(name, _base(plane, name).id, org)
    with plane.database.read() as connection:
        run = runs.get_run(connection, match["run_id"], org=org)
        live = deployments.find(connection, run.id)
        if live is None or live.revision is None:
            raise NotFound(f"{run.id} is not deployed", remedy=f"flash deploy {run.id}")
        if match["step"] is None or int(match["step"]) == live.revision.step:
            return Target(name, live.revision.model, org, live.revision, live.manifest_key)
        revision, key = _revision(connection, run, int(match["step"]))
    return Target(name, revision.model, org, revision, key)


def servable(plane: Services) -> list[ModelEntry]:
    """The catalog's models whose weights fit some device of this server."""
    return [entry for entry in _catalog(plane) if _fits(plane, entry)]


def _base(plane: Services, name: str) -> ModelEntry:
    catalog = _catalog(plane)
    if name not in catalog:
        raise NotFound(
            f"there is no model {name!r:.80}", remedy="give a deployed run's id, RUN_ID/step-N, or a catalog id"
        )
    entry = catalog.get(name)
    _check_fits(plane, entry)
    return entry


def _catalog(plane: Services) -> Catalog:
    own = plane.settings.home / "models.toml"
    return _read_catalog(plane.settings.home, own.stat().st_mtime_ns if own.is_file() else 0)


@lru_cache(maxsize=4)
def _read_catalog(home: Path, _changed_at: int) -> Catalog:
    """Kept until the operator's file changes: names are looked up with every request."""
    return load_catalog(home)


def _fits(plane: Services, entry: ModelEntry) -> bool:
    known, needs = [hardware for _, hardware in reachable(plane)], serving_needs(entry)
    return not known or any(needs[hardware.kind] <= hardware.memory for hardware in known)


def _check_fits(plane: Services, entry: ModelEntry) -> None:
    if not _fits(plane, entry):
        most = max(hardware.memory for _, hardware in reachable(plane))
        raise InvalidInput(
            f"{entry.id} ({entry.size}) can't be served here: its weights need more than the {most / 1e9:.1f} GB "
            "of the largest device",
            remedy="choose a smaller base",
        )


# --- revisions --------------------------------------------------------------------------------------------


def _revision(connection: Connection, run: runs.RunRow, step: int | None) -> tuple[Revision, str]:
    """A checkpoint's adapter, the final one where no step is named, with its manifest's key."""
    known = runs.checkpoints_of(connection, run.id)
    if step is None:
        final = [found.step for found in known if found.final]
        if not final:
            raise _no_final(run, [found.step for found in known])
        step = final[-1]
    manifest = runs.manifest_of(connection, run.id, step)
    revision = Revision(
        run_id=run.id, step=step, adapter_sha256=adapter_digest(manifest), model=str(run.spec["model"])
    )
    return revision, manifest_key(run.id, step)


def _no_final(run: runs.RunRow, steps: list[int]) -> FlashError:
    message = f"{run.id} is {run.state.value} and has no final adapter"
    if not steps:
        return InvalidInput(f"{message}, nor any checkpoint yet", remedy=f"flash status {run.id} -f")
    listed = ", ".join(str(step) for step in steps)
    return InvalidInput(
        f"{message}; it has checkpoints at steps {listed}", remedy=f"flash deploy {run.id}/step-{steps[-1]}"
    )


# --- deploying --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    target: Target
    revision: Revision
    manifest_key: str
    before: deployments.DeploymentRow | None
    engine: engines.EngineRow | None
    device: str | None
    wait: str | None

    @property
    def version(self) -> int:
        return self.before.version if self.before else 0

    @property
    def live(self) -> Revision | None:
        return self.before.revision if self.before else None

    def answer(self, state: str, **values: Any) -> DeployAnswer:
        fields: dict[str, Any] = {
            "state": state,
            "ref": self.revision.ref,
            "step": self.revision.step,
            "model": self.revision.model,
            "adapter_sha256": self.revision.adapter_sha256,
            "live": self.live.ref if self.live else None,
            "device": self.device,
            "engine": self.engine.view if self.engine else None,
            "wait": self.wait,
        }
        return DeployAnswer(**{**fields, **values})


async def deploy(plane: Services, client: httpx.AsyncClient, caller: Caller, request: DeployRequest) -> DeployAnswer:
    """Makes the revision what the run's name answers with, once a smoke completion came out right.

    An answer in the state `waiting` has moved nothing: the engine is on its way, and the same request again goes
    on from there. A failed smoke completion raises ModelError; a name that someone else moved meanwhile, Conflict.
    """
    plan = await run_in_threadpool(_plan, plane, caller, request)
    if request.dry_run:
        return plan.answer("planned")
    if not request.verify:
        row, _ = await run_in_threadpool(calling.want, plane, plan.revision.model)
        await run_in_threadpool(_move, plane, caller, plan, verified=False)
        return plan.answer("live", live=plan.revision.ref, engine=row.view)
    found = await find_host(plane, plan.revision.model, wait_s=DEPLOY_WAIT_S)
    if isinstance(found, NotReady):
        return plan.answer("waiting", engine=found.engine, device=found.engine.device, wait=found.reason)
    busy = await _smoke(plane, client, found, plan)
    if busy is not None:
        return plan.answer("waiting", wait=busy)
    await run_in_threadpool(_move, plane, caller, plan, verified=True)
    after = await run_in_threadpool(_plan, plane, caller, request)
    return after.answer("live", live=plan.revision.ref, wait=None)


def _plan(plane: Services, caller: Caller, request: DeployRequest) -> _Plan:
    with plane.database.read() as connection:
        run = runs.get_run(connection, request.run_id, org=caller.org)
        revision, key = _revision(connection, run, request.step)
        before = deployments.find(connection, run.id)
        engine = engines.usable(connection, revision.model)
        held = {row.device: row for row in engines.live(connection) if row.device is not None}
        trains = _training(connection, caller.org)
    entry = _catalog(plane).get(revision.model)
    _check_fits(plane, entry)
    device, wait = _placing(plane, engine, held, trains)
    target = Target(revision.ref, revision.model, caller.org, revision, key)
    return _Plan(target, revision, key, before, engine, device, wait)


def _training(connection: Connection, org: str) -> dict[str, str]:
    """The run on each device that has one, as the org may know it."""
    open_runs = runs.open_runs(connection)
    attempts = runs.attempts_of(connection, [run.id for run in open_runs])
    own = {run.id for run in open_runs if run.org_id == org}
    return {
        attempt.device: run_id if run_id in own else "a run"
        for run_id, found in attempts.items()
        for attempt in found
        if attempt.state.value in runs.LIVE_ATTEMPTS
    }


def _placing(
    plane: Services,
    engine: engines.EngineRow | None,
    held: dict[str, engines.EngineRow],
    trains: dict[str, str],
) -> tuple[str | None, str | None]:
    """Where the engine is or would be now, and what it waits for."""
    if engine is not None and engine.device is not None:
        ready = engine.state.value == "ready"
        return engine.device, None if ready else calling.wait_words(engine)
    try:
        devices = plane.launcher.devices()
    except FlashError as error:
        return None, str(error)
    free = [name for name in devices if name not in held and (shares(name, plane.settings) or name not in trains)]
    if free:
        return free[0], None
    words = [f"{name} {f'serves {held[name].model}' if name in held else f'trains {trains[name]}'}" for name in devices]
    return None, f"waiting for a free device: {', '.join(words)}" if words else "the server has no device"


def _move(plane: Services, caller: Caller, plan: _Plan, *, verified: bool) -> None:
    if plan.live == plan.revision:
        return
    with plane.database.write() as connection:
        runs.manifest_of(connection, plan.revision.run_id, plan.revision.step)  # NotFound: it was kept long enough
        deployments.move(
            connection,
            plan.revision,
            org=caller.org,
            manifest_key=plan.manifest_key,
            expected=plan.version,
            verified=verified,
            now=plane.clock(),
        )


async def _smoke(plane: Services, client: httpx.AsyncClient, host: Host, plan: _Plan) -> str | None:
    """Asks the revision for a few tokens. None: they are sound; words: the engine is too busy to say."""
    problem: str | None
    body = json.dumps({**_SMOKE, "model": plan.revision.ref}).encode()
    try:
        with plane.traffic.using(host.engine_id):
            answer = await calling.ask(
                client, host, "/v1/chat/completions", body, plan.target.headers, silence_s=plane.settings.smoke_s
            )
            try:
                await answer.aread()
            finally:
                await answer.aclose()
    except httpx.TimeoutException:
        problem = f"no answer within {plane.settings.smoke_s:g} s"
    except httpx.TransportError as error:
        plane.wake.set()
        raise Unavailable(
            f"the engine was lost during the smoke completion of {plan.revision.ref} ({type(error).__name__})",
            remedy="deploy it again",
        ) from error
    else:
        if answer.status_code in _BUSY:
            return f"the engine of {plan.revision.model} is busy"
        problem = _fault(answer)
    if problem is None:
        return None
    kept = f"{plan.live.ref} stays live" if plan.live else "nothing is deployed"
    raise ModelError(
        f"the smoke completion of {plan.revision.ref} failed: {problem}; {kept}",
        remedy="--no-verify deploys it all the same",
    )


def _fault(answer: httpx.Response) -> str | None:
    """What is wrong with a smoke completion."""
    try:
        body = answer.json()
        if answer.status_code != 200:
            return str(body["error"]["message"])
        choice = body["choices"][0]
        if int(body["usage"]["completion_tokens"]) < 1:
            return "it has no token"
        scored = (choice.get("logprobs") or {}).get("content") or []
        if not all(math.isfinite(float(token["logprob"])) for token in scored):
            return "its log-probabilities are not finite: the adapter's weights are broken"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return f"the engine answered {answer.status_code} with {answer.text[:200]!r}"
    return None


# --- what is live -----------------------------------------------------------------------------------------


def list_deployments(plane: Services, org: str) -> list[Deployment]:
    with plane.database.read() as connection:
        return [_deployment(connection, row) for row in deployments.list_live(connection, org=org)]


def get_deployment(plane: Services, org: str, run_id: str) -> Deployment:
    with plane.database.read() as connection:
        row = _find_live(connection, org, run_id)
        return _deployment(connection, row)


def undeploy(plane: Services, org: str, run_id: str) -> Deployment:
    """Takes the run's name back; what it answered with until now."""
    with plane.database.write() as connection:
        row = _find_live(connection, org, run_id)
        before = _deployment(connection, row)
        deployments.remove(connection, row.run_id, org=org, expected=row.version, now=plane.clock())
    return before


def live_ref(connection: Connection, run_id: str) -> str | None:
    row = deployments.find(connection, run_id)
    return row.revision.ref if row and row.revision else None


def _find_live(connection: Connection, org: str, run_id: str) -> deployments.DeploymentRow:
    run = runs.get_run(connection, run_id, org=org)
    row = deployments.find(connection, run.id)
    if row is None or row.revision is None:
        raise NotFound(f"{run.id} is not deployed", remedy=f"flash deploy {run.id}")
    return row


def _deployment(connection: Connection, row: deployments.DeploymentRow) -> Deployment:
    assert row.revision is not None
    engine = engines.usable(connection, row.revision.model)
    return Deployment(
        run_id=row.run_id,
        ref=row.revision.ref,
        step=row.revision.step,
        model=row.revision.model,
        adapter_sha256=row.revision.adapter_sha256,
        version=row.version,
        deployed_at=row.updated_at,
        engine=engine.view if engine else None,
    )
