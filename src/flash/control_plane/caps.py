"""What a key may use, held against what its runs take: at submit, inside the transaction that adds the run.

Owns the sums and the refusals. A run that has ended counts with what it cost, an open one with its estimate or what
it has cost already, whichever is more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection

from flash.control_plane.estimating import cost_usd, estimated_usd
from flash.errors import BudgetSpent, CapReached, Unavailable
from flash.storage import runs
from flash.storage.identity import Caller


def check_caps(connection: Connection, caller: Caller, *, estimate: Mapping[str, Any] | None, gpus: int | None) -> None:
    """Raises CapReached or BudgetSpent if one more run of this estimate is more than the caller's key may have.

    Unavailable, if that can't be told now, as nothing is known of any device (`gpus` is None).
    """
    caps = caller.caps
    if gpus is None and (caps.max_gpus is not None or caps.max_usd is not None):
        raise Unavailable(
            f"the key {caller.name!r} has a cap, and what this run would take can't be told: no device is known now",
            remedy="try again when the server reaches its workers' machines",
        )
    if caps.max_runs is not None or caps.max_gpus is not None:
        open_runs, used = runs.under_way(connection, key_id=caller.key_id)
        if caps.max_runs is not None and open_runs >= caps.max_runs:
            raise CapReached(
                f"the key {caller.name!r} may have {caps.max_runs} run(s) under way and has {open_runs}",
                remedy="wait for one to end, cancel one, or ask an admin",
            )
        if caps.max_gpus is not None and gpus is not None and used + gpus > caps.max_gpus:
            raise CapReached(
                f"the key {caller.name!r} may use {caps.max_gpus} GPU(s); its runs use {used}, this one needs {gpus}",
                remedy="wait for one to end, cancel one, or ask an admin",
            )
    if caps.max_usd is not None:
        spent = sum(_usd(run) for run in runs.of_key(connection, key_id=caller.key_id))
        if estimate is None:
            raise BudgetSpent(
                f"the key {caller.name!r} has a budget, and what this run would cost can't be told",
                remedy="train a model of the catalog, or ask an admin for a key without a budget",
            )
        asked = float(estimate["usd"])
        if spent + asked > caps.max_usd or spent >= caps.max_usd:
            raise BudgetSpent(
                f"the key {caller.name!r} may cost ${caps.max_usd:,.2f} in all; its runs took ${spent:,.2f}, "
                f"this one is estimated at ${asked:,.2f}",
                remedy="make the run smaller, or ask an admin for another key",
            )


def _usd(run: runs.PricedRow) -> float:
    cost = cost_usd(run) or 0.0
    return cost if run.state.terminal else max(cost, estimated_usd(run) or 0.0)
