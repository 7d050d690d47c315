"""Retention: when a run's events went; indexes of what is still to be taken leave of, and for counts by org."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("runs", sa.Column("silenced_at", sa.Double(), nullable=True))
    op.drop_index("runs_by_end", "runs")
    op.create_index("runs_by_org_and_state", "runs", ["org_id", "state"])
    _partial("runs_uncollected", "runs", "finished_at", "collected_at IS NULL")
    _partial("runs_unsilenced", "runs", "finished_at", "silenced_at IS NULL")
    with_state = sa.text("has_state = 1"), sa.text("has_state")  # as each of them writes a condition on a boolean
    op.create_index(
        "checkpoints_with_state", "checkpoints", ["run_id"], sqlite_where=with_state[0], postgresql_where=with_state[1]
    )


def _partial(name: str, table: str, column: str, where: str) -> None:
    op.create_index(name, table, [column], sqlite_where=sa.text(where), postgresql_where=sa.text(where))
