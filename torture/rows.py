"""The table's rows, each with its long and its short form."""

from __future__ import annotations

from torture import (
    archives,
    configs,
    control_plane,
    disks,
    fencing,
    fuzzing,
    recovering,
    resuming,
    soaking,
    stores,
    troubles,
)
from torture.tally import Row

ROWS = (
    Row("sft", "kill -9 of trainer, host or supervisor (SFT)", "the uninterrupted run's adapter", resuming.sft, 250, 3),
    Row("grpo", "the same (GRPO)", "the uninterrupted run's adapter", resuming.grpo, 250, 3),
    Row(
        "plane", "kill -9 of the control plane", "every submit there, every event once and in order",
        control_plane.kills, 500, 5,
    ),
    Row("fence", "SIGSTOP past the lease, then SIGCONT", "no write accepted, the worker leaves", fencing.stops, 200, 2),
    Row(
        "recovery", "a worker killed, alone or with all of it, or stopped", "back at work within the lease + 10 s",
        recovering.recoveries, 200, 3,
    ),
    Row("store", "the store fails", "nothing partial visible, no false done, no orphan", stores.folder, 5000, 60),
    Row("bucket", "the same, a bucket behind a failing network", "the same", stores.bucket, 1000, 30),
    Row("disk", "a disk that is really full", "the undisturbed run's adapter, no event lost", disks.faults, 60, 3),
    Row("clock", "a wall clock that jumps", "no attempt lost for it, every event", troubles.jumps, 5000, 100),
    Row("locked", "a locked database", "refused as a whole and in words, nothing lost", troubles.locks, 5000, 100),
    Row("archives", "malformed archives", "nothing outside the root", archives.archives, 10_000, 500),
    Row("api", "calls made up from the schema", "no 5xx, no cross-org read", fuzzing.calls, 50_000, 500),
    Row("configs", "configs of every kind", "no traceback, every rejection names a key", configs.configs, 50_000, 400),
    Row("soak", "run after run", "flat memory and handles", soaking.soak, 1000, 60),
)  # fmt: skip
