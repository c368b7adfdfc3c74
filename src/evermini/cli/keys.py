"""``evermini keys``: create, list and revoke API keys, and what was done to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from evermini.cli.options import with_settings
from evermini.config import LoadedSettings
from evermini.errors import NotFoundError

if TYPE_CHECKING:
    from evermini.storage.keys import ApiKey

keys = typer.Typer(help="Look after API keys.", no_args_is_help=True)

_DAY = 86_400


@keys.command()
@with_settings("home", "database_url")
def create(
    loaded: LoadedSettings,
    name: Annotated[str, typer.Argument(help="What or whom the key is for.")],
    project: Annotated[
        str,
        typer.Option(
            help="Whose files, batches and so on it sees, and what its tokens are counted for."
        ),
    ] = "default",
    scopes: Annotated[
        list[str] | None,
        typer.Option(
            "--scope",
            help="inference (models), files (files, batches, training) or admin (everybody's usage); may be repeated.",
            show_default="inference and files",
        ),
    ] = None,
    days: Annotated[
        int | None, typer.Option(min=1, help="Days until it expires.", show_default="never")
    ] = None,
    requests_per_minute: Annotated[
        int | None,
        typer.Option(min=1, help="Limit; with SQLite, per server process.", show_default="none"),
    ] = None,
    tokens_per_minute: Annotated[
        int | None,
        typer.Option(min=1, help="Limit; with SQLite, per server process.", show_default="none"),
    ] = None,
    monthly_budget: Annotated[
        float | None,
        typer.Option(min=0, help="US dollars a month, by the list prices.", show_default="none"),
    ] = None,
) -> None:
    """Create a key and print it, this once: only its hash is stored.

    From the first key on, servers on this database ask for one; running ones within ten seconds.
    """
    import time

    from evermini.service.access import DEFAULT_SCOPES, new_key
    from evermini.storage.database import Database
    from evermini.storage.keys import KeyStore

    secret, key = new_key(
        name,
        project=project,
        scopes=scopes or DEFAULT_SCOPES,
        expires_at=None if days is None else int(time.time()) + days * _DAY,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        monthly_budget=monthly_budget,
    )
    with Database.open(loaded.settings) as database:
        KeyStore(database).add(key)
    typer.echo(f"{key.id} ({name}). Keep the key; it is not shown again:", err=True)
    print(secret)


@keys.command()
@with_settings("home", "database_url")
def ls(loaded: LoadedSettings) -> None:
    """List the keys, the oldest first."""
    from evermini.storage.database import Database
    from evermini.storage.keys import KeyStore

    with Database.open(loaded.settings) as database:
        found = KeyStore(database).list()
    if not found:
        typer.echo(
            "There are no keys in the database. `evermini keys create NAME` makes one.", err=True
        )
    for key in found:
        print(_line(key))


@keys.command()
@with_settings("home", "database_url")
def revoke(
    loaded: LoadedSettings,
    key_ids: Annotated[
        list[str], typer.Argument(metavar="KEY_ID", help="As `ls` prints it: key_...")
    ],
) -> None:
    """Refuse keys from now on; running servers notice within ten seconds."""
    import time

    from evermini.storage.database import Database
    from evermini.storage.keys import KeyStore

    with Database.open(loaded.settings) as database:
        for key_id in key_ids:
            if KeyStore(database).revoke(key_id, int(time.time())) is None:
                raise NotFoundError(f"There is no key {key_id}. See `evermini keys ls`.")
            print(f"{key_id} revoked")


@keys.command()
@with_settings("home", "database_url")
def log(
    loaded: LoadedSettings,
    limit: Annotated[int, typer.Option(min=1, help="Lines to print.")] = 50,
) -> None:
    """Print what was done to keys, the newest first."""
    from datetime import datetime

    from evermini.storage.database import Database
    from evermini.storage.keys import KeyStore

    with Database.open(loaded.settings) as database:
        for entry in KeyStore(database).audit_log(limit):
            at = datetime.fromtimestamp(entry.at).strftime("%Y-%m-%d %H:%M:%S")
            details = " ".join(f"{name}={value}" for name, value in entry.details.items())
            print(f"{at}  {entry.action:<12}  {entry.subject}  {details}")


def _line(key: ApiKey) -> str:
    import time
    from datetime import datetime

    state = "valid"
    if key.revoked_at is not None:
        state = "revoked"
    elif not key.is_valid(time.time()):
        state = "expired"
    elif key.expires_at is not None:
        state = f"until {datetime.fromtimestamp(key.expires_at):%Y-%m-%d}"
    limits = [
        f"{limit:g} {what}"
        for limit, what in (
            (key.requests_per_minute, "requests/min"),
            (key.tokens_per_minute, "tokens/min"),
            (key.monthly_budget, "USD/month"),
        )
        if limit is not None
    ]
    return "  ".join(
        [key.id, key.shown, f"{state:<16}", key.project, ",".join(key.scopes), *limits, key.name]
    )
