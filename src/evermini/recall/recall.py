"""Recall as one object: ingest texts once, then find what a question needs.

    recall = Recall(model, tokenizer, store)
    context = cut(text, "book.txt")
    recall.ingest(context)
    selection = recall.ask(context, "Who killed the butler?")
    selection.spans                     # where to look, with scores

Safe to use from several threads. Native passes run one at a time, a chunk each, inside ``gate``: whoever shares the
processor (an engine's step loop) can hand in its own to take turns.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from evermini.models.batch import IndexModel
from evermini.recall.calibration import Calibration
from evermini.recall.prompt import Span
from evermini.recall.scan import BLOCK
from evermini.recall.segment import Segment, TextTokenizer, tokenize
from evermini.recall.select import (
    NULL_QUESTION,
    ContextScan,
    Policy,
    TokenSpan,
    smooth,
    spread,
    take_blocks,
    to_spans,
)
from evermini.recall.store import Damage, IndexedSegment, SegmentStore

logger = logging.getLogger(__name__)

_MAX_OPEN = 8192


@dataclass(frozen=True)
class Progress:
    """How far an ingest is; ``eta`` and ``seconds`` in seconds, ``eta`` is ``None`` before the first chunk."""

    done_tokens: int
    total_tokens: int
    seconds: float
    tokens_per_second: float
    eta: float | None


@dataclass(frozen=True)
class Ingested:
    """What an ingest did.

    Attributes:
        num_tokens: Tokens of the context, by the index model's tokenizer.
        num_new_tokens: Those that were not indexed before.
        num_repaired_chunks: Chunks found damaged and computed again.
        seconds: How long it took.
    """

    num_tokens: int
    num_new_tokens: int
    num_repaired_chunks: int
    seconds: float


@dataclass(frozen=True)
class Selection:
    """What was found for a question, and why.

    Attributes:
        spans: Passages in document order.
        num_tokens: Their length together, in tokens of the index model.
        num_context_tokens: Length of the context.
        rounds: Rounds done.
        top_score: Score of the best block; at most the number of heads.
        spread: 0 to 1: how evenly the score lies over the context. A needle is near 0; a question about the whole
            document has no place to point at and is near 1.
        query_seconds: Time for the question's forward passes.
        scan_seconds: Time for the scans of the index.
    """

    spans: tuple[Span, ...]
    num_tokens: int
    num_context_tokens: int
    rounds: int
    top_score: float
    spread: float
    query_seconds: float
    scan_seconds: float


class Recall:
    """Ingest and selection with one index model.

    Args:
        model: The index model; may be another one than answers.
        tokenizer: The index model's.
        store: Where the index lives; its calibration must be the model's.
        gate: Entered around each native pass; by default a lock of its own.
    """

    def __init__(
        self,
        model: IndexModel,
        tokenizer: TextTokenizer,
        store: SegmentStore,
        *,
        gate: Callable[[], AbstractContextManager[object]] | None = None,
    ) -> None:
        self.store = store
        self._model, self._tokenizer = model, tokenizer
        lock = threading.Lock()
        self._gate = gate if gate is not None else lambda: lock
        self._open: OrderedDict[str, IndexedSegment] = OrderedDict()
        self._open_lock = threading.Lock()
        self._null: list[Tensor] | None = None

    @property
    def calibration(self) -> Calibration:
        """The heads it asks."""
        return self.store.calibration

    # Ingest

    def ingest(
        self,
        segments: Sequence[Segment],
        *,
        progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Ingested:
        """Index what is not indexed yet. Interrupted at any point, the next call goes on after the last full chunk.

        Args:
            segments: The context; equal ones are done once.
            progress: Called after every chunk.
            cancelled: Asked before every chunk; if true, stop there.

        Raises:
            RecallDiskError: The index does not fit under the store's cap.
            ModelError: The tokenizer's tokens cannot be mapped to the text.
        """
        return self._ingest(segments, progress, cancelled)[0]

    def _ingest(
        self,
        segments: Sequence[Segment],
        progress: Callable[[Progress], None] | None,
        cancelled: Callable[[], bool],
    ) -> tuple[Ingested, dict[str, IndexedSegment]]:
        began = time.monotonic()
        repaired = new = 0
        unique = {segment.digest: segment for segment in segments}
        opened = {digest: self._prepare(segment) for digest, segment in unique.items()}
        if missing := sum(segment.missing_bytes() for segment in opened.values()):
            for info in self.store.make_room(missing, tuple(unique)):
                self._forget(info.digest)
        total = sum(len(segment.ids) for segment in opened.values())
        done = sum(self._done_tokens(segment) for segment in opened.values())
        for digest, segment in opened.items():
            if segment.is_complete and digest in self._open:
                continue
            with self.store.writing(digest):
                if not self.store.touch(digest):  # evicted in the meantime, by another process
                    self.store.create(unique[digest], segment.ids, segment.char_starts)
                for chunk in segment.damaged_chunks():
                    logger.warning("%s; computing it again", Damage(digest, chunk))
                    self._index_chunk(segment, chunk)
                    repaired += 1
                for chunk in range(segment.chunks_done(), segment.num_chunks):
                    if cancelled():
                        return Ingested(total, new, repaired, time.monotonic() - began), opened
                    start, end = self.calibration.windows.chunk_range(chunk, len(segment.ids))
                    self._index_chunk(segment, chunk)
                    new, done = new + end - start, done + end - start
                    if progress is not None:
                        progress(_progress(done, total, new, time.monotonic() - began))
            self._remember(segment)
        return Ingested(total, new, repaired, time.monotonic() - began), opened

    def missing_tokens(self, segments: Iterable[Segment]) -> int | None:
        """Return how many tokens an ingest would compute, or ``None`` if some text was never tokenised."""
        missing = 0
        for segment in segments:
            opened = self._find(segment.digest)
            if opened is None:
                return None
            missing += len(opened.ids) - self._done_tokens(opened)
        return missing

    def verify(self, *, repair: bool = False) -> list[Damage]:
        """Read the whole index and return what is damaged.

        Args:
            repair: Compute damaged chunks again. Damaged tokens cannot be: that segment is removed, and the next
                ingest of its text makes it again.
        """
        damage = self.store.verify()
        if repair:
            for item in damage:
                self._forget(item.digest)
                segment = self.store.open(item.digest)
                if item.chunk is None or segment is None:
                    self.store.remove(self.calibration.fingerprint, item.digest)
                    continue
                with self.store.writing(item.digest):
                    self._index_chunk(segment, item.chunk)
        return damage

    def _prepare(self, segment: Segment) -> IndexedSegment:
        """Return the segment open, its tokens on disk."""
        opened = self._find(segment.digest)
        if opened is not None:
            return opened
        with self.store.writing(segment.digest):
            opened = self.store.open(segment.digest)
            if opened is None:
                ids, starts = tokenize(self._tokenizer, segment)
                opened = self.store.create(segment, ids, starts)
        return opened

    def _find(self, digest: str) -> IndexedSegment | None:
        with self._open_lock:
            opened = self._open.get(digest)
            if opened is not None:
                self._open.move_to_end(digest)
        if opened is None:
            return self.store.open(digest)
        self.store.touch(digest)
        return opened

    def _remember(self, segment: IndexedSegment) -> None:
        """Keep a segment open that is complete and was checked."""
        with self._open_lock:
            self._open[segment.digest] = segment
            while len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)

    def _forget(self, digest: str) -> None:
        with self._open_lock:
            self._open.pop(digest, None)

    def _done_tokens(self, segment: IndexedSegment) -> int:
        return min(len(segment.ids), segment.chunks_done() * self.calibration.windows.chunk)

    def _index_chunk(self, segment: IndexedSegment, chunk: int) -> None:
        calibration = self.calibration
        start, end = calibration.windows.chunk_range(chunk, len(segment.ids))
        ids = torch.from_numpy(calibration.windows.chunk_pass(segment.ids, chunk))
        with self._gate():
            by_layer = dict(
                zip(
                    calibration.layers, self._model.index_pass(ids, calibration.layers), strict=True
                )
            )
        rows = [by_layer[layer][1][start - end :, head] for layer, head in calibration.pairs]
        segment.write_chunk(chunk, torch.stack(rows))

    # Questions

    def ask(
        self, segments: Sequence[Segment], question: str, policy: Policy | None = None
    ) -> Selection:
        """Find the passages that a question needs; ingests what is missing first.

        Args:
            segments: The context, in order.
            question: What is asked, in plain text.
            policy: How much to take; default `Policy`.
        """
        policy = policy or Policy()
        _, by_digest = self._ingest(segments, None, lambda: False)
        opened = [by_digest[segment.digest] for segment in segments]
        scan = ContextScan(self.calibration, opened)
        question_ids = self._tokenizer.encode(question)
        query_seconds = scan_seconds = 0.0
        chosen: dict[int, int] = {}
        taken: set[int] = set()
        first: Tensor | None = None
        best: Tensor | None = None
        lead: list[int] = []
        rounds = 0
        if self._null is None:
            self._null = self.queries(self._tokenizer.encode(NULL_QUESTION))
        while rounds < policy.max_rounds and question_ids and scan.num_blocks:
            rounds += 1
            began = time.monotonic()
            queries = self.queries([*lead, *question_ids])
            query_seconds += time.monotonic() - began
            began = time.monotonic()
            scores = scan.score(queries, self._null)
            scores[list(taken)] = 0  # a later round looks for what the earlier ones have not found
            scores = smooth(scores)
            scan_seconds += time.monotonic() - began
            before = set(taken)
            budget = policy.max_tokens - len(taken) * BLOCK
            peaks = take_blocks(
                scan, scores, policy, taken, budget, None if first is None else float(first.max())
            )
            first = scores if first is None else first
            best = scores if best is None else torch.maximum(best, scores)
            chosen.update(dict.fromkeys(taken - before, rounds))
            if not taken - before:
                break
            lead = self._ids_around(scan, peaks[:2])
        spans = to_spans(scan, best, chosen) if best is not None else []
        return Selection(
            spans=tuple(self._place(segments, opened, span) for span in spans),
            num_tokens=sum(span.end - span.start for span in spans),
            num_context_tokens=sum(len(segment.ids) for segment in opened),
            rounds=rounds,
            top_score=float(first.max()) if first is not None else 0.0,
            spread=spread(first) if first is not None else 0.0,
            query_seconds=query_seconds,
            scan_seconds=scan_seconds,
        )

    def rank(self, segments: Sequence[Segment], question: str) -> list[Span]:
        """Return every block of a context with its score in the first round, the best first; for evaluations.

        Args:
            segments: The context, in order; what is missing is ingested first.
            question: What is asked, in plain text.
        """
        _, by_digest = self._ingest(segments, None, lambda: False)
        opened = [by_digest[segment.digest] for segment in segments]
        scan = ContextScan(self.calibration, opened)
        if self._null is None:
            self._null = self.queries(self._tokenizer.encode(NULL_QUESTION))
        scores = smooth(scan.score(self.queries(self._tokenizer.encode(question)), self._null))
        spans: list[Span] = []
        for block in scores.argsort(descending=True).tolist():
            number, start = scan.block_place(block)
            end = min(start + BLOCK, len(opened[number].ids))
            spans.append(
                self._place(
                    segments, opened, TokenSpan(number, start, end, float(scores[block]), 1)
                )
            )
        return spans

    def queries(self, ids: Sequence[int]) -> list[Tensor]:
        """Return each pair's queries (heads, len(ids), head_dim) for a text that stands alone."""
        calibration = self.calibration
        prefix = calibration.windows.prefix
        with self._gate():
            passed = self._model.index_pass(torch.tensor([*prefix, *ids]), calibration.layers)
        by_layer = dict(zip(calibration.layers, passed, strict=True))
        result = []
        for pair in calibration.pairs:
            heads = [h for layer, h in calibration.heads if (layer, h // calibration.group) == pair]
            result.append(by_layer[pair[0]][0][len(prefix) :, heads].transpose(0, 1).contiguous())
        return result

    def _ids_around(self, scan: ContextScan, blocks: Sequence[int]) -> list[int]:
        ids: list[int] = []
        for block in sorted(blocks):
            segment, start = scan.block_place(block)
            ids += scan.segments[segment].ids[max(0, start - 8) : start + 40].tolist()
        return ids

    @staticmethod
    def _place(
        segments: Sequence[Segment], opened: Sequence[IndexedSegment], span: TokenSpan
    ) -> Span:
        segment, starts = segments[span.segment], opened[span.segment].char_starts
        start, end = int(starts[span.start]), int(starts[span.end])
        return Span(
            segment=span.segment,
            name=segment.name,
            tokens=(span.start, span.end),
            chars=(segment.first_char + start, segment.first_char + end),
            lines=(segment.line_of(start), segment.line_of(max(start, end - 1))),
            score=span.score,
            round=span.round,
        )


def _progress(done: int, total: int, new: int, seconds: float) -> Progress:
    rate = new / seconds if seconds > 0 else 0.0
    return Progress(done, total, seconds, rate, (total - done) / rate if rate else None)
