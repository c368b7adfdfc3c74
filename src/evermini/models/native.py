"""The decoder on `evermini.kernels`: integer weights, half-precision KV memory, one native call per pass.

Batch-invariant: a token's logits are the same bit for bit whatever else is in the batch, however its prompt was cut
into chunks, and whether its prefix came from the cache (reasons in kernels/linear.c and kernels/attention.c).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from evermini import kernels
from evermini.models.batch import BLOCK_SIZE, ForwardBatch, KVCache, QueriesKeys, whole_prompt
from evermini.models.checkpoint import Checkpoint
from evermini.models.config import ModelConfig
from evermini.models.lora import LoraWeights
from evermini.models.native_lora import LoraBatch, NativeAdapter
from evermini.models.packed import open_packed
from evermini.models.quantize import GROUP
from evermini.models.rms_norm import rms_norm
from evermini.models.rope import rope_tables, section_tables


def padded_to(size: int, multiple: int) -> int:
    """Return ``size`` rounded up."""
    return -(-size // multiple) * multiple


def linear_struct(
    weights: Mapping[str, Tensor], name: str, n: int, k: int, bits: int
) -> kernels.Linear:
    """Point at a packed matrix (n, k) of `evermini.models.packed`; the tensors must outlive the struct."""
    bias = weights.get(f"{name}.bias")
    return kernels.Linear(
        weights[f"{name}.data"].data_ptr(),
        weights[f"{name}.scale"].data_ptr(),
        None if bias is None else bias.data_ptr(),
        n, k, padded_to(k, GROUP), bits,
    )  # fmt: skip


class ActivationBuffer:
    """Room for ``rows`` quantised rows of up to ``width`` inputs."""

    def __init__(self, rows: int, width: int) -> None:
        padded = padded_to(width, GROUP)
        self.q = torch.empty(rows, padded, dtype=torch.int8)
        self.scale = torch.empty(rows)
        self.group_sums = torch.empty(rows, padded // GROUP + 1, dtype=torch.int32)
        self.struct = kernels.Activation(
            self.q.data_ptr(), self.scale.data_ptr(), self.group_sums.data_ptr()
        )


class _Workspace:
    """Intermediate results of a forward pass over up to ``rows`` tokens."""

    def __init__(self, config: ModelConfig, rows: int) -> None:
        attention = config.num_heads * config.head_dim
        self.rows = rows
        self.act = ActivationBuffer(
            rows, max(config.hidden_size, config.intermediate_size, attention)
        )
        self.qkv = torch.empty(rows, attention + 2 * config.num_kv_heads * config.head_dim)
        self.attn = torch.empty(rows, attention)
        self.gated = torch.empty(rows, padded_to(config.intermediate_size, 32))
        self.struct = kernels.Workspace(
            self.act.struct, self.qkv.data_ptr(), self.attn.data_ptr(), self.gated.data_ptr()
        )


class NativeDecoder:
    """A decoder on native kernels; implements `evermini.models.batch.Model`.

    Args:
        checkpoint: Where the weights come from; its head_dim must be a multiple of 16.
        bits: Weight bits: 8, 6, 5 or 4. The output projection keeps at least 6.
        home: Folder of all caches, where the packed weights are kept; by default `evermini.config.default_home`.
    """

    kv_dtype = torch.float16

    def __init__(self, checkpoint: Checkpoint, *, bits: int = 8, home: Path | None = None) -> None:
        library = kernels.load()
        assert library is not None, "callers check kernels.load() first"
        self._library = library
        self.config: ModelConfig = checkpoint.config
        config = self.config
        self._weights = open_packed(checkpoint, bits, home)
        structs = [self._layer_struct(index, bits) for index in range(config.num_layers)]
        self._layers = (kernels.Layer * config.num_layers)(*structs)
        self._head = linear_struct(
            self._weights, "head", config.vocab_size, config.hidden_size, max(bits, 6)
        )
        self._cos, self._sin = rope_tables(config)
        self._shape = self._shape_struct(self._cos, self._sin)
        self._workspace = _Workspace(config, 1)
        self._index_workspace = _Workspace(config, 1)

    def _layer_struct(self, index: int, bits: int) -> kernels.Layer:
        config, weights, prefix = self.config, self._weights, f"layers.{index}."
        hidden, inner = config.hidden_size, config.intermediate_size
        attention = config.num_heads * config.head_dim
        fused = attention + 2 * config.num_kv_heads * config.head_dim
        shapes = {
            "qkv": (fused, hidden),
            "o": (hidden, attention),
            "gate_up": (2 * padded_to(inner, 32), hidden),
            "down": (hidden, inner),
        }
        norms = [
            weights.get(prefix + name) for name in ("input_norm", "post_norm", "q_norm", "k_norm")
        ]
        return kernels.Layer(
            *(linear_struct(weights, prefix + name, n, k, bits) for name, (n, k) in shapes.items()),
            *(None if norm is None else norm.data_ptr() for norm in norms),
        )

    def _shape_struct(self, cos: Tensor, sin: Tensor) -> kernels.Shape:
        """Describe the model; the tables of rotations, which positions are rows of, must outlive the struct."""
        config = self.config
        return kernels.Shape(
            config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads, config.head_dim,
            config.rms_norm_eps, config.head_dim**-0.5, cos.data_ptr(), sin.data_ptr(),
        )  # fmt: skip

    def new_kv_cache(self, num_blocks: int) -> KVCache:
        """Allocate float16 KV memory."""
        return KVCache(self.config, num_blocks, self.kv_dtype)

    def load_adapter(self, lora: LoraWeights) -> NativeAdapter:
        """Return an adapter that fits this model in the kernels' form.

        Raises:
            AdapterError: It does not fit.
        """
        lora.check(self.config)
        return NativeAdapter(lora, self.config)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        """Write the batch's keys and values into ``kv``; return logits (R, vocab_size) float32."""
        return self._logits(self._last_layer(batch, kv)[batch.logits_rows])

    @torch.inference_mode()
    def forward_hidden(self, batch: ForwardBatch, kv: KVCache) -> tuple[Tensor, Tensor]:
        """Return `forward`'s logits and every row's (T, hidden_size) after the final norm."""
        hidden = self._last_layer(batch, kv)
        normed = rms_norm(hidden, self._weights["norm"], self.config.rms_norm_eps)
        return self._logits(hidden[batch.logits_rows]), normed

    def _last_layer(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        """Write the batch's keys and values into ``kv``; return (T, hidden_size) after the last layer."""
        hidden = self._weights["embedding"][batch.token_ids].float()
        if batch.embedded is not None:
            hidden[batch.embedded.rows] = batch.embedded.values
        shape = self._shape
        if batch.axes is not None:
            # To the kernels a position is a row of the tables: these have a row of its own for each of the batch's.
            cos, sin = section_tables(self.config, self._cos, self._sin, batch.axes)
            shape = self._shape_struct(cos, sin)
            batch = replace(batch, positions=torch.arange(hidden.shape[0]))
        lora = LoraBatch(batch.adapters, self.config.hidden_size) if batch.adapters else None
        pointers = self._batch_struct(batch, lora)
        workspace = self._workspace_for(hidden.shape[0])
        self._run_layers(shape, 0, self.config.num_layers, hidden, pointers, kv, workspace)
        return hidden

    def _run_layers(
        self,
        shape: kernels.Shape,
        first: int,
        count: int,
        hidden: Tensor,
        batch: kernels.Batch,
        kv: KVCache,
        workspace: _Workspace,
    ) -> None:
        """Update ``hidden`` (T, hidden_size) in place by ``count`` layers; their keys and values go to ``kv``."""
        pointers = ctypes.c_void_p * count
        self._library.em_layers(
            ctypes.byref(shape), ctypes.byref(self._layers, first * ctypes.sizeof(kernels.Layer)), count,
            ctypes.byref(batch), ctypes.byref(workspace.struct), hidden.data_ptr(),
            pointers(*(tensor.data_ptr() for tensor in kv.k[:count])),
            pointers(*(tensor.data_ptr() for tensor in kv.v[:count])),
        )  # fmt: skip

    @torch.inference_mode()
    def index_pass(self, token_ids: Tensor, layers: Sequence[int]) -> list[QueriesKeys]:
        """Run a whole prompt through the first layers; see `evermini.models.batch.IndexModel`."""
        length, last = token_ids.shape[0], max(layers)
        if self._index_workspace.rows < length:
            self._index_workspace = _Workspace(self.config, length)
        workspace, config = self._index_workspace, self.config
        batch = whole_prompt(token_ids)
        kv = KVCache(replace(config, num_layers=1), -(-length // BLOCK_SIZE), self.kv_dtype)
        hidden = self._weights["embedding"][token_ids].float()
        pointers = self._batch_struct(batch)
        num_heads = config.num_heads
        wanted: dict[int, QueriesKeys] = {}
        for index in range(last + 1):
            if index == last:
                self._library.em_qkv(
                    ctypes.byref(self._shape), ctypes.byref(self._layers[index]),
                    ctypes.byref(workspace.struct), hidden.data_ptr(), length,
                )  # fmt: skip
            else:
                self._run_layers(self._shape, index, 1, hidden, pointers, kv, workspace)
            if index in layers:
                qkv = workspace.qkv[:length].view(length, -1, config.head_dim)
                wanted[index] = (
                    qkv[:, :num_heads].clone(),
                    qkv[:, num_heads : num_heads + config.num_kv_heads].clone(),
                )
        return [wanted[index] for index in layers]

    def _logits(self, hidden: Tensor) -> Tensor:
        rows = hidden.shape[0]
        logits = torch.empty(rows, self.config.vocab_size)
        if rows:
            self._library.em_logits(
                ctypes.byref(self._shape), self._weights["norm"].data_ptr(), ctypes.byref(self._head),
                ctypes.byref(self._workspace_for(rows).struct), hidden.data_ptr(), rows, logits.data_ptr(),
            )  # fmt: skip
        return logits

    def _workspace_for(self, rows: int) -> _Workspace:
        if self._workspace.rows < rows:
            self._workspace = _Workspace(self.config, rows)
        return self._workspace

    @staticmethod
    def _batch_struct(batch: ForwardBatch, lora: LoraBatch | None = None) -> kernels.Batch:
        """Point at the batch's tensors and its adapters; they must outlive the struct."""
        for tensor in (
            batch.positions,
            batch.slots,
            batch.query_start,
            batch.context_lens,
            batch.block_tables,
        ):
            assert tensor.is_contiguous()
        bias = bias_lens = None
        if any(values is not None for values in batch.key_bias):
            count = len(batch.key_bias)
            bias = (ctypes.c_void_p * count)(
                *(None if values is None else values.data_ptr() for values in batch.key_bias)
            )
            bias_lens = (ctypes.c_int64 * count)(
                *(0 if values is None else values.shape[0] for values in batch.key_bias)
            )
        return kernels.Batch(
            batch.token_ids.shape[0], batch.context_lens.shape[0], batch.block_tables.shape[1],
            batch.positions.data_ptr(), batch.slots.data_ptr(), batch.query_start.data_ptr(),
            batch.context_lens.data_ptr(), batch.block_tables.data_ptr(),
            None if lora is None else ctypes.addressof(lora.struct), bias, bias_lens,
        )  # fmt: skip
