"""``evermini calibrate`` and ``ingest``: long contexts, indexed once and kept on disk."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from evermini.cli.files import ExcludeFlag, collect_documents, piped_input
from evermini.cli.options import with_settings
from evermini.config import LoadedSettings, Settings

if TYPE_CHECKING:
    from evermini.recall.load import Indexer
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
    from evermini.cli.reading import reading_bar
    from evermini.recall.calibrate import calibrate as measure
    from evermini.recall.calibrate import default_prefix
    from evermini.recall.calibration import find_calibration, save_calibration

    index = _load(loaded.settings)
    weights, tokenizer = index.checkpoint.fingerprint, index.tokenizer
    home = loaded.settings.home
    found = None if again else find_calibration(home, weights)
    if found is None:
        with reading_bar() as progress:
            prefix = default_prefix(tokenizer)
            found = measure(index.model, tokenizer, weights, prefix=prefix, progress=progress)
        print(f"kept in {save_calibration(home, found)}", file=sys.stderr)
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
        list[str],
        typer.Argument(
            metavar="PATH",
            help="Files (text, PDF, DOCX, PPTX), folders and quoted globs; - is piped input.",
        ),
    ],
    exclude: ExcludeFlag = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Name every file that was skipped.")
    ] = False,
) -> None:
    """Read long texts once and keep their index on disk, so that later questions to them start at once.

    Interrupted, it goes on where it stopped. What is known already costs nothing: of a folder in which one file
    changed, that file is read again.
    """
    from evermini.cli.reading import reading_bar
    from evermini.recall.segment import cut

    documents = collect_documents(
        paths, piped_input(), exclude, settings=loaded.settings, verbose=verbose
    )
    segments = [segment for item in documents for segment in cut(item.text, item.name)]
    indexer, settings = _indexer(loaded.settings), loaded.settings
    with reading_bar() as progress:
        recall = indexer.open(settings.home, max_bytes=settings.recall_disk, progress=progress)
        done = recall.ingest(segments, progress=progress)
    what = documents[0].name if len(documents) == 1 else f"{len(documents):,} files"
    print(
        f"{what}: {done.num_tokens:,} tokens, {done.num_new_tokens:,} of them new, {done.seconds:.1f} s"
    )


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
