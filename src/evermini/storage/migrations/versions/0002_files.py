"""Files, and uploads in parts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "files",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("id", sa.String(), nullable=False, unique=True),
        sa.Column("filename", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False, index=True),
        sa.Column("num_bytes", NUMBER, nullable=False),
        sa.Column("created_at", NUMBER, nullable=False),
        sa.Column("expires_at", sa.Double(), index=True),
    )
    op.create_table(
        "file_blobs",
        sa.Column(
            "file", NUMBER, sa.ForeignKey("files.number", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("position", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("blob", sa.String(), nullable=False, unique=True),
        sa.Column("num_bytes", NUMBER, nullable=False),
    )
    op.create_table(
        "uploads",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("id", sa.String(), nullable=False, unique=True),
        sa.Column("filename", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("num_bytes", NUMBER, nullable=False),
        sa.Column("created_at", NUMBER, nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False, index=True),
        sa.Column("file_seconds", sa.Integer()),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("file_id", sa.String()),
    )
    op.create_table(
        "upload_parts",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("id", sa.String(), nullable=False, unique=True),
        sa.Column(
            "upload",
            NUMBER,
            sa.ForeignKey("uploads.number", ondelete="CASCADE"),
            nullable=False,
            index=True,
        ),
        sa.Column("blob", sa.String(), nullable=False, unique=True),
        sa.Column("num_bytes", NUMBER, nullable=False),
    )
