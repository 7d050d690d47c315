"""A submit: validated by the CLI's own classes, pinned, and recorded in one transaction.

Owns what a server alone can decide: the environment's version, the adapter that a run starts from, whether
this request was made before. Knows no HTTP.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field

from sqlalchemy import Connection

from flash.artifacts.manifests import environment_key
from flash.catalog.catalog import load_catalog
from flash.config.environment_id import EnvironmentRef
from flash.config.load import parse_config
from flash.config.recipes import AdapterSource, resolve
from flash.config.run import ADAPTER_REF, RunConfig
from flash.config.secrets import WANDB_KEY, wandb_warnings
from flash.control_plane.caps import check_caps
from flash.control_plane.estimating import packaged_rows, plan_run
from flash.control_plane.services import Services
from flash.environments.references import at_commit, fetch, pinned_commit
from flash.errors import InvalidInput, NotFound, Unavailable
from flash.records import EnvironmentVersion, Priority, RunState, SubmitRequest
from flash.storage import environments, runs
from flash.storage.identity import Caller

_LONGEST_NAME = 200  # what the table holds


@dataclass(frozen=True)
class Submitted:
    run_id: str
    created: bool  # False: this key had made the run before


def submit(plane: Services, caller: Caller, request: SubmitRequest, key: str | None) -> Submitted:
    """Records a queued run. With an idempotency `key`, the same request again gives the same run."""
    mac = plane.vault.mac(_canonical(request))
    if key is not None:
        with plane.database.read() as connection:
            known = runs.find_submission(connection, org=caller.org, key=key, body_mac=mac)
        if known is not None:
            return Submitted(known, created=False)
    catalog = load_catalog(plane.settings.home)
    config, warnings = parse_config(request.config, catalog=catalog)
    check_secrets(config, request.secrets)
    fetched = fetch_environment(plane, caller, config)  # before the transaction: it may take a while
    with plane.database.read() as connection:  # only to measure it, which takes a while too
        package = fetched or pin_environment(connection, caller, config)
    size = packaged_rows(plane, package.sha256, package.size, config.environment.params)
    now = plane.clock()
    with plane.database.write() as connection:
        if key is not None:  # another request with the same key may have won since
            known = runs.find_submission(connection, org=caller.org, key=key, body_mac=mac)
            if known is not None:
                return Submitted(known, created=False)
        if fetched:
            version = record_fetched(connection, caller, fetched, now=now)
        else:
            version = pin_environment(connection, caller, config)
        source = find_source(connection, caller, config)
        spec = resolve(config, seed=request.seed, source=source, catalog=catalog)
        if fetched:
            spec = spec.model_copy(
                update={"environment": spec.environment.model_copy(update={"id": str(fetched.ref)})}
            )
        planned = plan_run(plane, spec, catalog.get(spec.model), size)
        check_caps(connection, caller, estimate=planned.estimate, gpus=planned.gpus)
        new = runs.NewRun(
            org=caller.org,
            config=config.document(),
            spec=planned.spec.model_dump(mode="json"),
            seed=request.seed,
            environment_namespace=version.namespace,
            environment_name=version.name,
            environment_sha256=version.sha256,
            init_run_id=source.run_id if source else None,
            init_step=source.step if source else None,
            wall_clock_limit_s=planned.wall_clock_limit_s,
            estimate=planned.estimate,
            warnings=[*warnings, *wandb_warnings(config, request.secrets)],
            key_id=caller.key_id,
            gpus=planned.gpus or 0,
            priority=request.priority.rank,
        )
        run_id = runs.insert_run(connection, new, now=now)
        plane.vault.store(connection, run_id, request.secrets)
        if key is not None:
            runs.record_submission(
                connection, org=caller.org, key=key, body_mac=mac, run_id=run_id, now=now
            )
    if fetched and fetched.data is not None:
        put_archive(plane, fetched.sha256, fetched.data)
    plane.wake.set()
    return Submitted(run_id, created=True)


def _canonical(request: SubmitRequest) -> bytes:
    """The same bytes for the same request, whatever the order of its keys."""
    try:
        whole = [request.config, request.seed, request.secrets]
        if request.priority is not Priority.NORMAL:
            whole.append(request.priority.value)  # left out else: the same bytes as before there were priorities
        return json.dumps(whole, sort_keys=True).encode()
    except RecursionError:
        raise InvalidInput("the config is nested too deeply", remedy="flatten it") from None


def check_secrets(config: RunConfig, given: dict[str, str]) -> None:
    """Every declared secret has a value, and nothing else came along."""
    declared = set(config.environment.secrets)
    missing = sorted(declared - set(given))
    if missing:
        raise InvalidInput(
            f"secrets without a value: {', '.join(missing)}",
            remedy="set them in your shell, .env.local or .env, or take them out of environment.secrets",
        )
    extra = sorted(set(given) - declared - {WANDB_KEY})
    if extra:
        raise InvalidInput(
            f"secrets that the config does not declare: {', '.join(extra)[:200]}",
            remedy="add their names to environment.secrets",
        )
    for name, value in given.items():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidInput(f"the secret {name} is not valid Unicode text") from None


def pin_environment(connection: Connection, caller: Caller, config: RunConfig) -> EnvironmentVersion:
    """The version this run will use, whatever is pushed later."""
    ref = config.environment.ref
    assert ref.namespace is not None and ref.name is not None
    try:
        return environments.resolve(
            connection, org=caller.org, namespace=ref.namespace, name=ref.name, version=ref.version
        )
    except NotFound as error:
        raise InvalidInput(f"environment.id = {str(ref)!r:.200}: {error.message}", remedy=error.remedy) from None


@dataclass(frozen=True)
class Fetched:
    """An environment from GitHub: where it is, with its commit, and what is in the store."""

    ref: EnvironmentRef
    sha256: str
    size: int
    files: tuple[str, ...]
    data: bytes | None = field(default=None, repr=False)  # None: it was in the store already

    @property
    def namespace(self) -> str:
        """With a colon, which no namespace of the hub may have."""
        return f"github:{self.ref.owner}"

    @property
    def name(self) -> str:
        return record_name(self.ref)


def record_name(ref: EnvironmentRef) -> str:
    """`repo@commit[:path]`, with the digest of a path that is too long for a name."""
    name = str(ref).partition("/")[2]
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 33]}:{hashlib.sha256(name.encode()).hexdigest()[:32]}"


def fetch_environment(plane: Services, caller: Caller, config: RunConfig) -> Fetched | None:
    """The files of a GitHub reference, brought into the store; None for an environment of the hub.

    A commit that was fetched before is not fetched again. Raises InvalidInput, PackageError, Unavailable.
    """
    ref = config.environment.ref
    if ref.kind != "github":
        return None
    if (commit := pinned_commit(ref)) is not None:
        ref = at_commit(ref, commit)
        with plane.database.read() as connection:
            known = environments.kept(
                connection, org=caller.org, namespace=f"github:{ref.owner}", name=record_name(ref)
            )
        if known is not None and plane.store.size(environment_key(known.sha256)) == known.size:
            return Fetched(ref, known.sha256, known.size, known.files)
    if not plane.fetches.acquire(blocking=False):
        raise Unavailable("the server is busy fetching other environments", remedy="try again in a minute")
    try:
        found = fetch(ref, plane.settings.github)
    except NotFound as error:
        raise InvalidInput(f"environment.id = {str(ref)!r:.200}: {error.message}", remedy=error.remedy) from None
    finally:
        plane.fetches.release()
    package = found.package
    put_archive(plane, package.sha256, package.data)
    return Fetched(at_commit(ref, found.commit), package.sha256, package.size, package.files, package.data)


def put_archive(plane: Services, sha256: str, archive: bytes) -> None:
    """Puts an environment's archive into the store unless it is there. Once more after the record of it is made:
    until then it was nobody's, and the same content of before may have gone meanwhile."""
    key = environment_key(sha256)
    if plane.store.size(key) != len(archive):
        plane.store.put_bytes(key, archive)


def record_fetched(connection: Connection, caller: Caller, fetched: Fetched, *, now: float) -> EnvironmentVersion:
    """The record that a run of a fetched environment pins."""
    if fetched.data is None and (
        environments.kept(connection, org=caller.org, namespace=fetched.namespace, name=fetched.name) is None
    ):
        raise Unavailable("the environment's files were just removed", remedy="submit again: they are fetched anew")
    return environments.keep(
        connection,
        org=caller.org,
        namespace=fetched.namespace,
        name=fetched.name,
        sha256=fetched.sha256,
        size=fetched.size,
        files=fetched.files,
        now=now,
    )


def find_source(connection: Connection, caller: Caller, config: RunConfig) -> AdapterSource | None:
    """The adapter that `train.init_from_adapter` names, with the rank and alpha it was trained with."""
    text = config.train.init_from_adapter
    if text is None:
        return None
    match = ADAPTER_REF.fullmatch(text)
    assert match is not None, "RunConfig checked the form"
    problem = f'train.init_from_adapter = "{text}"'
    try:
        run = runs.get_run(connection, match["run_id"], org=caller.org)
    except NotFound:
        raise InvalidInput(f"{problem}: there is no such run", remedy="`flash runs` lists them") from None
    checkpoints = runs.checkpoints_of(connection, run.id)
    steps = ", ".join(str(found.step) for found in checkpoints) or "none"
    remedy = f'name a step that is there, as "{run.id}/step-N" (steps: {steps})'
    if match["step"] is not None:
        step = int(match["step"])
        if step not in {found.step for found in checkpoints}:
            raise InvalidInput(f"{problem}: that step has no checkpoint", remedy=remedy)
    elif run.state is not RunState.DONE:
        raise InvalidInput(f"{problem}: the run is {run.state.value}, without a final adapter", remedy=remedy)
    elif (final := next((found.step for found in reversed(checkpoints) if found.final), None)) is None:
        raise InvalidInput(f"{problem}: the run's files were kept long enough and are gone", remedy="train it again")
    else:
        step = final
    train = run.spec["train"]
    return AdapterSource(
        run_id=run.id,
        step=step,
        base_model=run.spec["model"],
        rank=train["lora_rank"],
        alpha=train["lora_alpha"],
    )
