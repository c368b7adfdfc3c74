"""Responses, the events of those that may be streamed again, and who works on the unfinished ones.

A background response is stored before it is worked on. The process that works on it holds a lease, which it renews
while it lives; when a lease has run out, any process may claim the response. A finished response is never changed.

    queued | in_progress  (leased)  ->  completed | failed | incomplete | cancelled
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import Double, ForeignKey, Select, select, update
from sqlalchemy.orm import Mapped, Session, mapped_column

from evermini.storage.conversations import append_items, find_item
from evermini.storage.database import Database
from evermini.storage.schema import Base, Json, Number

UNFINISHED = ("queued", "in_progress")


class ResponseRow(Base):
    """A response and what it was made from."""

    __tablename__ = "responses"

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    previous_id: Mapped[str | None]
    status: Mapped[str]
    body: Mapped[Json]
    items: Mapped[list[Json]]
    request: Mapped[Json]
    is_resumable: Mapped[bool]
    owner: Mapped[str | None]
    lease_expires: Mapped[float | None] = mapped_column(Double, index=True)
    num_attempts: Mapped[int]


class ResponseEventRow(Base):
    """One event of a response's stream."""

    __tablename__ = "response_events"

    response: Mapped[int] = mapped_column(
        ForeignKey(ResponseRow.number, ondelete="CASCADE"), primary_key=True
    )
    sequence_number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    body: Mapped[Json]


class ResponseItemRow(Base):
    """The id of one item of a response's input or output, by which later requests may refer to it."""

    __tablename__ = "response_items"

    response: Mapped[int] = mapped_column(
        ForeignKey(ResponseRow.number, ondelete="CASCADE"), primary_key=True
    )
    id: Mapped[str] = mapped_column(primary_key=True, index=True)


@dataclass(frozen=True)
class StoredResponse:
    """A response.

    Attributes:
        body: The object that clients see.
        items: Its own input, each item with an id; not that of the responses before it.
        request: The body of the request.
        is_resumable: Its events are stored, too.
        num_attempts: How many processes have begun to work on it in the background.
    """

    body: Json
    items: list[Json]
    request: Json
    is_resumable: bool = False
    num_attempts: int = 0

    @property
    def id(self) -> str:
        """The response's id."""
        return str(self.body["id"])

    @property
    def is_finished(self) -> bool:
        """Nothing about it will change."""
        return self.body["status"] not in UNFINISHED


@dataclass(frozen=True)
class Lease:
    """Who works on a response, and until when nobody else may. Times are Unix time in seconds."""

    owner: str
    expires: float


@dataclass(frozen=True)
class Addition:
    """Items that a finished response adds to its conversation."""

    conversation_id: str
    items: Sequence[Json]


class ResponseStore:
    """Reads and writes responses."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self,
        response: StoredResponse,
        *,
        lease: Lease | None = None,
        addition: Addition | None = None,
    ) -> None:
        """Store a new response; it is on the disk when this returns.

        Args:
            response: The response.
            lease: Who will finish it; ``None``: it is finished.
            addition: What it adds to its conversation.
        """
        with self._database.writing() as session:
            row = ResponseRow(
                id=response.id,
                previous_id=response.body["previous_response_id"],
                status=response.body["status"],
                body=response.body,
                items=response.items,
                request=response.request,
                is_resumable=response.is_resumable,
                owner=lease and lease.owner,
                lease_expires=lease and lease.expires,
                num_attempts=response.num_attempts,
            )
            session.add(row)
            session.flush()
            _add_item_ids(session, row)
            if addition is not None:
                append_items(session, addition.conversation_id, addition.items)

    def get(self, response_id: str) -> StoredResponse | None:
        """Return a response, ``None`` if there is none of that id."""
        with self._database.reading() as session:
            row = session.scalar(_one(response_id))
            return None if row is None else _stored(row)

    def delete(self, response_id: str) -> bool:
        """Delete a response and its events; false if there is none of that id."""
        with self._database.writing() as session:
            row = session.scalar(_one(response_id))
            if row is not None:
                session.delete(row)
            return row is not None

    def chain(self, response_id: str) -> list[StoredResponse]:
        """Return the response and all those before it, oldest first; it ends early where one was deleted."""
        last = (
            select(ResponseRow.number, ResponseRow.previous_id)
            .where(ResponseRow.id == response_id)
            .cte("chain", recursive=True)
        )
        before = select(ResponseRow.number, ResponseRow.previous_id).join(
            last, ResponseRow.id == last.c.previous_id
        )
        chain = last.union(before)
        query = (
            select(ResponseRow)
            .join(chain, ResponseRow.number == chain.c.number)
            .order_by(ResponseRow.number)
        )
        with self._database.reading() as session:
            return [_stored(row) for row in session.scalars(query)]

    def find_item(self, item_id: str) -> Json | None:
        """Return the newest item of that id, of a response's input or output or of a conversation."""
        query = (
            select(ResponseRow)
            .join(ResponseItemRow, ResponseItemRow.response == ResponseRow.number)
            .where(ResponseItemRow.id == item_id)
            .order_by(ResponseRow.number.desc())
            .limit(1)
        )
        with self._database.reading() as session:
            row = session.scalar(query)
            if row is None:
                return find_item(session, item_id)
            items: list[Json] = [*row.items, *row.body["output"]]
            return next(item for item in items if item["id"] == item_id)

    # Unfinished responses

    def save(
        self, body: Json, owner: str, events: Sequence[Json], addition: Addition | None = None
    ) -> bool:
        """Replace an unfinished response's object, add events, and if it is finished now, end the lease.

        Returns:
            Whether it was done: false if the response was cancelled, deleted, or claimed by somebody else.
        """
        with self._database.writing() as session:
            row = session.scalar(_one(body["id"]).with_for_update())
            if row is None or row.owner != owner:
                return False
            row.body, row.status = body, body["status"]
            _add_events(session, row.number, events)
            if row.status not in UNFINISHED:
                row.owner = row.lease_expires = None
                _add_item_ids(session, row)
                if addition is not None:
                    append_items(session, addition.conversation_id, addition.items)
            return True

    def append_events(self, response_id: str, owner: str, events: Sequence[Json]) -> bool:
        """Add events to an unfinished response's stream; false as with `save`."""
        with self._database.writing() as session:
            row = session.scalar(_one(response_id).with_for_update())
            if row is None or row.owner != owner:
                return False
            _add_events(session, row.number, events)
            return True

    def cancel(self, response_id: str) -> StoredResponse | None:
        """Make an unfinished response cancelled, whoever works on it; return it as it is then."""
        with self._database.writing() as session:
            row = session.scalar(_one(response_id).with_for_update())
            if row is None:
                return None
            if row.status in UNFINISHED:
                row.status = "cancelled"
                row.body = {**row.body, "status": "cancelled"}
                row.owner = row.lease_expires = None
            return _stored(row)

    def renew(self, lease: Lease, response_ids: Collection[str]) -> set[str]:
        """Renew the owner's leases on the responses named.

        Returns:
            Those that are still the owner's; the others were cancelled, deleted or claimed.
        """
        with self._database.writing() as session:
            renewed = session.scalars(
                update(ResponseRow)
                .where(ResponseRow.owner == lease.owner, ResponseRow.id.in_(response_ids))
                .values(lease_expires=lease.expires)
                .returning(ResponseRow.id)
            )
            return set(renewed)

    def release(self, owner: str) -> None:
        """End all of an owner's leases at once: others may claim what it has not finished."""
        with self._database.writing() as session:
            session.execute(
                update(ResponseRow).where(ResponseRow.owner == owner).values(lease_expires=0.0)
            )

    def claim(self, lease: Lease, *, now: float, limit: int) -> list[StoredResponse]:
        """Take over responses whose lease has run out, oldest first.

        Args:
            lease: The new one.
            now: Unix time in seconds.
            limit: How many at most.
        """
        query = (
            select(ResponseRow)
            .where(ResponseRow.lease_expires < now)
            .order_by(ResponseRow.number)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        with self._database.writing() as session:
            rows = session.scalars(query).all()
            for row in rows:
                row.owner, row.lease_expires = lease.owner, lease.expires
                row.num_attempts += 1
            return [_stored(row) for row in rows]

    def events(self, response_id: str, after: int, limit: int) -> list[Json]:
        """Return the stored events that come after the sequence number ``after``, in order."""
        query = (
            select(ResponseEventRow.body)
            .join(ResponseRow, ResponseRow.number == ResponseEventRow.response)
            .where(ResponseRow.id == response_id, ResponseEventRow.sequence_number > after)
            .order_by(ResponseEventRow.sequence_number)
            .limit(limit)
        )
        with self._database.reading() as session:
            return list(session.scalars(query))


def _one(response_id: str) -> Select[ResponseRow]:
    return select(ResponseRow).where(ResponseRow.id == response_id)


def _add_item_ids(session: Session, row: ResponseRow) -> None:
    """Note the ids of the input and of what there is of the output."""
    known = select(ResponseItemRow.id).where(ResponseItemRow.response == row.number)
    ids = {item["id"] for item in (*row.items, *row.body["output"])} - set(session.scalars(known))
    session.add_all(ResponseItemRow(response=row.number, id=item_id) for item_id in sorted(ids))


def _add_events(session: Session, number: int, events: Sequence[Json]) -> None:
    session.add_all(
        ResponseEventRow(response=number, sequence_number=event["sequence_number"], body=event)
        for event in events
    )


def _stored(row: ResponseRow) -> StoredResponse:
    return StoredResponse(row.body, row.items, row.request, row.is_resumable, row.num_attempts)
