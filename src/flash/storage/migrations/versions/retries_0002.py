"""Lineage of retried runs, and when an ended run's leftovers were removed."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("runs", sa.Column("retry_of", sa.String(length=64), nullable=True))
    op.add_column("runs", sa.Column("cleaned_at", sa.Double(), nullable=True))
