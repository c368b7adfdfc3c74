"""Would prompts be worth keeping on the disk? Keys and values of a prefix: read back, against computed again.

    python benchmarks/prefix_restore.py                    # mini, 4,096 tokens, 3 rounds
    python benchmarks/prefix_restore.py --model nano --tokens 2048

Each block of the prefix is one record with a checksum, as a cache would keep it. Timed are computing the prefix in
chunks as the engine does, writing it (with fsync), and reading it back into memory of its own, from the disk and from
the system's page cache. What is read back must be what was computed, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path

import torch

from evermini.config import load_settings
from evermini.models.batch import BLOCK_SIZE, KVCache, Model, whole_prompt
from evermini.service.loading import load_checkpoint

CHUNK = 512
_CRC_BYTES = 4


def compute(model: Model, ids: torch.Tensor, kv: KVCache) -> float:
    """Fill the blocks 0, 1, ... with the prefix; return the seconds."""
    began = time.perf_counter()
    for start in range(0, len(ids), CHUNK):
        end = min(len(ids), start + CHUNK)
        batch = whole_prompt(ids[:end])
        positions = torch.arange(start, end)
        model.forward(
            replace(
                batch,
                token_ids=ids[start:end],
                positions=positions,
                slots=positions,
                query_start=torch.tensor([0, end - start], dtype=torch.int32),
            ),
            kv,
        )
    return time.perf_counter() - began


def record(kv: KVCache, block: int) -> bytes:
    """Return a block's keys and values of all layers, and their checksum before them."""
    body = b"".join(tensor[block].numpy().tobytes() for tensor in (*kv.k, *kv.v))
    return zlib.crc32(body).to_bytes(_CRC_BYTES, "little") + body


def write(kv: KVCache, num_blocks: int, path: Path) -> float:
    """Write the blocks; return the seconds."""
    began = time.perf_counter()
    with path.open("wb") as file:
        for block in range(num_blocks):
            file.write(record(kv, block))
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began


def restore(kv: KVCache, num_blocks: int, path: Path, *, cold: bool) -> float:
    """Read the blocks into ``kv``; return the seconds."""
    tensors = (*kv.k, *kv.v)
    with path.open("rb") as file:
        if cold:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        size = path.stat().st_size // num_blocks
        for block in range(num_blocks):
            data = bytearray(file.read(size))
            body = memoryview(data)[_CRC_BYTES:]
            if zlib.crc32(body) != int.from_bytes(data[:_CRC_BYTES], "little"):
                raise SystemExit(f"block {block} is damaged")
            at = 0
            for tensor in tensors:
                count = tensor[block].numel()
                values = torch.frombuffer(body, dtype=kv.dtype, count=count, offset=at)
                tensor[block] = values.view(tensor[block].shape)
                at += count * kv.dtype.itemsize
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="mini")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="where to write; default the system's temporary folder"
    )
    options = parser.parse_args()
    loaded = load_checkpoint(options.model, load_settings().settings)
    num_blocks = options.tokens // BLOCK_SIZE
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(
        0, loaded.model.config.vocab_size, (num_blocks * BLOCK_SIZE,), generator=draw
    )
    times: dict[str, list[float]] = {
        "compute": [],
        "write": [],
        "read, cold": [],
        "read, cached": [],
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "prefix"
        for _ in range(options.rounds):
            fresh, read = (loaded.model.new_kv_cache(num_blocks) for _ in range(2))
            times["compute"].append(compute(loaded.model, ids, fresh))
            times["write"].append(write(fresh, num_blocks, path))
            times["read, cold"].append(restore(read, num_blocks, path, cold=True))
            times["read, cached"].append(restore(read, num_blocks, path, cold=False))
            for one, other in zip((*fresh.k, *fresh.v), (*read.k, *read.v), strict=True):
                if not torch.equal(one, other):
                    raise SystemExit("what was read is not what was computed")
        size = path.stat().st_size
    print(
        f"{options.model}: {len(ids)} tokens, {num_blocks} blocks, {size / 2**20:.1f} MiB, the same bit for bit"
    )
    for name, seconds in times.items():
        print(f"  {name:<13}{statistics.median(seconds):9.3f} s  (of {len(seconds)})")


if __name__ == "__main__":
    main()
