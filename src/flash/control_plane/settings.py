"""The server's settings: places, time-outs, leases, back-offs. The operator's, never a run's.

Each can be set by an environment variable FLASH_SERVER_<NAME>, which is how tests shorten the long ones; only
`github_token` has its customary name, GITHUB_TOKEN.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator
from sqlalchemy.engine import URL, make_url

from flash.environments.references import GitHub
from flash.errors import InvalidInput
from flash.records import Phase

PREFIX = "FLASH_SERVER_"

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


class ServerSettings(BaseModel):
    """Durations in seconds, sizes in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    home: Path
    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)  # 0: the one of server.json, or any free one
    database_url: str | None = None  # None: flash.db in `home`
    store_url: str | None = None  # None: artifacts/ in `home`
    # A bucket's settings by obstore's names (endpoint, region, access_key_id, …); else the provider's own variables.
    store_options: dict[str, str] = Field(default_factory=dict, repr=False)
    devices: tuple[str, ...] | None = None  # None: what the machine has
    usd_per_hour: dict[str, float] = Field(default_factory=dict)  # of a device, by its name or as "gpu" or "cpu"
    access_log: bool = False  # a line for each request

    heartbeat_s: float = Field(default=5.0, gt=0)
    lease_s: float = Field(default=30.0, gt=0)
    claim_timeout_s: float = Field(default=120.0, gt=0)  # from launch to claim
    stall_s: dict[str, float] = Field(default_factory=dict)  # by phase, over STALL_S
    exit_grace_s: float = Field(default=15.0, ge=0)  # from a worker's last word to its process's end
    cancel_grace_s: float = Field(default=120.0, ge=0)  # from the wish to the kill
    flush_grace_s: float = Field(default=300.0, ge=0)  # from the wall-clock limit to the kill
    orphan_grace_s: float = Field(default=30.0, ge=0)
    draft_grace_s: float = Field(default=3600.0, ge=0)  # age at which a half-written object is removed
    work_grace_s: float = Field(default=3600.0, ge=0)  # from a run's end to the removal of its work folder
    clean_interval_s: float = Field(default=600.0, ge=0)
    backoff_first_s: float = Field(default=2.0, ge=0)
    backoff_max_s: float = Field(default=60.0, ge=0)
    fruitless_limit: int = Field(default=3, ge=1)
    wall_clock_min_s: float = Field(default=3600.0, gt=0)
    wall_clock_factor: float = Field(default=3.0, gt=0)
    wall_clock_unknown_s: float = Field(default=86400.0, gt=0)  # where no estimate can be made

    engine: Literal["auto", "flash", "vllm"] = "auto"  # auto: vLLM on GPUs where it is installed, else the built-in one
    engine_wait_s: float = Field(default=120.0, ge=0)  # how long a request waits for an engine that has to start
    engine_want_s: float = Field(default=60.0, gt=0)  # a queued engine that no one waited for so long is dropped
    engine_load_s: float = Field(default=3600.0, gt=0)  # from its host's first report to a loaded base
    engine_idle_s: float = Field(default=300.0, ge=0)  # without a request for so long, an engine leaves; 0: never
    engine_yield_s: float = Field(default=5.0, ge=0)  # the same, where something else waits for its device
    engine_drain_s: float = Field(default=120.0, ge=0)  # from being asked to leave to the kill
    engine_silence_s: float = Field(default=600.0, gt=0)  # from one piece of an answer to the next
    engine_rows: int = Field(default=64, ge=1)  # completions that an engine decodes at once
    engine_waiting: int = Field(default=256, ge=0)  # requests that wait for a row; one more gets 429
    engine_cache_bytes: int = Field(default=1 << 30, ge=0)  # of cached prefixes
    engine_adapters: int = Field(default=32, ge=1)  # adapters on an engine's device at once
    engine_disk_bytes: int = Field(default=16 << 30, ge=0)  # of adapters' files in the cache folder
    engine_threads: int = Field(default=0, ge=0)  # of an engine on a CPU; 0: as many as there are cores
    max_requests: int = Field(default=512, ge=1)  # open at once on their way to engines
    smoke_s: float = Field(default=300.0, gt=0)  # a deploy's smoke completion, the fetch of its adapter included

    reconcile_interval_s: float = Field(default=1.0, gt=0)
    idle_exit_s: float = Field(default=1800.0, ge=0)  # 0: never
    graceful_shutdown_s: int = Field(default=2, ge=0)
    stream_poll_s: float = Field(default=1.0, gt=0)
    max_body: int = Field(default=16 << 20, gt=0)
    max_archive: int = Field(default=64 << 20, gt=0)

    # Where `github:` environments come from. The token is GITHUB_TOKEN of the server's own environment.
    github_api_url: str = Field(default="https://api.github.com", pattern="^https?://[^/]+")
    github_token: SecretStr | None = None
    github_timeout_s: float = Field(default=15.0, gt=0)  # each connection and each read
    github_deadline_s: float = Field(default=50.0, gt=0)  # a whole fetch; clients wait 60 s for an answer
    github_allow_private: bool = False  # redirects may lead into a private network (GitHub Enterprise)
    github_fetches: int = Field(default=4, ge=1)  # at once; more are told to come again

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
    def database(self) -> URL:
        if self.database_url is not None:
            return make_url(self.database_url)
        return URL.create("sqlite", database=str(self.home / "flash.db"))

    @property
    def store(self) -> str:
        return self.store_url or (self.home / "artifacts").resolve().as_uri()


def load_settings(home: Path, environment: Mapping[str, str] = os.environ, **given: Any) -> ServerSettings:
    """Settings for `home`, with FLASH_SERVER_* on top and `given` over those."""
    values: dict[str, Any] = {}
    for name, field in ServerSettings.model_fields.items():
        text = environment.get("GITHUB_TOKEN" if name == "github_token" else PREFIX + name.upper())
        if text is not None and name != "home":
            values[name] = _read(text, str(field.annotation))
    try:
        return ServerSettings(home=home.absolute(), **{**values, **given})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise InvalidInput(
            f"server setting {name} = {first['input']!r:.80}: {first['msg']}",
            remedy=f"set {PREFIX}{name.upper()} right, or leave it out",
        ) from None


def _read(text: str, annotation: str) -> Any:
    """Lists are comma-separated, tables are name=value pairs; the rest is left to the field's type."""
    if "tuple" in annotation:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if "dict" in annotation:
        pairs = (part.partition("=") for part in text.split(",") if part.strip())
        return {name.strip(): value.strip() for name, _, value in pairs}
    return text
