"""The words of a text by passage: what BM25 asks, beside the heads.

Heads see what a word means, and for that reason confuse names that mean the same sort of thing; words tell names apart
and know no synonyms. Each finds what the other misses (figures in docs/log.md).
"""

from __future__ import annotations

import copy
import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evermini.recall.segment import Ids

Floats = npt.NDArray[np.float32]

K1, B = 1.5, 0.75
"""BM25's constants: how soon a word's repetitions stop counting, and how much a passage's length does."""
_STEM = 6
"""Letters of a word that count: endings do not."""
_PLURAL = re.compile(r"[^\W\d_]{2}[^\W\d_siu]s$")
"""A short word in the plural: sheets, flows, costs; not class, bus, this."""

_WORD = re.compile(r"\w+")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_a-zA-Z]+")
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
"""Scripts that put no space between words: pairs of characters stand for words there."""


def words(text: str) -> list[tuple[int, int, str]]:
    """Return each word with where it begins and ends; identifiers whole and in parts, endings cut off."""
    found: list[tuple[int, int, str]] = []
    for match in _WORD.finditer(text):
        start, end = match.span()
        word = match[0]
        if _UNSPACED.search(word):
            found += [
                (start + i, start + i + 2, word[i : i + 2]) for i in range(max(1, len(word) - 1))
            ]
            continue
        low = word.lower()
        if low.isalpha():
            found.append((start, end, _stem(low)))
            if word not in (low, low.capitalize(), word.upper()):  # camelCase
                found += _parts(start, word)
            continue
        found.append((start, end, low))
        if not low.isdigit():
            found += _parts(start, word)
    return found


def _parts(start: int, word: str) -> list[tuple[int, int, str]]:
    return [
        (start + m.start(), start + m.end(), _stem(m[0].lower()))
        for m in _PART.finditer(word)
        if len(m[0]) > 1
    ]


def _stem(word: str) -> str:
    """Return a lower-case word without its ending; of a short one, without the plural's s."""
    if len(word) <= _STEM and _PLURAL.search(word):
        return word[:-1]
    return word[:_STEM]


def word_hash(word: str) -> int:
    """Return the 32 bits a word is kept as."""
    return zlib.crc32(word.encode("utf-8", "surrogatepass"))


@dataclass(frozen=True)
class WordIndex:
    """Which words stand in which passage of a segment.

    Attributes:
        hashes: (w,) the different words, ascending.
        firsts: (w + 1,) where each one's postings begin.
        passages: (p,) of each posting, its passage.
        counts: (p,) and how often the word stands there, up to 255.
        lengths: (passages,) words of each passage.
    """

    hashes: npt.NDArray[np.uint32]
    firsts: npt.NDArray[np.uint32]
    passages: npt.NDArray[np.uint32]
    counts: npt.NDArray[np.uint8]
    lengths: npt.NDArray[np.uint32]

    def find(self, asked: npt.NDArray[np.uint32]) -> list[tuple[int, slice]]:
        """Return which of some words (hashes, ascending) occur, by place in ``asked``, and their postings."""
        if not len(self.hashes):
            return []
        at = np.minimum(np.searchsorted(self.hashes, asked), len(self.hashes) - 1)
        return [
            (number, slice(int(self.firsts[at[number]]), int(self.firsts[at[number] + 1])))
            for number in np.flatnonzero(self.hashes[at] == asked).tolist()
        ]

    def to_bytes(self) -> bytes:
        """Return the bytes that `from_bytes` reads."""
        sizes = np.array([len(self.hashes), len(self.passages), len(self.lengths)], np.uint32)
        arrays = (sizes, self.hashes, self.firsts, self.passages, self.lengths, self.counts)
        return b"".join(array.tobytes() for array in arrays)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> WordIndex:
        """Read what `to_bytes` wrote; the arrays lie in ``data``."""
        num_words, num_postings, num_passages = np.frombuffer(data, np.uint32, 3).tolist()
        at = 12
        arrays = []
        for size in (num_words, num_words + 1, num_postings, num_passages):
            arrays.append(np.frombuffer(data, np.uint32, size, at))
            at += 4 * size
        hashes, firsts, passages, lengths = arrays
        return cls(
            hashes, firsts, passages, np.frombuffer(data, np.uint8, num_postings, at), lengths
        )


def index_words(text: str, passage_chars: npt.NDArray[np.integer]) -> WordIndex:
    """Index a text's words.

    Args:
        text: The text.
        passage_chars: (passages,) the character at which each passage begins.
    """
    found = words(text)
    codes = {word: word_hash(word) for word in {word for _, _, word in found}}
    hashes = np.array([codes[word] for _, _, word in found], np.uint64)
    starts = np.array([start for start, _, _ in found], np.int64)
    places = np.maximum(np.searchsorted(passage_chars, starts, side="right") - 1, 0).astype(
        np.uint64
    )
    pairs, counts = np.unique(hashes << np.uint64(32) | places, return_counts=True)
    different, firsts = np.unique(pairs >> np.uint64(32), return_index=True)
    return WordIndex(
        hashes=different.astype(np.uint32),
        firsts=np.append(firsts, len(pairs)).astype(np.uint32),
        passages=(pairs & np.uint64(0xFFFFFFFF)).astype(np.uint32),
        counts=np.minimum(counts, 255).astype(np.uint8),
        lengths=np.bincount(places.astype(np.int64), minlength=len(passage_chars)).astype(
            np.uint32
        ),
    )


class PassageWords:
    """BM25 (Robertson and Zaragoza 2009) over the passages of several segments.

    Args:
        indexes: The segments' words, in order.
    """

    def __init__(self, indexes: Sequence[WordIndex]) -> None:
        self._indexes = list(indexes)
        self._firsts = np.cumsum([0, *(len(index.lengths) for index in indexes)]).tolist()
        self.num_passages = int(self._firsts[-1])
        lengths = [index.lengths for index in indexes if len(index.lengths)]
        length = np.concatenate(lengths).astype(np.float32) if lengths else np.zeros(0, np.float32)
        mean = float(length.mean()) if len(length) else 1.0
        self._saturation = (K1 * (1 - B + B * length / max(mean, 1.0))).astype(np.float32)
        self._found: dict[int, tuple[Ids, Floats]] = {}

    def for_question(self) -> PassageWords:
        """Return the same with nothing looked up yet."""
        own = copy.copy(self)
        own._found = {}
        return own

    def look_up(self, asked: Iterable[int]) -> None:
        """Find words in all segments at once; asking for them one by one takes longer where segments are many."""
        new = np.array(sorted({word for word in asked if word not in self._found}), np.uint32)
        where: list[list[Ids]] = [[] for _ in new]
        counts: list[list[npt.NDArray[np.uint8]]] = [[] for _ in new]
        for first, index in zip(self._firsts, self._indexes, strict=False):
            for number, postings in index.find(new):
                where[number].append(index.passages[postings] + np.uint32(first))
                counts[number].append(index.counts[postings])
        for number, word in enumerate(new.tolist()):
            at = np.concatenate([np.zeros(0, np.uint32), *where[number]])
            n = np.concatenate([np.zeros(0, np.uint8), *counts[number]]).astype(np.float32)
            self._found[word] = at, n * (K1 + 1) / (n + self._saturation[at])

    def _postings(self, word: int) -> tuple[Ids, Floats]:
        """Return a word's passages, counted over all segments, and what each gives for it."""
        if word not in self._found:
            self.look_up([word])
        return self._found[word]

    def rarity(self, word: int) -> float:
        """Return a word's inverse document frequency, over passages."""
        n = len(self._postings(word)[0])
        return math.log(1 + (self.num_passages - n + 0.5) / (n + 0.5))

    def is_shared(self, word: int) -> bool:
        """Return whether a word stands in more than one passage."""
        return len(self._postings(word)[0]) > 1

    def score(self, asked: Mapping[int, float]) -> Floats:
        """Return each passage's BM25 score, (num_passages,), for different words, each with its weight."""
        total = np.zeros(self.num_passages, np.float32)
        for word, weight in asked.items():
            passages, gain = self._postings(word)
            total[passages] += gain * (weight * self.rarity(word))
        return total
