"""Adapters of fine-tuned models, and aliases of model names."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "adapters",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("name", sa.String(), nullable=False, unique=True),
        sa.Column("tier", sa.String(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False, index=True),
        sa.Column("num_bytes", NUMBER, nullable=False),
        sa.Column("base_name", sa.String()),
        sa.Column("base_weights", sa.String()),
        sa.Column("job_id", sa.String(), index=True),
        sa.Column("created_at", NUMBER, nullable=False),
        sa.Column("config_blob", sa.String(), nullable=False, unique=True),
        sa.Column("weights_blob", sa.String(), nullable=False, unique=True),
    )
    op.create_table(
        "model_aliases",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("name", sa.String(), nullable=False, unique=True),
        sa.Column("target", sa.String(), nullable=False),
        sa.Column("created_at", NUMBER, nullable=False),
    )
