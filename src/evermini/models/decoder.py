"""The dense decoder of the Llama, Qwen2 and Qwen3 families, in PyTorch operations.

It is the float32 oracle, the CUDA path (bfloat16), and what int8 weights run on where `evermini.kernels` is
unavailable. `evermini.models.native` is the same computation in native code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from evermini.models.batch import BLOCK_SIZE, ForwardBatch, KVCache, QueriesKeys, whole_prompt
from evermini.models.checkpoint import Checkpoint
from evermini.models.config import ModelConfig
from evermini.models.lora import LoraWeights
from evermini.models.quantize import quantize_activations, quantize_weight
from evermini.models.rms_norm import rms_norm
from evermini.models.rope import apply_rope, rope_tables, section_tables
from evermini.models.torch_lora import AdapterStack, BoundAdapters, TorchAdapter

LinearOp = Callable[[Tensor], Tensor]


class DenseLinear:
    """``x W^T + b`` in the dtype of the weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """Map (T, k) to (T, n)."""
        return F.linear(x, self.weight, self.bias)


class Int8Linear:
    """The integer product of `evermini.models.quantize` on ``torch._int_mm``."""

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: int) -> None:
        quantized = quantize_weight(weight, bits)
        self.weight_t = quantized.int8().t()  # (k, n)
        self.scale, self.bias = quantized.scale, bias

    def __call__(self, x: Tensor) -> Tensor:
        """Map (T, k) to (T, n)."""
        q, scale = quantize_activations(x)
        y = torch._int_mm(q, self.weight_t).float() * (scale[:, None] * self.scale)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class DecoderLayer:
    """Weights of one layer; q, k, v and gate, up are fused along the output dimension."""

    qkv: LinearOp
    o: LinearOp
    gate_up: LinearOp
    down: LinearOp
    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None


@dataclass(frozen=True)
class LayerParameters:
    """One layer's tensors as loaded: fused weights (n, k), biases or ``None``, norms; all float32."""

    qkv: Tensor
    qkv_bias: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    gate_up: Tensor
    down: Tensor
    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None


def load_layer(checkpoint: Checkpoint, index: int) -> LayerParameters:
    """Read layer ``index`` and fuse q, k, v and gate, up."""
    config = checkpoint.config
    prefix = f"model.layers.{index}."

    def read(name: str) -> Tensor:
        return checkpoint.tensor(prefix + name)

    def optional(name: str, present: bool) -> Tensor | None:
        return read(name) if present else None

    projections = [f"self_attn.{p}_proj" for p in "qkv"]
    return LayerParameters(
        qkv=torch.cat([read(f"{p}.weight") for p in projections]),
        qkv_bias=torch.cat([read(f"{p}.bias") for p in projections])
        if config.attention_bias
        else None,
        o=read("self_attn.o_proj.weight"),
        o_bias=optional("self_attn.o_proj.bias", config.output_bias),
        gate_up=torch.cat([read("mlp.gate_proj.weight"), read("mlp.up_proj.weight")]),
        down=read("mlp.down_proj.weight"),
        input_norm=read("input_layernorm.weight"),
        post_norm=read("post_attention_layernorm.weight"),
        q_norm=optional("self_attn.q_norm.weight", config.qk_norm),
        k_norm=optional("self_attn.k_norm.weight", config.qk_norm),
    )


class Decoder:
    """A decoder on PyTorch operations; implements `evermini.models.batch.Model`.

    Args:
        checkpoint: Where the weights come from.
        dtype: float32 or bfloat16: of weights, activations and KV memory.
        device: CPU or CUDA.
        bits: ``None`` for weights in ``dtype``; 4, 5, 6 or 8 for integer weights (CPU, float32 activations).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        bits: int | None = None,
    ) -> None:
        self.config: ModelConfig = checkpoint.config
        self.device = torch.device(device)
        self.dtype = dtype

        def place(tensor: Tensor) -> Tensor:
            return tensor.to(device=self.device, dtype=dtype)

        def linear(weight: Tensor, bias: Tensor | None) -> LinearOp:
            if bits is not None:
                return Int8Linear(weight, bias, bits)
            return DenseLinear(place(weight), None if bias is None else place(bias))

        self.embedding = place(checkpoint.tensor("model.embed_tokens.weight"))
        self.layers: list[DecoderLayer] = []
        for index in range(self.config.num_layers):
            p = load_layer(checkpoint, index)
            norms = (p.input_norm, p.post_norm, p.q_norm, p.k_norm)
            self.layers.append(
                DecoderLayer(
                    linear(p.qkv, p.qkv_bias),
                    linear(p.o, p.o_bias),
                    linear(p.gate_up, None),
                    linear(p.down, None),
                    *(None if norm is None else norm.to(self.device) for norm in norms),  # type: ignore[arg-type]
                )
            )
        self.norm = checkpoint.tensor("model.norm.weight").to(self.device)
        if self.config.tie_embeddings and bits is None:
            self.head: LinearOp = DenseLinear(self.embedding, None)
        else:
            name = "model.embed_tokens" if self.config.tie_embeddings else "lm_head"
            self.head = linear(checkpoint.tensor(f"{name}.weight"), None)
        self.cos, self.sin = rope_tables(self.config, self.device)
        self._stack: AdapterStack | None = None

    def new_kv_cache(self, num_blocks: int) -> KVCache:
        """Allocate KV memory in the dtype and on the device this model computes with."""
        return KVCache(self.config, num_blocks, self.dtype, self.device)

    @property
    def kv_dtype(self) -> torch.dtype:
        """The dtype `new_kv_cache` uses."""
        return self.dtype

    def load_adapter(self, lora: LoraWeights) -> TorchAdapter:
        """Return an adapter that fits this model, on its device.

        Raises:
            AdapterError: It does not fit.
        """
        lora.check(self.config)
        return TorchAdapter(lora, self.config, self.dtype, self.device)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        """Write the batch's keys and values into ``kv``; return logits (R, vocab_size) float32 on the CPU."""
        batch = batch.to(self.device)
        hidden = self._last_layer(batch, kv)[batch.logits_rows]
        return self._logits(rms_norm(hidden, self.norm, self.config.rms_norm_eps))

    @torch.inference_mode()
    def forward_hidden(self, batch: ForwardBatch, kv: KVCache) -> tuple[Tensor, Tensor]:
        """Return `forward`'s logits and every row's (T, hidden_size) after the final norm, float32 on the CPU."""
        batch = batch.to(self.device)
        normed = rms_norm(self._last_layer(batch, kv), self.norm, self.config.rms_norm_eps)
        return self._logits(normed[batch.logits_rows]), normed.float().cpu()

    def _last_layer(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        """Write the batch's keys and values into ``kv``; return (T, hidden_size) after the last layer."""
        hidden = F.embedding(batch.token_ids, self.embedding)
        if batch.embedded is not None:
            hidden[batch.embedded.rows] = batch.embedded.values.to(hidden.dtype)
        adapters, turns = self._bind(batch), self._turns(batch)
        for index in range(self.config.num_layers):
            hidden = self.run_layer(index, hidden, batch, kv, turns, adapters)
        return hidden

    def _bind(self, batch: ForwardBatch) -> BoundAdapters | None:
        """Return the batch's adapters side by side; those of the last batch stay, for the next one has the same."""
        if not batch.adapters:
            self._stack = None  # it holds memory of adapters that may be gone
            return None
        wanted: list[TorchAdapter] = []
        for part in batch.adapters:
            assert isinstance(part.adapter, TorchAdapter), "the adapter is another model's"
            wanted.append(part.adapter)
        if self._stack is None or self._stack.adapters != tuple(wanted):
            self._stack = AdapterStack(wanted)
        return self._stack.bind(batch.adapters, batch.token_ids.shape[0])

    def _turns(self, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of each row's rotation, (T, head_dim / 2)."""
        if batch.axes is not None:
            return section_tables(self.config, self.cos, self.sin, batch.axes)
        return self.cos[batch.positions], self.sin[batch.positions]

    def _logits(self, normed: Tensor) -> Tensor:
        return self.head(normed).float().cpu()

    def run_layer(
        self,
        index: int,
        hidden: Tensor,
        batch: ForwardBatch,
        kv: KVCache,
        turns: tuple[Tensor, Tensor],
        adapters: BoundAdapters | None = None,
    ) -> Tensor:
        """Return ``hidden`` (T, hidden_size) after layer ``index``; its keys and values go to ``kv``.

        ``turns`` are the cosines and sines of the rows' rotations.
        """
        config, layer = self.config, self.layers[index]
        q, k, v = self._project(index, hidden, adapters)
        q, k = apply_rope(q, *turns), apply_rope(k, *turns)
        blocks, offsets = batch.slots // BLOCK_SIZE, batch.slots % BLOCK_SIZE
        kv.k[index][blocks, :, :, offsets] = k
        kv.v[index][blocks, :, offsets] = v
        attended = attention(q, kv.k[index], kv.v[index], batch)
        hidden = hidden + self._linear(index, "o", attended.flatten(1), adapters)
        normed = rms_norm(hidden, layer.post_norm, config.rms_norm_eps)
        gate, up = self._linear(index, "gate_up", normed, adapters).chunk(2, -1)
        return hidden + self._linear(index, "down", F.silu(gate) * up, adapters)

    def _linear(
        self, index: int, name: str, x: Tensor, adapters: BoundAdapters | None = None
    ) -> Tensor:
        y: Tensor = getattr(self.layers[index], name)(x)
        return y if adapters is None else y + adapters.delta(index, name, x)

    def _project(
        self, index: int, hidden: Tensor, adapters: BoundAdapters | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return layer ``index``'s q, k, v before RoPE, each (T, heads, head_dim)."""
        config, layer = self.config, self.layers[index]
        eps, keys = config.rms_norm_eps, config.num_heads
        values = keys + config.num_kv_heads
        normed = rms_norm(hidden, layer.input_norm, eps)
        qkv = self._linear(index, "qkv", normed, adapters).view(
            hidden.shape[0], -1, config.head_dim
        )
        q, k, v = qkv[:, :keys], qkv[:, keys:values], qkv[:, values:]
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = rms_norm(q, layer.q_norm, eps), rms_norm(k, layer.k_norm, eps)
        return q, k, v

    @torch.inference_mode()
    def index_pass(self, token_ids: Tensor, layers: Sequence[int]) -> list[QueriesKeys]:
        """Run a whole prompt through the first layers; see `evermini.models.batch.IndexModel`."""
        batch = whole_prompt(token_ids).to(self.device)
        kv = self.new_kv_cache(-(-token_ids.shape[0] // BLOCK_SIZE))
        hidden, last = F.embedding(batch.token_ids, self.embedding), max(layers)
        turns = self._turns(batch)
        wanted: dict[int, QueriesKeys] = {}
        for index in range(last + 1):
            if index in layers:
                q, k, _ = self._project(index, hidden)
                wanted[index] = (q.float().cpu(), k.float().cpu())
            if index < last:
                hidden = self.run_layer(index, hidden, batch, kv, turns)
        return [wanted[index] for index in layers]


def attention(q: Tensor, k_blocks: Tensor, v_blocks: Tensor, batch: ForwardBatch) -> Tensor:
    """Causal grouped-query attention over block memory.

    Args:
        q: (T, num_heads, head_dim) rotated queries.
        k_blocks: (num_blocks, num_kv_heads, head_dim, BLOCK_SIZE).
        v_blocks: (num_blocks, num_kv_heads, BLOCK_SIZE, head_dim).
        batch: Which rows belong to which sequence.

    Returns:
        (T, num_heads, head_dim).
    """
    out = torch.empty_like(q)
    starts, lens = batch.query_start.tolist(), batch.context_lens.tolist()
    decoding = [s for s in range(len(lens)) if starts[s + 1] - starts[s] == 1]
    if len(decoding) > 1:
        rows = [starts[s] for s in decoding]
        out[rows] = _decode_attention(
            q[rows], k_blocks, v_blocks, batch, decoding, [lens[s] for s in decoding]
        )
    for s, length in enumerate(lens):
        start, end = starts[s], starts[s + 1]
        if end - start == 1 and len(decoding) > 1:
            continue
        blocks = batch.block_tables[s, : -(-length // BLOCK_SIZE)].long()
        k = (
            k_blocks[blocks].permute(1, 0, 3, 2).flatten(1, 2)[:, :length]
        )  # (kv_heads, length, head_dim)
        v = v_blocks[blocks].permute(1, 0, 2, 3).flatten(1, 2)[:, :length]
        first = length - (end - start)
        mask = torch.ones(end - start, length, dtype=torch.bool, device=q.device).tril(first)
        if batch.key_bias and (bias := batch.key_bias[s]) is not None:
            mask = _biased(mask, _fitted(bias, length), q.dtype)
        part = q[start:end].transpose(0, 1)[None]
        attended = F.scaled_dot_product_attention(
            part, k[None], v[None], attn_mask=mask, enable_gqa=True
        )
        out[start:end] = attended[0].transpose(0, 1)
    return out


def _decode_attention(
    q: Tensor,
    k_blocks: Tensor,
    v_blocks: Tensor,
    batch: ForwardBatch,
    seqs: list[int],
    lens: list[int],
) -> Tensor:
    """One query per sequence, (S, num_heads, head_dim), padded to the longest."""
    longest = max(lens)
    blocks = batch.block_tables[seqs, : -(-longest // BLOCK_SIZE)].long()  # (S, blocks)
    k = k_blocks[blocks].permute(0, 2, 1, 4, 3).flatten(2, 3)  # (S, kv_heads, length, head_dim)
    v = v_blocks[blocks].permute(0, 2, 1, 3, 4).flatten(2, 3)
    visible = (
        torch.arange(k.shape[2], device=q.device) < torch.tensor(lens, device=q.device)[:, None]
    )
    mask = visible[:, None, None]
    biases = [batch.key_bias[s] if batch.key_bias else None for s in seqs]
    if any(bias is not None for bias in biases):
        rows = [
            torch.zeros(k.shape[2], device=q.device) if bias is None else _fitted(bias, k.shape[2])
            for bias in biases
        ]
        mask = _biased(mask, torch.stack(rows)[:, None, None], q.dtype)
    return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask, enable_gqa=True)[
        :, :, 0
    ]


def _fitted(bias: Tensor, length: int) -> Tensor:
    """Return ``bias`` cut off or continued with zeros to ``length``."""
    return F.pad(bias[:length], (0, max(0, length - bias.shape[0])))


def _biased(visible: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to scores: ``bias`` where ``visible``, elsewhere minus infinity."""
    return torch.where(visible, bias, float("-inf")).to(dtype)
