"""API keys, the audit log, usage; batches know who created them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create the tables and the column."""
    op.create_table(
        "api_keys",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("id", sa.String(), nullable=False, unique=True),
        sa.Column("digest", sa.String(), nullable=False, unique=True),
        sa.Column("shown", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("created_at", NUMBER, nullable=False),
        sa.Column("expires_at", NUMBER),
        sa.Column("revoked_at", NUMBER),
        sa.Column("requests_per_minute", NUMBER),
        sa.Column("tokens_per_minute", NUMBER),
        sa.Column("monthly_budget", sa.Double()),
    )
    op.create_table(
        "audit_log",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("at", NUMBER, nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
    )
    op.create_table(
        "usage",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("at", NUMBER, nullable=False, index=True),
        sa.Column("request_id", sa.String(), nullable=False),
        sa.Column("endpoint", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("key_id", sa.String()),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("is_batch", sa.Boolean(), nullable=False),
        sa.Column("input_tokens", NUMBER, nullable=False),
        sa.Column("cached_tokens", NUMBER, nullable=False),
        sa.Column("output_tokens", NUMBER, nullable=False),
        sa.Column("accepted_tokens", NUMBER, nullable=False),
        sa.Column("rejected_tokens", NUMBER, nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
    )
    op.create_table(
        "busy",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("at", NUMBER, nullable=False, index=True),
        sa.Column("machine_seconds", sa.Double(), nullable=False),
    )
    op.add_column("batches", sa.Column("key_id", sa.String()))
    op.add_column(
        "batches", sa.Column("project", sa.String(), nullable=False, server_default="default")
    )
