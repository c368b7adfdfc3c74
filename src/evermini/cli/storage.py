"""``evermini gc``: stored files that nothing refers to any more."""

from __future__ import annotations

from typing import Annotated

import typer

from evermini.cli.options import with_settings
from evermini.config import LoadedSettings


@with_settings("home", "database_url", "blob_url")
def gc(
    loaded: LoadedSettings,
    grace: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="Leave bytes alone that are younger: they may belong to a file that is being sent right now.",
        ),
    ] = 86_400,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be deleted.")
    ] = False,
) -> None:
    """Delete expired files, and bytes that a crash left behind without a file."""
    import time

    from evermini.service.adapters import AdapterStore
    from evermini.storage.blobs import BlobStore
    from evermini.storage.database import Database
    from evermini.storage.files import FileStore

    with Database.open(loaded.settings) as database:
        files, blobs = FileStore(database), BlobStore.open(loaded.settings)
        adapters = AdapterStore(database, blobs, loaded.settings.home)
        if not dry_run:
            expired = files.delete_expired(time.time())
            blobs.delete(expired)
            print(f"{len(expired)} blobs of expired files deleted")
            adapters.delete_copies()
        orphans = blobs.orphans(
            lambda names: files.used_blobs(names) | adapters.used_blobs(names), grace
        )
        if not dry_run:
            blobs.delete(orphans)
        print(f"{len(orphans)} orphaned blobs {'found' if dry_run else 'deleted'}")
