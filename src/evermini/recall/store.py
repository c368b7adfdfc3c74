"""The index on disk: what recall keeps of each segment, content-addressed.

    HOME/recall/<index fingerprint>/calibration.json          what the index was made with
    HOME/recall/<index fingerprint>/<segment digest>.tokens   written at once, atomically
    HOME/recall/<index fingerprint>/<segment digest>.keys     append-only, one record per chunk, memory-mapped
    HOME/recall/.locks/<fingerprint>-<digest>.lock            held by the one writer of a segment

    .tokens   | magic, counts, crc32 of the rest | name, beginning | ids uint32 (n) | character starts uint32 (n + 1) |
              | passage starts uint32 | words by passage (`evermini.recall.words`) |
    .keys     | record of chunk 0 | record of chunk 1 | ...            all of one size but the last chunk's
    record    | magic, chunk, tokens, crc32 (64 bytes) | pair 0: keys int8 (n, d), scales float32 (n) | pair 1: ... |

Nothing says "complete": a segment is, when its last record is there in full. A record cut short by a kill is dropped
and written again. Readers need no lock; a file that is evicted stays readable to those who have it open.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from evermini.errors import (
    InsufficientStorageError,
    ModelError,
    RecallDiskError,
    StorageError,
    is_disk_full,
)
from evermini.recall.calibration import Calibration
from evermini.recall.passages import block_starts, passage_starts
from evermini.recall.scan import quantize_keys
from evermini.recall.segment import Ids, Segment
from evermini.recall.words import WordIndex, index_words

_TOKENS = struct.Struct("<8sQIIII")  # magic, tokens, bytes of preview, of words, passages, crc32
_TOKENS_MAGIC = b"EVRTOK3\0"
_RECORD = struct.Struct("<8sIII44x")  # magic, chunk, tokens, crc32
_RECORD_MAGIC = b"EVRKEY1\0"
_PREVIEW_CHARS = 120
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


class IndexedSegment:
    """An open segment, to read and to append to.

    Attributes:
        ids: (n,) its tokens.
        char_starts: (n + 1,) the character where each token begins; last, the text's length.
        passages: (p,) the token where each passage begins.
        blocks: (b,) the token where each block begins.
        words: Which words stand in which passage.
        is_checked: Every record was read by this process, and is what was written.
    """

    is_checked = False

    def __init__(self, calibration: Calibration, folder: Path, digest: str) -> None:
        self.digest = digest
        self._calibration = calibration
        self._keys_path = folder / f"{digest}.keys"
        tokens = read_tokens(folder / f"{digest}.tokens")
        self.ids, self.char_starts, self.passages = tokens.ids, tokens.char_starts, tokens.passages
        self.words = WordIndex.from_bytes(tokens.words)
        self.num_chunks = calibration.windows.num_chunks(len(self.ids))
        self.blocks = block_starts(self.passages, len(self.ids), calibration.windows.chunk)
        self._chunks: list[list[tuple[Tensor, Tensor]]] = []

    def _record_bytes(self, num_tokens: int) -> int:
        return _RECORD.size + num_tokens * len(self._calibration.pairs) * (
            self._calibration.head_dim + 4
        )

    def _chunk_tokens(self, chunk: int) -> int:
        start, end = self._calibration.windows.chunk_range(chunk, len(self.ids))
        return end - start

    def _offset(self, chunk: int) -> int:
        return chunk * self._record_bytes(self._calibration.windows.chunk)

    def _end(self, chunk: int) -> int:
        return self._offset(chunk) + self._record_bytes(self._chunk_tokens(chunk))

    @property
    def num_bytes(self) -> int:
        """Bytes its keys take when complete."""
        return self._end(self.num_chunks - 1) if self.num_chunks else 0

    def missing_bytes(self) -> int:
        """Return how much its keys will still grow."""
        return max(0, self.num_bytes - self._present_bytes())

    def _present_bytes(self) -> int:
        return self._keys_path.stat().st_size if self._keys_path.exists() else 0

    def chunks_done(self) -> int:
        """Return the leading chunks whose records are there in full."""
        size = self._present_bytes()
        if size >= self.num_bytes:
            return self.num_chunks
        return size // self._record_bytes(self._calibration.windows.chunk)

    @property
    def is_complete(self) -> bool:
        """Whether every chunk is there."""
        return self.chunks_done() == self.num_chunks

    def write_chunk(self, chunk: int, keys: Tensor) -> None:
        """Put one chunk's record on disk; a torn record after the last full one is overwritten.

        Args:
            chunk: At most `chunks_done`; an earlier one is replaced (repair).
            keys: (num_pairs, n, head_dim) float32, as computed.

        Raises:
            StorageError: It cannot be written.
        """
        assert chunk <= self.chunks_done()
        quantized, scales = quantize_keys(keys - self._calibration.mean_keys[:, None])
        parts = [part for q, s in zip(quantized, scales, strict=True) for part in (q, s)]
        body = b"".join(part.contiguous().numpy().tobytes() for part in parts)
        header = _RECORD.pack(_RECORD_MAGIC, chunk, keys.shape[1], zlib.crc32(body))
        replacing = chunk < self.chunks_done()
        with _translated():
            descriptor = os.open(self._keys_path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if not replacing:
                    os.ftruncate(descriptor, self._offset(chunk))
                _write_all(descriptor, header + body, self._offset(chunk))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        if not replacing:
            self._chunks = []

    def chunk_keys(self, chunk: int) -> list[tuple[Tensor, Tensor]]:
        """Return each pair's keys (n, head_dim) int8 and scales (n,) float32, in memory-mapped pages."""
        chunks = self._chunks
        if not chunks:
            chunks = self._chunks = self._map()
        return chunks[chunk]

    def _map(self) -> list[list[tuple[Tensor, Tensor]]]:
        done, dim = self.chunks_done(), self._calibration.head_dim
        if not done:
            return []
        # Copy-on-write only because PyTorch wants writable memory; nobody writes.
        pages = torch.from_numpy(np.memmap(self._keys_path, dtype=np.int8, mode="c"))
        chunks = []
        for chunk in range(done):
            at, n = self._offset(chunk) + _RECORD.size, self._chunk_tokens(chunk)
            pairs = []
            for _ in self._calibration.pairs:
                middle, end = at + n * dim, at + n * (dim + 4)
                pairs.append((pages[at:middle].view(n, dim), pages[middle:end].view(torch.float32)))
                at = end
            chunks.append(pairs)
        return chunks

    def damaged_chunks(self) -> list[int]:
        """Read every record that is there and return those that are not what was written."""
        bad: list[int] = []
        if not (done := self.chunks_done()):
            return bad
        room = memoryview(bytearray(self._record_bytes(self._chunk_tokens(0))))
        with self._keys_path.open("rb") as file:
            for chunk in range(done):
                num_tokens = self._chunk_tokens(chunk)
                record = room[: self._record_bytes(num_tokens)]
                num_bytes = file.readinto(record)
                *head, crc = _RECORD.unpack_from(record)
                if (
                    num_bytes != len(record)
                    or head != [_RECORD_MAGIC, chunk, num_tokens]
                    or zlib.crc32(record[_RECORD.size :]) != crc
                ):
                    bad.append(chunk)
        return bad


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
        except (FileNotFoundError, _DamagedTokensError):
            return None
        return segment

    def create(self, segment: Segment, ids: Ids, char_starts: Ids) -> IndexedSegment:
        """Write a segment's tokens and words; its keys follow with `IndexedSegment.write_chunk`.

        Raises:
            StorageError: They cannot be written.
        """
        with _translated():
            self.folder.mkdir(parents=True, exist_ok=True)
        _write_atomically(self.folder / _CALIBRATION, self.calibration.to_json().encode())
        path = self.folder / f"{segment.digest}.tokens"
        preview = _describe(segment).encode("utf-8", "replace")
        passages = passage_starts(segment.text, char_starts)
        words = index_words(segment.text, char_starts[passages]).to_bytes()
        body = preview + ids.tobytes() + char_starts.tobytes() + passages.tobytes() + words
        header = _TOKENS.pack(
            _TOKENS_MAGIC, len(ids), len(preview), len(words), len(passages), zlib.crc32(body)
        )
        _write_atomically(path, header + body)
        return IndexedSegment(self.calibration, self.folder, segment.digest)

    @contextmanager
    def writing(self, digest: str) -> Iterator[None]:
        """Be the only writer of a segment, among threads and processes; waits."""
        lock = _lock(self.home, self.calibration.fingerprint, digest)
        with _translated():
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
            except _DamagedTokensError:
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
        except _DamagedTokensError:
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
    with _translated():
        folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{fingerprint}-{digest}.lock", thread_local=False)


class _DamagedTokensError(Exception):
    """A tokens file is not what was written."""


@dataclass(frozen=True)
class Tokens:
    """What a tokens file holds; attributes as in `IndexedSegment`, ``preview`` as `_describe` wrote it."""

    ids: Ids
    char_starts: Ids
    passages: Ids
    words: memoryview
    preview: str


def read_tokens(path: Path) -> Tokens:
    """Read a tokens file."""
    data = path.read_bytes()
    try:
        magic, n, preview_bytes, word_bytes, num_passages, crc = _TOKENS.unpack_from(data)
    except struct.error:
        raise _DamagedTokensError(str(path)) from None
    body = memoryview(data)[_TOKENS.size :]
    size = 4 * (2 * n + 1 + num_passages)
    if (
        magic != _TOKENS_MAGIC
        or len(body) != preview_bytes + size + word_bytes
        or zlib.crc32(body) != crc
    ):
        raise _DamagedTokensError(str(path))
    numbers = np.frombuffer(data, np.uint32, size // 4, _TOKENS.size + preview_bytes)
    return Tokens(
        ids=numbers[:n],
        char_starts=numbers[n : 2 * n + 1],
        passages=numbers[2 * n + 1 :],
        words=body[preview_bytes + size :],
        preview=bytes(body[:preview_bytes]).decode(),
    )


def _describe(segment: Segment) -> str:
    """Return a segment's name on a line of its own, if it has one, and its first characters on one line."""
    preview = " ".join(segment.text[: 4 * _PREVIEW_CHARS].split())[:_PREVIEW_CHARS]
    if segment.name is None:
        return preview
    name = " ".join(segment.name.split("\n"))
    return f"{name}:{segment.first_line}\n{preview}" if segment.first_char else f"{name}\n{preview}"


@contextmanager
def _translated() -> Iterator[None]:
    """Turn the system's errors of writing into ours."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise InsufficientStorageError(
                "The server's disk is full, so this long text cannot be indexed. Its operator has to make room; then "
                "send the request again."
            ) from error
        raise StorageError(f"The index of long texts cannot be written: {error}") from error


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
    with _translated():
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
