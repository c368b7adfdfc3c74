"""Exact softmax mass of queries over all keys of a context, block by block; never an N x N matrix.

Keys are int8 rows with a scale, mean-centred per (layer, kv head). Taking a constant vector from every key changes no
softmax (the same number leaves all of a query's scores), so centring costs nothing and makes the int8 steps smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from evermini import kernels

BLOCK = 32
"""Keys per block at most: the resolution of selection, and of `kernels/recall.c`."""
_LANES = 16
"""Queries that `kernels/recall.c` scores together."""


@dataclass(frozen=True)
class KeyRun:
    """Keys of one (layer, kv head), consecutive tokens of one segment.

    Attributes:
        keys: (n, head_dim) int8, contiguous.
        scales: (n,) float32, contiguous.
        first_block: Where its blocks go; runs share no block.
        starts: (blocks + 1,) int32, contiguous: the first key of each block, each at most ``BLOCK`` long; last, n.
    """

    keys: Tensor
    scales: Tensor
    first_block: int
    starts: Tensor

    @property
    def num_blocks(self) -> int:
        """Its blocks."""
        return self.starts.shape[0] - 1

    @cached_property
    def struct(self) -> kernels.Run:
        """Itself as the kernel reads it; a context has a thousand and is asked often."""
        return kernels.Run(
            self.keys.data_ptr(),
            self.scales.data_ptr(),
            self.starts.data_ptr(),
            self.num_blocks,
            self.first_block,
        )


def even_starts(num_keys: int) -> Tensor:
    """Return a run's ``starts`` with every block but the last full."""
    return torch.tensor([*range(0, num_keys, BLOCK), num_keys], dtype=torch.int32)


def quantize_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 rows and their scales (float32) of centred keys (..., head_dim)."""
    scales = (keys.abs().amax(-1) / 127).clamp_min(1e-12)
    return torch.round(keys / scales[..., None]).to(torch.int8), scales


def block_mass(queries: Tensor, runs: Sequence[KeyRun], num_blocks: int) -> Tensor:
    """Return each query's softmax mass in each block.

    Args:
        queries: (Q, head_dim) float32 of one (layer, kv head), before RoPE.
        runs: The keys; together they fill blocks 0 to ``num_blocks``.
        num_blocks: Blocks of the whole context.

    Returns:
        (num_blocks, Q) float32; each column sums to 1.
    """
    mass = _unscaled_mass(queries, runs, num_blocks)[:, : queries.shape[0]]
    return mass / mass.sum(0)


def weighted_mass(
    queries: Tensor, weights: Tensor, runs: Sequence[KeyRun], num_blocks: int
) -> Tensor:
    """Return ``block_mass(...) @ weights``, (num_blocks,), without writing the quotients down.

    Args:
        queries: As for `block_mass`, as the others are.
        weights: (Q,) of each query.
        runs: The keys.
        num_blocks: Blocks of the whole context.
    """
    mass = _unscaled_mass(queries, runs, num_blocks)
    weights = torch.nn.functional.pad(weights, (0, mass.shape[1] - len(weights)))
    return mass @ (weights / mass.sum(0))


def _unscaled_mass(queries: Tensor, runs: Sequence[KeyRun], num_blocks: int) -> Tensor:
    """Return the masses up to a factor for each query, and columns beyond the queries: whole rows are quicker."""
    block_max, block_sum = _scan(queries, runs, num_blocks)
    return block_max.sub_(block_max.amax(0)).exp_().mul_(block_sum)


def _scan(queries: Tensor, runs: Sequence[KeyRun], num_blocks: int) -> tuple[Tensor, Tensor]:
    q, scales = quantize_keys(queries)
    scales = scales * queries.shape[1] ** -0.5
    library = kernels.load()
    if library is None or queries.shape[1] % 4:
        return _scan_torch(q, scales, runs, num_blocks)
    count, dim = q.shape
    padded = -(-count // _LANES) * _LANES
    q = torch.nn.functional.pad(q, (0, 0, 0, padded - count))
    scales = torch.nn.functional.pad(scales, (0, padded - count))
    offsets = 128 * q.to(torch.int32).sum(1, dtype=torch.int32)
    packed = q.view(padded // _LANES, _LANES, dim // 4, 4).transpose(1, 2).contiguous()
    structs = (kernels.Run * len(runs))(*(run.struct for run in runs))
    block_max, block_sum = torch.empty(num_blocks, padded), torch.empty(num_blocks, padded)
    library.em_scan(
        structs, len(runs), dim, packed.data_ptr(), offsets.data_ptr(), scales.data_ptr(), padded,
        block_max.data_ptr(), block_sum.data_ptr(),
    )  # fmt: skip
    return block_max, block_sum


def _scan_torch(
    q: Tensor, scales: Tensor, runs: Sequence[KeyRun], num_blocks: int
) -> tuple[Tensor, Tensor]:
    """The same on PyTorch operations: the oracle, and what runs without a compiler."""
    block_max, block_sum = torch.empty(num_blocks, q.shape[0]), torch.empty(num_blocks, q.shape[0])
    for run in runs:
        scores = (run.keys.float() @ q.float().T) * scales * run.scales[:, None]  # (n, Q)
        starts = run.starts[:-1].numpy()
        highest = torch.from_numpy(np.maximum.reduceat(scores.numpy(), starts))
        own = torch.repeat_interleave(highest, run.starts.diff().long(), dim=0)
        where = slice(run.first_block, run.first_block + run.num_blocks)
        block_max[where] = highest
        block_sum[where] = torch.from_numpy(np.add.reduceat((scores - own).exp().numpy(), starts))
    return block_max, block_sum
