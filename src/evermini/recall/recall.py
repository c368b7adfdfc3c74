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
import operator
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evermini.models.batch import IndexModel
from evermini.recall.calibration import Calibration
from evermini.recall.definitions import find_definitions
from evermini.recall.prompt import Span
from evermini.recall.segment import Segment, TextTokenizer, tokenize
from evermini.recall.segment_files import IndexedSegment
from evermini.recall.select import (
    NULL_QUESTION,
    ContextScan,
    Policy,
    Ranking,
    TokenSpan,
    spread,
    take,
    to_spans,
    token_weights,
)
from evermini.recall.store import Damage, SegmentStore
from evermini.recall.words import word_hash, words

logger = logging.getLogger(__name__)

_MAX_OPEN = 8192
_MAX_SCANS = 4


@dataclass(frozen=True)
class Progress:
    """How far an ingest is; ``eta`` and ``seconds`` in seconds, ``eta`` is ``None`` before the first chunk.

    Attributes:
        stage: What goes on, in a word.
    """

    stage: ClassVar[str] = "index"

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
        rounds: 2 if a span was found by following another one's words, else 1.
        top_score: The heads' vote for the best block; at most their number.
        spread: 0 to 1: how evenly that vote lies over the context. A plain needle is near 0. It does not tell a
            question about the whole text; `evermini.recall.scope.needs_whole` does.
        query_seconds: Time for the question's forward pass.
        scan_seconds: Time for ranking: the scan of the index, words, choice.
        hops: The words (by hash) that were looked for, with weights: the question's, then those that were followed.
    """

    spans: tuple[Span, ...]
    num_tokens: int
    num_context_tokens: int
    rounds: int
    top_score: float
    spread: float
    query_seconds: float
    scan_seconds: float
    hops: tuple[Mapping[int, float], ...] = ()


@dataclass(frozen=True)
class _Asked:
    """A ranked context, and when (monotonic seconds) the question's forward pass began and ended."""

    scan: ContextScan
    ranking: Ranking
    began: float
    queried: float


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
        self._scans: OrderedDict[tuple[str, ...], ContextScan] = OrderedDict()
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
        _check([segment for segment in opened.values() if not segment.is_checked])
        for digest, segment in opened.items():
            if segment.is_complete and segment.is_checked:
                self._remember(segment)
                continue
            self._forget(digest)
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
                segment.is_checked = True
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

    def num_tokens(self, digest: str) -> int | None:
        """Return the tokens of a text, or ``None`` if it was never tokenised."""
        found = self._find(digest)
        return None if found is None else len(found.ids)

    def remove(self, digest: str) -> bool:
        """Delete a segment's index, unless someone is writing it."""
        self._forget(digest)
        return self.store.remove(self.calibration.fingerprint, digest)

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
        if opened is not None:
            self.store.touch(digest)
            return opened
        opened = self.store.open(digest)
        if opened is not None and opened.is_complete:
            self._remember(opened)
        return opened

    def _remember(self, segment: IndexedSegment) -> None:
        """Keep a segment open that is complete."""
        with self._open_lock:
            self._open[segment.digest] = segment
            while len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)

    def _forget(self, digest: str) -> None:
        with self._open_lock:
            self._open.pop(digest, None)
            for context in [context for context in self._scans if digest in context]:
                del self._scans[context]

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
        opened = self._opened(segments)
        num_context_tokens = sum(len(segment.ids) for segment in opened)
        asked = self._ask(segments, opened, question, policy)
        if asked is None:
            return Selection((), 0, num_context_tokens, 0, 0.0, 0.0, 0.0, 0.0)
        defined = find_definitions(segments, Segment(question).text)
        spans = to_spans(asked.scan, take(asked.scan, asked.ranking, policy, defined))
        return Selection(
            spans=tuple(self._place(segments, opened, span) for span in spans),
            num_tokens=sum(span.end - span.start for span in spans),
            num_context_tokens=num_context_tokens,
            rounds=max((span.round for span in spans), default=1),
            top_score=float(asked.ranking.blocks.max()),
            spread=spread(asked.ranking.blocks),
            query_seconds=asked.queried - asked.began,
            scan_seconds=time.monotonic() - asked.queried,
            hops=asked.ranking.hops,
        )

    def rank(
        self,
        segments: Sequence[Segment],
        question: str,
        policy: Policy | None = None,
    ) -> list[Span]:
        """Return every passage of a context with its score, the best first; for evaluations.

        Args:
            segments: The context, in order; what is missing is ingested first.
            question: What is asked, in plain text.
            policy: How to rank; default `Policy`.
        """
        opened = self._opened(segments)
        asked = self._ask(segments, opened, question, policy or Policy())
        if asked is None:
            return []
        scores, direct = asked.ranking.total, asked.ranking.direct
        return [
            self._place(
                segments,
                opened,
                TokenSpan(
                    *asked.scan.passage_place(passage),
                    score=float(scores[passage]),
                    round=1 if 2 * direct[passage] >= scores[passage] else 2,
                ),
            )
            for passage in scores.argsort(descending=True, stable=True).tolist()
        ]

    def _opened(self, segments: Sequence[Segment]) -> list[IndexedSegment]:
        _, by_digest = self._ingest(segments, None, lambda: False)
        return [by_digest[segment.digest] for segment in segments]

    def _ask(
        self,
        segments: Sequence[Segment],
        opened: Sequence[IndexedSegment],
        question: str,
        policy: Policy,
    ) -> _Asked | None:
        """Rank the passages; ``None`` if there are none, or nothing is asked."""
        scan = self._scan(segments, opened)
        ids, char_starts = tokenize(self._tokenizer, Segment(question))
        if not len(ids) or not scan.num_blocks:
            return None
        began = time.monotonic()
        if self._null is None:
            self._null = self.queries(self._tokenizer.encode(NULL_QUESTION))
        queries = self.queries(ids.tolist())
        queried = time.monotonic()
        text = Segment(question).text
        hashes = [word_hash(word) for _, _, word in words(text)]
        scan.words.look_up(hashes)
        weights = token_weights(text, char_starts[1:].tolist(), scan.words.rarity)
        blocks = scan.vote(queries, self._null, weights)
        ranking = scan.rank(blocks, hashes, policy, [segment.text for segment in segments])
        return _Asked(scan, ranking, began, queried)

    def _scan(self, segments: Sequence[Segment], opened: Sequence[IndexedSegment]) -> ContextScan:
        """Return the context's keys and words for one question; those of the last few contexts are kept."""
        context = tuple(segment.digest for segment in opened)
        with self._open_lock:
            kept = self._scans.get(context)
            if kept is not None and all(map(operator.is_, kept.segments, opened)):
                self._scans.move_to_end(context)
                return kept.for_question()
        made = ContextScan(self.calibration, opened, segments)
        with self._open_lock:
            self._scans[context] = made
            while len(self._scans) > _MAX_SCANS:
                self._scans.popitem(last=False)
        return made.for_question()

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


def _check(segments: Sequence[IndexedSegment]) -> None:
    """Read the records of complete segments, several at a time; those with none damaged are checked."""

    def check(segment: IndexedSegment) -> None:
        with suppress(FileNotFoundError):  # evicted in the meantime, by another process
            segment.is_checked = not segment.damaged_chunks()

    complete = [segment for segment in segments if segment.is_complete]
    if complete:
        with ThreadPoolExecutor(torch.get_num_threads(), "evermini-check") as pool:
            list(pool.map(check, complete))


def _progress(done: int, total: int, new: int, seconds: float) -> Progress:
    rate = new / seconds if seconds > 0 else 0.0
    return Progress(done, total, seconds, rate, (total - done) / rate if rate else None)
