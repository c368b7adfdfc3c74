"""Which projects may use a fine-tuned model besides the one that trained it; see `evermini.storage.adapters`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from evermini.storage.adapters import AdapterRow, ModelPermissionRow
from evermini.storage.database import Database
from evermini.storage.schema import Cursor, Page, page


@dataclass(frozen=True)
class Permission:
    """A project may use a model since ``created_at`` (Unix time)."""

    id: str
    project: str
    created_at: int


class PermissionStore:
    """Reads and writes permissions."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, model: str, projects: Sequence[str]) -> Sequence[Permission] | None:
        """Share a model; return the permissions of these projects, those that were there already among them.

        ``None``: there is no such model.
        """
        with self._database.writing() as session:
            found = select(AdapterRow.number).where(AdapterRow.name == model)
            adapter = session.scalar(found.with_for_update())
            if adapter is None:
                return None
            return [_stored(_put(session, adapter, project)) for project in dict.fromkeys(projects)]

    def restore(self, model: str, permission: Permission) -> None:
        """Store a model's permission as it is, if there is none of its id."""
        with self._database.writing() as session:
            if session.scalar(_of(model).where(ModelPermissionRow.id == permission.id)) is None:
                adapter = session.scalars(select(AdapterRow.number).where(AdapterRow.name == model))
                session.add(
                    ModelPermissionRow(
                        id=permission.id,
                        adapter=adapter.one(),
                        project=permission.project,
                        created_at=permission.created_at,
                    )
                )

    def list(
        self, model: str, cursor: Cursor, project: str | None = None
    ) -> Page[Permission] | None:
        """Return a page of a model's permissions, or of one project's; ``None``: there is none ``cursor.after``."""
        query = every = _of(model)
        if project is not None:
            query = query.where(ModelPermissionRow.project == project)
        with self._database.reading() as session:
            return page(session, ModelPermissionRow, query, cursor, _stored, among=every)

    def delete(self, model: str, permission_id: str) -> bool:
        """Stop sharing; ``False``: the model has no such permission."""
        with self._database.writing() as session:
            row = session.scalar(_of(model).where(ModelPermissionRow.id == permission_id))
            if row is None:
                return False
            session.delete(row)
            return True


def _of(model: str) -> Select[ModelPermissionRow]:
    return (
        select(ModelPermissionRow)
        .join(AdapterRow, AdapterRow.number == ModelPermissionRow.adapter)
        .where(AdapterRow.name == model)
    )


def _put(session: Session, adapter: int, project: str) -> ModelPermissionRow:
    row = session.scalar(
        select(ModelPermissionRow).where(
            ModelPermissionRow.adapter == adapter, ModelPermissionRow.project == project
        )
    )
    if row is None:
        row = ModelPermissionRow(
            id=f"cp_{uuid.uuid4().hex}",
            adapter=adapter,
            project=project,
            created_at=int(time.time()),
        )
        session.add(row)
        session.flush()
    return row


def _stored(row: ModelPermissionRow) -> Permission:
    return Permission(row.id, row.project, row.created_at)
