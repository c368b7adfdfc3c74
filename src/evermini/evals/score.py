"""How an answer is judged: 0 to 1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Literal

Scorer = Literal["all", "any", "qa"]
"""``all``: the share of the wanted things that the answer has; ``any``: whether it has one of them (RULER's two
metrics); ``qa``: as ``any``, between texts without articles and punctuation."""

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_THOUSANDS = re.compile(r"(?<=\d)[,  ](?=\d{3}\b)")


def plain(text: str) -> str:
    """Return a text in lower case, its white space single, its numbers without separators of thousands."""
    return _THOUSANDS.sub("", " ".join(text.casefold().split()))


def squad(text: str) -> str:
    """Return a text as SQuAD's metric compares it: lower case, no punctuation, no articles."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def has(answer: str, wanted: str) -> bool:
    """Return whether the answer has a text, as a whole word or number at both ends."""
    wanted = plain(wanted)
    left = r"(?<!\w)" if wanted[:1].isalnum() else ""
    right = r"(?!\w)" if wanted[-1:].isalnum() else ""
    return re.search(left + re.escape(wanted) + right, plain(answer)) is not None


def score(
    answer: str,
    answers: Sequence[Sequence[str]],
    scorer: Scorer = "all",
    wrong: Sequence[str] = (),
) -> float:
    """Judge an answer.

    Args:
        answer: What was answered.
        answers: What is wanted; each item lists ways to write one thing.
        scorer: The metric.
        wrong: What ends it at 0.
    """
    if any(has(answer, text) for text in wrong):
        return 0.0
    if scorer == "qa":
        padded = f" {squad(answer)} "
        hits = [any(f" {squad(text)} " in padded for text in ways) for ways in answers]
    else:
        hits = [any(has(answer, text) for text in ways) for ways in answers]
    return sum(hits) / len(hits) if scorer == "all" else float(any(hits))


def exact_match(answer: str, wanted: str) -> float:
    """Return 1 if both are equal, as SQuAD compares."""
    return float(squad(answer) == squad(wanted))


def f1(answer: str, wanted: str) -> float:
    """Return the harmonic mean of precision and recall of words, as SQuAD and HotpotQA do."""
    found, gold = squad(answer).split(), squad(wanted).split()
    yes_no = {"yes", "no", "noanswer"}
    if " ".join(found) != " ".join(gold) and yes_no & {" ".join(found), " ".join(gold)}:
        return 0.0
    common = sum((Counter(found) & Counter(gold)).values())
    if not common:
        return 0.0
    precision, recall = common / len(found), common / len(gold)
    return 2 * precision * recall / (precision + recall)
