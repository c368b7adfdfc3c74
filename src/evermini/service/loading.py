"""From a name to a model in memory: what every command that needs one goes through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike, fspath

from evermini.config import Settings
from evermini.errors import ConfigError, DownloadError
from evermini.models import catalogue, pull
from evermini.models.checkpoint import Checkpoint, open_checkpoint
from evermini.models.decoder import Decoder
from evermini.models.load import load_model
from evermini.models.native import NativeDecoder
from evermini.recall.load import Indexer
from evermini.text.tokenizer import Tokenizer

INDEX_TIERS = {"full": "mini"}
"""Tiers whose long prompts another one indexes unless the settings say otherwise (figures in docs/log.md)."""

UPSTREAM_INDEX = "mini"
"""Tier that indexes long prompts for upstream engines: nano finds less and reads no faster."""

OnFetch = Callable[[int, int, str], None]
"""Told how a fetch of weights goes: bytes done, bytes in total, where from."""


@dataclass(frozen=True)
class Loaded:
    """A model in memory.

    Attributes:
        entry: The tier under whose names it goes, if any.
        checkpoint: What it was loaded from.
        model: The model.
        tokenizer: Its tokenizer.
    """

    entry: catalogue.CatalogueEntry | None
    checkpoint: Checkpoint
    model: NativeDecoder | Decoder
    tokenizer: Tokenizer


def load_checkpoint(
    name_or_path: str | PathLike[str], settings: Settings, *, progress: OnFetch | None = None
) -> Loaded:
    """Fetch (if need be) and load a model.

    Args:
        name_or_path: Tier, alias or path of a checkpoint; ``mini=PATH`` is the checkpoint at PATH under the names
            of the tier mini.
        settings: Home folder, device, precision, threads.
        progress: Told how a fetch of the weights goes, as in `evermini.models.pull.ensure`.

    Raises:
        ModelNotFoundError: Nothing has that name.
        DownloadError: The weights could not be fetched.
        ModelError: The checkpoint cannot be used.
    """
    entry, _ = what_to_serve(fspath(name_or_path))
    checkpoint = open_model(name_or_path, settings, progress=progress)
    model = load_model(
        checkpoint,
        device=settings.device,
        precision=settings.precision,
        threads=settings.threads,
        home=settings.home,
    )
    return Loaded(entry, checkpoint, model, Tokenizer(checkpoint.tokenizer))


def open_model(
    name_or_path: str | PathLike[str], settings: Settings, *, progress: OnFetch | None = None
) -> Checkpoint:
    """Fetch (if need be) and open a checkpoint, whose weights stay on disk; as `load_checkpoint`."""
    _, source = what_to_serve(fspath(name_or_path))
    return open_checkpoint(
        pull.ensure(source, home=settings.home, progress=progress, weights_dir=settings.weights_dir)
    )


def load_indexer(
    answering: Loaded, settings: Settings, *, progress: OnFetch | None = None
) -> Indexer:
    """Fetch (if need be) and load the model that finds passages for another, by the setting ``recall_index``.

    Args:
        answering: The model that answers.
        settings: As for `load_checkpoint`.
        progress: As for `load_checkpoint`.

    Raises:
        DownloadError: Its weights could not be fetched.
        ModelNotFoundError: Nothing has that name.
        ModelError: The checkpoint cannot be used.
    """
    name = settings.recall_index
    if name == "auto":
        name = INDEX_TIERS.get(answering.entry.tier, "own") if answering.entry else "own"
    found = answering
    if name != "own":
        other = _load_index(name, settings, progress)
        if other.checkpoint.fingerprint != answering.checkpoint.fingerprint:
            found = other
    return Indexer(found.model, found.tokenizer, found.checkpoint.fingerprint)


def load_index(settings: Settings, *, progress: OnFetch | None = None) -> Loaded:
    """Fetch (if need be) and load the model that finds passages for an upstream engine, which cannot.

    Args:
        settings: As for `load_checkpoint`.
        progress: As for `load_checkpoint`.

    Raises:
        ConfigError: ``recall_index`` is ``own``.
        DownloadError: Its weights could not be fetched.
        ModelNotFoundError: Nothing has that name.
        ModelError: The checkpoint cannot be used.
    """
    name = settings.recall_index
    if name == "own":
        raise ConfigError(
            "recall_index = own: an upstream engine cannot find passages in long prompts. Set it to auto or to a tier, "
            "or switch recall off: the engine then refuses what is longer than its window.",
            param="recall_index",
        )
    return _load_index(UPSTREAM_INDEX if name == "auto" else name, settings, progress)


def _load_index(name: str, settings: Settings, progress: OnFetch | None) -> Loaded:
    try:
        return load_checkpoint(name, settings, progress=progress)
    except DownloadError as error:
        raise DownloadError(
            f"The model that finds passages in long prompts could not be fetched. {error.message} Or set "
            "recall_index to own: the answering model then finds them itself, more slowly. An upstream engine cannot: "
            "there, switch recall off.",
            param="recall_index",
        ) from error


def name_of_tier(tier: str, settings: Settings) -> str:
    """Return what to load for a tier: what the settings serve under its names, else its own weights."""
    for name in settings.models:
        entry, _ = what_to_serve(name)
        if entry is not None and entry.tier == tier:
            return name
    return tier


def what_to_serve(name: str) -> tuple[catalogue.CatalogueEntry | None, str]:
    """Return whose names a model is served under, and what it is loaded from.

    ``mini`` is the tier with its own weights, ``PATH`` a checkpoint under its own name, ``mini=PATH`` a checkpoint
    under the names of the tier.
    """
    tier, _, path = name.partition("=")
    if path and (entry := catalogue.find(tier)):
        return entry, path
    return catalogue.find(name), name
