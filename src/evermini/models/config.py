"""The shape of a decoder: the one description that loaders produce and the decoder consumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Family = Literal["llama", "qwen2", "qwen3"]


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder of the Llama, Qwen2 (also 2.5) or Qwen3 family.

    Attributes:
        family: Which family's conventions apply.
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated MLP.
        num_layers: Number of decoder layers.
        num_heads: Query heads.
        num_kv_heads: Key/value heads (grouped-query attention); divides ``num_heads``.
        head_dim: Width of one head.
        max_position: Native window in tokens: no position at or above it is ever used.
        rope_theta: RoPE base.
        rms_norm_eps: RMSNorm epsilon.
        tie_embeddings: Output projection shares the embedding.
        attention_bias: q, k and v projections have a bias (Qwen2).
        output_bias: o_proj has a bias too (Llama checkpoints with ``attention_bias``).
        qk_norm: RMSNorm on each query and key head before RoPE (Qwen3).
        rope_scaling: ``None`` or the Hugging Face dict (``llama3`` and ``linear`` are supported).
        rope_sections: Of a model whose positions have three axes (M-RoPE): how many neighbouring dimension pairs of a
            head turn by each axis in turn; their sum is ``head_dim / 2``. Empty: positions are numbers.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rope_theta: float
    rms_norm_eps: float
    tie_embeddings: bool
    attention_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    rope_scaling: dict[str, Any] | None = None
    rope_sections: tuple[int, ...] = ()
