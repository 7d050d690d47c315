"""The shapes on the wire and in the database: Run, Attempt, Event, Checkpoint, Adapter, EnvironmentVersion,
Deployment, Engine, Org, Key.

Frozen data and the vocabularies that go with it; no behaviour beyond that, no storage, no HTTP.
Times are UTC seconds since the epoch (float) everywhere on the wire.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RunState(StrEnum):
    QUEUED = "queued"
    PROVISIONING = "provisioning"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return self in (RunState.DONE, RunState.FAILED, RunState.CANCELLED)


class Phase(StrEnum):
    """What an attempt is doing now; each phase has its own stall deadline."""

    STARTING = "starting"
    PREPARING_ENVIRONMENT = "preparing environment"
    LOADING_MODEL = "loading model"
    PREPARING_DATA = "preparing data"
    TRAINING = "training"
    EVALUATING = "evaluating"
    UPLOADING = "uploading"
    FINISHED = "finished"


class AttemptState(StrEnum):
    LAUNCHING = "launching"  # created; the launcher was or will be asked
    RUNNING = "running"      # claimed by its supervisor, lease alive
    ENDING = "ending"        # to be killed: cancelled, expired or stalled; its device is not free yet
    ENDED = "ended"          # known dead


class FailureKind(StrEnum):
    """Why an attempt ended without `done`; the reconciler's retry rules go by this."""

    USER_CODE = "user_code"            # never retried
    INVALID_INPUT = "invalid_input"    # never retried
    OUT_OF_MEMORY = "out_of_memory"    # once, with a smaller micro-batch
    INFRASTRUCTURE = "infrastructure"  # process, node, network or store lost
    STALL = "stall"                    # no progress within the phase's deadline
    PREEMPTED = "preempted"
    WALL_CLOCK = "wall_clock"          # the run's time limit; checkpoint flushed; not retried
    INTERNAL = "internal"              # a defect of Flash


class Priority(StrEnum):
    """Among the runs of one org: a higher one gets the org's next device, whatever their age."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"

    @property
    def rank(self) -> int:
        """The higher the sooner; what the database keeps."""
        return list(Priority).index(self) - 1

    @classmethod
    def of(cls, rank: int) -> Priority:
        return list(cls)[rank + 1]


class EventKind(StrEnum):
    """`Event.data` by kind:

    state {from, to, reason} · attempt {epoch, state, failure?, message?}
    phase {phase, total_steps?, done_bytes?, total_bytes?}
    log {stream: trainer|environment|supervisor, text} · warning {code, text}
    metrics {step, total_steps, values: {name: float}} · checkpoint {step, ref, final}
    eval {base, adapter, n} · sample {step, ...}
    """

    STATE = "state"
    ATTEMPT = "attempt"
    PHASE = "phase"
    LOG = "log"
    WARNING = "warning"
    METRICS = "metrics"
    CHECKPOINT = "checkpoint"
    EVAL = "eval"
    SAMPLE = "sample"


class Event(Record):
    """One line of a run's append-only history. `seq` is contiguous per run, from 1."""

    run_id: str
    seq: int
    time: float
    kind: EventKind
    epoch: int | None = None  # the attempt that reported it; None for the control plane's own
    data: dict[str, Any]


class WorkerEvent(Record):
    """An event as a worker spools it: `n` counts from 1 within the attempt and de-duplicates re-sent batches."""

    n: int = Field(ge=1)
    time: float
    kind: EventKind
    data: dict[str, Any]


class ManifestPart(Record):
    """One object in the store."""

    sha256: str
    size: int    # bytes


class ManifestFile(Record):
    path: str    # relative, e.g. "adapter/adapter_model.safetensors", "state/optimizer.safetensors"
    sha256: str
    size: int    # bytes
    parts: tuple[ManifestPart, ...] = ()  # of a large file, in order

    @property
    def objects(self) -> tuple[ManifestPart, ...]:
        """What the store has of it: its parts, or itself."""
        return self.parts or (ManifestPart(sha256=self.sha256, size=self.size),)


class Manifest(Record):
    """Everything a checkpoint consists of; written last, so what has one is complete."""

    run_id: str
    step: int
    final: bool
    created_at: float
    files: tuple[ManifestFile, ...]
    metrics: dict[str, float] = Field(default_factory=dict)


class Checkpoint(Record):
    run_id: str
    step: int
    final: bool
    epoch: int
    created_at: float
    manifest_sha256: str
    has_state: bool  # optimizer and RNG state still kept (the two newest only)

    @property
    def ref(self) -> str:
        return f"{self.run_id}/step-{self.step}"


class EnvironmentVersion(Record):
    namespace: str
    name: str
    sha256: str      # of the normalised archive; the version's address
    size: int        # bytes, compressed
    files: tuple[str, ...]
    created_at: float

    @property
    def id(self) -> str:
        return f"{self.namespace}/{self.name}"


class AttemptView(Record):
    epoch: int
    state: AttemptState
    phase: Phase | None = None
    device: str | None = None
    started_at: float | None = None
    ended_at: float | None = None
    failure: FailureKind | None = None
    message: str | None = None


class EvalReport(Record):
    """Mean reward on the held-out rows, greedy, by the environment's own scoring."""

    base: float
    adapter: float
    n: int


class ManagedView(Record):
    """The platform's own choices: shown, never settable."""

    device: str | None = None
    wall_clock_limit_s: float | None = None
    retries: int = 0
    estimated_s: float | None = None  # wall-clock, as estimated at submit
    active_s: float = 0.0             # what it has taken so far: seconds under a worker's lease
    memory_needed_bytes: int | None = None  # the peak, as estimated at submit
    artifact_uri: str | None = None
    pinned: bool = False              # its files and its log are kept for good
    kept_until: float | None = None   # when its checkpoints may go; none: it has not ended, or they stay
    files_removed_at: float | None = None   # they were kept long enough
    events_removed_at: float | None = None


class RunStatus(Record):
    """`GET /api/runs/{id}` and `flash status --json`."""

    run_id: str
    state: RunState
    phase: Phase | None
    step: int
    total_steps: int | None
    summary: str  # what happened, in words
    next: str     # what comes next, in words
    spec: dict[str, Any]
    seed: int
    created_at: float
    updated_at: float
    finished_at: float | None
    attempts: tuple[AttemptView, ...]
    metrics: dict[str, Any]  # the latest values by name, and `eval` = {base, adapter, n} once there
    checkpoints: tuple[str, ...]  # refs, oldest first
    adapter_ref: str | None
    deployment: str | None
    estimated_cost_usd: float | None
    cost_usd: float | None
    error: dict[str, Any] | None  # {code, message, remedy, detail}
    warnings: tuple[str, ...] = ()
    retry_of: str | None = None  # the run from whose exact state this one began
    priority: Priority = Priority.NORMAL
    managed: ManagedView


class RunSummary(Record):
    """One row of `GET /api/runs` and `flash runs`."""

    run_id: str
    state: RunState
    phase: Phase | None
    step: int
    total_steps: int | None
    model: str
    algorithm: str
    environment: str
    created_at: float
    updated_at: float


class SubmitRequest(Record):
    """Body of `POST /api/runs`; `config` is validated again on the server by the CLI's own class."""

    config: dict[str, Any]
    seed: int = Field(default=0, ge=0, lt=2**63)
    secrets: dict[str, str] = Field(default_factory=dict, repr=False)
    priority: Priority = Priority.NORMAL


class RetryRequest(Record):
    """Body of `POST /api/runs/{id}/retry`: secrets end with a run, so a new one needs them again."""

    secrets: dict[str, str] = Field(default_factory=dict, repr=False)


class KeepRequest(Record):
    """Body of `POST /api/runs/{id}/keep`: for good, for so many days from its end, or (neither) for the server's."""

    pinned: bool = False
    days: float | None = Field(default=None, ge=0, le=36_500)


class PriorityRequest(Record):
    """Body of `POST /api/runs/{id}/priority`."""

    priority: Priority


# --- serving ----------------------------------------------------------------------------------------


class EngineState(StrEnum):
    WAITING = "waiting"      # wanted; no device yet
    LAUNCHING = "launching"  # has a device; the launcher was or will be asked
    LOADING = "loading"      # its host reports, and loads the base
    READY = "ready"
    DRAINING = "draining"    # finishes what it has and leaves
    ENDING = "ending"        # to be killed; its device is not free yet
    ENDED = "ended"          # known dead


class Revision(Record):
    """One adapter of one step, which never changes; what a deployment points to."""

    run_id: str
    step: int
    adapter_sha256: str  # flash.serving.hello.adapter_digest
    model: str           # the base's catalog id

    @property
    def ref(self) -> str:
        return f"{self.run_id}/step-{self.step}"


class EngineView(Record):
    engine_id: str
    model: str
    state: EngineState
    device: str | None = None
    reason: str | None = None  # why it waits, leaves or ended
    started_at: float | None = None


class Deployment(Record):
    """What a run's name answers with now."""

    run_id: str
    ref: str  # "<run-id>/step-N": the step that is live
    step: int
    model: str  # the base
    adapter_sha256: str
    version: int  # rises with every change of this name
    deployed_at: float
    engine: EngineView | None = None  # none while no one has asked for a while; the next request starts one


class DeployRequest(Record):
    """Body of `POST /api/deployments`. Without `step`: the run's final adapter."""

    run_id: str = Field(max_length=200)
    step: int | None = Field(default=None, ge=0, lt=2**53)
    verify: bool = True    # a smoke completion has to succeed before the name moves
    dry_run: bool = False  # say what would happen, change nothing


class DeployAnswer(Record):
    """`waiting` means: ask again; nothing has moved yet, and `wait` says why."""

    state: Literal["planned", "waiting", "live"]
    ref: str
    step: int
    model: str
    adapter_sha256: str
    live: str | None = None  # the ref that answers now
    device: str | None = None  # where the engine is, or would be placed now
    engine: EngineView | None = None
    wait: str | None = None


# --- teams ------------------------------------------------------------------------------------------


class Org(Record):
    name: str  # the namespace of its environments
    created_at: float
    revoked_at: float | None = None
    share: float = 1.0  # its weight where devices are scarce


class OrgRequest(Record):
    """Body of `POST /api/orgs`."""

    name: str = Field(max_length=200)


class ShareRequest(Record):
    """Body of `PATCH /api/orgs/{org}`."""

    share: float = Field(ge=0.01, le=100, allow_inf_nan=False)


class Key(Record):
    """An API key, without the key itself."""

    id: str
    org: str
    name: str
    role: str  # read-only | member | admin | owner
    max_usd: float | None = None   # of all its runs together
    max_runs: int | None = None    # unfinished at once
    max_gpus: int | None = None    # of its unfinished runs together
    created_at: float
    revoked_at: float | None = None


class KeyRequest(Record):
    """Body of `POST /api/keys`. Without `org`: the caller's own."""

    name: str = Field(max_length=200)
    role: str = "member"
    org: str | None = Field(default=None, max_length=200)
    max_usd: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    max_runs: int | None = Field(default=None, ge=0, lt=2**31)
    max_gpus: int | None = Field(default=None, ge=0, lt=2**31)


class NewKey(Record):
    key: Key
    secret: str = Field(repr=False)  # the key itself, this once


class AuditEntry(Record):
    """Who did, or tried, what: `status` is HTTP's, 4xx where it was refused."""

    id: int
    time: float
    org: str | None
    actor: str  # a key's id, "server" or "anonymous"
    name: str | None
    address: str | None
    action: str
    object: str | None
    status: int
    message: str | None


# --- the worker API ---------------------------------------------------------------------------------


class Claim(Record):
    """What a supervisor gets for its attempt's token; the one time that secrets travel."""

    run_id: str
    epoch: int
    spec: dict[str, Any]  # a flash.config.run.RunSpec
    secrets: dict[str, str] = Field(repr=False)
    environment: EnvironmentVersion
    store_url: str
    store_options: dict[str, str] = Field(default_factory=dict, repr=False)  # a bucket's settings, keys included
    signed: bool = False  # the bucket is reached by addresses that the plane signs; there are no options then
    work_dir: str
    host_user: str | None = None  # as whom the environment's host runs; none: as the worker itself
    resume_from: Manifest | None = None   # newest verified checkpoint of this run
    init_from: Manifest | None = None     # warm start's source (adapter files only)
    heartbeat_s: float
    lease_s: float
    micro_batch_divisor: int = 1          # doubled after an out-of-memory attempt


class Heartbeat(Record):
    epoch: int
    phase: Phase
    step: int = 0
    progress: int = 0  # rises whenever anything moved forward; liveness and progress are separate


class HeartbeatAnswer(Record):
    desired: Literal["run", "cancel"]
    lease_s: float


class EventBatch(Record):
    epoch: int
    events: tuple[WorkerEvent, ...]


class EventAck(Record):
    acknowledged: int  # every event with n <= this is stored


class SignRequest(Record):
    """Addresses for objects of the run (or, to read, of the adapter that it starts from)."""

    epoch: int
    verb: Literal["GET", "HEAD", "PUT"]
    keys: tuple[str, ...] = Field(min_length=1, max_length=100)


class SignAnswer(Record):
    urls: tuple[str, ...] = Field(repr=False)  # in the order of the keys


class CheckpointReport(Record):
    epoch: int
    step: int
    final: bool
    manifest_sha256: str


class Finish(Record):
    epoch: int
    outcome: Literal["done", "failed", "cancelled"]
    failure: FailureKind | None = None
    error: dict[str, Any] | None = None  # FlashError.to_wire()
