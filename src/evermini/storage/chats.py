"""Stored chat completions: listed by model and metadata, page by page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import ForeignKey, Index, delete
from sqlalchemy.orm import Mapped, mapped_column, relationship

from evermini.storage.schema import (
    Base,
    Cursor,
    Json,
    Number,
    Owned,
    Page,
    ProjectStore,
    find,
    owned,
    page,
)


class ChatCompletionRow(Owned, Base):
    """A completion; its metadata lies in rows of their own, by which listings are filtered."""

    __tablename__ = "chat_completions"
    __table_args__ = (Index(None, "project", "number"),)

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    model: Mapped[str] = mapped_column(index=True)
    body: Mapped[Json]
    messages: Mapped[list[Json]]
    project: Mapped[str] = mapped_column(server_default="default")
    pairs: Mapped[list[ChatMetadataRow]] = relationship(
        cascade="all, delete-orphan", passive_deletes=True, lazy="selectin"
    )


class ChatMetadataRow(Base):
    """One pair of a completion's metadata."""

    __tablename__ = "chat_completion_metadata"

    completion: Mapped[int] = mapped_column(
        ForeignKey(ChatCompletionRow.number, ondelete="CASCADE"), primary_key=True
    )
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


@dataclass(frozen=True)
class StoredChat:
    """A chat completion as it was answered, and the messages it answered, each with an id."""

    body: Json
    messages: list[Json]


class ChatStore(ProjectStore):
    """Reads and writes stored chat completions."""

    def add(
        self,
        body: Json,
        messages: list[Json],
        metadata: Mapping[str, str],
        project: str = "default",
    ) -> None:
        """Store a completion of a project; it is on the disk when this returns."""
        with self._database.writing() as session:
            session.add(
                ChatCompletionRow(
                    id=body["id"],
                    model=body["model"],
                    body={key: value for key, value in body.items() if key != "metadata"},
                    messages=messages,
                    project=project,
                    pairs=_pairs(metadata),
                )
            )

    def get(self, completion_id: str) -> StoredChat | None:
        """Return a completion, ``None`` if there is none of that id."""
        with self._database.reading() as session:
            row = find(session, ChatCompletionRow, completion_id, self._project)
            return None if row is None else _stored(row)

    def list(
        self, cursor: Cursor, *, model: str | None, metadata: Mapping[str, str]
    ) -> Page[StoredChat] | None:
        """Return a page, oldest first by default; ``None`` if there is no completion ``cursor.after``.

        Args:
            cursor: Which page.
            model: Only completions of this model.
            metadata: Only completions whose metadata has all of these pairs.
        """
        query = every = owned(ChatCompletionRow, self._project)
        if model is not None:
            query = query.where(ChatCompletionRow.model == model)
        for key, value in metadata.items():
            pair = ChatCompletionRow.pairs.any(
                (ChatMetadataRow.key == key) & (ChatMetadataRow.value == value)
            )
            query = query.where(pair)
        with self._database.reading() as session:
            return page(session, ChatCompletionRow, query, cursor, _stored, among=every)

    def update(self, completion_id: str, metadata: Mapping[str, str]) -> StoredChat | None:
        """Replace a completion's metadata and return it, ``None`` if there is none of that id."""
        with self._database.writing() as session:
            row = find(session, ChatCompletionRow, completion_id, self._project)
            if row is None:
                return None
            session.execute(delete(ChatMetadataRow).where(ChatMetadataRow.completion == row.number))
            session.expire(row, ["pairs"])
            row.pairs = _pairs(metadata)
            session.flush()
            return _stored(row)

    def delete(self, completion_id: str) -> bool:
        """Delete a completion; false if there is none of that id."""
        with self._database.writing() as session:
            row = find(session, ChatCompletionRow, completion_id, self._project)
            if row is not None:
                session.delete(row)
            return row is not None


def _pairs(metadata: Mapping[str, str]) -> list[ChatMetadataRow]:
    return [ChatMetadataRow(key=key, value=value) for key, value in metadata.items()]


def _stored(row: ChatCompletionRow) -> StoredChat:
    return StoredChat(
        {**row.body, "metadata": {pair.key: pair.value for pair in row.pairs}}, row.messages
    )
