"""Sentences of prose, definitions of code: the unit in which what is closest to a question is pointed out.

    sentences("Anna left. Bob stayed.")         [(0, 11), (11, 22)]

A small model that has read the right passage among others still answers from a wrong one; shown the sentences that have
the question's words once more, it mostly does not (docs/log.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from evermini.recall.words import word_hash, words

_PARAGRAPH = re.compile(r"(?:[^\n]*\S[^\n]*(?:\n|\Z))+")
_ABBREVIATION = r"(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bNo)(?<!\bMrs)(?<!\bvs)(?<!\be\.g)(?<!\bi\.e)(?<!\b[A-Z])"
_END = re.compile(rf"{_ABBREVIATION}[.?!][\"'\u201d\u2019)\]]*\s+|[\u3002\uff01\uff1f]")
_AFTER = re.compile(rf"{_END.pattern}|:[ \t]*\n")
_BLOCK = re.compile(r"\s*(?:def|class|fn|func|function|struct|if|for|while|return)\b")
_OPENS = re.compile(r"[;{})=:]$")
_INDENTED = re.compile(r"^(?:\s{2,}|\t)\S", re.MULTILINE)


def sentences(text: str) -> list[tuple[int, int]]:
    """Return where each sentence begins and ends; in code, each block that is not indented with what is below it."""
    found: list[tuple[int, int]] = []
    for paragraph in _PARAGRAPH.finditer(text):
        start, end = paragraph.span()
        lines = paragraph[0].splitlines(keepends=True)
        is_block = _BLOCK.match(lines[0]) is not None
        opens = is_block or _OPENS.search(lines[0].rstrip())
        if opens and _INDENTED.search("".join(lines[1:])):
            cuts = [at for at, line in _starts(lines) if not line[:1].isspace()]
            if not is_block:  # a list, a log, a transcript: what is indented may be prose
                cuts += [match.end() for match in _AFTER.finditer(paragraph[0])]
        else:
            cuts = [match.end() for match in _END.finditer(paragraph[0])] + _entries(lines)
        cuts = sorted({0, *(at for at in cuts if at < end - start), end - start})
        found += ((start + first, start + last) for first, last in pairwise(cuts))
    return [(start, end) for start, end in found if text[start:end].strip()]


def _starts(lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yield each line but the first, and where it begins."""
    at = len(lines[0])
    for line in lines[1:]:
        yield at, line
        at += len(line)


def _entries(lines: Sequence[str]) -> list[int]:
    """Return where a line begins that does not go on with the sentence of the line before.

    So it is with lines of a poem, list or log, none of which begins with a small letter, and after a line that is too
    short to have been wrapped.
    """
    is_list = len(lines) > 2 and not any(line.lstrip()[:1].islower() for line in lines)
    width = max(map(len, lines))
    return [
        at
        for before, (at, line) in zip(lines, _starts(lines), strict=False)
        if not line.lstrip()[:1].islower() and (is_list or 2 * len(before) < width)
    ]


def weight_of(text: str, wanted: Mapping[int, float]) -> float:
    """Return the weights of the wanted words (by hash) that a text has, added up."""
    return sum(wanted.get(word, 0.0) for word in hashes(text))


def hashes(text: str, least: int = 1) -> set[int]:
    """Return the hashes of a text's different words of ``least`` characters or more."""
    return {word_hash(word) for _, _, word in words(text) if len(word) >= least}


def names(text: str) -> set[int]:
    """Return the hashes of words that are not plain lower-case ones: names, numbers, identifiers."""
    return {
        word_hash(word)
        for start, end, word in words(text)
        if len(word) > 2 and not (text[start:end].islower() and text[start:end].isalpha())
    }
