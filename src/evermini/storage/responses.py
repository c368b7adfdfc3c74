"""Responses, and the events of those that may be streamed again.

A background response is stored before it is worked on, with a job (`evermini.storage.jobs`): who changes it must hold
the job, which ends with the change that finishes the response. A finished response is never changed.

    queued | in_progress  (has a job)  ->  completed | failed | incomplete | cancelled
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ForeignKey, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from evermini.storage.conversations import append_items, find_item
from evermini.storage.jobs import Job, drop, enqueue, finish, hold
from evermini.storage.schema import (
    Base,
    Json,
    Number,
    Owned,
    ProjectStore,
    StoredObject,
    find,
    owned,
)

JOB = "response"
UNFINISHED = ("queued", "in_progress")


class ResponseRow(Owned, Base):
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
    caller: Mapped[Json | None]
    project: Mapped[str] = mapped_column(server_default="default")


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
class StoredResponse(StoredObject):
    """A response.

    Attributes:
        items: Its own input, each item with an id; not that of the responses before it.
        request: The body of the request.
        is_resumable: Its events are stored, too.
        caller: Who asked for it, if it is made in the background.
        project: Whose it is.
    """

    items: list[Json]
    request: Json
    is_resumable: bool = False
    caller: Json | None = None
    project: str = "default"

    @property
    def is_finished(self) -> bool:
        """Nothing about it will change."""
        return self.status not in UNFINISHED


@dataclass(frozen=True)
class Addition:
    """Items that a finished response adds to its conversation."""

    conversation_id: str
    items: Sequence[Json]


class ResponseStore(ProjectStore):
    """Reads and writes responses. Reading alone asks whose one is: who changes it has found it before."""

    def add(
        self,
        response: StoredResponse,
        *,
        events: Sequence[Json] = (),
        addition: Addition | None = None,
    ) -> None:
        """Store a finished response, its events, and what it adds to its conversation; all is on the disk then."""
        with self._database.writing() as session:
            _add_events(session, _add(session, response), events)
            if addition is not None:
                append_items(session, addition.conversation_id, addition.items)

    def submit(self, response: StoredResponse, events: Sequence[Json]) -> None:
        """Store a new response, its first events, and the job to finish it."""
        with self._database.writing() as session:
            _add_events(session, _add(session, response), events)
            enqueue(session, JOB, response.id)

    def get(self, response_id: str) -> StoredResponse | None:
        """Return a response, ``None`` if there is none of that id."""
        with self._database.reading() as session:
            row = find(session, ResponseRow, response_id, self._project)
            return None if row is None else _stored(row)

    def delete(self, response_id: str) -> bool:
        """Delete a response, its events and its job; false if there is none of that id."""
        with self._database.writing() as session:
            drop(session, response_id)
            row = find(session, ResponseRow, response_id)
            if row is not None:
                session.delete(row)
            return row is not None

    def chain(self, response_id: str) -> list[StoredResponse]:
        """Return the response and all those before it, oldest first; it ends early where one was deleted.

        The last one's project has continued the others, so theirs is not asked for.
        """
        first = select(ResponseRow.number, ResponseRow.previous_id).where(
            ResponseRow.id == response_id
        )
        if self._project is not None:
            first = first.where(ResponseRow.project == self._project)
        last = first.cte("chain", recursive=True)
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
            owned(ResponseRow, self._project)
            .join(ResponseItemRow, ResponseItemRow.response == ResponseRow.number)
            .where(ResponseItemRow.id == item_id)
            .order_by(ResponseRow.number.desc())
            .limit(1)
        )
        with self._database.reading() as session:
            row = session.scalar(query)
            if row is None:
                return find_item(session, item_id, self._project)
            items: list[Json] = [*row.items, *row.body["output"]]
            return next(item for item in items if item["id"] == item_id)

    # Unfinished responses

    def save(
        self, body: Json, job: Job, events: Sequence[Json], addition: Addition | None = None
    ) -> None:
        """Replace an unfinished response's object, add events, and if it is finished now, end the job.

        Raises:
            LeaseLostError: The response was cancelled or deleted, or another process works on it.
        """
        is_finished = body["status"] not in UNFINISHED
        with self._database.writing() as session:
            (finish if is_finished else hold)(session, job)
            row = find(session, ResponseRow, body["id"])
            assert row is not None, "deleting it ends its job"
            row.body, row.status = body, body["status"]
            _add_events(session, row.number, events)
            if is_finished:
                _add_item_ids(session, row)
                if addition is not None:
                    append_items(session, addition.conversation_id, addition.items)

    def append_events(self, response_id: str, job: Job, events: Sequence[Json]) -> None:
        """Add events to an unfinished response's stream.

        Raises:
            LeaseLostError: As `save` says.
        """
        with self._database.writing() as session:
            hold(session, job)
            number = session.scalars(
                select(ResponseRow.number).where(ResponseRow.id == response_id)
            ).one()
            _add_events(session, number, events)

    def cancel(self, response_id: str) -> StoredResponse | None:
        """Make an unfinished response cancelled, whoever works on it; return it as it is then."""
        with self._database.writing() as session:
            drop(session, response_id)
            row = find(session, ResponseRow, response_id, lock=True)
            if row is None:
                return None
            if row.status in UNFINISHED:
                row.status = "cancelled"
                row.body = {**row.body, "status": "cancelled"}
            return _stored(row)

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


def _add(session: Session, response: StoredResponse) -> int:
    """Add a row, and return its number."""
    row = ResponseRow(
        id=response.id,
        previous_id=response.body["previous_response_id"],
        status=response.body["status"],
        body=response.body,
        items=response.items,
        request=response.request,
        is_resumable=response.is_resumable,
        caller=response.caller,
        project=response.project,
    )
    session.add(row)
    session.flush()
    _add_item_ids(session, row)
    return row.number


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
    return StoredResponse(
        row.body, row.items, row.request, row.is_resumable, row.caller, row.project
    )
