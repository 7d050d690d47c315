"""Teams: keys with caps, an audit log, whose a run is and how long it is kept; indexes for many runs."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("orgs", sa.Column("revoked_at", sa.Double(), nullable=True))
    op.add_column("api_keys", sa.Column("max_usd", sa.Double(), nullable=True))
    op.add_column("api_keys", sa.Column("max_runs", sa.Integer(), nullable=True))
    op.add_column("api_keys", sa.Column("max_gpus", sa.Integer(), nullable=True))
    op.create_index("api_keys_by_org", "api_keys", ["org_id"])
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("time", sa.Double(), nullable=False),
        sa.Column("org_id", sa.String(length=64), nullable=True),
        sa.Column("actor", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=True),
        sa.Column("address", sa.String(length=100), nullable=True),
        sa.Column("action", sa.String(length=100), nullable=False),
        sa.Column("object", sa.Text(), nullable=True),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("message", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("audit_by_org", "audit", ["org_id", "id"])
    op.add_column("runs", sa.Column("key_id", sa.String(length=32), nullable=True))
    op.add_column("runs", sa.Column("gpus", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("runs", sa.Column("pinned", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("runs", sa.Column("ttl_s", sa.Double(), nullable=True))
    op.add_column("runs", sa.Column("collected_at", sa.Double(), nullable=True))
    op.drop_index("runs_by_org", "runs")
    op.drop_index("runs_by_state", "runs")
    op.create_index("runs_by_org", "runs", ["org_id", "created_at", "id"])
    op.create_index("runs_by_state", "runs", ["state", "created_at", "id"])
    op.create_index("runs_by_key", "runs", ["key_id"])
    op.create_index("runs_by_source", "runs", ["init_run_id"])
    op.create_index("runs_by_environment", "runs", ["environment_sha256"])
    op.create_index("runs_by_end", "runs", ["finished_at"])
    uncleaned = sa.text("cleaned_at IS NULL")
    op.create_index(
        "runs_uncleaned", "runs", ["finished_at"], sqlite_where=uncleaned, postgresql_where=uncleaned
    )
