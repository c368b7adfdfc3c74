"""Adapters on PyTorch operations, grouped: a batch with many adapters costs two products per layer, not two for each.

The factors of all adapters of a batch stand side by side. Every row is multiplied by all of them, what belongs to
other rows' adapters is set to zero, and the second product adds up the rest: at ranks of 8 to 64, far cheaper on a GPU
than a launch for each adapter. Fused layers (q, k, v and gate, up) keep their factors in one matrix, block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evermini.models.batch import AdapterRows
from evermini.models.checkpoint import parameter_shapes
from evermini.models.config import ModelConfig
from evermini.models.lora import LoraFactors, LoraWeights

FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""The linear layers of `evermini.models.decoder.DecoderLayer` and the targets that they hold."""


@dataclass(frozen=True)
class Factors:
    """What is added to a fused layer: ``(x a^T) b^T``, with a (rank, inputs) and b (outputs, rank), scale included."""

    a: Tensor
    b: Tensor


class TorchAdapter:
    """An adapter as `evermini.models.decoder` computes with it; implements `evermini.models.batch.Adapter`.

    Args:
        lora: Fits ``config``.
        config: The model's shape.
        dtype: Of the model's activations.
        device: Where the model is.
    """

    def __init__(
        self, lora: LoraWeights, config: ModelConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        shapes = parameter_shapes(config)
        self.layers: list[dict[str, Factors]] = []
        for index in range(config.num_layers):
            found = lora.layer(index)
            layer: dict[str, Factors] = {}
            for name, targets in FUSED.items():
                sizes = [shapes[f"model.layers.{index}.{target}.weight"] for target in targets]
                layer[name] = _fuse([found.get(target) for target in targets], sizes, dtype, device)
            self.layers.append(layer)

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return sum(f.a.nbytes + f.b.nbytes for layer in self.layers for f in layer.values())


class AdapterStack:
    """Adapters of one batch side by side.

    Args:
        adapters: All different.
    """

    def __init__(self, adapters: Sequence[TorchAdapter]) -> None:
        self.adapters = tuple(adapters)
        self._layers = [
            {name: _beside([adapter.layers[index][name] for adapter in adapters]) for name in FUSED}
            for index in range(len(adapters[0].layers))
        ]

    def bind(self, rows: Sequence[AdapterRows], num_rows: int) -> BoundAdapters:
        """Return the stack for a batch of ``num_rows`` rows, of which some have adapters."""
        slots = {id(adapter): slot for slot, adapter in enumerate(self.adapters)}
        slot_of_row = torch.full((num_rows,), -1)
        for part in rows:
            slot_of_row[part.start : part.end] = slots[id(part.adapter)]
        return BoundAdapters(self, slot_of_row.to(self._layers[0]["o"][0].a.device))

    def factors(self, layer: int, name: str) -> tuple[Factors, Tensor]:
        """Return a layer's factors, and to which adapter each of the inner numbers belongs."""
        return self._layers[layer][name]


class BoundAdapters:
    """A stack, and which of its adapters each row of a batch has.

    Args:
        stack: The adapters.
        slot_of_row: (T,) number of the row's adapter, -1 for none.
    """

    def __init__(self, stack: AdapterStack, slot_of_row: Tensor) -> None:
        self._stack = stack
        self._slot_of_row = slot_of_row

    def delta(self, layer: int, name: str, x: Tensor) -> Tensor:
        """Return what the rows' adapters add to a layer's output, (T, outputs), for its input (T, inputs)."""
        factors, slots = self._stack.factors(layer, name)
        inner = x.to(factors.a.dtype) @ factors.a.t()
        return inner.masked_fill_(self._slot_of_row[:, None] != slots, 0) @ factors.b.t()


def _fuse(
    found: Sequence[LoraFactors | None],
    sizes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
) -> Factors:
    rank = sum(factors.rank for factors in found if factors is not None)
    a = torch.zeros(rank, sizes[0][1])
    b = torch.zeros(sum(size[0] for size in sizes), rank)
    row = column = 0
    for factors, (outputs, _) in zip(found, sizes, strict=True):
        if factors is not None:
            end = column + factors.rank
            a[column:end] = factors.a
            b[row : row + outputs, column:end] = factors.b * factors.scale
            column = end
        row += outputs
    return Factors(a.to(device, dtype), b.to(device, dtype))


def _beside(parts: Sequence[Factors]) -> tuple[Factors, Tensor]:
    ranks = torch.tensor([len(part.a) for part in parts])
    slots = torch.repeat_interleave(torch.arange(len(parts)), ranks)
    if len(parts) == 1:
        return parts[0], slots.to(parts[0].a.device)
    factors = Factors(torch.cat([p.a for p in parts]), torch.cat([p.b for p in parts], dim=1))
    return factors, slots.to(factors.a.device)
