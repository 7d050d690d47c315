"""How orgs share devices: the weight of each, and whose turn it is.

Owns two columns of `orgs`. What follows from them is `control_plane.queueing`'s to say.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, func, select, update

from flash.errors import NotFound
from flash.storage import schema

_orgs = schema.orgs


@dataclass(frozen=True)
class Standing:
    """`share`: the org's weight. `turn`: the start tag of its next run, in starts per weight since ever."""

    share: float = 1.0
    turn: float = 0.0


def standings(connection: Connection) -> dict[str, Standing]:
    """Every org's."""
    rows = connection.execute(select(_orgs.c.id, _orgs.c.share, _orgs.c.turn))
    return {row.id: Standing(row.share, row.turn) for row in rows}


def set_share(connection: Connection, org: str, share: float) -> None:
    """NotFound for an org that is not there or was revoked."""
    mine = (_orgs.c.id == org) & _orgs.c.revoked_at.is_(None)
    if connection.execute(update(_orgs).where(mine).values(share=share)).rowcount == 0:
        raise NotFound(f"no org {org!r:.80}", remedy="flash admin org create makes one")


def take_turn(connection: Connection, run_id: str) -> None:
    """Notes that a run starts: its org's next turn comes after one of everybody else's.

    An org that had nothing to start for a while begins where the others are, with no turns saved up.
    """
    org = connection.execute(select(schema.runs.c.org_id).where(schema.runs.c.id == run_id)).scalar_one()
    now = connection.execute(select(func.max(_orgs.c.turn - 1 / _orgs.c.share))).scalar_one()
    mine = connection.execute(select(_orgs.c.turn, _orgs.c.share).where(_orgs.c.id == org)).one()
    turn = max(now, mine.turn) + 1 / mine.share
    connection.execute(update(_orgs).where(_orgs.c.id == org).values(turn=turn))
