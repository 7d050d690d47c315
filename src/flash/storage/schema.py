"""The tables: what the database keeps, in SQLAlchemy Core, the same on SQLite and Postgres.

Owns columns, keys and the JSON column type. Knows no queries and no rules; `migrations/` builds these tables,
and a test compares the two.
"""

from __future__ import annotations

import json
import math
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    false,
    text,
)
from sqlalchemy.types import TypeDecorator


def _storable(value: Any) -> Any:
    """JSON that any database takes: no NaN or infinity (null instead), no lone surrogates."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_storable(str(key)): _storable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(item) for item in value]
    return value


class Json(TypeDecorator[Any]):
    """JSON as text: NUL characters stay escaped, so Postgres takes what SQLite takes."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else json.dumps(_storable(value), separators=(",", ":"))

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        return None if value is None else json.loads(value)


metadata = MetaData()

orgs = Table(
    "orgs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("created_at", Double, nullable=False),
    Column("revoked_at", Double),
    Column("share", Double, nullable=False, server_default="1"),  # its weight where devices are scarce
    Column("turn", Double, nullable=False, server_default="0"),  # the start tag of its next run
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("org_id", ForeignKey("orgs.id"), nullable=False),
    Column("name", String(200), nullable=False),
    Column("role", String(32), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("revoked_at", Double),
    # what it may use; none: as much as there is
    Column("max_usd", Double),  # of all its runs together, by their estimates and what they took
    Column("max_runs", Integer),  # unfinished at once
    Column("max_gpus", Integer),  # of its unfinished runs together
    Index("api_keys_by_org", "org_id"),
)

audit = Table(
    "audit",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("time", Double, nullable=False),
    Column("org_id", String(64)),  # none: nobody that we know, or the server itself
    Column("actor", String(64), nullable=False),  # a key's id, "server", or "anonymous"
    Column("name", String(200)),  # of the key
    Column("address", String(100)),  # where the request came from
    Column("action", String(100), nullable=False),
    Column("object", Text),
    Column("status", Integer, nullable=False),  # HTTP's, also where no HTTP was
    Column("message", Text),  # why it was refused
    Index("audit_by_org", "org_id", "id"),
)

environment_versions = Table(
    "environment_versions",
    metadata,
    Column("namespace", String(200), primary_key=True),
    Column("name", String(200), primary_key=True),
    Column("sha256", String(64), primary_key=True),
    Column("org_id", ForeignKey("orgs.id"), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("files", Json, nullable=False),
    Column("created_at", Double, nullable=False),
    # rises with each push of the name; the highest is current. 0: fetched from elsewhere; -1: it leaves
    Column("push", BigInteger, nullable=False),
    Column("deleted_at", Double),
)

# Indexes of what is still to be done, which stay small however many runs there were.
_UNCLEANED = text("cleaned_at IS NULL")
_UNCOLLECTED = text("collected_at IS NULL")
_UNSILENCED = text("silenced_at IS NULL")

runs = Table(
    "runs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("org_id", ForeignKey("orgs.id"), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Column("finished_at", Double),
    # intent
    Column("config", Json, nullable=False),
    Column("spec", Json, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("environment_namespace", String(200), nullable=False),
    Column("environment_name", String(200), nullable=False),
    Column("environment_sha256", String(64), nullable=False),
    Column("init_run_id", String(64)),
    Column("init_step", BigInteger),
    Column("retry_of", String(64)),  # the run from whose exact state this one began
    Column("wall_clock_limit_s", Double),
    Column("estimate", Json),  # catalog.cost.CostEstimate.document() at submit; none where nothing can be estimated
    Column("desired", String(16), nullable=False),  # the user's wish: run | cancel
    # observation
    Column("state", String(16), nullable=False),
    Column("phase", String(32)),
    Column("step", BigInteger, nullable=False),
    Column("total_steps", BigInteger),
    Column("metrics", Json, nullable=False),
    Column("eval", Json),
    Column("warnings", Json, nullable=False),
    Column("error", Json),
    Column("last_seq", BigInteger, nullable=False),
    Column("active_s", Double, nullable=False),  # seconds under a worker's lease, summed over attempts
    Column("retry_at", Double),  # not to be started before this time
    Column("fruitless", Integer, nullable=False),  # attempts in a row that brought no new checkpoint
    Column("micro_batch_divisor", Integer, nullable=False),
    Column("cleaned_at", Double),  # when leftovers of the ended run were removed
    # whose it is, what it takes, how long it is kept
    Column("key_id", String(32)),  # the key that submitted it
    Column("gpus", Integer, nullable=False, server_default="0"),
    Column("pinned", Boolean, nullable=False, server_default=false()),
    Column("ttl_s", Double),  # of its files after its end; none: the server's
    Column("collected_at", Double),  # when its time was over and its checkpoints went
    Column("silenced_at", Double),  # when its events went
    Column("priority", Integer, nullable=False, server_default="0"),  # among its org's own, the highest first
    Index("runs_by_org", "org_id", "created_at", "id"),
    Index("runs_by_state", "state", "created_at", "id"),
    Index("runs_by_org_and_state", "org_id", "state"),
    Index("runs_by_key", "key_id"),
    Index("runs_by_source", "init_run_id"),
    Index("runs_by_environment", "environment_sha256"),
    Index("runs_uncollected", "finished_at", sqlite_where=_UNCOLLECTED, postgresql_where=_UNCOLLECTED),
    Index("runs_unsilenced", "finished_at", sqlite_where=_UNSILENCED, postgresql_where=_UNSILENCED),
    Index("runs_uncleaned", "finished_at", sqlite_where=_UNCLEANED, postgresql_where=_UNCLEANED),
)

attempts = Table(
    "attempts",
    metadata,
    Column("run_id", ForeignKey("runs.id"), primary_key=True),
    Column("epoch", Integer, primary_key=True),
    Column("state", String(16), nullable=False),
    Column("token_sha256", String(64), nullable=False),
    Column("device", String(64), nullable=False),
    Column("work_dir", Text, nullable=False),
    Column("handle", Text),
    Column("pid", BigInteger),
    Column("created_at", Double, nullable=False),
    Column("claimed_at", Double),
    Column("heartbeat_at", Double),
    Column("ended_at", Double),
    Column("phase", String(32)),
    Column("step", BigInteger, nullable=False),
    Column("progress", BigInteger, nullable=False),
    Column("acknowledged", BigInteger, nullable=False),  # every worker event with n <= this is stored
    Column("stop_reason", String(16)),  # asked to stop: cancel | wall_clock
    Column("outcome", String(16)),  # what the worker said: done | failed | cancelled
    Column("failure", String(32)),
    Column("message", Text),
    Column("error", Json),
    Index("attempts_by_state", "state"),
)

events = Table(
    "events",
    metadata,
    Column("run_id", ForeignKey("runs.id"), primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("time", Double, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("epoch", Integer),
    Column("n", BigInteger),  # the worker's own count within its attempt
    Column("data", Json, nullable=False),
    Index("events_by_worker_count", "run_id", "epoch", "n", unique=True),
)

metric_blocks = Table(
    "metric_blocks",
    metadata,
    Column("run_id", ForeignKey("runs.id"), primary_key=True),
    Column("position", BigInteger, primary_key=True),  # 0, 1, 2, … in the order of reporting
    Column("epoch", Integer),
    Column("events", Integer, nullable=False),
    Column("first_seq", BigInteger, nullable=False),
    Column("last_seq", BigInteger, nullable=False),
    Column("first_step", BigInteger, nullable=False),
    Column("last_step", BigInteger, nullable=False),
    Column("last_time", Double, nullable=False),
    Column("sums", Json, nullable=False),  # {name: [count, sum, lowest, highest]}
)

samples = Table(
    "samples",
    metadata,
    Column("run_id", ForeignKey("runs.id"), primary_key=True),
    Column("seq", BigInteger, primary_key=True),  # of the event that holds the sample itself
    Column("epoch", Integer),
    Column("step", BigInteger, nullable=False),
    Column("kind", String(16), nullable=False),  # rollout | eval
    Column("row", BigInteger),
    Column("reward", Double),
    Column("spread", Double),  # highest minus lowest reward of its group
    Column("truncated", Boolean, nullable=False),
    Column("failed", Boolean, nullable=False),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("run_id", ForeignKey("runs.id"), primary_key=True),
    Column("step", BigInteger, primary_key=True),
    Column("final", Boolean, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("manifest_sha256", String(64), nullable=False),
    Column("manifest", Json, nullable=False),
    Column("has_state", Boolean, nullable=False),
    Index("checkpoints_with_state", "run_id", sqlite_where=text("has_state = 1"), postgresql_where=text("has_state")),
)

submissions = Table(
    "submissions",
    metadata,
    Column("org_id", ForeignKey("orgs.id"), primary_key=True),
    Column("key", String(200), primary_key=True),
    Column("body_mac", String(64), nullable=False),
    Column("run_id", ForeignKey("runs.id"), nullable=False),
    Column("created_at", Double, nullable=False),
)

secrets = Table(
    "secrets",
    metadata,
    Column("run_id", ForeignKey("runs.id"), primary_key=True),
    Column("name", String(200), primary_key=True),
    Column("sealed", LargeBinary, nullable=False),
)

revisions = Table(
    "revisions",
    metadata,
    Column("run_id", ForeignKey("runs.id"), primary_key=True),
    Column("step", BigInteger, primary_key=True),
    Column("adapter_sha256", String(64), primary_key=True),
    Column("org_id", ForeignKey("orgs.id"), nullable=False),
    Column("model", Text, nullable=False),  # the base's catalog id
    Column("manifest_key", Text, nullable=False),  # where the store says which files it has
    Column("created_at", Double, nullable=False),
)

deployments = Table(
    "deployments",
    metadata,
    Column("run_id", ForeignKey("runs.id"), primary_key=True),
    Column("org_id", ForeignKey("orgs.id"), nullable=False),
    Column("version", Integer, nullable=False),  # rises with every change
    Column("step", BigInteger),  # with adapter_sha256: the revision that is live; none after an undeploy
    Column("adapter_sha256", String(64)),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Index("deployments_by_org", "org_id"),
)

deployment_history = Table(
    "deployment_history",
    metadata,
    Column("run_id", ForeignKey("deployments.run_id"), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("time", Double, nullable=False),
    Column("action", String(16), nullable=False),  # deploy | undeploy
    Column("from_step", BigInteger),
    Column("to_step", BigInteger),
    Column("adapter_sha256", String(64)),
    Column("verified", Boolean, nullable=False),  # whether a smoke completion had succeeded
)

engines = Table(
    "engines",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("model", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("device", String(64)),
    Column("work_dir", Text, nullable=False),
    Column("token_sha256", String(64), nullable=False),  # by which the host is known here
    Column("sealed_token", LargeBinary),  # the same token, by which the host knows us; gone with the engine
    Column("handle", Text),
    Column("pid", BigInteger),
    Column("url", Text),
    Column("created_at", Double, nullable=False),
    Column("ready_at", Double),
    Column("heartbeat_at", Double),  # of its host; while it waits for a device: of those who wait for it
    Column("ended_at", Double),
    Column("in_flight", Integer, nullable=False),
    Column("stats", Json, nullable=False),
    Column("reason", Text),  # why it waits, leaves or ended
    Column("error", Json),
    Index("engines_by_state", "state"),
)
