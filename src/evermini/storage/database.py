"""The database: opened, brought up to date, and asked from threads.

    with Database.open(settings) as database:
        with database.writing() as session: ...          # commits at the end, or rolls back
        row = await database.run(store.get, "resp_...")  # off the event loop

SQLite by default, one file in Evermini's home folder: write-ahead log, foreign keys, a wait when another process
writes, and every commit flushed to the disk. PostgreSQL by URL, through psycopg 3. Several processes may share either.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

from sqlalchemy import URL, Engine, create_engine, event, func, make_url, select, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from evermini.config import Settings
from evermini.errors import (
    ConfigError,
    InsufficientStorageError,
    InvalidRequestError,
    StorageError,
)
from evermini.storage.migrate import migrate

P = ParamSpec("P")
T = TypeVar("T")

FILE_NAME = "evermini.db"
NUM_CONNECTIONS = 8
"""Threads that ask the database, each on a connection of its own."""
BUSY_SECONDS = 15.0
"""How long to wait for another process that writes, before giving up."""


class Database:
    """Connections to one database, whose tables are up to date. Closing it closes them.

    Args:
        url: SQLAlchemy's URL.

    Raises:
        StorageError: It cannot be reached, or a newer version of Evermini has written it.
    """

    def __init__(self, url: URL) -> None:
        self.url = url
        self._engine = _engine(url)
        # For SQLite: a transaction that will write says so when it begins, and waits for its turn there. One that
        # found out half way would fail at once when another has written in the meantime.
        self._writing = self._engine.execution_options(evermini_writes=True)
        self._pool = ThreadPoolExecutor(NUM_CONNECTIONS, "evermini-database")
        try:
            with _translated():
                migrate(self._engine)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):  # of its lock, or the copy made before an upgrade
                raise StorageError(
                    f"The database cannot be opened: {error.filename}: {error.strerror}. Set EVERMINI_HOME, or "
                    "database_url, to a folder that can be written."
                ) from error
            raise

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """Open the database that the settings name, and bring its tables up to date.

        Raises:
            ConfigError: ``database_url`` is none that can be used.
            StorageError: As the class says.
        """
        return cls(database_url(settings))

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Give a session that sees one state of the database and changes nothing."""
        with _translated(), Session(self._engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """Give a session whose changes are on the disk when the block ends, all of them or, on an error, none.

        Raises:
            StorageError: They cannot be stored, or (``may_be_stored``) nobody can tell.
        """
        is_committing = False
        try:
            with _translated(), Session(self._writing, expire_on_commit=False) as session:
                yield session
                session.flush()
                is_committing = True
                session.commit()
        except StorageError as error:
            error.may_be_stored = is_committing and not isinstance(error, InsufficientStorageError)
            raise

    def ping(self) -> None:
        """Write something to the disk that changes nothing: a full one, or one that is locked, still lets read.

        Raises:
            StorageError: It cannot be written.
        """
        with self.writing() as session:
            if self.url.drivername == "sqlite":
                version = session.execute(text("PRAGMA user_version")).scalar_one()
                session.execute(text(f"PRAGMA user_version = {int(version)}"))
            else:
                session.execute(select(func.pg_current_xact_id()))

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return ``work(...)``, done in one of the database's threads. Cancelled, it is done nevertheless."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, partial(work, *args, **kwargs))

    def close(self) -> None:
        """Wait for what runs, then close the connections."""
        self._pool.shutdown()
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def clock(session: Session) -> float:
    """Return the Unix time that all processes of a database share: PostgreSQL's, or this machine's."""
    if session.get_bind().dialect.name == "sqlite":
        return time.time()
    return float(
        session.execute(select(func.extract("epoch", func.clock_timestamp()))).scalar_one()
    )


def database_url(settings: Settings) -> URL:
    """Return the URL of the database that the settings name.

    Raises:
        ConfigError: It is malformed, or of a kind that is not supported.
    """
    if settings.database_url is None:
        return URL.create("sqlite", database=str(settings.home.absolute() / FILE_NAME))
    try:
        url = make_url(settings.database_url)
    except ArgumentError:
        raise _unusable("it cannot be read as a URL") from None
    match url.drivername:
        case "sqlite":
            if not url.database or url.database == ":memory:" or url.query:
                raise _unusable("it names no file")
            return url.set(database=str(Path(url.database).expanduser().absolute()))
        case "postgresql" | "postgres" | "postgresql+psycopg":
            return url.set(drivername="postgresql+psycopg")
        case other:
            raise _unusable(f"{other} databases are not supported")


def _unusable(reason: str) -> ConfigError:
    return ConfigError(
        f"database_url cannot be used: {reason}. Give postgresql://USER:PASSWORD@HOST/NAME or sqlite:////PATH, or "
        f"leave it out for {FILE_NAME} in the home folder.",
        param="database_url",
    )


def _engine(url: URL) -> Engine:
    options: dict[str, Any] = {
        "pool_size": NUM_CONNECTIONS,
        "max_overflow": 2,  # migrations hold a lock on one connection and work on another
        "json_serializer": partial(json.dumps, ensure_ascii=False, separators=(",", ":")),
    }
    if url.drivername == "sqlite":
        assert url.database
        folder = Path(url.database).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"The database's folder {folder} cannot be made: {error.strerror}. Set EVERMINI_HOME, or database_url, "
                "to a folder that can be written."
            ) from error
        engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS}, **options)
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    # Whoever holds a lock, and a server that is not there any more, are waited for as long as a locked SQLite file.
    arguments: dict[str, Any] = {
        "connect_timeout": max(1, round(BUSY_SECONDS)),
        "tcp_user_timeout": round(1000 * BUSY_SECONDS),
    }
    if "options" not in url.query:
        arguments["options"] = f"-c lock_timeout={round(1000 * BUSY_SECONDS)}"
    try:
        return create_engine(url, pool_pre_ping=True, connect_args=arguments, **options)
    except ModuleNotFoundError:
        raise ConfigError(
            "database_url names a PostgreSQL database, but psycopg is not installed. Install it with "
            "`pip install 'evermini[postgres]'`.",
            param="database_url",
        ) from None


def _set_up_sqlite(connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # transactions begin where we say, in `_begin_sqlite`
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # a commit survives a power cut
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: Any) -> None:
    writes = connection.get_execution_options().get("evermini_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def _translated() -> Iterator[None]:
    """Turn the driver's errors into ours; what is a bug of ours (a broken constraint, wrong SQL) stays as it is."""
    try:
        yield
    except DataError as error:  # PostgreSQL stores no NUL characters
        raise InvalidRequestError(
            "Invalid value: a string in this request has a character that the database cannot store. Leave out NUL "
            "characters (\\u0000).",
            code="invalid_value",
        ) from error
    except (OperationalError, InterfaceError, PoolTimeoutError) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        if _is_full(cause):
            raise InsufficientStorageError(
                "The disk of the server's database is full, so nothing was stored. Its operator has to make room; then "
                "send the request again."
            ) from error
        raise StorageError(f"The database cannot be used at the moment: {cause}") from error


def _is_full(cause: BaseException | None) -> bool:
    is_sqlites = getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return is_sqlites or getattr(cause, "sqlstate", None) == "53100"  # PostgreSQL's "disk full"
