"""The server's settings: places, time-outs, leases, back-offs. The operator's, never a run's.

Owns names, types, ranges, defaults and what is said of each. How they are read, from a file and from variables of the
environment, is `server_config`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator
from sqlalchemy.engine import URL

from flash.environments.references import GitHub
from flash.records import Phase
from flash.storage.database import normal_url
from flash.storage.retention import DAY_S, Times

# Seconds without progress before an attempt counts as stalled. Installing packages and loading a large model
# report little; a training step or an upload reports often.
STALL_S: dict[str, float] = {
    Phase.STARTING.value: 120.0,
    Phase.PREPARING_ENVIRONMENT.value: 1800.0,
    Phase.LOADING_MODEL.value: 3600.0,
    Phase.PREPARING_DATA.value: 1800.0,
    Phase.TRAINING.value: 1800.0,
    Phase.EVALUATING.value: 1800.0,
    Phase.UPLOADING.value: 1800.0,
    Phase.FINISHED.value: 300.0,
}


def _on_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


class ServerSettings(BaseModel):
    """Durations in seconds, sizes in bytes."""

    # The docstrings below the fields make the page of the documentation; titles above them are its sections.
    model_config = ConfigDict(frozen=True, extra="forbid")

    # --- Where it listens

    home: Path
    """The server's folder: work of local workers, caches, logs, the vault's key, its own token; on a laptop the
    database and the artifacts too. `FLASH_HOME` where the file does not say; relative to the file."""

    host: str = "127.0.0.1"
    """The address to listen on. Anything but loopback is refused until somebody has a key."""

    port: int = Field(default=0, ge=0, le=65535)
    """0: the one it had before, or any free one."""

    public_url: str | None = Field(default=None, pattern="^https?://[^/]+")
    """The address by which people reach it, e.g. that of the proxy which speaks TLS."""

    worker_url: str | None = Field(default=None, pattern="^https?://[^/]+")
    """The address by which workers and engines reach it. Left out: this machine's own, which is right for one server
    on one machine. Where several servers run, name an address that leads to whichever lives."""

    trusted_proxies: tuple[str, ...] = ()
    """Addresses or networks of proxies whose `X-Forwarded-For` and `X-Forwarded-Proto` are believed; nobody else's
    are."""

    stop_delay_s: float = Field(default=0.0, ge=0)
    """How long it says that it is not ready before it stops to listen, so that a load balancer can see it."""

    graceful_shutdown_s: int = Field(default=2, ge=0)
    """How long requests under way have to end when it stops."""

    idle_exit_s: float = Field(default=1800.0, ge=0)
    """It ends by itself when nobody has asked for so long and nothing lives; 0: never, which is the default with a
    config file."""

    # --- Where things are kept

    database_url: str | None = Field(default=None, repr=False)
    """`postgresql://user:password@host/name`. Left out: the SQLite file `flash.db` in `home`. A server of SQLite is
    the only one of its database; on Postgres there may be several."""

    store_url: str | None = None
    """`s3://bucket/prefix`, `gs://…`, `az://…` or `file:///folder`. Left out: `artifacts/` in `home`."""

    store_options: dict[str, str] = Field(default_factory=dict, repr=False)
    """A bucket's settings by obstore's names (`endpoint`, `region`, `access_key_id`, `secret_access_key`, …); what
    they leave out comes from the provider's own variables (`AWS_…`)."""

    worker_store: Literal["keys", "signed"] = "keys"
    """How workers and engines reach a bucket. `keys`: with `store_options`, so as the server does. `signed`: by
    addresses that the server signs, good for one object each: of a worker's own run, or an adapter's for the engine."""

    vault_key_file: Path | None = None
    """The 32 bytes under which secrets are sealed; every server of one database needs the same. Left out: `vault.key`
    in `home`, made when it is missing."""

    # --- How long things are kept

    keep_state_days: float | None = Field(default=None, ge=0)
    """Optimizer and generator state of an ended run, without which it can't be retried. Left out: for good."""

    keep_files_days: float | None = Field(default=None, ge=0)
    """Checkpoints and adapters of an ended run that is neither pinned, nor deployed, nor the source of another one.
    Left out: for good. A run may have a time of its own (`flash keep`)."""

    keep_events_days: float | None = Field(default=None, ge=0)
    """Log, metrics and samples of an ended run that is not pinned. Left out: for good."""

    keep_audit_days: float | None = Field(default=None, ge=0)
    """Entries of the audit log. Left out: for good."""

    # --- What it says

    log_to: Literal["file", "stderr"] = "file"
    """`file`: `logs/server.log` in `home`, ten megabytes at a time. With a config file the default is `stderr`."""

    log_format: Literal["text", "json"] = "text"
    """`json`: one object a line, for machines."""

    access_log: bool = False
    """A line for each request, with who asked and how long it took."""

    # --- Devices and prices

    launcher: Literal["local", "ray"] = "local"
    """Where workers and engines run: `local`, on this machine's devices; `ray`, on the nodes of a Ray cluster."""

    devices: tuple[str, ...] | None = None
    """What runs are placed on, e.g. `["cuda:0", "cuda:1"]`. Left out: what the machine has. With `launcher = "ray"`
    kinds: `["cuda"]`, `["cpu"]` or both; left out, GPUs if a node has any, else CPUs."""

    usd_per_hour: dict[str, float] = Field(default_factory=dict)
    """What an hour costs, by a device's name as `flash gpus` shows it, or for all as `gpu` or `cpu`. Budgets of keys
    go by it; left out, one's own hardware costs nothing."""

    host_user: str | None = Field(default=None, min_length=1)
    """The user of the operating system as whom environments run, with what `environment.pip` names: what people bring
    is kept from the server's files and keys, its workers and other runs. Workers have to be root for it, and so has the
    server where they are this machine's.
    Left out: environments run as the server does."""

    preload: bool = True
    """Keep a process that has loaded what trainers need (torch, transformers), from which workers on this machine are
    forked: a run starts some seconds sooner, for 200 to 300 MB of memory while the server lives. Linux only; without
    it, and elsewhere, each worker loads that anew."""

    # --- A Ray cluster

    ray_address: str | None = Field(default=None, validate_default=True, pattern="^https?://[^/]+")
    """The head's dashboard, which takes jobs, e.g. `http://ray-head:8265`. `worker_url` has to be set too, unless the
    head is on this machine."""

    ray_token: SecretStr | None = None
    """The cluster's `RAY_AUTH_TOKEN`."""

    ray_cpus: int = Field(default=4, ge=1)
    """CPUs of a worker on a node without GPUs; such a node has as many places as that goes into its CPUs."""

    ray_pip: tuple[str, ...] = ()
    """What Ray installs for a worker before it starts, e.g. `["flash-lora[train]==0.1.0"]`. Left out: the nodes have
    Flash already, as their image does. It counts into `claim_timeout_s`."""

    ray_timeout_s: float = Field(default=5.0, gt=0)
    """For each request to the head."""

    ray_lost_s: float = Field(default=15.0, ge=0)
    """A worker whose job a restarted head does not know counts as dead after so long."""

    # --- Workers: leases, patience, retries

    heartbeat_s: float = Field(default=5.0, gt=0)
    """How often a worker reports."""

    lease_s: float = Field(default=30.0, gt=0)
    """A worker that was silent for so long has lost its attempt; it stops by itself before that."""

    claim_timeout_s: float = Field(default=120.0, gt=0)
    """From a worker's launch to its first report."""

    stall_s: dict[str, float] = Field(default_factory=dict)
    """Seconds without progress before an attempt counts as stalled, by phase, e.g. `training`."""

    exit_grace_s: float = Field(default=15.0, ge=0)
    """From a worker's last word to its process's end."""

    cancel_grace_s: float = Field(default=120.0, ge=0)
    """From a cancel to the kill."""

    flush_grace_s: float = Field(default=300.0, ge=0)
    """From a run's time limit to the kill."""

    orphan_grace_s: float = Field(default=30.0, ge=0)
    """From the sight of a worker that nobody owns to its kill."""

    backoff_first_s: float = Field(default=2.0, ge=0)
    """Before the first retry; it doubles from there."""

    backoff_max_s: float = Field(default=60.0, ge=0)
    """The longest wait before a retry."""

    fruitless_limit: int = Field(default=3, ge=1)
    """Attempts in a row without a new checkpoint after which a run fails."""

    wall_clock_min_s: float = Field(default=3600.0, gt=0)
    """The least time limit of a run."""

    wall_clock_factor: float = Field(default=3.0, gt=0)
    """A run's time limit over its estimate."""

    wall_clock_unknown_s: float = Field(default=86400.0, gt=0)
    """The time limit where no estimate can be made."""

    reconcile_interval_s: float = Field(default=1.0, gt=0)
    """How often runs and workers are looked at when nothing happens; more often while a worker is leaving."""

    leader_lease_s: float = Field(default=15.0, ge=2)
    """With several servers: after so long without a sign of the leading one another takes the lead."""

    # --- Engines: serving

    engine: Literal["auto", "flash", "vllm"] = "auto"
    """`auto`: vLLM on GPUs where it is installed, else the built-in one."""

    share_cpu: bool = True
    """Whether a run and an engine may be on the processor together, so that a checkpoint can be tried while its run
    goes on. A GPU holds one of them."""

    engine_wait_s: float = Field(default=120.0, ge=0)
    """How long a request waits for an engine that has to start."""

    engine_want_s: float = Field(default=60.0, gt=0)
    """A queued engine that no one waited for so long is dropped."""

    engine_load_s: float = Field(default=3600.0, gt=0)
    """From its host's first report to a loaded base."""

    engine_idle_s: float = Field(default=300.0, ge=0)
    """Without a request for so long, an engine leaves; 0: never."""

    engine_yield_s: float = Field(default=5.0, ge=0)
    """The same, where something else waits for its device."""

    engine_drain_s: float = Field(default=120.0, ge=0)
    """From being asked to leave to the kill."""

    engine_silence_s: float = Field(default=600.0, gt=0)
    """From one piece of an answer to the next."""

    engine_rows: int = Field(default=64, ge=1)
    """Completions that an engine decodes at once."""

    engine_waiting: int = Field(default=256, ge=0)
    """Requests that wait for a row; one more gets 429."""

    engine_cache_bytes: int = Field(default=1 << 30, ge=0)
    """Of cached prefixes."""

    engine_adapters: int = Field(default=32, ge=1)
    """Adapters on an engine's device at once."""

    engine_disk_bytes: int = Field(default=16 << 30, ge=0)
    """Of adapters' files in the cache folder."""

    engine_threads: int = Field(default=0, ge=0)
    """Of an engine on a CPU; 0: as many as there are cores."""

    max_requests: int = Field(default=512, ge=1)
    """Requests open at once on their way to engines."""

    smoke_s: float = Field(default=300.0, gt=0)
    """For a deploy's smoke completion, the fetch of its adapter included."""

    # --- Requests

    stream_poll_s: float = Field(default=1.0, gt=0)
    """How often a followed run is looked at for what another server wrote."""

    max_body: int = Field(default=16 << 20, gt=0)
    """Bytes of a request's body."""

    max_archive: int = Field(default=64 << 20, gt=0)
    """Bytes of an environment's archive."""

    # --- Cleaning up

    draft_grace_s: float = Field(default=3600.0, ge=0)
    """The age at which a half-written object is removed."""

    work_grace_s: float = Field(default=3600.0, ge=0)
    """From a run's end to the removal of its work folder."""

    clean_interval_s: float = Field(default=600.0, ge=0)
    """How often it is looked for what nobody needs."""

    clean_budget_s: float = Field(default=1.0, ge=0)
    """How long its removal may go on at a time, while runs and workers wait; the rest follows after a look at them."""

    # --- Environments from GitHub

    github_api_url: str = Field(default="https://api.github.com", pattern="^https?://[^/]+")
    """Where `github:` environments come from."""

    github_token: SecretStr | None = None
    """For private repositories. As a variable it has its customary name, `GITHUB_TOKEN`."""

    github_timeout_s: float = Field(default=15.0, gt=0)
    """For each connection and each read."""

    github_deadline_s: float = Field(default=50.0, gt=0)
    """For a whole fetch; clients wait 60 s for an answer."""

    github_allow_private: bool = False
    """Redirects may lead into a private network (GitHub Enterprise)."""

    github_fetches: int = Field(default=4, ge=1)
    """At once; more are told to come again."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("must not be true or false")
        return value

    @field_validator("devices")
    @classmethod
    def _kinds_on_a_cluster(cls, value: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        if info.data.get("launcher") == "ray" and set(value or ()) - {"cuda", "cpu"}:
            raise ValueError('with launcher = "ray" it names kinds, "cuda" and "cpu"')
        return value

    @field_validator("ray_address")
    @classmethod
    def _reachable_both_ways(cls, value: str | None, info: ValidationInfo) -> str | None:
        if info.data.get("launcher") != "ray":
            return value
        if value is None:
            raise ValueError('launcher = "ray" needs it: the address of the head\'s dashboard, e.g. http://ray-head:8265')
        if info.data.get("worker_url") is None and not _on_this_machine(value):
            raise ValueError("its nodes have to reach this server: set worker_url, to an address that they can ask")
        return value

    @field_validator("stall_s")
    @classmethod
    def _known_phases(cls, value: dict[str, float]) -> dict[str, float]:
        unknown = sorted(set(value) - set(STALL_S))
        if unknown:
            raise ValueError(f"unknown phases {unknown}; known are {sorted(STALL_S)}")
        return value

    def stall_limit(self, phase: Phase | None) -> float:
        name = (phase or Phase.STARTING).value
        return self.stall_s.get(name, STALL_S[name])

    @property
    def github(self) -> GitHub:
        return GitHub(
            api_url=self.github_api_url.rstrip("/"),
            token=self.github_token.get_secret_value() if self.github_token else None,
            timeout_s=self.github_timeout_s,
            deadline_s=self.github_deadline_s,
            allow_private=self.github_allow_private,
        )

    @property
    def times(self) -> Times:
        """How long things are kept, in seconds."""
        days = (self.keep_state_days, self.keep_files_days, self.keep_events_days, self.keep_audit_days)
        return Times(*(None if each is None else each * DAY_S for each in days))

    @property
    def vault_key(self) -> Path:
        return self.vault_key_file or self.home / "vault.key"

    @property
    def database(self) -> URL:
        if self.database_url is not None:
            return normal_url(self.database_url)
        return URL.create("sqlite", database=str(self.home / "flash.db"))

    @property
    def store(self) -> str:
        return self.store_url or (self.home / "artifacts").resolve().as_uri()
