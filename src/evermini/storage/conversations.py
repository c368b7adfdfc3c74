"""Conversations: items in order, added by requests and by the responses that belong to them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ForeignKey, Index, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from evermini.storage.schema import (
    Base,
    Cursor,
    Json,
    Listed,
    Number,
    Owned,
    Page,
    ProjectStore,
    find,
    page,
)


class ConversationRow(Owned, Base):
    """A conversation; ``details`` is its metadata (SQLAlchemy keeps the name ``metadata`` for itself)."""

    __tablename__ = "conversations"

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[int] = mapped_column(Number)
    details: Mapped[Json]
    project: Mapped[str] = mapped_column(server_default="default")


class ConversationItemRow(Listed, Base):
    """An item of a conversation; its id is unique there, not everywhere."""

    __tablename__ = "conversation_items"
    __table_args__ = (Index(None, "conversation", "id", unique=True),)

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    conversation: Mapped[int] = mapped_column(
        ForeignKey(ConversationRow.number, ondelete="CASCADE")
    )
    id: Mapped[str] = mapped_column(index=True)
    body: Mapped[Json]


@dataclass(frozen=True)
class StoredConversation:
    """A conversation without its items."""

    id: str
    created_at: int
    metadata: dict[str, str]


class ConversationStore(ProjectStore):
    """Reads and writes conversations. Methods return ``None`` where there is no conversation of the id."""

    def add(
        self,
        conversation_id: str,
        metadata: dict[str, str],
        items: Sequence[Json],
        project: str = "default",
    ) -> StoredConversation:
        """Store a new conversation of a project, with its first items."""
        with self._database.writing() as session:
            row = ConversationRow(
                id=conversation_id,
                created_at=int(time.time()),
                details=dict(metadata),
                project=project,
            )
            session.add(row)
            session.flush()
            _append(session, row, items)
            return _stored(row)

    def get(self, conversation_id: str) -> StoredConversation | None:
        """Return a conversation."""
        with self._database.reading() as session:
            row = find(session, ConversationRow, conversation_id, self._project)
            return None if row is None else _stored(row)

    def update(self, conversation_id: str, metadata: dict[str, str]) -> StoredConversation | None:
        """Replace a conversation's metadata."""
        with self._database.writing() as session:
            row = find(session, ConversationRow, conversation_id, self._project)
            if row is None:
                return None
            row.details = dict(metadata)
            return _stored(row)

    def delete(self, conversation_id: str) -> bool:
        """Delete a conversation and its items; false if there is none of that id."""
        with self._database.writing() as session:
            row = find(session, ConversationRow, conversation_id, self._project)
            if row is not None:
                session.delete(row)
            return row is not None

    def append(self, conversation_id: str, items: Sequence[Json]) -> list[Json] | None:
        """Add items at the end and return them as they were stored; one whose id is taken gets a new id."""
        with self._database.writing() as session:
            row = find(session, ConversationRow, conversation_id, self._project)
            return None if row is None else _append(session, row, items)

    def items(self, conversation_id: str) -> list[Json] | None:
        """Return all items, oldest first."""
        with self._database.reading() as session:
            row = find(session, ConversationRow, conversation_id, self._project)
            if row is None:
                return None
            query = (
                select(ConversationItemRow.body)
                .where(ConversationItemRow.conversation == row.number)
                .order_by(ConversationItemRow.number)
            )
            return list(session.scalars(query))

    def list(self, conversation_id: str, cursor: Cursor) -> Page[Json] | None:
        """Return a page of items.

        Raises:
            KeyError: There is no item ``cursor.after``.
        """
        with self._database.reading() as session:
            row = find(session, ConversationRow, conversation_id, self._project)
            if row is None:
                return None
            query = select(ConversationItemRow).where(
                ConversationItemRow.conversation == row.number
            )
            found = page(session, ConversationItemRow, query, cursor, lambda item: item.body)
            if found is None:
                raise KeyError(cursor.after)
            return found

    def get_item(self, conversation_id: str, item_id: str) -> Json | None:
        """Return an item; ``None`` also if the conversation has none of that id."""
        with self._database.reading() as session:
            row = find(session, ConversationRow, conversation_id, self._project)
            item = None if row is None else _find_item(session, row, item_id)
            return None if item is None else item.body

    def delete_item(self, conversation_id: str, item_id: str) -> StoredConversation | None:
        """Delete an item and return its conversation.

        Raises:
            KeyError: The conversation has no item of that id.
        """
        with self._database.writing() as session:
            row = find(session, ConversationRow, conversation_id, self._project)
            if row is None:
                return None
            item = _find_item(session, row, item_id)
            if item is None:
                raise KeyError(item_id)
            session.delete(item)
            return _stored(row)


def find_item(session: Session, item_id: str, project: str | None) -> Json | None:
    """Return the newest item of that id in any conversation of a project; ``None``: of any project."""
    query = select(ConversationItemRow.body).where(ConversationItemRow.id == item_id)
    if project is not None:
        query = query.join(
            ConversationRow, ConversationRow.number == ConversationItemRow.conversation
        ).where(ConversationRow.project == project)
    return session.scalar(query.order_by(ConversationItemRow.number.desc()).limit(1))


def append_items(session: Session, conversation_id: str, items: Sequence[Json]) -> None:
    """Add items to a conversation as part of another change; does nothing if it has been deleted."""
    row = find(session, ConversationRow, conversation_id)
    if row is not None:
        _append(session, row, items)


def _find_item(session: Session, row: ConversationRow, item_id: str) -> ConversationItemRow | None:
    return session.scalar(
        select(ConversationItemRow).where(
            ConversationItemRow.conversation == row.number, ConversationItemRow.id == item_id
        )
    )


def _append(session: Session, row: ConversationRow, items: Sequence[Json]) -> list[Json]:
    # One writer at a time per conversation, or the items of two requests could mix.
    session.refresh(row, with_for_update=True)
    stored = []
    for item in items:
        if _find_item(session, row, item["id"]) is not None:
            item = {**item, "id": f"{item['id'].partition('_')[0]}_{uuid.uuid4().hex}"}
        session.add(ConversationItemRow(conversation=row.number, id=item["id"], body=item))
        session.flush()
        stored.append(item)
    return stored


def _stored(row: ConversationRow) -> StoredConversation:
    return StoredConversation(row.id, row.created_at, row.details)
