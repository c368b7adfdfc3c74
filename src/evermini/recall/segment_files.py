"""What lies on disk of one segment: its tokens, and keys to find them by. `evermini.recall.store` keeps many of them.

    <segment digest>.tokens   written at once, atomically
    <segment digest>.keys     append-only, one record per chunk, memory-mapped

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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evermini.errors import InsufficientStorageError, StorageError, is_disk_full
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
        with translated():
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


class DamagedTokensError(Exception):
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
    """Read a tokens file.

    Raises:
        DamagedTokensError: It is not what was written, or of another version.
        FileNotFoundError: There is none.
    """
    data = path.read_bytes()
    try:
        magic, n, preview_bytes, word_bytes, num_passages, crc = _TOKENS.unpack_from(data)
    except struct.error:
        raise DamagedTokensError(str(path)) from None
    body = memoryview(data)[_TOKENS.size :]
    size = 4 * (2 * n + 1 + num_passages)
    if (
        magic != _TOKENS_MAGIC
        or len(body) != preview_bytes + size + word_bytes
        or zlib.crc32(body) != crc
    ):
        raise DamagedTokensError(str(path))
    numbers = np.frombuffer(data, np.uint32, size // 4, _TOKENS.size + preview_bytes)
    return Tokens(
        ids=numbers[:n],
        char_starts=numbers[n : 2 * n + 1],
        passages=numbers[2 * n + 1 :],
        words=body[preview_bytes + size :],
        preview=bytes(body[:preview_bytes]).decode(),
    )


def write_tokens(path: Path, segment: Segment, ids: Ids, char_starts: Ids) -> None:
    """Write a segment's tokens file, with its passages and words.

    Raises:
        StorageError: It cannot be written.
    """
    preview = _describe(segment).encode("utf-8", "replace")
    passages = passage_starts(segment.text, char_starts)
    words = index_words(segment.text, char_starts[passages]).to_bytes()
    body = preview + ids.tobytes() + char_starts.tobytes() + passages.tobytes() + words
    header = _TOKENS.pack(
        _TOKENS_MAGIC, len(ids), len(preview), len(words), len(passages), zlib.crc32(body)
    )
    write_atomically(path, header + body)


def _describe(segment: Segment) -> str:
    """Return a segment's name on a line of its own, if it has one, and its first characters on one line."""
    preview = " ".join(segment.text[: 4 * _PREVIEW_CHARS].split())[:_PREVIEW_CHARS]
    if segment.name is None:
        return preview
    name = " ".join(segment.name.split("\n"))
    return f"{name}:{segment.first_line}\n{preview}" if segment.first_char else f"{name}\n{preview}"


@contextmanager
def translated() -> Iterator[None]:
    """Turn the system's errors of writing into ours.

    Raises:
        StorageError: What is done in it cannot be written.
    """
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


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file, or none of it.

    Raises:
        StorageError: It cannot be written.
    """
    temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
    with translated():
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
