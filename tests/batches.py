"""Forward batches by hand, for tests that talk to a model without an engine."""

from __future__ import annotations

import torch

from evermini.models.batch import BLOCK_SIZE, ForwardBatch


def make_batch(
    chunks: list[tuple[list[int], int, list[int]]], *, all_rows: bool = False
) -> ForwardBatch:
    """Build a batch of (new token ids, tokens already in KV memory, block ids) per sequence.

    Logits are asked for each sequence's last row, or for every row.
    """
    token_ids, positions, slots, starts, lens = [], [], [], [0], []
    for ids, done, blocks in chunks:
        for i, token in enumerate(ids):
            position = done + i
            token_ids.append(token)
            positions.append(position)
            slots.append(blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        starts.append(len(token_ids))
        lens.append(done + len(ids))
    tables = torch.zeros(
        len(chunks), max(len(blocks) for _, _, blocks in chunks), dtype=torch.int32
    )
    for row, (_, _, blocks) in enumerate(chunks):
        tables[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    rows = range(len(token_ids)) if all_rows else [start - 1 for start in starts[1:]]
    return ForwardBatch(
        torch.tensor(token_ids),
        torch.tensor(positions),
        torch.tensor(slots),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(lens, dtype=torch.int32),
        tables,
        torch.tensor(list(rows)),
    )
