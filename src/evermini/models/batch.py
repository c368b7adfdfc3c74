"""What one forward pass reads and writes: a flat batch of tokens, and the KV memory it lives in."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from evermini.models.config import ModelConfig
from evermini.models.lora import LoraWeights

BLOCK_SIZE = 32
"""Tokens per KV block."""

KEY_STEP = 64
"""Keys that attention looks at in one go."""

HUGE_PAGE = 2 << 20


class Adapter(Protocol):
    """An adapter (LoRA) in the form that one model computes with; made by its `Model.load_adapter`."""

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        ...


@dataclass(frozen=True)
class AdapterRows:
    """Rows ``start:end`` of a batch are computed under ``adapter``."""

    adapter: Adapter
    start: int
    end: int


@dataclass(frozen=True)
class EmbeddedRows:
    """Rows of a batch that are no tokens' but an image's: they enter the first layer as they are.

    Attributes:
        rows: (E,) int64, ascending.
        values: (E, hidden_size) float32.
    """

    rows: Tensor
    values: Tensor


@dataclass(frozen=True)
class ForwardBatch:
    """T new tokens of S sequences, flattened without padding; prefill chunks and decode steps mix freely.

    Sequence ``s`` owns rows ``query_start[s]:query_start[s+1]``; they are its last tokens, so row ``r`` of it has
    position ``context_lens[s] - (query_start[s+1] - r)`` and attends to every earlier position of its sequence.

    Attributes:
        token_ids: (T,) int64.
        positions: (T,) int64, position of each token in its sequence.
        slots: (T,) int64, ``block_id * BLOCK_SIZE + offset`` where the token's key and value are written.
        query_start: (S + 1,) int32.
        context_lens: (S,) int32, tokens in the sequence after this step.
        block_tables: (S, max_blocks) int32, the sequence's blocks in order; entries past its end are 0 and unread.
        logits_rows: (R,) int64, rows whose logits are wanted, ascending.
        adapters: Runs of rows with adapters, each beginning where the one before it ends, the last one at T; rows
            without one come before all of them.
        embedded: Rows whose token has no embedding of its own.
        axes: (3, T) int64, positions of the rows for RoPE, where the model has three axes and a row needs them;
            ``None``: ``positions`` on all axes.
        key_bias: Of each sequence, (n,) float32, what is added to the scores of its first n keys (n is a multiple of
            `KEY_STEP`), in every layer and head, or ``None``; empty: to none's.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    logits_rows: Tensor
    adapters: tuple[AdapterRows, ...] = ()
    embedded: EmbeddedRows | None = None
    axes: Tensor | None = None
    key_bias: tuple[Tensor | None, ...] = ()

    def to(self, device: torch.device) -> ForwardBatch:
        """Return the batch on ``device``."""
        embedded = self.embedded
        if embedded is not None:
            embedded = EmbeddedRows(embedded.rows.to(device), embedded.values.to(device))
        return ForwardBatch(
            self.token_ids.to(device),
            self.positions.to(device),
            self.slots.to(device),
            self.query_start.to(device),
            self.context_lens.to(device),
            self.block_tables.to(device),
            self.logits_rows.to(device),
            self.adapters,
            embedded,
            None if self.axes is None else self.axes.to(device),
            tuple(None if bias is None else bias.to(device) for bias in self.key_bias),
        )


def whole_prompt(token_ids: Tensor) -> ForwardBatch:
    """Return the batch of one sequence from position 0, in blocks 0, 1, ..., with no logits wanted."""
    length = token_ids.shape[0]
    positions = torch.arange(length, device=token_ids.device)
    return ForwardBatch(
        token_ids=token_ids,
        positions=positions,
        slots=positions,
        query_start=torch.tensor([0, length], dtype=torch.int32),
        context_lens=torch.tensor([length], dtype=torch.int32),
        block_tables=torch.arange(-(-length // BLOCK_SIZE), dtype=torch.int32)[None],
        logits_rows=torch.empty(0, dtype=torch.int64),
    )


class KVCache:
    """Key and value memory of all layers, in blocks of ``BLOCK_SIZE`` tokens.

        k[layer]: (num_blocks, num_kv_heads, head_dim, BLOCK_SIZE)   keys after RoPE, transposed inside a block
        v[layer]: (num_blocks, num_kv_heads, BLOCK_SIZE, head_dim)

    Transposed keys let a kernel compute the scores of 16 neighbouring tokens with one multiply-add per dimension.
    Who owns which block is the engine's business (`evermini.engine.kv`); this class is only the bytes.

    Args:
        config: The model's shape.
        num_blocks: Blocks to allocate.
        dtype: float32 (oracle), float16 (CPU) or bfloat16 (CUDA).
        device: Where the memory lives.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_blocks = num_blocks
        self.dtype = dtype
        k_shape = (num_blocks, config.num_kv_heads, config.head_dim, BLOCK_SIZE)
        v_shape = (num_blocks, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
        self.k = [_zeros(k_shape, dtype, device) for _ in range(config.num_layers)]
        self.v = [_zeros(v_shape, dtype, device) for _ in range(config.num_layers)]

    def copy_out(self, blocks: Sequence[int]) -> Tensor:
        """Return copies of blocks: (n, bytes per block) uint8 on the CPU, keys of all layers, then values."""
        tensors = (*self.k, *self.v)
        rows = torch.empty(len(blocks), sum(map(_block_bytes, tensors)), dtype=torch.uint8)
        index = torch.tensor(blocks, device=tensors[0].device)
        for tensor, part in zip(tensors, _parts(rows, tensors), strict=True):
            part.copy_(tensor[index])
        return rows

    def copy_in(self, blocks: Sequence[int], rows: Tensor) -> None:
        """Overwrite blocks with what `copy_out` returned."""
        tensors = (*self.k, *self.v)
        index = torch.tensor(blocks, device=tensors[0].device)
        for tensor, part in zip(tensors, _parts(rows, tensors), strict=True):
            tensor[index] = part.to(tensor.device)

    @staticmethod
    def bytes_per_block(config: ModelConfig, dtype: torch.dtype) -> int:
        """Return the bytes one block takes over all layers."""
        per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        return per_token * BLOCK_SIZE * dtype.itemsize


def _block_bytes(tensor: Tensor) -> int:
    return tensor[0].numel() * tensor.dtype.itemsize


def _parts(rows: Tensor, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield views (n, *shape of a block) of ``rows``, one for each tensor of a `KVCache`."""
    at = 0
    for tensor in tensors:
        end = at + _block_bytes(tensor)
        yield rows[:, at:end].view(tensor.dtype).view(len(rows), *tensor.shape[1:])
        at = end


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return zeros; on the CPU in huge pages where the system has them (blocks are read in random order)."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or num_bytes < HUGE_PAGE:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, num_bytes)  # zeroed by the system, and resident only once written
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)


class Model(Protocol):
    """What the engine asks of a model."""

    config: ModelConfig

    @property
    def kv_dtype(self) -> torch.dtype:
        """The dtype of its KV memory."""
        ...

    def new_kv_cache(self, num_blocks: int) -> KVCache:
        """Allocate KV memory in the dtype and on the device this model computes with."""
        ...

    def load_adapter(self, lora: LoraWeights) -> Adapter:
        """Return an adapter that fits this model, for `ForwardBatch.adapters`; safe from any thread."""
        ...

    def forward(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        """Write the batch's keys and values into ``kv`` and return logits (R, vocab_size) float32 on the CPU."""
        ...

    def forward_hidden(self, batch: ForwardBatch, kv: KVCache) -> tuple[Tensor, Tensor]:
        """Return `forward`'s logits, and what the head sees of every row: (T, hidden_size) float32 on the CPU."""
        ...


QueriesKeys = tuple[Tensor, Tensor]
"""Queries (T, num_heads, head_dim) and keys (T, num_kv_heads, head_dim) of one layer, before RoPE; float32, CPU."""


class IndexModel(Protocol):
    """What recall asks of a model; it needs no KV memory of the engine's and does not disturb it."""

    config: ModelConfig

    def index_pass(self, token_ids: Tensor, layers: Sequence[int]) -> list[QueriesKeys]:
        """Run a whole prompt from position 0 through the first layers, with dense causal attention.

        Args:
            token_ids: (T,) int64, at most ``config.max_position``.
            layers: Layers whose queries and keys are wanted. Nothing after the last one is computed, and of that one
                only its projections.

        Returns:
            One pair for each of ``layers``, in their order.
        """
        ...
