"""A step's batch: the rows of all chunks behind each other, and what the model has to know of each.

    chunk of a    rows 0-2     positions 5-7      adapter, images, blocks of a
    chunk of b    row  3       position  40       those of b
    ...

A row is a token to compute: a known one, or one of a draft.
"""

from __future__ import annotations

from collections import abc
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from evermini.engine.scheduler import Chunk
from evermini.models.batch import BLOCK_SIZE, AdapterRows, EmbeddedRows, ForwardBatch


def batch_of(chunks: abc.Sequence[Chunk], tables: abc.Sequence[abc.Sequence[int]]) -> ForwardBatch:
    """Return the batch of some chunks.

    Args:
        chunks: As `Scheduler.schedule` returns them.
        tables: The blocks of each one's sequence.
    """
    query_start = np.zeros(len(chunks) + 1, np.int32)
    np.cumsum([chunk.context - chunk.start for chunk in chunks], out=query_start[1:])
    block_tables = np.zeros((len(chunks), max(map(len, tables))), np.int32)
    token_ids: list[int] = []
    positions, slots, rows = [], [], []
    for index, (chunk, table) in enumerate(zip(chunks, tables, strict=True)):
        block_tables[index, : len(table)] = table
        at = np.arange(chunk.start, chunk.context, dtype=np.int64)
        positions.append(at)
        slots.append(block_tables[index, at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE)
        token_ids += chunk.sequence.token_ids[chunk.start : chunk.end]
        token_ids += chunk.draft
        first = int(query_start[index]) - chunk.start
        rows += [first + position for position in wanted_rows(chunk)]
    return ForwardBatch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        positions=torch.from_numpy(np.concatenate(positions)),
        slots=torch.from_numpy(np.concatenate(slots).astype(np.int64)),
        query_start=torch.from_numpy(query_start),
        context_lens=torch.tensor([chunk.context for chunk in chunks], dtype=torch.int32),
        block_tables=torch.from_numpy(block_tables),
        logits_rows=torch.tensor(rows, dtype=torch.int64),
        adapters=_adapter_rows(chunks, query_start.tolist()),
        embedded=_embedded_rows(chunks, query_start.tolist()),
        axes=_axes(chunks),
        key_bias=_key_bias(chunks),
    )


def wanted_rows(chunk: Chunk) -> range:
    """Return the positions in ``chunk`` whose logits are wanted.

    All that score the prompt, the last known one, and a draft's.
    """
    sequence = chunk.sequence
    end = chunk.end
    is_last = end == len(sequence.token_ids)
    if sequence.is_scoring:
        return range(max(chunk.start, len(sequence.prompt_logprobs) - 1), end)
    is_drawn = is_last and sequence.params.max_tokens > 0
    return range(end - 1, chunk.context) if is_drawn else range(0)


def draws(chunk: Chunk) -> bool:
    """Return whether a token is drawn after ``chunk``."""
    sequence = chunk.sequence
    is_last = chunk.end == len(sequence.token_ids)
    return is_last and sequence.num_generated < sequence.params.max_tokens


def _adapter_rows(
    chunks: abc.Sequence[Chunk], starts: abc.Sequence[int]
) -> tuple[AdapterRows, ...]:
    """Return the runs of rows with adapters, as `ForwardBatch.adapters` has them.

    Args:
        chunks: As `Scheduler.schedule` returns them.
        starts: Chunk ``i`` has the rows ``starts[i]:starts[i + 1]``.
    """
    runs: list[AdapterRows] = []
    previous = b""
    for chunk, start, end in zip(chunks, starts, starts[1:], strict=False):
        if (adapter := chunk.sequence.adapter) is None:
            continue
        if adapter.key == previous:
            runs[-1] = replace(runs[-1], end=end)
        else:
            runs.append(AdapterRows(adapter.weights, start, end))
        previous = adapter.key
    return tuple(runs)


def _embedded_rows(chunks: abc.Sequence[Chunk], starts: abc.Sequence[int]) -> EmbeddedRows | None:
    """Return the rows that stand for images; chunk ``i`` has the rows ``starts[i]:starts[i + 1]``."""
    rows: list[Tensor] = []
    values: list[Tensor] = []
    for chunk, first in zip(chunks, starts, strict=False):
        embedded = chunk.sequence.embedded
        for run in () if embedded is None else embedded.runs:
            begin, end = max(run.start, chunk.start), min(run.end, chunk.end)
            if begin < end:
                rows.append(torch.arange(begin, end) + (first - chunk.start))
                values.append(run.values[begin - run.start : end - run.start])
    return EmbeddedRows(torch.cat(rows), torch.cat(values)) if rows else None


def _axes(chunks: abc.Sequence[Chunk]) -> Tensor | None:
    """Return the rows' positions on three axes, if one of them needs that."""
    found = [chunk.sequence.embedded for chunk in chunks]
    if all(embedded is None or embedded.axes is None for embedded in found):
        return None
    parts = [
        np.broadcast_to(np.arange(chunk.start, chunk.context), (3, chunk.context - chunk.start))
        if embedded is None or embedded.axes is None
        else embedded.positions(chunk.start, chunk.context)
        for chunk, embedded in zip(chunks, found, strict=True)
    ]
    return torch.from_numpy(np.concatenate(parts, axis=1).astype(np.int64))


def _key_bias(chunks: abc.Sequence[Chunk]) -> tuple[Tensor | None, ...]:
    """Return what attention adds for each chunk's sequence; empty if it adds nothing at all."""
    found = [chunk.sequence.emphasis for chunk in chunks]
    if all(emphasis is None for emphasis in found):
        return ()
    return tuple(None if emphasis is None else emphasis.key_bias for emphasis in found)
