"""What is stored belongs to a project: another project's keys do not see it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Add the columns. What is known to be of another project than the default one goes there."""
    for table in ("files", "uploads", "chat_completions", "conversations", "responses"):
        op.add_column(
            table, sa.Column("project", sa.String(), nullable=False, server_default="default")
        )
    for table in ("files", "batches", "chat_completions", "fine_tuning_jobs"):
        op.create_index(op.f(f"ix_{table}_project_number"), table, ["project", "number"])
    _move()


def _move() -> None:
    connection = op.get_bind()
    files = _table("files", "id")
    batches, tunings = _table("batches", body=sa.JSON), _table("fine_tuning_jobs", body=sa.JSON)
    responses = _table("responses", "id", caller=sa.JSON)
    for table in (batches, tunings):
        query = sa.select(table.c.project, table.c.body).where(table.c.project != "default")
        for owner, body in connection.execute(query).all():
            names = list(_files(body))
            moved = sa.update(files).where(files.c.id.in_(names)).values(project=owner)
            connection.execute(moved)
    query = sa.select(responses.c.id, responses.c.caller).where(responses.c.caller.is_not(None))
    for response_id, caller in connection.execute(query).all():
        owner = (caller or {}).get("project", "default")
        if owner != "default":
            moved = sa.update(responses).where(responses.c.id == response_id).values(project=owner)
            connection.execute(moved)


def _table(name: str, *strings: str, **others: type[sa.JSON]) -> sa.TableClause:
    columns = [sa.column(one, sa.String) for one in ("project", *strings)]
    return sa.table(name, *columns, *(sa.column(one, kind) for one, kind in others.items()))


def _files(body: dict[str, Any]) -> Iterator[str]:
    """Return the files of a batch or a fine-tuning job."""
    for field in (
        "input_file_id", "output_file_id", "error_file_id", "training_file", "validation_file"
    ):  # fmt: skip
        if body.get(field):
            yield body[field]
    yield from body.get("result_files") or ()
