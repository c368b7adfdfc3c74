"""HotpotQA in one prompt: all paragraphs of all questions, each question needs two of them.

Retrieval is measured twice: whether both paragraphs are among the best k, for recall and for BM25; and whether the
sentences that HotpotQA names as supporting facts stand in what the model read.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from evermini.errors import ConfigError, InvalidRequestError
from evermini.evals.cases import Case, CasePlan, Question
from evermini.evals.corpus import CountTokens
from evermini.evals.report import percent, table
from evermini.evals.run import Row
from evermini.evals.score import exact_match, f1
from evermini.evals.systems import BM25
from evermini.recall.segment import cut

if TYPE_CHECKING:
    from evermini.llm import LLM

KS = (2, 5, 10, 20)
INSTRUCTION = (
    "Here are short articles. A question about them follows at the end; answer it in a few words."
)
_ANSWER_TOKENS = 48


@dataclass(frozen=True)
class Pool:
    """The articles of all questions in one text.

    Attributes:
        text: All articles, shuffled.
        bounds: Each article's first and past-the-end character.
        items: The questions, as HotpotQA has them.
        gold: Each question's two articles, by number.
    """

    text: str
    bounds: tuple[tuple[int, int], ...]
    items: tuple[dict[str, Any], ...]
    gold: tuple[frozenset[int], ...]


def make_pool(items: Sequence[dict[str, Any]], num_questions: int, seed: int) -> Pool:
    """Put the articles of ``num_questions`` questions into one text; an article that several have is there once.

    Raises:
        InvalidRequestError: There are not so many questions.
    """
    if num_questions > len(items):
        raise InvalidRequestError(
            f"There are {len(items)} questions only, not {num_questions}. Ask for fewer."
        )
    rng = random.Random(f"hotpot {seed}")
    chosen = rng.sample(list(items), num_questions)
    articles: dict[str, str] = {}
    for item in chosen:
        context = item["context"]
        for title, sentences in zip(context["title"], context["sentences"], strict=True):
            articles.setdefault(title, f"{title}\n{''.join(sentences).strip()}")
    titles = list(articles)
    rng.shuffle(titles)
    bounds: list[tuple[int, int]] = []
    at = 0
    for title in titles:
        bounds.append((at, at + len(articles[title])))
        at += len(articles[title]) + 2
    number = {title: i for i, title in enumerate(titles)}
    gold = tuple(
        frozenset(number[title] for title in item["supporting_facts"]["title"]) for item in chosen
    )
    text = "\n\n".join(articles[title] for title in titles)
    return Pool(text, tuple(bounds), tuple(chosen), gold)


def hotpot_plans(pool: Pool, count: CountTokens) -> Iterator[CasePlan]:
    """Yield the one case: the pool, with every question to it."""
    size = count(pool.text)
    labels = {"length": size}
    yield CasePlan(f"hotpot-{len(pool.items)}", labels, partial(_case, pool, size))


def _case(pool: Pool, size: int) -> Case:
    questions = []
    for item in pool.items:
        context = dict(zip(item["context"]["title"], item["context"]["sentences"], strict=True))
        facts = item["supporting_facts"]
        gold = [
            context[title][number].strip()
            for title, number in zip(facts["title"], facts["sent_id"], strict=True)
            if number < len(context[title])
        ]
        questions.append(
            Question(
                id=item["id"],
                text=item["question"],
                answers=((item["answer"],),),
                gold=tuple(gold),
                scorer="qa",
                max_tokens=_ANSWER_TOKENS,
                labels={"kind": item["type"]},
            )
        )
    return Case(INSTRUCTION, pool.text, tuple(questions), size, size + 512)


def rank_recall(llm: LLM, pool: Pool) -> Callable[[str], list[int]]:
    """Return what ranks the articles for a question by recall's score of their best block.

    Raises:
        ConfigError: Recall is switched off.
    """
    recall = llm.recall
    if recall is None:
        raise ConfigError("Recall is switched off. Switch the setting 'recall' on to evaluate it.")
    segments = cut(pool.text)

    def rank(question: str) -> list[int]:
        found: dict[int, None] = {}
        for span in recall.rank(segments, question):
            start, end = span.chars
            # A block across two articles counts for the one that has more of it.
            overlap = [
                (min(end, b) - max(start, a), i)
                for i, (a, b) in enumerate(pool.bounds)
                if a < end and start < b
            ]
            if overlap:
                found.setdefault(max(overlap)[1])
            if len(found) == max(KS):
                break
        return list(found)

    return rank


def rank_bm25(llm: LLM, pool: Pool) -> Callable[[str], list[int]]:
    """Return what ranks the articles for a question by BM25."""
    bm25 = BM25(pool.text, llm.count_tokens, pool.bounds)
    return lambda question: [number for number, _ in bm25.rank(question, max(KS))]


def ranking_table(pool: Pool, rankers: dict[str, Callable[[str], list[int]]]) -> tuple[str, Row]:
    """Return how often both articles, and what share of them, are among the best k: as Markdown and as figures."""
    lines: list[list[str]] = []
    figures: Row = {}
    for name, rank in rankers.items():
        ranked = [rank(item["question"]) for item in pool.items]
        cells = [name]
        for k in KS:
            shares = [
                len(gold & set(found[:k])) / len(gold)
                for gold, found in zip(pool.gold, ranked, strict=True)
            ]
            both = statistics.mean(share == 1 for share in shares)
            mean = statistics.mean(shares)
            figures[f"{name}@{k}"] = {"both": both, "recall": mean}
            cells.append(f"{percent(both)} ({mean:.2f})")
        lines.append(cells)
    return table(["both articles among the best (recall)", *map(str, KS)], lines), figures


def answer_table(rows: Sequence[Row]) -> str:
    """Return HotpotQA's metrics of the answers, by system."""
    lines = []
    for system in dict.fromkeys(row["system"] for row in rows):
        own = [row for row in rows if row["system"] == system]
        pairs = [(row["answer"], row["wanted"][0][0]) for row in own]
        lines.append(
            [
                system,
                len(own),
                percent(statistics.mean(row["found"] == 1 for row in own)),
                percent(statistics.mean(exact_match(*pair) for pair in pairs)),
                percent(statistics.mean(f1(*pair) for pair in pairs)),
                percent(statistics.mean(row["score"] for row in own)),
            ]
        )
    return table(
        ["system", "questions", "all facts read", "exact match", "F1", "answer contained"], lines
    )
