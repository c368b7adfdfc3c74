"""From a question to the few passages of a context that it needs.

score   per retrieval head: softmax of the question's queries over *all* keys, per block, averaged over the question's
        tokens by how rare their words are, minus the same for the null question; summed over heads; a passage has its
        best block's. To that, BM25 of the question's words; each divided by its best; and in texts of pages what
        the page's title gets (`evermini.recall.titles`)
follow  the best passage's rarest words that stand elsewhere, too, by BM25: the second fact of a chain shares a name
        with the first, not with the question
link    from the sentence that has most of the question's words, by its rare names, to the passage that shares them, and
        on from there: up to three facts further
take    definitions of what the question names, if it names any (`evermini.recall.definitions`); then best passages
        first, until the scores fall off or the budget is spent, and what was linked
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evermini.recall.calibration import Calibration
from evermini.recall.definitions import Definition
from evermini.recall.scan import BLOCK, KeyRun, weighted_mass
from evermini.recall.segment import Ids, Segment
from evermini.recall.segment_files import IndexedSegment
from evermini.recall.sentences import hashes, names, sentences, weight_of
from evermini.recall.titles import PageTitles
from evermini.recall.words import PassageWords, word_hash, words

NULL_QUESTION = "N/A"
MAX_SPAN_BLOCKS = 8
_FOLLOWED_WORDS = 8
_RARE = 0.7
"""A name leads on if it has this share of the rarity that one of a single passage has."""
_CANDIDATES = 4
"""Of so many of the best passages, the one whose sentence has most of the question's words is where links begin."""
_LINKED = 0.5
"""A passage follows another one if it has this share, by rarity, of the rare names in that one's wanted sentence."""
_FULL_RARITY = 6.0
"""Rarity (inverse document frequency) from which on a word of the question counts in full."""


@dataclass(frozen=True)
class Policy:
    """How much to take.

    Attributes:
        max_tokens: Budget of all spans together, in tokens of the index model.
        falloff: A passage is taken only if its score is at least this share of the best one's.
        min_passages: Passages to take in any case.
        follow: Weight of the best passage's words against the question's own; 0 does not follow chains of facts.
        max_hops: Passages that are followed, one from the other, by rare names in the sentence that led there.
        mark_end: Say where the excerpts end: it helps mini not to take the question for a part of the last one, and
            confuses nano.
        emphasis: How much more attention goes to what is closest to the question (`Excerpts.emphasis`): nats for a
            sentence with all of its words.
    """

    max_tokens: int = 2048
    falloff: float = 0.35
    min_passages: int = 4
    follow: float = 0.5
    max_hops: int = 3
    mark_end: bool = True
    emphasis: float = 1.0


SPARING = Policy(max_tokens=1024, falloff=0.4, min_passages=2, mark_end=False)
"""For small readers: what does not belong to the answer leads them astray, and each token costs them as much time."""


@dataclass(frozen=True)
class TokenSpan:
    """Consecutive tokens of one segment; ``segment`` counts in the context, ``round`` as in `Span`."""

    segment: int
    start: int
    end: int
    score: float
    round: int


@dataclass(frozen=True)
class Ranking:
    """What a question's passages got.

    Attributes:
        blocks: (num_blocks,) the heads' vote; at most the number of heads.
        direct: (num_passages,) from the question itself; the best at most 2, in texts of pages 3.
        total: (num_passages,) with what following gives.
        hops: Of each step, the words (by hash) that are looked for, with weights: the question's, then those of each
            passage that is followed.
        linked: The passages that they led to.
    """

    blocks: Tensor
    direct: Tensor
    total: Tensor
    hops: tuple[Mapping[int, float], ...]
    linked: tuple[int, ...] = ()


class ContextScan:
    """The keys and words of a list of segments, ready to be scored.

    Costs some milliseconds to make for a long context, so it may serve many questions: `for_question` gives each one of
    its own, and these can be used at the same time.

    Args:
        calibration: The index's.
        segments: The context, in order; all complete.
        texts: What they are the index of.
    """

    def __init__(
        self,
        calibration: Calibration,
        segments: Sequence[IndexedSegment],
        texts: Sequence[Segment],
    ) -> None:
        self.calibration = calibration
        self.segments = list(segments)
        self._titles = PageTitles(texts, [_passage_ends(segment) for segment in segments])
        self.words = PassageWords([segment.words for segment in segments])
        self.first_blocks = np.cumsum([0, *(len(s.blocks) for s in segments)]).tolist()
        self.first_passages = np.cumsum([0, *(len(s.passages) for s in segments)]).tolist()
        self.num_blocks: int = self.first_blocks[-1]
        self.num_passages: int = self.first_passages[-1]
        self._passage_blocks = [
            np.searchsorted(segment.blocks, segment.passages) + first
            for segment, first in zip(self.segments, self.first_blocks, strict=False)
        ]
        self._runs: list[list[KeyRun]] = [[] for _ in calibration.pairs]
        chunk_tokens = calibration.windows.chunk
        for segment, first in zip(self.segments, self.first_blocks, strict=False):
            edges = np.append(segment.blocks, len(segment.ids)).astype(np.int32)
            cuts = np.searchsorted(edges, np.arange(segment.num_chunks + 1) * chunk_tokens)
            for chunk in range(segment.num_chunks):
                begin, end = int(cuts[chunk]), min(int(cuts[chunk + 1]), len(segment.blocks))
                starts = torch.from_numpy(edges[begin : end + 1] - chunk * chunk_tokens)
                for runs, (keys, scales) in zip(self._runs, segment.chunk_keys(chunk), strict=True):
                    runs.append(KeyRun(keys, scales, first + begin, starts))

    def for_question(self) -> ContextScan:
        """Return the same for one question: what it looks up stays its own."""
        own = copy.copy(self)
        own.words = self.words.for_question()
        return own

    def vote(self, queries: Sequence[Tensor], null: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Return each block's score, (num_blocks,): the vote of all heads, null question subtracted.

        Args:
            queries: Per pair of the calibration, (its heads, tokens, head_dim) of the question.
            null: The same of the null question.
            weights: (tokens,) how much each of the question's tokens counts; they sum to 1.
        """
        total = torch.zeros(self.num_blocks)
        for runs, asked, nothing in zip(self._runs, queries, null, strict=True):
            heads, length, dim = asked.shape
            both = torch.cat([asked.reshape(-1, dim), nothing.reshape(-1, dim)])
            share = torch.full((both.shape[0],), -1 / nothing.shape[1])
            share[: heads * length] = weights.repeat(heads)
            total += weighted_mass(both, share, runs, self.num_blocks)
        return total

    def rank(
        self, blocks: Tensor, question: Sequence[int], policy: Policy, texts: Sequence[str]
    ) -> Ranking:
        """Return what the passages get.

        Args:
            blocks: From `vote`.
            question: Hashes of the question's words.
            policy: Whether and how far to follow.
            texts: The segments' texts.
        """
        heads = self._by_passage(blocks)
        asked = dict.fromkeys(question, 1.0)
        direct = _relative(heads) + _relative(torch.from_numpy(self.words.score(asked)))
        wanted = {word: min(self.words.rarity(word), _FULL_RARITY) for word in asked}
        by_title = self._titles.score(wanted)
        if by_title is not None:
            direct = direct + torch.from_numpy(by_title)
        best = int(direct.argmax())
        peak = float(direct[best])
        if not policy.follow or peak <= 0:
            return Ranking(blocks, direct, direct, (wanted,))
        hops, followed = [wanted], [self._nearest(direct, wanted, texts)]
        seen = set(asked)
        beside = self._new_words(hashes(self._passage_text(best, texts), least=3), seen)
        others = torch.from_numpy(self.words.score(dict.fromkeys(beside[:_FOLLOWED_WORDS], 1.0)))
        others[best] = 0
        gain = _relative(others)
        for _ in range(policy.max_hops):
            hop = self._link(followed[-1], hops[-1], seen, texts)
            score = self.words.score(dict.fromkeys(hop, 1.0))
            score[followed] = 0
            nearest = int(score.argmax())
            reached = weight_of(self._passage_text(nearest, texts), hop)
            if not reached or reached < _LINKED * sum(hop.values()):
                break
            gain[nearest] = 1
            hops.append(hop)
            followed.append(nearest)
            seen |= set(hop)
        gain[best] = 1  # it stays the best
        return Ranking(
            blocks, direct, direct + policy.follow * peak * gain, tuple(hops), tuple(followed[1:])
        )

    def _nearest(self, direct: Tensor, wanted: Mapping[int, float], texts: Sequence[str]) -> int:
        """Return which of the best passages has the sentence with most of the question's words."""
        few: list[int] = torch.topk(direct, min(_CANDIDATES, self.num_passages)).indices.tolist()
        return max(few, key=lambda passage: self._key_sentence(passage, wanted, texts)[0])

    def _key_sentence(
        self, passage: int, wanted: Mapping[int, float], texts: Sequence[str]
    ) -> tuple[float, str]:
        """Return a passage's sentence with most of the wanted words, and their weight."""
        text = self._passage_text(passage, texts)
        parts = (text[start:end] for start, end in sentences(text))
        weighed = ((weight_of(part, wanted), part) for part in parts)
        return max(weighed, key=lambda found: found[0], default=(0.0, ""))

    def _link(
        self, passage: int, wanted: Mapping[int, float], seen: Collection[int], texts: Sequence[str]
    ) -> dict[int, float]:
        """Return the rare names, with their rarity, by which a passage's wanted sentence may lead on to another one."""
        _, key = self._key_sentence(passage, wanted, texts)
        rare = _RARE * math.log(1 + self.num_passages)
        new = self._new_words(names(key), seen)
        return {
            word: self.words.rarity(word)
            for word in new[:_FOLLOWED_WORDS]
            if self.words.rarity(word) >= rare
        }

    def _new_words(self, found: Collection[int], seen: Collection[int]) -> list[int]:
        """Return the words that stand elsewhere, too, the rarest first."""
        self.words.look_up(found)
        new = sorted(word for word in found if word not in seen and self.words.is_shared(word))
        return sorted(new, key=lambda word: -self.words.rarity(word))

    def _passage_text(self, passage: int, texts: Sequence[str]) -> str:
        segment, start, end = self.passage_place(passage)
        chars = self.segments[segment].char_starts
        return texts[segment][int(chars[start]) : int(chars[end])]

    def _by_passage(self, blocks: Tensor) -> Tensor:
        """Return each passage's best block's score."""
        firsts = np.concatenate(self._passage_blocks)
        return torch.from_numpy(np.maximum.reduceat(blocks.numpy(), firsts))

    def block_place(self, block: int) -> tuple[int, int, int]:
        """Return the segment of a block, its first token there and the end."""
        segment = bisect_right(self.first_blocks, block) - 1
        return segment, *_range(
            self.segments[segment].blocks,
            block - self.first_blocks[segment],
            self.segments[segment],
        )

    def passage_place(self, passage: int) -> tuple[int, int, int]:
        """Return the segment of a passage, its first token there and the end."""
        segment = bisect_right(self.first_passages, passage) - 1
        return segment, *_range(
            self.segments[segment].passages,
            passage - self.first_passages[segment],
            self.segments[segment],
        )

    def passage_blocks(self, passage: int) -> range:
        """Return a passage's blocks."""
        segment, start, end = self.passage_place(passage)
        first = self.first_blocks[segment]
        begin, past = np.searchsorted(self.segments[segment].blocks, [start, end]).tolist()
        return range(first + begin, first + past)

    def char_blocks(self, segment: int, start: int, end: int) -> range:
        """Return the blocks that a range of a segment's characters lies in."""
        own = self.segments[segment]
        tokens = np.searchsorted(own.char_starts, [start, end - 1], side="right") - 1
        begin, last = (np.searchsorted(own.blocks, tokens, side="right") - 1).tolist()
        first = self.first_blocks[segment]
        return range(first + begin, first + last + 1)

    def segment_blocks(self, segment: int) -> range:
        """Return a segment's blocks."""
        return range(self.first_blocks[segment], self.first_blocks[segment + 1])


def _passage_ends(segment: IndexedSegment) -> Ids:
    """Return the character past the end of each passage."""
    ends = np.append(segment.passages[1:], len(segment.ids)).astype(np.int64)
    return segment.char_starts[ends]


def _range(starts: Ids, number: int, segment: IndexedSegment) -> tuple[int, int]:
    is_last = number + 1 == len(starts)
    return int(starts[number]), len(segment.ids) if is_last else int(starts[number + 1])


def _relative(scores: Tensor) -> Tensor:
    """Return scores with the best one as 1 and negative ones as 0."""
    scores = scores.clamp_min(0)
    peak = float(scores.max())
    return scores / peak if peak > 0 else scores


def token_weights(
    question: str, token_ends: Sequence[int], rarity: Callable[[int], float]
) -> Tensor:
    """Return how much each of a question's tokens counts, (tokens,), summing to 1: as much as its word is rare.

    Args:
        question: The question.
        token_ends: The character at which each of its tokens ends.
        rarity: Of a word, by its hash.
    """
    weights = torch.zeros(len(token_ends))
    ends = np.array(token_ends)
    begins = np.append(0, ends[:-1])
    for start, end, word in words(question):
        share = min(rarity(word_hash(word)), _FULL_RARITY) / _FULL_RARITY
        inside = torch.from_numpy((begins < end) & (ends > start))
        weights[inside] = weights[inside].clamp_min(share)
    total = float(weights.sum())
    return weights / total if total > 0 else torch.full_like(weights, 1 / max(1, len(weights)))


def spread(scores: Tensor) -> float:
    """Return how evenly positive scores are spread: 0 (one block) to 1 (all alike)."""
    share = scores.clamp_min(0)
    total = float(share.sum())
    if total <= 0 or len(scores) < 2:
        return 1.0 if len(scores) > 1 else 0.0
    share = share / total
    entropy = -float((share * share.clamp_min(1e-12).log()).sum())
    return entropy / math.log(len(scores))


def take(
    scan: ContextScan, ranking: Ranking, policy: Policy, defined: Sequence[Definition] = ()
) -> dict[int, tuple[float, int]]:
    """Return the blocks to read, each with its passage's score and round (2: found by following).

    Taken are the passages whose scores have not fallen off, and those that rare names led to. A passage is taken as a
    whole; if its best block is at its edge, with the block beyond. Of one that exceeds what is left of the budget, the
    part around its best block. Definitions come before all passages, with a score above the best one's, and have half
    of the budget at most.
    """
    scores = ranking.total
    taken = _take_defined(scan, defined, float(scores.max()), policy.max_tokens // 2)
    best = torch.topk(scores, min(scan.num_passages, 4096))
    order, values = best.indices.tolist(), best.values.tolist()
    floor = max(0.0, values[0] * policy.falloff)
    direct_floor = max(0.0, float(ranking.direct.max()) * policy.falloff)
    budget = policy.max_tokens
    for block in taken:
        _, start, end = scan.block_place(block)
        budget -= end - start
    wanted = [
        passage
        for number, (passage, value) in enumerate(zip(order, values, strict=True))
        if number < policy.min_passages or value > floor
    ]
    for passage in dict.fromkeys([*wanted, *ranking.linked]):
        if budget <= 0:
            break
        score = float(scores[passage])
        own = scan.passage_blocks(passage)
        peak = own[int(ranking.blocks[own.start : own.stop].argmax())]
        all_of = scan.segment_blocks(scan.passage_place(passage)[0])
        reach = range(
            max(all_of.start, min(own.start, peak - 1)), min(all_of.stop, max(own.stop, peak + 2))
        )
        followed = float(ranking.direct[passage]) < min(score, direct_floor)
        for block in sorted(reach, key=lambda block: abs(block - peak)):
            _, start, end = scan.block_place(block)
            if block in taken:
                continue
            if end - start > budget:
                break
            budget -= end - start
            taken[block] = score, 2 if followed else 1
    return taken


def _take_defined(
    scan: ContextScan, defined: Sequence[Definition], peak: float, budget: int
) -> dict[int, tuple[float, int]]:
    taken: dict[int, tuple[float, int]] = {}
    for number, place in enumerate(defined):
        score = peak + 1 / (1 + number)
        for block in scan.char_blocks(place.segment, place.start, place.end):
            _, start, end = scan.block_place(block)
            if block in taken:
                continue
            if end - start > budget:
                break
            budget -= end - start
            taken[block] = score, 1
    return taken


def to_spans(scan: ContextScan, blocks: dict[int, tuple[float, int]]) -> list[TokenSpan]:
    """Join adjacent blocks (block -> score, round) of a segment into spans, in order; a span has its best score.

    No span is much longer than ``MAX_SPAN_BLOCKS`` blocks, so that a small budget can take a part of a long text.
    """
    spans: list[TokenSpan] = []
    for block in sorted(blocks):
        segment, start, end = scan.block_place(block)
        score, number = blocks[block]
        if spans and spans[-1].segment == segment and _joins(spans[-1], start):
            last = spans.pop()
            start, score, number = last.start, max(score, last.score), min(number, last.round)
        spans.append(TokenSpan(segment, start, end, score, number))
    return spans


def _joins(span: TokenSpan, start: int) -> bool:
    return span.end == start and span.end - span.start < MAX_SPAN_BLOCKS * BLOCK
