"""Small stand-ins that behave like the real thing, shared by all tests."""

from __future__ import annotations

import torch
from torch import Tensor

from evermini.models.batch import BLOCK_SIZE, ForwardBatch, KVCache
from evermini.models.config import ModelConfig


def tiny_config(vocab_size: int = 97, max_position: int = 8192) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        max_position=max_position,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        tie_embeddings=False,
    )


class TinyModel:
    """Two layers of causal attention with random weights, in float64 (so batching cannot flip an argmax).

    Every key and value goes through the KV cache by way of ``slots`` and ``block_tables`` alone, and attention is
    sharp enough that one wrong, stale or foreign block changes the output. Blocks it is handed for the first time
    hold NaN: reading what was never written shows.

    Attributes:
        batches: Tokens per sequence of every step so far, e.g. ``[[32, 1, 1], [1, 1]]``.
        fail_on: Raise in the step with this number (0 is the first).
    """

    def __init__(self, config: ModelConfig | None = None, seed: int = 0) -> None:
        self.config = config or tiny_config()
        self.batches: list[list[int]] = []
        self.fail_on: int | None = None
        c, gen = self.config, torch.Generator().manual_seed(seed)
        width = c.num_heads * c.head_dim

        def weight(*shape: int) -> Tensor:
            return torch.randn(shape, generator=gen, dtype=torch.float64) / shape[0] ** 0.5

        self._embed = weight(c.vocab_size, c.hidden_size) * c.vocab_size**0.5
        self._head = weight(c.hidden_size, c.vocab_size) * 3
        self._layers = [
            {
                "q": weight(c.hidden_size, width) * 2,
                "k": weight(c.hidden_size, c.head_dim) * 2,
                "v": weight(c.hidden_size, c.head_dim),
                "o": weight(width, c.hidden_size),
            }
            for _ in range(c.num_layers)
        ]

    def new_kv_cache(self, num_blocks: int) -> KVCache:
        kv = KVCache(self.config, num_blocks, torch.float64)
        for memory in (*kv.k, *kv.v):
            memory.fill_(torch.nan)
        return kv

    def forward(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        c = self.config
        starts = batch.query_start.tolist()
        self.batches.append([end - start for start, end in zip(starts, starts[1:], strict=False)])
        if self.fail_on == len(self.batches) - 1:
            raise RuntimeError("injected failure")
        hidden = self._embed[batch.token_ids] + self._place(batch.positions)
        block, offset = batch.slots // BLOCK_SIZE, batch.slots % BLOCK_SIZE
        for layer, weights in enumerate(self._layers):
            x = hidden / hidden.norm(dim=-1, keepdim=True) * c.hidden_size**0.5
            q = (x @ weights["q"]).view(-1, c.num_heads, c.head_dim)
            kv.k[layer][block, 0, :, offset] = x @ weights["k"]
            kv.v[layer][block, 0, offset] = x @ weights["v"]
            out = torch.empty_like(q)
            for s, context in enumerate(batch.context_lens.tolist()):
                rows = slice(starts[s], starts[s + 1])
                table = batch.block_tables[s, : -(-context // BLOCK_SIZE)].long()
                k = kv.k[layer][table, 0].transpose(1, 2).reshape(-1, c.head_dim)[:context]
                v = kv.v[layer][table, 0].reshape(-1, c.head_dim)[:context]
                scores = torch.einsum("thd,cd->htc", q[rows], k) / c.head_dim**0.5
                future = torch.arange(context) > batch.positions[rows, None]
                scores = scores.masked_fill(future, -torch.inf)
                out[rows] = torch.einsum("htc,cd->thd", scores.softmax(-1), v)
            hidden = hidden + out.reshape(len(x), -1) @ weights["o"]
        return (hidden[batch.logits_rows] @ self._head).float()

    def _place(self, positions: Tensor) -> Tensor:
        half = self.config.hidden_size // 2
        angles = positions[:, None] / 100.0 ** (torch.arange(half, dtype=torch.float64) / half)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)
