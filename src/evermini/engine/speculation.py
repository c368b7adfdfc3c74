"""Guesses of what a request will write next, and how many of them are worth verifying.

A decode step reads all weights to compute one token. A few more rows of the same sequence cost little on top, so a
*draft* of likely tokens goes along: row ``i`` of the step gives the logits after draft token ``i``, tokens are drawn
from them in order, and the first one that differs from the draft ends it. What is drawn is what would have been drawn
without a draft: the logits of a row and its random number do not depend on how the row came to be computed.

Drafts are copies: from the prediction that came with the request, or from the prompt and the output so far (prompt
lookup; Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding), wherever the last tokens have been seen before.
How often a copied token was right is counted by how many tokens before it matched. This costs nothing, so it goes on
while nothing is drafted, and a text that begins to repeat itself is noticed.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

ROW_COST = 0.1
"""Time of one more row in a step, as a share of the time of a step's first row.

Measured with 2,048 tokens of context on 2 cores: mini 0.07 (8 rows take 1.44 times as long as one, 16 rows 1.95,
32 rows 3.4), nano 0.12 (2.0, 3.1, 5.6).
"""

MAX_DRAFT = 32
"""Tokens per draft at most. Beyond, a row costs as much as in a prompt, and streams would stutter."""

_MAX_MATCH = 33
_CANDIDATES = 8
"""Places where the last two tokens occurred that are compared, the latest or nearest ones."""

_LEVELS = (0, 1, 2, 3, 5, 9, 17, 33)
"""Lengths of a match that are told apart: level ``i`` reaches to ``_LEVELS[i + 1] - 1`` tokens."""

_LEVEL_OF = [max(i for i, low in enumerate(_LEVELS) if low <= n) for n in range(_MAX_MATCH + 1)]
_EXPECTED = (0.3, 0.3, 0.3, 0.4, 0.6, 0.8, 0.9, 0.95)
"""Share of right copies per level before anything was counted, worth `_WEIGHT` observations."""

_WEIGHT = 6.0
_MEMORY = 0.98
"""What an observation keeps of its weight at the next one."""

_PREFERENCE = 0.1
"""How much likelier a copy from the prompt must look to be preferred to one from the prediction."""

_TRUSTED = 17
"""The match length that the beginning of a prediction is credited with."""


@dataclass(frozen=True)
class Draft:
    """Guessed next tokens and, for each, the chance that it and all before it are right."""

    token_ids: Sequence[int]
    chances: Sequence[float]


NO_DRAFT = Draft((), ())


class _Rates:
    """How often copies were right, by length of the match before them."""

    def __init__(self) -> None:
        self._right = [_WEIGHT * share for share in _EXPECTED]
        self._all = [_WEIGHT] * len(_EXPECTED)

    def count(self, matched: int, right: bool) -> None:
        level = _LEVEL_OF[min(matched, _MAX_MATCH)]
        self._right[level] = self._right[level] * _MEMORY + right
        self._all[level] = self._all[level] * _MEMORY + 1.0

    def chance(self, matched: int) -> float:
        level = _LEVEL_OF[min(matched, _MAX_MATCH)]
        return self._right[level] / self._all[level]


class _Source:
    """Tokens to copy from, and where each pair of them occurs."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids = token_ids
        self.rates = _Rates()
        self._after: dict[tuple[int, int], list[int]] = {}
        self._num_indexed = 2

    def index(self, end: int) -> None:
        """Note the pairs that end before position ``end``."""
        tokens, after = self.token_ids, self._after
        for at in range(self._num_indexed, end):
            after.setdefault((tokens[at - 2], tokens[at - 1]), []).append(at)
        self._num_indexed = max(self._num_indexed, end)

    def longest(self, tail: Sequence[int], near: int) -> tuple[int, int]:
        """Return (matched tokens, position after them) of the longest match of ``tail``'s end; (0, 0): none.

        Of equally long ones, the first at or after ``near``, else the last before it.
        """
        places = self._after.get((tail[-2], tail[-1]), ())
        pivot = bisect_left(places, near)
        later, earlier = (
            places[pivot : pivot + _CANDIDATES],
            places[max(0, pivot - _CANDIDATES) : pivot],
        )
        best, found = 0, 0
        for at in chain(later, reversed(earlier)):
            matched = self._matched(tail, at)
            if matched > best:
                best, found = matched, at
                if matched == _MAX_MATCH:
                    break
        return best, found

    def _matched(self, tail: Sequence[int], at: int) -> int:
        tokens, length, most = self.token_ids, 2, min(_MAX_MATCH, at, len(tail))
        while length < most and tokens[at - 1 - length] == tail[-1 - length]:
            length += 1
        return length


class Drafter:
    """Drafts for one request.

    Args:
        token_ids: The request's tokens, prompt first; the caller appends to it and tells `observe`.
        prediction: What the request's sender expects as output; may be empty.
        end_ids: Tokens that end the output, so nothing is guessed from them on.
    """

    def __init__(
        self,
        token_ids: list[int],
        prediction: Sequence[int] = (),
        end_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._token_ids = token_ids
        self._end_ids = end_ids
        self._own = _Source(token_ids)
        self._prediction = _Source(prediction)
        self._has_appeared = bytearray(len(prediction))
        self._anchor = 0  # one past the last token of the prediction that appeared
        # The next token is guessed to be the source's at `_at`, after `_matched` equal tokens.
        self._source = self._prediction if prediction else None
        self._at, self._matched = 0, _TRUSTED

    def propose(self, limit: int, least: float) -> Draft:
        """Guess at most ``limit`` next tokens, all with a chance above ``least``."""
        source = self._source
        if source is None:
            return NO_DRAFT
        tokens, at, chance = source.token_ids, self._at, 1.0
        draft: list[int] = []
        chances: list[float] = []
        while len(draft) < limit:
            chance *= source.rates.chance(self._matched + len(draft))
            if chance <= least:
                break
            position = at + len(draft)
            if position < len(tokens):
                guess = tokens[position]
            elif source is self._own:  # the copy overlaps itself: a loop
                guess = draft[position - len(tokens)]
            else:
                break
            if guess in self._end_ids:
                break
            draft.append(guess)
            chances.append(chance)
        return Draft(draft, chances)

    def observe(self) -> bool:
        """A token was appended: compare it with the guess, and look for a better place to copy from.

        Returns:
            Whether it is a token of the prediction that has not appeared before.
        """
        token_id, source = self._token_ids[-1], self._source
        is_new = False
        if source is not None and self._at < len(source.token_ids):
            right = source.token_ids[self._at] == token_id
            source.rates.count(self._matched, right)
            if right:
                if source is self._prediction:
                    is_new = not self._has_appeared[self._at]
                    self._has_appeared[self._at] = 1
                    self._anchor = self._at + 1
                self._at += 1
                self._matched += 1
                if self._at < len(source.token_ids) and not self._may_switch():
                    return is_new
        self._look()
        return is_new

    def _may_switch(self) -> bool:
        """Return whether to look if the prediction has by now what is being copied from the prompt."""
        return (
            self._source is self._own
            and bool(self._prediction.token_ids)
            and self._matched in _LEVELS
        )

    def _look(self) -> None:
        """Find where the last tokens occurred before; the likeliest copy wins, the prediction's if about equal."""
        tail, own, prediction = self._token_ids, self._own, self._prediction
        was_predicted = self._source is prediction and self._matched > 0
        diverged_at = self._at
        self._source, self._matched = None, 0
        if len(tail) < 2:
            return
        own.index(len(tail))
        matched, at = own.longest(tail, len(tail))
        if matched:
            self._source, self._matched, self._at = own, matched, at
        if not prediction.token_ids:
            return
        prediction.index(len(prediction.token_ids))
        matched, at = prediction.longest(tail, self._anchor)
        if not matched and was_predicted and diverged_at + 1 < len(prediction.token_ids):
            at = diverged_at + 1  # one token may have been replaced by another: go on after it
        if at and prediction.rates.chance(matched) > self._chance() - _PREFERENCE:
            self._source, self._matched, self._at = prediction, matched, at

    def _chance(self) -> float:
        """Return the chance of the guess that is followed."""
        return 0.0 if self._source is None else self._source.rates.chance(self._matched)


def break_even(tokens: float, rows: float) -> float:
    """Return the tokens that a step with ``rows`` rows and ``tokens`` tokens yields in the time of one more row."""
    return ROW_COST * tokens / (1.0 + ROW_COST * rows)


def plan(drafts: Sequence[Draft], num_rows: int, budget: int) -> list[int]:
    """Return how many tokens of each draft are worth their time in a step.

    A row pays if its chance of yielding a token is above `break_even`; the best rows are taken first. So long drafts
    are made where copies are nearly always right, none where they seldom are, and fewer the more requests share the
    step.

    Args:
        drafts: One per request.
        num_rows: Rows in the step without them, each yielding one token.
        budget: Rows to add at most.
    """
    sizes = [0] * len(drafts)
    rows, tokens = float(num_rows), float(num_rows)
    heap = [(-draft.chances[0], i) for i, draft in enumerate(drafts) if draft.chances]
    heapq.heapify(heap)
    while heap and budget:
        chance, i = -heap[0][0], heap[0][1]
        if chance <= break_even(tokens, rows):
            break
        sizes[i] += 1
        rows += 1.0
        tokens += chance
        budget -= 1
        if sizes[i] < len(drafts[i].chances):
            heapq.heapreplace(heap, (-drafts[i].chances[sizes[i]], i))
        else:
            heapq.heappop(heap)
    return sizes
