"""The index on disk: what recall keeps of each segment, content-addressed.

HOME/recall/<index fingerprint>/calibration.json          what the index was made with
HOME/recall/<index fingerprint>/<segment digest>.tokens   one segment's (`evermini.recall.segment_files`)
HOME/recall/<index fingerprint>/<segment digest>.keys
HOME/recall/.locks/<fingerprint>-<digest>.lock            held by the one writer of a segment
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from evermini.errors import ModelError, RecallDiskError
from evermini.recall.calibration import Calibration
from evermini.recall.segment import Ids, Segment
from evermini.recall.segment_files import (
    DamagedTokensError,
    IndexedSegment,
    read_tokens,
    translated,
    write_atomically,
    write_tokens,
)

_FOLDER = "recall"
_CALIBRATION = "calibration.json"


@dataclass(frozen=True)
class Damage:
    """A damaged part of a segment: one chunk's record, or (``chunk`` is ``None``) its tokens."""

    digest: str
    chunk: int | None

    def __str__(self) -> str:
        part = "its tokens" if self.chunk is None else f"chunk {self.chunk}"
        return f"segment {self.digest[:12]}: {part} damaged"


@dataclass(frozen=True)
class SegmentInfo:
    """One segment on disk, as ``evermini contexts`` shows it.

    Attributes:
        fingerprint: Of the index it is in.
        digest: Of its text.
        num_tokens: Its tokens.
        num_bytes: What it takes on disk.
        last_used: When, in seconds since 1970.
        preview: Its first characters.
        name: What it was called when it was ingested first, if it had a name.
    """

    fingerprint: str
    digest: str
    num_tokens: int
    num_bytes: int
    last_used: float
    preview: str
    name: str | None = None


class SegmentStore:
    """All segments indexed with one calibration, and the cap on what all calibrations' take together.

    Args:
        home: Evermini's home folder.
        calibration: Which index.
        max_bytes: Least recently used segments go when the disk space would exceed this; ``None`` for no cap.
    """

    def __init__(self, home: Path, calibration: Calibration, max_bytes: int | None = None) -> None:
        self.home = home
        self.folder = home / _FOLDER / calibration.fingerprint
        self.calibration = calibration
        self.max_bytes = max_bytes

    def touch(self, digest: str) -> bool:
        """Mark a segment used; false if it is not there (any more)."""
        try:
            os.utime(self.folder / f"{digest}.tokens")
        except FileNotFoundError:
            return False
        return True

    def open(self, digest: str) -> IndexedSegment | None:
        """Return a segment whose tokens are there (its keys may be incomplete) and mark it used.

        Damaged tokens count as absent.
        """
        path = self.folder / f"{digest}.tokens"
        try:
            segment = IndexedSegment(self.calibration, self.folder, digest)
            os.utime(path)
        except (FileNotFoundError, DamagedTokensError):
            return None
        return segment

    def create(self, segment: Segment, ids: Ids, char_starts: Ids) -> IndexedSegment:
        """Write a segment's tokens and words; its keys follow with `IndexedSegment.write_chunk`.

        Raises:
            StorageError: They cannot be written.
        """
        with translated():
            self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / _CALIBRATION, self.calibration.to_json().encode())
        write_tokens(self.folder / f"{segment.digest}.tokens", segment, ids, char_starts)
        return IndexedSegment(self.calibration, self.folder, segment.digest)

    @contextmanager
    def writing(self, digest: str) -> Iterator[None]:
        """Be the only writer of a segment, among threads and processes; waits."""
        lock = _lock(self.home, self.calibration.fingerprint, digest)
        with translated():
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def make_room(self, num_bytes: int, keep: Sequence[str] = ()) -> list[SegmentInfo]:
        """Evict least recently used segments until ``num_bytes`` more fit under the cap.

        Args:
            num_bytes: What is about to be written.
            keep: Segments of this index that are needed now.

        Returns:
            What was evicted.

        Raises:
            RecallDiskError: It cannot fit.
        """
        if self.max_bytes is None:
            return []
        present = self.list_all()
        excess = sum(info.num_bytes for info in present) + num_bytes - self.max_bytes
        evicted: list[SegmentInfo] = []
        for info in sorted(present, key=lambda info: info.last_used):
            if excess <= 0:
                break
            if info.fingerprint == self.calibration.fingerprint and info.digest in keep:
                continue
            if self.remove(info.fingerprint, info.digest):
                evicted.append(info)
                excess -= info.num_bytes
        if excess > 0:
            raise RecallDiskError(
                f"The index of this context needs {excess:,} bytes more than the recall cap of {self.max_bytes:,} "
                "bytes allows. Send less text, or ask the server's operator to raise recall_disk."
            )
        return evicted

    def list_all(self) -> list[SegmentInfo]:
        """Return every segment on disk, of all indexes, the most recently used first."""
        return list_segments(self.home)

    def remove(self, fingerprint: str, digest: str) -> bool:
        """Delete a segment, unless someone is writing it."""
        return remove_segment(self.home, fingerprint, digest)

    def verify(self) -> list[Damage]:
        """Read everything of this index and return what is damaged."""
        damage: list[Damage] = []
        for path in sorted(self.folder.glob("*.tokens")):
            try:
                segment = IndexedSegment(self.calibration, self.folder, path.stem)
            except DamagedTokensError:
                damage.append(Damage(path.stem, None))
                continue
            damage += [Damage(path.stem, chunk) for chunk in segment.damaged_chunks()]
        return damage


def all_stores(home: Path) -> list[SegmentStore]:
    """Return every index of this version under a home folder."""
    stores = []
    for path in sorted((home / _FOLDER).glob(f"*/{_CALIBRATION}")):
        try:
            store = SegmentStore(home, Calibration.from_json(path.read_text()))
        except ModelError:  # written by another version
            continue
        if store.folder == path.parent:
            stores.append(store)
    return stores


def list_segments(home: Path) -> list[SegmentInfo]:
    """Return every segment on disk, of all indexes and versions, the most recently used first."""
    found = []
    for path in (home / _FOLDER).glob("*/*.tokens"):
        try:
            stat, keys = path.stat(), path.with_suffix(".keys")
            size = stat.st_size + (keys.stat().st_size if keys.exists() else 0)
            tokens = read_tokens(path)
            num_tokens, preview = len(tokens.ids), tokens.preview
        except FileNotFoundError:
            continue
        except DamagedTokensError:
            num_tokens, preview = 0, "(damaged, or of another version)"
        name, _, preview = preview.rpartition("\n")
        found.append(
            SegmentInfo(
                path.parent.name,
                path.stem,
                num_tokens,
                size,
                stat.st_mtime,
                preview,
                name or None,
            )
        )
    return sorted(found, key=lambda info: -info.last_used)


def remove_segment(home: Path, fingerprint: str, digest: str) -> bool:
    """Delete a segment of any index and version, unless someone is writing it."""
    try:
        with _lock(home, fingerprint, digest).acquire(blocking=False):
            for suffix in ("tokens", "keys"):
                (home / _FOLDER / fingerprint / f"{digest}.{suffix}").unlink(missing_ok=True)
    except Timeout:
        return False
    return True


def _lock(home: Path, fingerprint: str, digest: str) -> FileLock:
    folder = home / _FOLDER / ".locks"
    with translated():
        folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{fingerprint}-{digest}.lock", thread_local=False)
