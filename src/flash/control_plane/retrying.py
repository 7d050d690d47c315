"""A retry: a new run from the exact state of one that failed or was cancelled.

Owns what is carried over: configuration, seed, pinned environment, warm start, micro-batch, and the newest
checkpoint that is whole, optimizer and generators included, as a checkpoint of the new run's own. What a
retried run then does is what any run does after a lost attempt. Knows no HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from flash.artifacts.manifests import Damaged, copy_checkpoint, verify
from flash.catalog.catalog import load_catalog
from flash.config.load import parse_config
from flash.control_plane.caps import check_caps
from flash.control_plane.services import Services
from flash.control_plane.status import files_removed, from_adapter
from flash.control_plane.submitting import Submitted, check_secrets
from flash.errors import Conflict
from flash.records import Checkpoint, Manifest, RunState
from flash.storage import runs
from flash.storage.identity import Caller


def retry(plane: Services, caller: Caller, run_id: str, secrets: dict[str, str], key: str | None) -> Submitted:
    """Records the new run. With an idempotency `key`, the same request again gives the same run."""
    mac = plane.vault.mac(json.dumps(["retry", run_id, secrets], sort_keys=True).encode())
    with plane.database.read() as connection:
        if key is not None:
            known = runs.find_submission(connection, org=caller.org, key=key, body_mac=mac)
            if known is not None:
                return Submitted(known, created=False)
        source = runs.get_run(connection, run_id, org=caller.org)
        check_caps(connection, caller, estimate=source.estimate, gpus=source.gpus)  # before anything is copied
        checkpoints = runs.checkpoints_of(connection, source.id)
        manifests = [
            runs.manifest_of(connection, source.id, found.step) for found in reversed(checkpoints) if found.has_state
        ]
    if source.state not in (RunState.FAILED, RunState.CANCELLED):
        raise Conflict(
            f"{source.id} is {source.state.value}: only a failed or cancelled run can be retried",
            remedy="submit its config again for another run" if source.state.terminal else "cancel it first, or wait",
        )
    _check_kept(source, checkpoints)
    config, _ = parse_config(source.config, catalog=load_catalog(plane.settings.home))
    check_secrets(config, secrets)
    now = plane.clock()
    new_id = runs.new_run_id(now)
    taken = _take_over(plane, manifests, new_id)
    step = taken[0].step if taken else 0
    new = runs.NewRun(
        org=source.org_id,
        config=source.config,
        spec=source.spec,
        seed=source.seed,
        environment_namespace=source.environment_namespace,
        environment_name=source.environment_name,
        environment_sha256=source.environment_sha256,
        init_run_id=source.init_run_id,
        init_step=source.init_step,
        wall_clock_limit_s=source.wall_clock_limit_s,
        estimate=source.estimate,
        retry_of=source.id,
        step=step,
        total_steps=source.total_steps,
        micro_batch_divisor=source.micro_batch_divisor,
        key_id=caller.key_id,
        gpus=source.gpus,
        priority=source.priority,
        reason=f"a retry of {source.id} from {f'step {step}' if step else 'the start'}",
    )
    with plane.database.write() as connection:
        if key is not None:  # another request with the same key may have won since
            known = runs.find_submission(connection, org=caller.org, key=key, body_mac=mac)
            if known is not None:
                return Submitted(known, created=False)
        check_caps(connection, caller, estimate=new.estimate, gpus=new.gpus)
        if taken is None:  # perhaps because its time was over meanwhile
            checkpoints = runs.checkpoints_of(connection, source.id)
        _check_kept(runs.get_run(connection, source.id), checkpoints)
        runs.insert_run(connection, new, now=now, run_id=new_id)
        if taken is not None:
            # Epoch 0: no attempt of this run brought it.
            runs.record_checkpoint(connection, taken[0], epoch=0, manifest_sha256=taken[1], now=now)
        plane.vault.store(connection, new_id, secrets)
        if key is not None:
            runs.record_submission(connection, org=caller.org, key=key, body_mac=mac, run_id=new_id, now=now)
    plane.wake.set()
    return Submitted(new_id, created=True)


def _check_kept(run: runs.RunRow, checkpoints: Sequence[Checkpoint]) -> None:
    """Refuses where a retry would silently begin at the start, though the run had come further."""
    if run.collected_at is not None:
        raise Conflict(
            f"{run.id} can't be retried: {files_removed(run)}", remedy="submit its config again for another run"
        )
    if checkpoints and not any(found.has_state for found in checkpoints):
        raise Conflict(
            f"{run.id} can't be retried: of its checkpoints only the adapters are still kept (keep_state_days)",
            remedy=from_adapter(checkpoints),
        )


def _take_over(plane: Services, manifests: list[Manifest], run_id: str) -> tuple[Manifest, str] | None:
    """Copies the first of `manifests` (newest first) that is whole; None: there is none, the start it is."""
    for manifest in manifests:
        try:
            verify(plane.store, manifest, digests=True)
        except Damaged:
            continue  # the one before it, as a lost attempt's successor would
        return copy_checkpoint(plane.store, manifest, run_id)
    return None
