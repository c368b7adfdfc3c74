"""Where a text's passages begin and end: the pieces that are ranked against each other.

A passage is a paragraph where that is neither tiny nor huge; a heading goes with what follows it, a long paragraph is
cut after lines or sentences. Ranking whole passages instead of a fixed number of tokens keeps a paragraph's score from
its neighbours: half of what tells HotpotQA's paragraphs apart was lost to blocks that lay on two of them.
"""

from __future__ import annotations

import re

import numpy as np

from evermini.recall.scan import BLOCK
from evermini.recall.segment import Ids

MIN_TOKENS = 24
"""A shorter paragraph goes with the next one."""
MAX_TOKENS = 160
"""No passage is longer."""

_ATOM_END = re.compile(r"\n(?:[^\S\n]*\n)*|[.!?][\"')\]]*(?=[^\S\n])|[\u3002\uff01\uff1f]")
"""Where a passage may end: after a line or a sentence."""


def passage_starts(text: str, char_starts: Ids) -> Ids:
    """Return the token at which each passage begins, ascending from 0; none for an empty text.

    Args:
        text: The text.
        char_starts: (n + 1,) the character at which each of its tokens begins.
    """
    num_tokens = len(char_starts) - 1
    matches = [(m.end(), m[0].count("\n") > 1) for m in _ATOM_END.finditer(text)]
    ends = np.searchsorted(char_starts, np.array([end for end, _ in matches], np.int64))
    starts: list[int] = []
    begin = at = 0  # of the passage being built, and its end so far
    for end, is_paragraph in [
        *zip(ends.tolist(), (p for _, p in matches), strict=True),
        (num_tokens, True),
    ]:
        if end <= at:
            continue
        if end - begin > MAX_TOKENS and at > begin:
            starts.append(begin)
            begin = at
        while end - begin > MAX_TOKENS:  # a line without end
            starts.append(begin)
            begin += MAX_TOKENS
        at = end
        if is_paragraph and at - begin >= MIN_TOKENS:
            starts.append(begin)
            begin = at
    if begin < num_tokens:
        starts.append(begin)
    return np.array(starts, np.uint32)


def block_starts(passages: Ids, num_tokens: int, chunk: int) -> Ids:
    """Return the token at which each block begins.

    Blocks are what the index is scanned in: at most ``BLOCK`` tokens, of one passage, of one chunk.

    Args:
        passages: From `passage_starts`.
        num_tokens: Tokens of the text.
        chunk: Tokens of a chunk.
    """
    first = passages.astype(np.int64)
    lengths = np.diff(first, append=num_tokens)
    counts = -(-lengths // BLOCK)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(first, counts) + within * BLOCK
    return np.union1d(starts, np.arange(0, num_tokens, chunk)).astype(np.uint32)
