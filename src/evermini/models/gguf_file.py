"""The GGUF container: metadata, tensor directory, and one tensor's values at a time.

    ┌────────┬─────────┬───────────┬──────────┬──────────────┬─────────┬──────────────┐
    │ "GGUF" │ version │ n_tensors │ metadata │ tensor infos │ padding │ tensor data  │
    └────────┴─────────┴───────────┴──────────┴──────────────┴─────────┴──────────────┘

Constants and dequantisation are the ``gguf`` package's. Its ``GGUFReader`` is not used: it builds a numpy view for
each array element (9 s and 0.5 GB on a 151k-token vocabulary; this reader takes 0.3 s), and it reports a truncated
file as an IndexError. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
)
from gguf.quants import dequantize
from numpy.typing import NDArray

from evermini.errors import DamagedCheckpointError, UnsupportedQuantizationError

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}

# dequantize() joins groups of rows at its end: one long row of cache size at a time halves its peak
# memory and runs 3 to 10 times faster.
_ELEMENTS_AT_ONCE = 2**17


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        name: Its GGUF name.
        shape: Row-major, as in numpy (GGUF stores it reversed).
        kind: ggml type.
        offset: First byte in the file.
        num_bytes: Bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    num_bytes: int


class GgufFile:
    """One GGUF file, opened: header parsed and checked against the file's size, tensor data not read.

    Args:
        path: The file.

    Attributes:
        metadata: Every key; arrays are lists.
        tensors: Tensor directory by GGUF name.

    Raises:
        DamagedCheckpointError: The file is truncated or no valid GGUF.
        UnsupportedQuantizationError: A tensor has a type that cannot be dequantised.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m:
                self._size = len(m)
                self._parse(_Cursor(m))
        except (OSError, ValueError, struct.error, OverflowError, MemoryError) as error:
            raise _damaged(path, str(error)) from error

    def _parse(self, cursor: _Cursor) -> None:
        if cursor.take(4) != b"GGUF":
            raise ValueError("it does not begin with the GGUF magic")
        version = cursor.scalar("I")
        if version not in (2, 3):
            detail = "a big-endian file" if version & 0xFFFF == 0 else f"GGUF version {version}"
            raise ValueError(f"{detail} is not supported; versions 2 and 3, little-endian, are")
        num_tensors, num_keys = cursor.scalar("Q"), cursor.scalar("Q")
        for _ in range(num_keys):
            key = cursor.string()
            self.metadata[key] = cursor.value(GGUFValueType(cursor.scalar("I")))
        headers = [self._tensor_header(cursor) for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r}, not a power of two")
        data_start = -(-cursor.position // alignment) * alignment
        for name, shape, raw_kind, offset in headers:
            info = self._tensor_info(name, shape, raw_kind, data_start + offset)
            if name in self.tensors:
                raise ValueError(f"tensor {name} occurs twice")
            self.tensors[name] = info

    @staticmethod
    def _tensor_header(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
        name = cursor.string()
        num_dims = cursor.scalar("I")
        if not 1 <= num_dims <= 4:
            raise ValueError(f"tensor {name} claims {num_dims} dimensions")
        dims = [cursor.scalar("Q") for _ in range(num_dims)]
        return name, tuple(reversed(dims)), cursor.scalar("I"), cursor.scalar("Q")

    def _tensor_info(
        self, name: str, shape: tuple[int, ...], raw_kind: int, offset: int
    ) -> TensorInfo:
        try:
            kind = GGMLQuantizationType(raw_kind)
        except ValueError:
            kind = None
        if kind is None or kind not in readable_kinds():
            raise UnsupportedQuantizationError(
                f"{self.path}: tensor {name} has type {kind.name if kind is not None else raw_kind}, which cannot be "
                f"read. Supported: {', '.join(sorted(k.name for k in readable_kinds()))}. Use another file of this "
                "model, such as Q8_0 or Q4_K_M."
            )
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block_size:
            raise ValueError(
                f"tensor {name} has rows of {shape[-1]}, no multiple of {kind.name}'s block"
            )
        num_bytes = math.prod(shape) // block_size * block_bytes
        if offset + num_bytes > self._size:
            raise ValueError(
                f"it has {self._size:,} bytes, but tensor {name} ends at byte {offset + num_bytes:,}; "
                "the download or copy was probably cut short"
            )
        return TensorInfo(name, shape, kind, offset, num_bytes)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Read and dequantise rows ``start:stop`` of a tensor (all of it by default).

        The file is mapped for the duration of the call only, so that pages read do not count as this process's
        memory afterwards.

        Raises:
            KeyError: There is no such tensor.
            DamagedCheckpointError: The file shrank or vanished since it was opened.
        """
        info = self.tensors[name]
        stop = info.shape[0] if stop is None else stop
        if not 0 <= start <= stop <= info.shape[0]:
            raise IndexError(f"rows {start}:{stop} of {name}, which has {info.shape[0]}")
        row_len = math.prod(info.shape[1:])
        block_size, block_bytes = GGML_QUANT_SIZES[info.kind]
        if row_len % block_size:  # a quantised vector: its blocks span rows
            return self._read_blocks(info, 0, info.num_bytes)[start:stop]
        row_bytes = row_len // block_size * block_bytes
        values = self._read_blocks(info, start * row_bytes, stop * row_bytes)
        return values.reshape(stop - start, *info.shape[1:])

    def _read_blocks(self, info: TensorInfo, start: int, stop: int) -> NDArray[np.float32]:
        """Dequantise bytes ``start:stop`` of a tensor (whole blocks), piece by piece."""
        block_size, block_bytes = GGML_QUANT_SIZES[info.kind]
        count = (stop - start) // block_bytes
        out = np.empty((count, block_size), dtype=np.float32)
        if count == 0:
            return out.reshape(-1)
        try:
            raw = np.memmap(self.path, np.uint8, "r", info.offset + start, (count, block_bytes))
        except (OSError, ValueError) as error:
            raise _damaged(self.path, f"it changed after it was opened: {error}") from error
        step = _ELEMENTS_AT_ONCE // block_size
        for first in range(0, count, step):
            piece = raw[first : first + step].reshape(1, -1)
            out[first : first + step] = dequantize(piece, info.kind).reshape(-1, block_size)
        return out.reshape(-1)


class _Cursor:
    """Reads GGUF's primitive values from a mapping, in order; `take` refuses to run past the end."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self._buffer = buffer
        self.position = 0

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self._buffer):
            raise ValueError(
                f"its header runs past its end ({len(self._buffer):,} bytes); "
                "the download or copy was probably cut short"
            )
        data = self._buffer[self.position : end]
        self.position = end
        return data

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

    def value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self.scalar(_SCALARS[kind])
        item_kind, count = GGUFValueType(self.scalar("I")), self.scalar("Q")
        if item_kind in _SCALARS:
            code = _SCALARS[item_kind]
            raw = self.take(count * struct.calcsize(code))
            return list(struct.unpack(f"<{count}{code}", raw))
        return [self.value(item_kind) for _ in range(count)]


@functools.cache
def readable_kinds() -> frozenset[GGMLQuantizationType]:
    """Return the types `GgufFile.read` can read.

    The package has no public list, so ``dequantize`` is asked with one block of zeros each (3 ms in all).
    """
    readable = set()
    for kind, (_, block_bytes) in GGML_QUANT_SIZES.items():
        try:
            dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError:
            continue
        readable.add(kind)
    return frozenset(readable)


def _damaged(path: Path, cause: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{path} is not a usable GGUF file: {cause}. Delete it and fetch it again."
    )
