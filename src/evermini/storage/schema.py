"""What all tables have in common: their base class, column types, and pages of a listing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from sqlalchemy import JSON, BigInteger, Integer, MetaData, Select, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session

if TYPE_CHECKING:
    from evermini.storage.database import Database

Json = dict[str, Any]
Order = Literal["asc", "desc"]
Scope = Literal["inference", "files", "admin"]
"""What a key may be good for: models; files, batches and training; everybody's usage and costs, and who may use
which model."""
T = TypeVar("T")
ListedT = TypeVar("ListedT", bound="Listed")
OwnedT = TypeVar("OwnedT", bound="Owned")

Number = BigInteger().with_variant(Integer, "sqlite")
"""A table's own ascending key, in order of insertion. Clients see string ids; pages and foreign keys use this one.

SQLite only counts up a column whose type is INTEGER, which has 64 bits there.
"""


class Base(DeclarativeBase):
    """Base of all tables. Constraints have predictable names, so that later migrations can find them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {Json: JSON, list[Json]: JSON}  # noqa: RUF012  (declared by SQLAlchemy)


class Shown:
    """Of a table whose ``body`` is what clients see; ``status`` is a column of its own, to be looked for."""

    if TYPE_CHECKING:
        body: Mapped[Json]
        status: Mapped[str]

    def show(self, **values: object) -> None:
        """Change what clients see; a new object, since SQLAlchemy does not look inside."""
        self.body = {**self.body, **values}
        self.status = self.body["status"]


class Listed:
    """Of a table whose rows clients know by their ids, and read in pages."""

    if TYPE_CHECKING:
        number: Mapped[int]
        id: Mapped[str]


class Owned(Listed):
    """Of one whose rows belong each to the project of the key that it was made with."""

    if TYPE_CHECKING:
        project: Mapped[str]


class ProjectStore:
    """Reads and writes what belongs to projects.

    Args:
        database: Where it is.
        project: Whose rows are found; ``None``: everybody's.
    """

    def __init__(self, database: Database, project: str | None = None) -> None:
        self._database, self._project = database, project


@dataclass(frozen=True)
class StoredObject:
    """What clients see as one object, which says its id and status itself."""

    body: Json

    @property
    def id(self) -> str:
        """Its id."""
        return str(self.body["id"])

    @property
    def status(self) -> str:
        """Its status."""
        return str(self.body["status"])


def owned(rows: type[OwnedT], project: str | None) -> Select[OwnedT]:
    """Return the query of what belongs to a project; ``None``: to any."""
    query = select(rows)
    return query if project is None else query.where(rows.project == project)


def find(
    session: Session,
    rows: type[OwnedT],
    object_id: str,
    project: str | None = None,
    *,
    lock: bool = False,
) -> OwnedT | None:
    """Return the row of an id if it belongs to the project.

    Args:
        session: Where to ask.
        rows: The table.
        object_id: The id.
        project: Whose it must be; ``None``: anybody's.
        lock: Keep it from others until the transaction ends.
    """
    query = owned(rows, project).where(rows.id == object_id)
    return session.scalar(query.with_for_update() if lock else query)


@dataclass(frozen=True)
class Page(Generic[T]):
    """Some rows of a listing, and whether there are more behind them."""

    rows: Sequence[T]
    has_more: bool


@dataclass(frozen=True)
class Cursor:
    """Which page of a listing: at most ``limit`` rows that come after the one with the id ``after``."""

    after: str | None = None
    limit: int = 20
    order: Order = "asc"


def page(
    session: Session,
    rows: type[ListedT],
    query: Select[ListedT],
    cursor: Cursor,
    stored: Callable[[ListedT], T],
    *,
    among: Select[ListedT] | None = None,
) -> Page[T] | None:
    """Return a page of ``query``, in order of insertion; ``None`` if there is no row ``cursor.after``.

    Args:
        session: Where to ask.
        rows: The table.
        query: Its rows to choose from.
        cursor: Which page.
        stored: Makes of a row what the page has.
        among: Where ``cursor.after`` is looked for, if ``query`` is a choice of those; default: in ``query``.
    """
    rest = behind(session, rows, query, cursor, among=among)
    if rest is None:
        return None
    found = session.scalars(rest.limit(cursor.limit + 1)).all()
    return Page([stored(row) for row in found[: cursor.limit]], len(found) > cursor.limit)


def behind(
    session: Session,
    rows: type[ListedT],
    query: Select[ListedT],
    cursor: Cursor,
    *,
    among: Select[ListedT] | None = None,
) -> Select[ListedT] | None:
    """Return the query of all that comes after ``cursor.after``, of any length; the rest as for `page`."""
    ascending = cursor.order == "asc"
    if cursor.after is not None:
        known = query if among is None else among
        named = known.where(rows.id == cursor.after).with_only_columns(rows.number)
        after = session.scalar(named)
        if after is None:
            return None
        query = query.where(rows.number > after if ascending else rows.number < after)
    return query.order_by(rows.number.asc() if ascending else rows.number.desc())
