"""Scores of simplified texts: SARI, BLEU, FKGL and compression.

    sari(sources, answers, references)      # references[i]: all of the i-th text's

SARI (Xu et al. 2016, https://aclanthology.org/Q16-1029) as EASSE computes it for a corpus: case ignored, tokens by
mteval-v13a, n-grams of one to four tokens, F1 of what was added, kept and deleted.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

ORDER = 4

_SPLITS = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
_SENTENCE = re.compile(r"[.!?]+(?:\s+|$)")
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
_VOWELS = re.compile(r"[aeiouy]+")


def tokens_13a(text: str) -> list[str]:
    """Return the tokens of mteval-v13a, as translations are scored by."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for escaped, plain in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(escaped, plain)
    text = f" {text} "
    for pattern, by in _SPLITS:
        text = pattern.sub(by, text)
    return text.split()


def sari(
    sources: Sequence[str], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> float:
    """Return SARI, 0 to 100: how well words were added, kept and deleted.

    Args:
        sources: The texts.
        answers: What was made of each.
        references: What people made of each, one or more; the same number of all.
    """
    # For each operation and order: right ones, done ones, wanted ones.
    counts = {name: [[0, 0, 0] for _ in range(ORDER)] for name in ("add", "keep", "delete")}
    for source, answer, wanted in zip(sources, answers, references, strict=True):
        ours, theirs = _ngrams(source), _ngrams(answer)
        people = [Counter[tuple[str, ...]]() for _ in range(ORDER)]
        for reference in wanted:
            for order, found in enumerate(_ngrams(reference)):
                people[order].update(found)
        for order in range(ORDER):
            before = _times(ours[order], len(wanted))
            after, refs = _times(theirs[order], len(wanted)), people[order]
            added = set(after) - set(before)
            _count(counts["add"][order], len(added & set(refs)), added, set(refs) - set(before))
            kept, to_keep = before & after, before & refs
            _count(counts["keep"][order], (kept & to_keep).total(), kept, to_keep)
            gone, to_go = before - after, before - refs
            _count(counts["delete"][order], (gone & to_go).total(), gone, to_go)
    scores = [_f1(*count) for orders in counts.values() for count in orders]
    return 100 * sum(scores) / len(scores)


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the corpus' BLEU, 0 to 100 (sacreBLEU's: 13a, case counts, smoothing of zeros).

    Args:
        answers: What was made of each text.
        references: What people made of each, one or more.
    """
    right, total = [0] * ORDER, [0] * ORDER
    length = wanted_length = 0
    for answer, wanted in zip(answers, references, strict=True):
        mine = tokens_13a(answer)
        people = [tokens_13a(reference) for reference in wanted]
        length += len(mine)
        wanted_length += min((abs(len(one) - len(mine)), len(one)) for one in people)[1]
        for order in range(ORDER):
            found = _ngrams_of(mine, order + 1)
            most = Counter[tuple[str, ...]]()
            for one in people:
                most |= _ngrams_of(one, order + 1)
            right[order] += (found & most).total()
            total[order] += found.total()
    if not all(total) or not right[0]:
        return 0.0
    smooth, logs = 1.0, 0.0
    for good, every in zip(right, total, strict=True):
        if not good:
            smooth *= 2
        logs += math.log((good or 1 / smooth) / every)
    brevity = min(0.0, 1 - wanted_length / length)
    return 100 * math.exp(brevity + logs / ORDER)


def fkgl(texts: Sequence[str]) -> float:
    """Return the Flesch-Kincaid grade level of texts together: years of school, roughly. Syllables are estimated."""
    sentences = sum(max(1, len([s for s in _SENTENCE.split(text) if s.strip()])) for text in texts)
    words = [word for text in texts for word in _WORD.findall(text)]
    if not words:
        return 0.0
    syllables = sum(map(_syllables, words))
    return 0.39 * len(words) / sentences + 11.8 * syllables / len(words) - 15.59


def compression(sources: Sequence[str], answers: Sequence[str]) -> float:
    """Return the mean share of a text's characters that are left."""
    shares = [
        len(answer) / max(1, len(source)) for source, answer in zip(sources, answers, strict=True)
    ]
    return sum(shares) / max(1, len(shares))


def _ngrams(text: str) -> list[Counter[tuple[str, ...]]]:
    tokens = tokens_13a(text.lower())
    return [_ngrams_of(tokens, order) for order in range(1, ORDER + 1)]


def _ngrams_of(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[at : at + order]) for at in range(len(tokens) - order + 1))


def _times(counter: Counter[tuple[str, ...]], factor: int) -> Counter[tuple[str, ...]]:
    return Counter({key: count * factor for key, count in counter.items()})


def _count(
    into: list[int],
    right: int,
    done: Counter[tuple[str, ...]] | set[tuple[str, ...]],
    wanted: Counter[tuple[str, ...]] | set[tuple[str, ...]],
) -> None:
    for at, value in enumerate((right, _size(done), _size(wanted))):
        into[at] += value


def _size(found: Counter[tuple[str, ...]] | set[tuple[str, ...]]) -> int:
    return found.total() if isinstance(found, Counter) else len(found)


def _f1(right: int, done: int, wanted: int) -> float:
    return 2 * right / (done + wanted) if right else 0.0


def _syllables(word: str) -> int:
    word = word.lower()
    count = len(_VOWELS.findall(word))
    if word.endswith("e") and not word.endswith(("le", "ee")) and count > 1:
        count -= 1
    return max(1, count)
