"""Adapters for the native kernels: factors in half precision, in the order that kernels/*.c read them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from evermini import kernels
from evermini.models.batch import AdapterRows
from evermini.models.config import ModelConfig
from evermini.models.lora import TARGETS, LoraFactors, LoraWeights

_FUSED = {
    "self_attn.k_proj": ("self_attn.q_proj",),
    "self_attn.v_proj": ("self_attn.q_proj", "self_attn.k_proj"),
    "mlp.up_proj": ("mlp.gate_proj",),
}
"""Targets whose first products lie before a target's own in a row of ``Lora.t``."""


class NativeAdapter:
    """An adapter as `evermini.models.native` computes with it; implements `evermini.models.batch.Adapter`.

    Args:
        lora: Fits ``config``.
        config: The model's shape.
    """

    def __init__(self, lora: LoraWeights, config: ModelConfig) -> None:
        self._kept: list[Tensor] = []
        self.stride = 1
        layers = []
        for index in range(config.num_layers):
            found = lora.layer(index)
            ranks = {target: factors.rank for target, factors in found.items()}
            parts = kernels.LoraLayer()
            for number, target in enumerate(TARGETS):
                if target not in found:
                    continue
                start = sum(ranks.get(before, 0) for before in _FUSED.get(target, ()))
                padding = -config.intermediate_size % 32 if target in _INNER else 0
                parts[number] = self._pack(found[target], start, padding)
                self.stride = max(self.stride, start + ranks[target])
            layers.append(parts)
        self.layers = (kernels.LoraLayer * config.num_layers)(*layers)

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return sum(tensor.nbytes for tensor in self._kept)

    def _pack(self, factors: LoraFactors, start: int, padding: int) -> kernels.LoraFactors:
        # Half precision has 11 bits for numbers from 2^-14 to 2^16: with the largest at 1, nothing of weight gets lost.
        peaks = [float(side.abs().amax()) or 1.0 for side in (factors.a, factors.b)]
        a = F.pad(factors.a / peaks[0], (0, -factors.a.shape[1] % 16)).half()
        b = F.pad(factors.b / peaks[1], (0, 0, 0, padding)).half()
        b = F.pad(b, (0, 0, 0, -b.shape[0] % 16))
        b = b.view(-1, 16, factors.rank).transpose(1, 2).contiguous()
        self._kept += [a, b]
        scale = factors.scale * peaks[0] * peaks[1]
        return kernels.LoraFactors(a.data_ptr(), b.data_ptr(), scale, factors.rank, start)


_INNER = ("mlp.gate_proj", "mlp.up_proj")


class LoraBatch:
    """The adapters of one forward pass, for `evermini.kernels.Batch`; must outlive the call.

    Args:
        rows: As in `evermini.models.batch.ForwardBatch`; not empty.
        hidden_size: Of the model.
    """

    def __init__(self, rows: Sequence[AdapterRows], hidden_size: int) -> None:
        adapters = []
        for part in rows:
            assert isinstance(part.adapter, NativeAdapter), "the adapter is another model's"
            adapters.append(part.adapter)
        first, end = rows[0].start, rows[-1].end
        self._adapters = adapters
        self._starts = torch.tensor([*(part.start for part in rows), end], dtype=torch.int32)
        sizes = torch.tensor([part.end - part.start for part in rows])
        self._segments = torch.repeat_interleave(
            torch.arange(len(rows), dtype=torch.int32), sizes, output_size=end - first
        )
        self._layers = (ctypes.c_void_p * len(rows))(
            *(ctypes.addressof(adapter.layers) for adapter in adapters)
        )
        stride = max(adapter.stride for adapter in adapters)
        self._x = torch.empty(end - first, hidden_size + -hidden_size % 32)
        self._t = torch.empty(end - first, stride)
        self.struct = kernels.Lora(
            first, len(rows), stride, self._starts.data_ptr(), self._segments.data_ptr(),
            ctypes.addressof(self._layers), self._x.data_ptr(), self._t.data_ptr(),
        )  # fmt: skip
