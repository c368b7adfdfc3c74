"""From a question to the few spans of a context that it needs.

score   per retrieval head: softmax of the question's queries over *all* keys, per block of 32 tokens, averaged over
        the question's tokens, minus the same for the null question; summed over heads
take    best blocks first, each with its neighbours, until the scores fall off or the budget is spent
again   for chains of facts: ask with the best spans before the question, at most three rounds
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evermini.recall.calibration import Calibration
from evermini.recall.scan import BLOCK, KeyRun, block_mass
from evermini.recall.store import IndexedSegment

NULL_QUESTION = "N/A"
MAX_SPAN_BLOCKS = 8


@dataclass(frozen=True)
class Policy:
    """How much to take.

    Attributes:
        max_tokens: Budget of all spans together, in tokens of the index model.
        neighbours: Blocks taken on either side of a chosen one.
        falloff: A block is taken only if its score is at least this share of the best one's.
        min_peaks: Chosen blocks to take in any case.
        max_rounds: Rounds at most; a round after the first is done only while it finds something new.
    """

    max_tokens: int = 2048
    neighbours: int = 2
    falloff: float = 0.2
    min_peaks: int = 3
    max_rounds: int = 2


@dataclass(frozen=True)
class TokenSpan:
    """Consecutive tokens of one segment; ``segment`` counts in the context, ``round`` from 1."""

    segment: int
    start: int
    end: int
    score: float
    round: int


Queries = Callable[[Sequence[int], Sequence[int]], list[Tensor]]
"""(context ids, question ids) -> per pair of the calibration, (heads of it, question tokens, head_dim) queries."""


class ContextScan:
    """The keys of a list of segments, ready to be scored.

    Args:
        calibration: The index's.
        segments: The context, in order; all complete.
    """

    def __init__(self, calibration: Calibration, segments: Sequence[IndexedSegment]) -> None:
        self.calibration = calibration
        self.segments = list(segments)
        self.first_blocks: list[int] = []
        self._runs: list[list[KeyRun]] = [[] for _ in calibration.pairs]
        total = 0
        for segment in self.segments:
            self.first_blocks.append(total)
            for chunk in range(segment.num_chunks):
                first = total + chunk * calibration.windows.chunk // BLOCK
                for runs, (keys, scales) in zip(self._runs, segment.chunk_keys(chunk), strict=True):
                    runs.append(KeyRun(keys, scales, first))
            total += -(-len(segment.ids) // BLOCK)
        self.num_blocks = total

    def score(self, queries: Sequence[Tensor], null: Sequence[Tensor]) -> Tensor:
        """Return each block's score, (num_blocks,): the vote of all heads, null question subtracted."""
        total = torch.zeros(self.num_blocks)
        for runs, asked, nothing in zip(self._runs, queries, null, strict=True):
            heads, length, dim = asked.shape
            both = torch.cat([asked.reshape(-1, dim), nothing.reshape(-1, dim)])
            weights = torch.full((both.shape[0],), 1 / length)
            weights[heads * length :] = -1 / nothing.shape[1]
            total += block_mass(both, runs, self.num_blocks) @ weights
        return total

    def block_place(self, block: int) -> tuple[int, int]:
        """Return the segment of a block and its first token there."""
        low, high = 0, len(self.first_blocks) - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.first_blocks[middle] <= block else (low, middle - 1)
        return low, (block - self.first_blocks[low]) * BLOCK

    def segment_blocks(self, segment: int) -> tuple[int, int]:
        """Return the range of a segment's blocks."""
        first = self.first_blocks[segment]
        return first, first + -(-len(self.segments[segment].ids) // BLOCK)


def smooth(scores: Tensor) -> Tensor:
    """Return scores in which a passage that straddles two blocks counts as much as one that lies inside a block."""
    padded = torch.nn.functional.pad(scores, (1, 1))
    return scores + torch.maximum(padded[..., :-2], padded[..., 2:]).clamp_min(0) / 2


def spread(scores: Tensor) -> float:
    """Return how evenly positive scores are spread: 0 (one block) to 1 (all alike)."""
    share = scores.clamp_min(0)
    total = float(share.sum())
    if total <= 0 or len(scores) < 2:
        return 1.0 if len(scores) > 1 else 0.0
    share = share / total
    entropy = -float((share * share.clamp_min(1e-12).log()).sum())
    return entropy / math.log(len(scores))


def take_blocks(
    scan: ContextScan,
    scores: Tensor,
    policy: Policy,
    taken: set[int],
    budget: int,
    reference: float | None = None,
) -> list[int]:
    """Add the best blocks with their neighbours to ``taken``, within ``budget`` tokens; return the chosen ones.

    Args:
        scan: The context.
        scores: What the blocks got, (num_blocks,).
        policy: How much to take.
        taken: Blocks taken so far; grows.
        budget: Tokens that may be added.
        reference: The first round's best score, in later rounds: they take only what compares with it.
    """
    peaks: list[int] = []
    if not scan.num_blocks:
        return peaks
    order = torch.topk(scores, min(scan.num_blocks, 4096)).indices.tolist()
    floor = max(0.0, (float(scores[order[0]]) if reference is None else reference) * policy.falloff)
    min_peaks = policy.min_peaks if reference is None else 0
    for block in order:
        if budget < BLOCK or (len(peaks) >= min_peaks and scores[block] <= floor):
            break
        first, end = scan.segment_blocks(scan.block_place(block)[0])
        around = range(
            max(first, block - policy.neighbours), min(end, block + policy.neighbours + 1)
        )
        new = sorted(
            (other for other in around if other not in taken), key=lambda other: abs(other - block)
        )
        new = new[: budget // BLOCK]
        if new:
            budget -= len(new) * BLOCK
            taken.update(new)
            peaks.append(block)
    return peaks


def to_spans(scan: ContextScan, scores: Tensor, blocks: dict[int, int]) -> list[TokenSpan]:
    """Join adjacent blocks (block -> round) of a segment into spans, in order; a span has its best block's score.

    No span is longer than ``MAX_SPAN_BLOCKS``, so that a small budget can take the best part of a long passage.
    """
    spans: list[TokenSpan] = []
    for block in sorted(blocks):
        segment, start = scan.block_place(block)
        end = min(start + BLOCK, len(scan.segments[segment].ids))
        score, number = float(scores[block]), blocks[block]
        if spans and spans[-1].segment == segment and _joins(spans[-1], start):
            last = spans.pop()
            start, score, number = last.start, max(score, last.score), min(number, last.round)
        spans.append(TokenSpan(segment, start, end, score, number))
    return spans


def _joins(span: TokenSpan, start: int) -> bool:
    return span.end == start and span.end - span.start < MAX_SPAN_BLOCKS * BLOCK
