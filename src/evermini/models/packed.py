"""Packed weights on disk: quantised once, then memory-mapped.

Quantising a 0.5B checkpoint takes seconds and gigabytes of scratch memory; mapping the result takes neither, and
several processes share its pages. One file per weights and precision lies under ``EVERMINI_HOME/packed``. It is a
safetensors file (any reader opens it) whose tensors start at multiples of 64 bytes, written under another name and
renamed when whole. Its metadata tells the format version and the checkpoint's fingerprint, both part of its name too.

    weights = open_packed(checkpoint, 8, home)       # dict of tensors; quantises on first use
    weights["layers.0.qkv.data"]                     # bytes that kernels/linear.c reads

Other parts of a checkpoint have files of their own, by `open_part` (a vision tower: `evermini.models.encoder`).
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

from evermini.config import default_home
from evermini.errors import DiskSpaceError, is_disk_full
from evermini.models.checkpoint import Checkpoint
from evermini.models.decoder import load_layer
from evermini.models.quantize import PANEL, quantize_weight
from evermini.models.store import PACKED

logger = logging.getLogger(__name__)

VERSION = 2
ALIGNMENT = 64
_DTYPES = {"U8": torch.uint8, "F16": torch.float16, "F32": torch.float32}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def open_packed(checkpoint: Checkpoint, bits: int, home: Path | None) -> dict[str, Tensor]:
    """Map the packed weights of ``checkpoint`` at ``bits`` bits, making the file if it is not there.

    Args:
        checkpoint: Where the weights come from.
        bits: 8, 6, 5 or 4; the output projection keeps at least 6.
        home: Folder of all caches (``EVERMINI_HOME``); by default `evermini.config.default_home`.

    Returns:
        Read-only tensors by name: ``embedding`` (float16), ``norm``, ``head.*`` and ``layers.N.*``.

    Raises:
        DiskSpaceError: The file does not fit on the disk.
    """
    return open_part(checkpoint, f"int{bits}-v{VERSION}", lambda: _pack(checkpoint, bits), home)


def open_part(
    checkpoint: Checkpoint,
    part: str,
    pack: Callable[[], Iterator[tuple[str, Tensor]]],
    home: Path | None,
) -> dict[str, Tensor]:
    """Map a file of packed weights, making it if it is not there.

    Args:
        checkpoint: Where the weights come from.
        part: What of it, in which precision and format; in the file's name.
        pack: Yields the tensors, read and packed.
        home: Folder of all caches (``EVERMINI_HOME``); by default `evermini.config.default_home`.

    Returns:
        Read-only tensors by name.

    Raises:
        DiskSpaceError: The file does not fit on the disk.
    """
    folder = (home or default_home()) / PACKED
    path = folder / f"{checkpoint.fingerprint}-{part}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                logger.info(
                    "quantising %s to %s (once; kept in %s)", checkpoint.path.name, part, folder
                )
                _write(path, pack(), {"fingerprint": checkpoint.fingerprint})
    return _map(path)


def _pack(checkpoint: Checkpoint, bits: int) -> Iterator[tuple[str, Tensor]]:
    """Yield every packed tensor, one matrix in memory at a time."""
    config = checkpoint.config
    yield "embedding", checkpoint.tensor("model.embed_tokens.weight").half()
    yield "norm", checkpoint.tensor("model.norm.weight")
    name = "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
    yield from pack_linear("head", checkpoint.tensor(name), None, max(bits, 6))
    for index in range(config.num_layers):
        p, prefix = load_layer(checkpoint, index), f"layers.{index}."
        yield from pack_linear(prefix + "qkv", p.qkv, p.qkv_bias, bits)
        yield from pack_linear(prefix + "o", p.o, p.o_bias, bits)
        yield from pack_linear(prefix + "gate_up", interleave(p.gate_up), None, bits)
        yield from pack_linear(prefix + "down", p.down, None, bits)
        norms = {
            "input_norm": p.input_norm,
            "post_norm": p.post_norm,
            "q_norm": p.q_norm,
            "k_norm": p.k_norm,
        }
        yield from ((prefix + key, norm) for key, norm in norms.items() if norm is not None)


def interleave(gate_up: Tensor) -> Tensor:
    """Reorder the fused rows (gates, then their factors) to 32 gates, 32 factors, 32 gates, ...

    So both of a pair lie in one panel and the kernel writes silu(gate) * factor. An inner size that is no multiple of
    32 is padded with zero rows.
    """
    gate, up = (F.pad(half, (0, 0, 0, -half.shape[0] % 32)) for half in gate_up.chunk(2))
    width = gate.shape[1]
    return torch.stack([gate.view(-1, 32, width), up.view(-1, 32, width)], 1).view(-1, width)


def pack_linear(
    name: str, weight: Tensor, bias: Tensor | None, bits: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield a matrix as ``evermini.h``'s ``Linear`` wants it, some panels of channels at a time."""
    rows = PANEL * max(1, (1 << 22) // (PANEL * weight.shape[1]))
    pieces, scales = [], []
    for start in range(0, weight.shape[0], rows):
        quantized = quantize_weight(weight[start : start + rows], bits)
        pieces.append(quantized.pack())
        scales.append(quantized.scale)
    padding = (0, -weight.shape[0] % PANEL)
    yield f"{name}.data", torch.cat(pieces)
    yield f"{name}.scale", F.pad(torch.cat(scales), padding)
    if bias is not None:
        yield f"{name}.bias", F.pad(bias, padding)


def _write(path: Path, tensors: Iterator[tuple[str, Tensor]], metadata: dict[str, str]) -> None:
    """Write a safetensors file. The header goes first but needs all shapes: room for it is left and filled in last."""
    header: dict[str, object] = {"__metadata__": {"format_version": str(VERSION), **metadata}}
    room = 1 << 20  # the header of some 10,000 tensors; the format allows trailing spaces
    temporary = path.with_suffix(".tmp")  # ours alone: the caller holds the lock
    try:
        with temporary.open("wb") as file:
            file.seek(room)
            offset = 0
            for name, tensor in tensors:
                content = tensor.contiguous().flatten().view(torch.uint8).numpy().data
                header[name] = {
                    "dtype": _NAMES[tensor.dtype],
                    "shape": list(tensor.shape),
                    "data_offsets": [offset, offset + len(content)],
                }
                file.write(content)
                offset += len(content)
                if (
                    padding := -offset % ALIGNMENT
                ):  # the format has no holes: padding is a tensor too
                    header[f"padding.{offset}"] = {
                        "dtype": "U8",
                        "shape": [padding],
                        "data_offsets": [offset, offset + padding],
                    }
                    file.write(bytes(padding))
                    offset += padding
            text = json.dumps(header).encode()
            assert len(text) <= room - 8
            file.seek(0)
            file.write(struct.pack("<Q", room - 8) + text.ljust(room - 8))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise DiskSpaceError(
            f"The quantised weights do not fit on the disk of {path.parent}. "
            "Free some space, or set EVERMINI_HOME to a folder on a larger disk."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _map(path: Path) -> dict[str, Tensor]:
    """Return the file's tensors, read-only pages of it."""
    with path.open("rb") as file:
        memory = mmap.mmap(
            file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE
        )
    (length,) = struct.unpack("<Q", memory[:8])
    header = json.loads(memory[8 : 8 + length])
    del header["__metadata__"]
    tensors = {}
    for name, entry in header.items():
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        count = torch.Size(shape).numel()
        offset = 8 + length + entry["data_offsets"][0]
        assert entry["data_offsets"][1] - entry["data_offsets"][0] == count * dtype.itemsize
        tensors[name] = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(
            shape
        )
    return tensors
