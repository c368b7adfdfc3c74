"""Run by Alembic; the connection comes from `evermini.storage.migrate`."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from evermini.storage.schema import Base

connection: Connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,  # gives constraints their names
    transactional_ddl=True,  # SQLite, too, takes back changes of tables: all revisions are applied, or none
)
with context.begin_transaction():
    context.run_migrations()
