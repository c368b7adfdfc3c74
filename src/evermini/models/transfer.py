"""One file over HTTP(S), resumed where it stopped.

What has arrived stays in the target file, whatever ends the transfer (a dropped connection, Ctrl-C, ``kill -9``); the
next call asks for the rest with a Range request. The hash is taken from the disk at the end, so it covers earlier runs.
"""

from __future__ import annotations

import logging
import shutil
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from evermini.errors import ChecksumMismatchError, SourceUnreachableError
from evermini.models.store import sha256_file

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10.0
READ_TIMEOUT = 30.0
MAX_STALLS = 5
"""Attempts in a row that may bring no new byte before the source is given up."""
_TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


class _TryAgainError(Exception):
    """This attempt failed in a way that another one may not."""


def shown(url: str) -> str:
    """Return a URL for messages: without credentials and without a signed query."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{host}{port}{parts.path}"


def explain(error: BaseException) -> str:
    """Return the cause of a failed request in words; httpx leaves some messages empty."""
    text = str(error) or type(error).__name__
    if isinstance(error, httpx.ConnectTimeout):
        return "no connection within the time limit"
    if isinstance(error, httpx.ReadTimeout):
        return "no answer within the time limit"
    return text


def download(
    client: httpx.Client,
    url: str,
    target: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Fetch ``url`` into ``target``, continuing a partial ``target``, and check it.

    Args:
        client: Follows redirects; its timeouts apply.
        url: ``http``, ``https`` or ``file``.
        target: Receives the bytes; complete and checked on return, partial after an error other than a mismatch.
        size: Expected bytes, if known.
        sha256: Expected hash, if known.
        on_progress: Called with the bytes that ``target`` holds.
        pause: Sleeps between attempts.

    Raises:
        SourceUnreachableError: The source does not answer, or does not have the file.
        ChecksumMismatchError: The bytes are other ones; ``target`` is deleted.
    """
    resumed = target.exists() and target.stat().st_size > 0
    while True:
        _receive_all(client, url, target, size, on_progress, pause)
        fault = _fault(target, size, sha256)
        if fault is None:
            return
        target.unlink()
        if not resumed:
            raise ChecksumMismatchError(f"{shown(url)} has other bytes than expected: {fault}")
        # The part kept from an earlier run may be what is wrong: fetch all of it once.
        logger.warning("Resumed download of %s is damaged (%s); starting over.", shown(url), fault)
        resumed = False


def _receive_all(
    client: httpx.Client,
    url: str,
    target: Path,
    size: int | None,
    on_progress: Callable[[int], None],
    pause: Callable[[float], None],
) -> None:
    stalls = 0
    while True:
        start = _length(target)
        if size is not None and start == size:
            on_progress(size)
            return
        if size is not None and start > size:
            target.unlink()
            start = 0
        try:
            if urlsplit(url).scheme == "file":
                _copy(url, target)
            else:
                _receive(client, url, target, start, on_progress)
            return
        except (_TryAgainError, httpx.TransportError) as error:
            grew = _length(target) > start
            stalls = 0 if grew else stalls + 1
            never_connected = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            if stalls >= MAX_STALLS or (never_connected and start == 0):
                raise SourceUnreachableError(f"{shown(url)}: {explain(error)}") from error
            logger.info("%s: %s; resuming at byte %d.", shown(url), explain(error), _length(target))
            pause(min(0.25 * 2**stalls, 8.0))


def _receive(
    client: httpx.Client,
    url: str,
    target: Path,
    start: int,
    on_progress: Callable[[int], None],
) -> None:
    # Ranges count the bytes as stored, so they must not be compressed on the way.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with client.stream("GET", url, headers=headers) as response:
        status = response.status_code
        if status == 416:  # what we hold is no prefix of what they have
            target.unlink()
            raise _TryAgainError("the server has fewer bytes than were received")
        if status in _TRY_AGAIN:
            raise _TryAgainError(f"HTTP {status} {response.reason_phrase}")
        if status not in (200, 206):
            raise SourceUnreachableError(f"{shown(url)}: HTTP {status} {response.reason_phrase}")
        if status == 206 and start:
            answered = response.headers.get("content-range", "")
            if not answered.startswith(f"bytes {start}-"):
                raise SourceUnreachableError(
                    f"{shown(url)}: asked for bytes from {start}, got {answered!r}"
                )
        done = start if status == 206 else 0
        with target.open("ab" if done else "wb") as file:
            on_progress(done)
            for chunk in response.iter_raw():  # as it arrives, so that a drop loses nothing
                file.write(chunk)
                done += len(chunk)
                on_progress(done)


def _copy(url: str, target: Path) -> None:
    path = Path(urllib.request.url2pathname(urlsplit(url).path))
    if not path.is_file():
        raise SourceUnreachableError(f"{path}: no such file")
    shutil.copyfile(path, target)


def _fault(path: Path, size: int | None, sha256: str | None) -> str | None:
    """Return what is wrong with the file, or ``None``."""
    if size is not None and path.stat().st_size != size:
        return f"{path.stat().st_size} bytes instead of {size}"
    if sha256 is not None and (actual := sha256_file(path)) != sha256:
        return f"sha256 {actual} instead of {sha256}"
    return None


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
