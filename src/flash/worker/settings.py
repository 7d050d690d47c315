"""Every interval, time-out, grace period and cap of a worker, in one frozen record.

Owns the numbers and how an operator (or a test, in fractions of a second) overrides them: one JSON object in
the environment variable `FLASH_WORKER_SETTINGS`. Two of them, the heartbeat interval and the lease, come with
the claim and are not settings here. All times are seconds, all sizes bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from flash.artifacts.manifests import PART_BYTES
from flash.errors import InvalidInput

VARIABLE = "FLASH_WORKER_SETTINGS"


@dataclass(frozen=True)
class WorkerSettings:
    threads: int = 0                      # of the trainer; 0: every CPU that it may use

    # the control plane's API
    connect_timeout_s: float = 5.0
    request_timeout_s: float = 30.0
    claim_patience_s: float = 30.0        # how long an unreachable plane is asked for the claim
    retry_first_s: float = 0.2            # back-off doubles from here …
    retry_most_s: float = 5.0             # … to here
    lease_margin: float = 0.2             # share of the lease kept in hand to kill the children in time

    # the store
    upload_part_bytes: int = PART_BYTES   # of a large file in one object, so what is sent again when a line breaks
    download_patience_s: float = 120.0    # for the environment and checkpoints, while their source fails

    # events
    event_interval_s: float = 0.25        # how long events are gathered before a batch is synced and sent
    event_batch: int = 500                # events in one batch
    event_batch_bytes: float = 1_000_000  # of JSON in one batch

    # what children print
    log_bytes_per_s: float = 32_768       # sustained, per source
    log_burst_bytes: float = 1_048_576    # at once, per source
    log_line_chars: int = 4_000           # a longer line is split

    # the environment host, with everything that it starts
    host_memory_bytes: int = 0            # 0 is half of this machine's memory
    host_processes: int = 512

    # endings
    stop_grace_s: float = 60.0            # from "stop" to the kill of a trainer: time to write a checkpoint
    preempt_grace_s: float = 20.0         # the same after SIGTERM; clouds give a node about 30 s
    preempt_flush_s: float = 8.0          # for the last upload after SIGTERM
    exit_grace_s: float = 10.0            # from a trainer's outcome to the end of its process
    upload_patience_s: float = 900.0      # for the final upload, while the store fails
    logger_wait_s: float = 2.0            # at the end, for a metrics logger to say whether it worked
    logger_finish_s: float = 60.0         # for its process to send what it holds, after the attempt's end

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> WorkerSettings:
        """The defaults with the overrides of `FLASH_WORKER_SETTINGS`, if it is set."""
        text = environ.get(VARIABLE)
        if not text:
            return cls()
        known = {field.name: field.type for field in fields(cls)}
        try:
            values = json.loads(text)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise InvalidInput(f"{VARIABLE} = {text!r}: must be a JSON object of numbers")
        for name, value in values.items():
            if name not in known:
                raise InvalidInput(f"{VARIABLE}: no setting is called {name!r}; there are {', '.join(known)}")
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise InvalidInput(f"{VARIABLE}: {name} = {value!r} must be a number, zero or more")
        numbers: dict[str, Any] = {
            name: int(value) if known[name] == "int" else float(value) for name, value in values.items()
        }
        return cls(**numbers)
