"""Fine-tuning jobs, their events and checkpoints."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "fine_tuning_jobs",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("id", sa.String(), nullable=False, unique=True),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("key_id", sa.String()),
        sa.Column("project", sa.String(), nullable=False),
    )
    job = sa.ForeignKey("fine_tuning_jobs.number", ondelete="CASCADE")
    op.create_table(
        "fine_tuning_events",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("id", sa.String(), nullable=False, unique=True),
        sa.Column("job", NUMBER, job, nullable=False, index=True),
        sa.Column("created_at", NUMBER, nullable=False),
        sa.Column("level", sa.String(), nullable=False),
        sa.Column("message", sa.String(), nullable=False),
        sa.Column("step", sa.Integer()),
        sa.Column("data", sa.JSON(), nullable=False),
    )
    job = sa.ForeignKey("fine_tuning_jobs.number", ondelete="CASCADE")
    op.create_table(
        "fine_tuning_checkpoints",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("id", sa.String(), nullable=False, unique=True),
        sa.Column("job", NUMBER, job, nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("created_at", NUMBER, nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.UniqueConstraint("job", "step"),
    )
