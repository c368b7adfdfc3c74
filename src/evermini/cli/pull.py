"""``evermini pull``, ``models`` and ``rm``: fetch, list and delete the weights of the tiers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evermini.cli.options import with_settings
from evermini.config import LoadedSettings

if TYPE_CHECKING:
    from evermini.models.catalogue import CatalogueEntry
    from evermini.models.store import ModelStore


@contextlib.contextmanager
def download_bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yield a progress callback for `evermini.models.pull.ensure`; the first progress draws a bar on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    bars: dict[str, Any] = {}

    def report(done: int, total: int, source: str) -> None:
        if source not in bars:
            for other in bars.values():  # the source before this one failed
                progress.update(other, visible=False)
            progress.start()
            bars[source] = progress.add_task(f"{title} from {source}", total=total, completed=done)
            progress.reset(bars[source], total=total, completed=done)
        progress.update(bars[source], total=total, completed=done)

    try:
        yield report
    finally:
        if bars:  # else stopping would print an empty line
            progress.stop()


@with_settings("home", "weights_dir")
def pull(
    loaded: LoadedSettings,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="TIER", help="Tiers or aliases.", show_default="the default model"),
    ] = None,
) -> None:
    """Fetch the weights of a tier, verify them, and print where they are.

    Does nothing if they are there. An interrupted download goes on where it stopped.
    """
    from evermini.models.pull import ensure

    settings = loaded.settings
    for name in names or settings.models:
        with download_bar(name) as progress:
            path = ensure(
                name, home=settings.home, progress=progress, weights_dir=settings.weights_dir
            )
        print(path)


@with_settings("home")
def models(
    loaded: LoadedSettings,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the tiers, the names they answer to, their weights, and what is on disk."""
    from evermini.models.catalogue import CATALOGUE
    from evermini.models.store import ModelStore

    store = ModelStore(loaded.settings.home)
    if as_json:
        import json

        print(json.dumps([_describe(entry, store) for entry in CATALOGUE], indent=2))
        return
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    table = Table(
        "tier", "also called", "weights", "size", "licence", "window", "on disk", box=None
    )
    for entry in CATALOGUE:
        row = _describe(entry, store)
        here = "yes" if row["cached"] else "no"
        if row["partial_bytes"]:
            here += f" ({decimal(row['partial_bytes'])} begun)"
        table.add_row(
            entry.tier,
            "\n".join(entry.aliases),
            f"{entry.model}\n{entry.quantisation}",
            decimal(entry.size),
            entry.licence,
            f"{entry.native_window:,}",
            here,
        )
    console = Console(width=140)  # names are for copying, so none is cut to the terminal's width
    console.print(table)
    console.print(f"\nkept in {store.root}", soft_wrap=True, highlight=False)


@with_settings("home")
def rm(
    loaded: LoadedSettings,
    names: Annotated[list[str], typer.Argument(metavar="TIER", help="Tiers or aliases.")],
) -> None:
    """Delete the weights of a tier from the disk."""
    from rich.filesize import decimal

    from evermini.errors import ModelNotFoundError
    from evermini.models.catalogue import find, known_names
    from evermini.models.store import ModelStore

    entries = {name: find(name) for name in names}
    for name, entry in entries.items():
        if entry is None:  # before anything is deleted
            raise ModelNotFoundError(f"No tier {name!r}. Known names: {', '.join(known_names())}.")
    store = ModelStore(loaded.settings.home)
    for entry in entries.values():
        assert entry is not None
        freed = store.remove(entry)
        print(f"{entry.tier}: {decimal(freed)} freed" if freed else f"{entry.tier}: not on disk")


def _describe(entry: CatalogueEntry, store: ModelStore) -> dict[str, Any]:
    path = store.path(entry)
    cached = path.is_file() and path.stat().st_size == entry.size
    return {
        "tier": entry.tier,
        "aliases": list(entry.aliases),
        "model": entry.model,
        "quantisation": entry.quantisation,
        "size": entry.size,
        "sha256": entry.sha256,
        "licence": entry.licence,
        "native_window": entry.native_window,
        "cached": cached,
        "path": str(path) if cached else None,
        "partial_bytes": store.partial_bytes(entry),
    }
