"""Brings a database's tables up to date, forwards only. Alembic's revisions lie in `migrations/versions`.

A new revision: change the models, then write the next file there; `tests/unit/test_storage.py` compares the two.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from filelock import FileLock
from sqlalchemy import Engine, text

from evermini.errors import StorageError

log = logging.getLogger(__name__)

SCRIPTS = Path(__file__).with_name("migrations")
_LOCK_NUMBER = 0x65766572  # "ever": PostgreSQL's advisory locks have numbers


def migrate(engine: Engine, scripts: Path = SCRIPTS) -> None:
    """Apply the revisions that the database lacks. Safe while other processes do the same.

    An SQLite file that holds something is copied to ``NAME.before-REVISION`` first.

    Raises:
        StorageError: The database has a revision that this version of Evermini does not know.
    """
    config = Config()
    config.set_main_option("script_location", str(scripts).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    directory = ScriptDirectory.from_config(config)
    newest = directory.get_current_head()
    with _alone(engine):
        with engine.connect() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
        known = {revision.revision for revision in directory.walk_revisions()}
        if current is not None and current not in known:
            raise StorageError(
                f"The database {engine.url.render_as_string()} was written by a newer version of Evermini: its "
                f"revision is {current}, and this version knows those up to {newest}. Upgrade Evermini, or name "
                "another database with database_url."
            )
        if current == newest:
            return
        if current is not None and engine.dialect.name == "sqlite":
            _back_up(engine, f"before-{newest}")
        with engine.execution_options(evermini_writes=True).connect() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    log.info("database %s: revision %s, was %s", engine.url.render_as_string(), newest, current)


@contextmanager
def _alone(engine: Engine) -> Iterator[None]:
    """Keep other processes from migrating the same database."""
    if engine.dialect.name == "sqlite":
        with FileLock(f"{engine.url.database}.lock"):
            yield
        return
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("SET lock_timeout = 0"))  # others' migrations may take their time
        connection.execute(text("SELECT pg_advisory_lock(:number)"), {"number": _LOCK_NUMBER})
        try:
            yield
        finally:
            connection.execute(text("SELECT pg_advisory_unlock(:number)"), {"number": _LOCK_NUMBER})
            connection.execute(text("RESET lock_timeout"))


def _back_up(engine: Engine, suffix: str) -> None:
    """Copy an SQLite database with SQLite's own means, which see what is only in the write-ahead log."""
    path = f"{engine.url.database}.{suffix}"
    partial = f"{path}.part"
    with (
        closing(sqlite3.connect(str(engine.url.database))) as source,
        closing(sqlite3.connect(partial)) as copy,
    ):
        source.backup(copy)
    Path(partial).replace(path)
    log.info("database: copied to %s", path)
