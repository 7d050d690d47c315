"""Sharing: the orgs' weights and turns, the runs' priorities."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("orgs", sa.Column("share", sa.Double(), nullable=False, server_default="1"))
    op.add_column("orgs", sa.Column("turn", sa.Double(), nullable=False, server_default="0"))
    op.add_column("runs", sa.Column("priority", sa.Integer(), nullable=False, server_default="0"))
