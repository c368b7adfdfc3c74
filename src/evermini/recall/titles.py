"""Titles of pages: what the short lines say that a page begins with holds for every passage on it.

    [page 52]
    Amcor plc and Subsidiaries
    Consolidated Balance Sheets                        a row far below has none of these words, and the question has
    ...
    Total current liabilities 4,476 5,103

A report's tables are cut into passages of which only the first has the table's name. So the titles are asked on their
own, by BM25 over titles, and what they get is added to each passage of their page (figures in docs/log.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from evermini.recall.segment import Ids, Segment
from evermini.recall.words import Floats, PassageWords, index_words, word_hash, words

_LINES = 4
"""Lines of a page that may be its title."""
_MAX_LINE = 90
"""A longer line is running text, and ends the title."""
_CLEAR = 8.0
"""A title counts in full if it has one word in so many of the question's, by weight."""


class PageTitles:
    """The titles of the pages of several texts. Safe to use from several threads.

    Args:
        segments: The texts.
        ends: For each, the character past the end of each of its passages. A passage on two pages belongs to the
            second one: what a page ends with, such as its number, goes with the next one if it is short.
    """

    def __init__(self, segments: Sequence[Segment], ends: Sequence[Ids]) -> None:
        titles = [""]  # of what lies on no page
        places: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
        for segment, past in zip(segments, ends, strict=True):
            pages = segment.page_starts
            numbers = np.searchsorted(np.array(pages, np.int64), past)
            # What a text was cut in the middle of goes on with the last page before.
            last = len(titles) - 1
            places.append(np.where(numbers > 0, numbers + last, last if segment.first_char else 0))
            titles += (_title(segment.text, start) for start in pages)
        self._title_of = np.concatenate(places) if places else np.zeros(0, np.int64)
        self._has_any = len(titles) > 1
        if self._has_any:
            begins = np.cumsum([0, *(len(title) + 1 for title in titles[:-1])])
            self._words = PassageWords([index_words("\n".join(titles), begins)])
            self._known = [{word_hash(word) for _, _, word in words(title)} for title in titles]

    def score(self, asked: Mapping[int, float]) -> Floats | None:
        """Return what each passage gets for its page's title, 0 to 1; ``None`` if there are no titles.

        Args:
            asked: The question's words, by hash, each with its rarity in the passages.
        """
        total = sum(asked.values())
        if not self._has_any or total <= 0:
            return None
        # By the root, since a word counts by its rarity among titles, too. Without the one in passages, the company's
        # name, rare in titles and frequent below them, would decide.
        wanted = {word: math.sqrt(weight) for word, weight in asked.items()}
        found = self._words.for_question().score(wanted)
        best = int(found.argmax())
        share = sum(asked[word] for word in self._known[best] if word in asked) / total
        if found[best] <= 0 or share <= 0:
            return None
        by_title: Floats = found / found[best] * np.float32(min(1.0, _CLEAR * share))
        return np.asarray(by_title[self._title_of])


def _title(text: str, start: int) -> str:
    """Return the title of the page whose mark stands at ``start``."""
    return "\n".join(_title_lines(text, start))


def _title_lines(text: str, start: int) -> Iterator[str]:
    at = text.find("\n", start) + 1
    for _ in range(_LINES if at else 0):
        end = text.find("\n", at)
        line = text[at:] if end < 0 else text[at:end]
        if not line or len(line) > _MAX_LINE:
            return
        yield line
        if end < 0:
            return
        at = end + 1
