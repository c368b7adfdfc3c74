"""Uploaded files that are indexed before anybody asks."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "ingests",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("file_id", sa.String(), nullable=False, unique=True),
        sa.Column("model", sa.String(), nullable=False, index=True),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("num_tokens", NUMBER),
        sa.Column("num_tokens_done", NUMBER, nullable=False),
        sa.Column("error", sa.String()),
    )
    op.create_table(
        "ingest_segments",
        sa.Column(
            "ingest", NUMBER, sa.ForeignKey("ingests.number", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("digest", sa.String(), primary_key=True, index=True),
    )
