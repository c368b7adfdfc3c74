"""Stored chat completions, responses and conversations."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "chat_completions",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("id", sa.String(), nullable=False, unique=True),
        sa.Column("model", sa.String(), nullable=False, index=True),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("messages", sa.JSON(), nullable=False),
    )
    op.create_table(
        "chat_completion_metadata",
        sa.Column(
            "completion",
            NUMBER,
            sa.ForeignKey("chat_completions.number", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("key", sa.String(), primary_key=True),
        sa.Column("value", sa.String(), nullable=False),
    )
    op.create_table(
        "responses",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("id", sa.String(), nullable=False, unique=True),
        sa.Column("previous_id", sa.String()),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("items", sa.JSON(), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("is_resumable", sa.Boolean(), nullable=False),
        sa.Column("owner", sa.String()),
        sa.Column("lease_expires", sa.Double(), index=True),
        sa.Column("num_attempts", sa.Integer(), nullable=False),
    )
    op.create_table(
        "response_events",
        sa.Column(
            "response",
            NUMBER,
            sa.ForeignKey("responses.number", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("sequence_number", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("body", sa.JSON(), nullable=False),
    )
    op.create_table(
        "conversations",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("id", sa.String(), nullable=False, unique=True),
        sa.Column("created_at", NUMBER, nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
    )
    op.create_table(
        "conversation_items",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column(
            "conversation",
            NUMBER,
            sa.ForeignKey("conversations.number", ondelete="CASCADE"),
            nullable=False,
        ),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
    )
    op.create_index(None, "conversation_items", ["conversation", "id"], unique=True)
