"""``evermini calibrate``, ``ingest`` and ``contexts``: long contexts, indexed once and kept on disk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evermini.cli.options import with_settings
from evermini.config import LoadedSettings, Settings

if TYPE_CHECKING:
    from evermini.recall.load import Indexer
    from evermini.recall.store import SegmentInfo, SegmentStore
    from evermini.service.loading import Loaded

_MODEL = ("model", "home", "weights_dir", "device", "precision", "threads")


@with_settings(*_MODEL)
def calibrate(
    loaded: LoadedSettings,
    again: Annotated[bool, typer.Option("--again", help="Measure even what is known.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole result.")] = False,
) -> None:
    """Find out which attention heads of the model look up facts; recall asks them where to read.

    Known for the models of the catalogue; another one is measured on first use, in a minute or more.
    """
    from evermini.recall.calibrate import calibrate as measure
    from evermini.recall.calibrate import default_prefix
    from evermini.recall.calibration import find_calibration, save_calibration

    index = _load(loaded.settings)
    weights, tokenizer = index.checkpoint.fingerprint, index.tokenizer
    home = loaded.settings.home
    found = None if again else find_calibration(home, weights)
    if found is None:
        found = measure(
            index.model, tokenizer, weights, prefix=default_prefix(tokenizer), progress=_say
        )
        _say(f"kept in {save_calibration(home, found)}")
    if as_json:
        print(found.to_json(), end="")
        return
    print("last layer  cost  recall@4    mrr  heads (layer, head)")
    for point in found.measured["curve"]:
        mark = "*" if point["last_layer"] == found.measured["chosen"]["last_layer"] else " "
        heads = " ".join(f"({layer},{head})" for layer, head in point["heads"])
        print(
            f"{mark} {point['last_layer']:8}  {point['cost']:4.0%}  {point['recall_at_4']:8.0%}  "
            f"{point['mrr']:5.2f}  {heads}"
        )
    print("* is used. Cost: share of the model's layers that reading a text takes.")


@with_settings(*_MODEL, "recall_index", "recall_disk")
def ingest(
    loaded: LoadedSettings,
    paths: Annotated[
        list[str], typer.Argument(metavar="FILE", help="Text files; - is standard input.")
    ],
) -> None:
    """Read long texts once and keep their index on disk, so that later questions to them start at once.

    Interrupted, it goes on where it stopped. What is known already costs nothing.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from evermini.recall.segment import cut

    texts = [(path, _read(path)) for path in paths]
    recall = _indexer(loaded.settings).open(
        loaded.settings.home, max_bytes=loaded.settings.recall_disk, progress=_say
    )
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn(),
        console=Console(stderr=True),
    )  # fmt: skip
    for path, text in texts:
        with bar:
            task = bar.add_task(path, total=None, speed="")
            done = recall.ingest(
                cut(text, path),
                progress=lambda p, task=task: bar.update(  # type: ignore[misc]
                    task, total=p.total_tokens, completed=p.done_tokens,
                    speed=f"{p.done_tokens:,} of {p.total_tokens:,} tokens, {p.tokens_per_second:,.0f}/s",
                ),
            )  # fmt: skip
            bar.remove_task(task)
        print(
            f"{path}: {done.num_tokens:,} tokens, {done.num_new_tokens:,} of them new, {done.seconds:.1f} s"
        )


contexts = typer.Typer(help="Look after the texts that were ingested.", no_args_is_help=True)


@contexts.command()
@with_settings("home")
def ls(loaded: LoadedSettings) -> None:
    """List what was ingested, the most recently used first."""
    from datetime import datetime

    from rich.filesize import decimal

    for info in _all(loaded.settings):
        used = datetime.fromtimestamp(info.last_used).strftime("%Y-%m-%d %H:%M")
        size = decimal(info.num_bytes)
        print(
            f"{info.digest[:12]}  {info.num_tokens:>9,} tokens  {size:>9}  {used}  {info.preview[:60]}"
        )


@contexts.command()
@with_settings("home")
def show(
    loaded: LoadedSettings,
    digest: Annotated[str, typer.Argument(help="As `ls` prints it, or more of it.")],
) -> None:
    """Show one text's index."""
    for store, info in _matching(loaded.settings, digest):
        segment = store.open(info.digest)
        print(
            f"digest      {info.digest}\nindex       {info.fingerprint}\ntokens      {info.num_tokens:,}"
        )
        print(f"bytes       {info.num_bytes:,}\nbegins      {info.preview}")
        if segment is not None:
            print(f"chunks      {segment.chunks_done()} of {segment.num_chunks} done")


@contexts.command()
@with_settings("home")
def rm(
    loaded: LoadedSettings,
    digests: Annotated[
        list[str], typer.Argument(metavar="DIGEST", help="As `ls` prints them; `all` for all.")
    ],
) -> None:
    """Delete texts' indexes from the disk."""
    from evermini.errors import OverloadedError

    for digest in digests:
        for store, info in _matching(loaded.settings, digest):
            if not store.remove(info.fingerprint, info.digest):
                raise OverloadedError(
                    f"{info.digest[:12]} is being ingested right now. Try again later."
                )
            print(f"{info.digest[:12]} deleted")


@contexts.command()
@with_settings("home")
def verify(loaded: LoadedSettings) -> None:
    """Read everything and name what is damaged; its next use computes that part again."""
    from evermini.recall.store import all_stores

    damage = [item for store in all_stores(loaded.settings.home) for item in store.verify()]
    for item in damage:
        print(item)
    print(f"{len(_all(loaded.settings))} checked, {len(damage)} damaged parts")
    if damage:
        raise typer.Exit(1)


def _all(settings: Settings) -> list[SegmentInfo]:
    from evermini.recall.store import all_stores

    stores = all_stores(settings.home)
    return stores[0].list_all() if stores else []


def _matching(settings: Settings, digest: str) -> list[tuple[SegmentStore, SegmentInfo]]:
    from evermini.errors import NotFoundError
    from evermini.recall.store import all_stores

    stores = {store.calibration.fingerprint: store for store in all_stores(settings.home)}
    found = [info for info in _all(settings) if digest == "all" or info.digest.startswith(digest)]
    if not found and digest != "all":
        raise NotFoundError(f"No ingested text {digest!r}. See `evermini contexts ls`.")
    return [(stores[info.fingerprint], info) for info in found]


def _load(settings: Settings) -> Loaded:
    from evermini.cli.pull import download_bar
    from evermini.service.loading import load_checkpoint

    with download_bar(settings.model) as progress:
        return load_checkpoint(settings.models[0], settings, progress=progress)


def _indexer(settings: Settings) -> Indexer:
    from evermini.cli.pull import download_bar
    from evermini.service.loading import load_indexer

    answering = _load(settings)
    with download_bar(settings.recall_index) as progress:
        return load_indexer(answering, settings, progress=progress)


def _read(path: str) -> str:
    from evermini.errors import InvalidRequestError

    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise InvalidRequestError(
            f"{path} cannot be read: {error.strerror}. Name text files."
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"{path} is not UTF-8 text ({error.reason}). Convert it first."
        ) from error


def _say(message: str) -> None:
    print(message, file=sys.stderr)
