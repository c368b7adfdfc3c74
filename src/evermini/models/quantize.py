"""Integer weights and activations: the arithmetic that `evermini.kernels` runs fast, written out in PyTorch.

A weight matrix W (n, k) becomes integers and one scale per output channel. Both sides of the product are first
multiplied by a block-diagonal Hadamard matrix H (runs of up to 128 inputs), which leaves x W^T = (x H)(W H)^T unchanged
but spreads outliers, so that one int8 scale per activation row loses almost nothing (docs/log.md has the figures).

At 8 bits a weight is an int8 times its channel's scale. Below that, each run of 32 inputs (a group) is g * q: q has
``bits`` bits, g is a small integer such that g * q fits in int8. The integers g * q are therefore int8 weights too, and
every path (packed, expanded, this module) computes the same exact int32 sum.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32
PANEL = 64
BITS = (4, 5, 6, 8)


@functools.cache
def _hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        top = torch.cat([matrix, matrix], 1)
        matrix = torch.cat([top, torch.cat([matrix, -matrix], 1)], 0)
    return matrix.div(size**0.5)


def rotate(x: Tensor) -> Tensor:
    """Multiply the last dimension of ``x`` by the block-diagonal Hadamard matrix.

    Runs have the largest power of two from 16 to 128 that divides it; a width without one stays as it is.
    """
    width = x.shape[-1]
    run = next((size for size in (128, 64, 32, 16) if width % size == 0), None)
    if run is None:
        return x
    return (x.reshape(*x.shape[:-1], width // run, run) @ _hadamard(run).to(x)).reshape(x.shape)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate and quantise each row of ``x`` (m, k) to int8 with one scale; return (m, k) int8 and (m,) float32."""
    x = rotate(x)
    peak = x.abs().amax(-1)
    inverse = torch.where(peak > 0, 127.0 / peak, 0.0)
    return (x * inverse[:, None]).round().to(torch.int8), peak / 127.0


@dataclass(frozen=True)
class QuantizedWeight:
    """Integers of one weight matrix.

    Attributes:
        q: (n, k_padded) int8, in ``[-2^(bits-1), 2^(bits-1))``; inputs past k are 0.
        group_scale: (n, k_padded / 32) uint8, g of each group (1 at 8 bits).
        scale: (n,) float32.
        bits: 4, 5, 6 or 8.
        k: Inputs without padding.
    """

    q: Tensor
    group_scale: Tensor
    scale: Tensor
    bits: int
    k: int

    def int8(self) -> Tensor:
        """Return the weights as int8 (n, k): g * q."""
        n, padded = self.q.shape
        groups = (
            self.q.view(n, padded // GROUP, GROUP) * self.group_scale.view(torch.int8)[..., None]
        )
        return groups.view(n, padded)[:, : self.k].contiguous()

    def pack(self) -> Tensor:
        """Return the bytes that kernels/linear.c reads: panels of 64 channels (layout drawn there)."""
        n, padded = self.q.shape
        panels, groups = -(-n // PANEL), padded // GROUP
        q = torch.zeros(panels * PANEL, padded, dtype=torch.int16)
        q[:n] = self.q.to(torch.int16) + (1 << (self.bits - 1))
        # (panel, group, step of 4 inputs, vector of 16 channels, channel, input)
        q = q.to(torch.uint8).view(panels, 4, 16, groups, 8, 4).permute(0, 3, 4, 1, 2, 5)
        if self.bits == 8:
            return q.contiguous().view(-1)
        q = q.reshape(panels, groups, 8, 256)
        low = q & 0xF
        planes = [(low[:, :, :4] | (low[:, :, 4:] << 4)).flatten(2)]
        powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
        for bit in range(4, self.bits):
            ones = ((q >> bit) & 1).view(panels, groups, 256, 8)
            planes.append((ones * powers).sum(-1, dtype=torch.uint8))
        scales = torch.ones(panels * PANEL, groups, dtype=torch.uint8)
        scales[:n] = self.group_scale
        planes.append(scales.view(panels, PANEL, groups).transpose(1, 2))
        return torch.cat(planes, 2).contiguous().view(-1)


def quantize_weight(weight: Tensor, bits: int) -> QuantizedWeight:
    """Quantise ``weight`` (n, k) float32 to ``bits`` bits.

    The channel's scale makes its largest weight 127. Each group takes the finest g that covers it or the next finer
    one, whichever leaves the smaller squared error.
    """
    n, k = weight.shape
    padded = -(-k // GROUP) * GROUP
    q = torch.zeros(n, padded, dtype=torch.int8)
    group_scale = torch.ones(n, padded // GROUP, dtype=torch.uint8)
    scale = torch.empty(n)
    rows = max(1, (1 << 22) // padded)
    for start in range(0, n, rows):
        part = slice(start, min(n, start + rows))
        rotated = torch.zeros(part.stop - start, padded)
        rotated[:, :k] = rotate(weight[part].float())
        scale[part] = rotated.abs().amax(-1).clamp_min(1e-20) / 127.0
        rotated /= scale[part, None]
        if bits == 8:
            q[part] = rotated.round_().clamp_(-127, 127).to(torch.int8)
        else:
            q[part], group_scale[part] = _quantize_groups(rotated, bits)
    return QuantizedWeight(q, group_scale, scale, bits, k)


def _quantize_groups(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Split ``values`` (rows, k) in [-127, 127] into q and g; return (rows, k) int8 and (rows, k / 32) uint8."""
    half = 1 << (bits - 1)
    groups = values.view(values.shape[0], -1, GROUP)
    cover = (groups.abs().amax(-1) / (half - 0.5)).ceil().clamp(1, 128 // half)
    q, error = _round_groups(groups, cover, half)
    finer = (cover - 1).clamp_min(1)
    finer_q, finer_error = _round_groups(groups, finer, half)
    better = finer_error < error
    q = torch.where(better[..., None], finer_q, q)
    group_scale = torch.where(better, finer, cover)
    return q.view_as(values).to(torch.int8), group_scale.to(torch.uint8)


def _round_groups(groups: Tensor, g: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Return q of each group (rows, groups, 32) for its g (rows, groups), and the squared error it leaves."""
    q = (groups / g[..., None]).round().clamp(-half, half - 1)
    q = torch.minimum(q, torch.div(127, g, rounding_mode="floor")[..., None])
    return q, (q * g[..., None] - groups).square().sum(-1)
