"""Ways to answer a case: recall, and what it is compared with in the same run.

auto     the product: the whole text is sent, it decides how to read it
recall   the same, ``x_evermini.reading`` is "recall"
sweep    the same with "sweep": all of the text is read or counted for the question
dense    ordinary attention over the whole text, where that fits the model's window
bm25     the best passages by BM25, up to recall's budget, through the same prompt assembly
window   the end of the text alone: what a sliding window would see
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from evermini.errors import ConfigError, InvalidRequestError
from evermini.evals.cases import Case, Question, user_message
from evermini.recall.prompt import Span, excerpts
from evermini.recall.segment import cut

if TYPE_CHECKING:
    from evermini.llm import LLM
    from evermini.service.reading import OnProgress

SystemName = Literal["auto", "recall", "sweep", "dense", "bm25", "window"]
SYSTEMS: tuple[SystemName, ...] = ("auto", "recall", "sweep", "dense", "bm25", "window")

BUDGET_TOKENS = 2048
"""Tokens of passages that BM25 takes: recall's own most."""
_EXCERPT_TOKENS = 3072
_PASSAGE_CHARS = 400
_CUT_MARGIN = 32


@dataclass(frozen=True)
class Reply:
    """What a system answered.

    Attributes:
        text: The answer.
        read: What of the prompt the model itself read.
        read_tokens: Tokens of that.
        seconds: From the question to the answer.
        finish_reason: Why it ended.
    """

    text: str
    read: str
    read_tokens: int
    seconds: float
    finish_reason: str | None


class System(Protocol):
    """Answers the questions of one case."""

    def ask(self, question: Question) -> Reply:
        """Answer one question."""
        ...


def open_system(
    name: SystemName,
    llm: LLM,
    case: Case,
    *,
    tail_tokens: int,
    dense_tokens: int | None = None,
    progress: OnProgress | None = None,
) -> System | None:
    """Return a system ready for a case, or ``None`` if the case does not fit it.

    Args:
        name: Which.
        llm: The model that answers.
        case: The text and its questions.
        tail_tokens: What ``window`` reads.
        dense_tokens: What ``dense`` reads at most; default: the model's window. It takes long.
        progress: Told how recall's first reading goes.
    """
    window = llm.native_window
    if name in ("auto", "recall", "sweep"):
        return _Whole(llm, case, name, progress)
    if name == "dense":
        most = window if dense_tokens is None else min(dense_tokens, window)
        return _Whole(llm, case, name, None) if case.room <= most else None
    if name == "window":
        tail = min(tail_tokens, window)
        if case.room <= tail:
            return None
        return _Part(llm, case, _tail(llm.count_tokens, case, tail))
    return _Part(llm, case, BM25(case.text, llm.count_tokens).excerpts)


class _Whole:
    """Sends the whole text."""

    def __init__(
        self, llm: LLM, case: Case, reading: SystemName, progress: OnProgress | None
    ) -> None:
        self._llm, self._case, self._reading, self._progress = llm, case, reading, progress

    def ask(self, question: Question) -> Reply:
        content = user_message(self._case.instruction, self._case.text, question.text)
        return _ask(self._llm, content, question, self._reading, self._progress)


class _Part:
    """Sends what it chooses of the text."""

    def __init__(self, llm: LLM, case: Case, choose: Callable[[str], str]) -> None:
        self._llm, self._case, self._choose = llm, case, choose

    def ask(self, question: Question) -> Reply:
        began = time.perf_counter()
        text = self._choose(question.text)
        chosen = time.perf_counter() - began
        content = user_message(self._case.instruction, text, question.text)
        reply = _ask(self._llm, content, question, "dense", None)
        return Reply(
            reply.text, reply.read, reply.read_tokens, reply.seconds + chosen, reply.finish_reason
        )


def _ask(
    llm: LLM, content: str, question: Question, reading: str, progress: OnProgress | None
) -> Reply:
    answer = llm.chat(
        [{"role": "user", "content": content}],
        temperature=0,
        max_completion_tokens=question.max_tokens,
        x_evermini={"reading": reading},
        progress=progress,
    )
    shortened = answer.recalled or answer.swept
    if shortened is None:
        read, read_tokens = content, answer.usage.prompt_tokens
    else:
        read, read_tokens = llm.decode(shortened.prompt), len(shortened.prompt)
    return Reply(answer.text, read, read_tokens, answer.seconds, answer.finish_reason)


def _tail(count: Callable[[str], int], case: Case, tokens: int) -> Callable[[str], str]:
    around = case.room - case.num_tokens
    room = tokens - around - _CUT_MARGIN
    text = case.text[-8 * room :]
    while (size := count(text)) > room:
        at = max(1, int(len(text) * (1 - room / size)))
        text = text[at:]
    return lambda question: text


class BM25:
    """Passages of a text, ranked by BM25 (Lucene's variant, English stop words, stems).

    Args:
        text: What is searched.
        count: Tokens of a text.
        bounds: Where the passages are; default: runs of sentences and lines of about 100 tokens.
    """

    def __init__(
        self,
        text: str,
        count: Callable[[str], int],
        bounds: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        try:
            import bm25s
            import Stemmer
        except ImportError as error:
            raise ConfigError(
                "The BM25 baseline needs the packages bm25s and PyStemmer. Run: pip install 'evermini[evals]'"
            ) from error
        self._text, self._count = text, count
        self._segments = cut(text)
        self.bounds = list(bounds) if bounds is not None else self._cut_up()
        self._stem = Stemmer.Stemmer("english")
        self._tokenize = bm25s.tokenize
        self._index = bm25s.BM25(method="lucene")
        passages = [text[start:end] for start, end in self.bounds]
        self._index.index(
            bm25s.tokenize(passages, stopwords="en", stemmer=self._stem, show_progress=False),
            show_progress=False,
        )

    def rank(self, question: str, k: int | None = None) -> list[tuple[int, float]]:
        """Return passages by number and their scores, the best first."""
        query = self._tokenize([question], stopwords="en", stemmer=self._stem, show_progress=False)
        size = len(self.bounds) if k is None else min(k, len(self.bounds))
        found: Any = self._index.retrieve(query, k=size, show_progress=False)
        return [
            (int(n), float(s)) for n, s in zip(found.documents[0], found.scores[0], strict=True)
        ]

    def excerpts(self, question: str) -> str:
        """Return the best passages within recall's budget, as recall writes them."""
        spans: list[Span] = []
        used = 0
        for number, score in self.rank(question, 200):
            start, end = self.bounds[number]
            used += self._count(self._text[start:end])
            if used > BUDGET_TOKENS:
                break
            spans.append(self._span(start, end, score))
        return excerpts(self._segments, spans, self._count, _EXCERPT_TOKENS, mark_end=True).text

    def _cut_up(self) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for segment in self._segments:
            at = segment.first_char
            for piece in cut(segment.text, max_chars=_PASSAGE_CHARS):
                if piece.text.strip():
                    found.append((at + piece.first_char, at + piece.first_char + len(piece.text)))
        return found

    def _span(self, start: int, end: int, score: float) -> Span:
        number = max(i for i, s in enumerate(self._segments) if s.first_char <= start)
        segment = self._segments[number]
        lines = (
            segment.line_of(start - segment.first_char),
            segment.line_of(end - 1 - segment.first_char),
        )
        return Span(number, None, (start, end), (start, end), lines, score, 1)


def parse_systems(names: str) -> tuple[SystemName, ...]:
    """Return the systems in a list such as ``"recall,bm25"``.

    Raises:
        InvalidRequestError: One is unknown.
    """
    found = tuple(name.strip() for name in names.split(",") if name.strip())
    for name in found:
        if name not in SYSTEMS:
            raise InvalidRequestError(
                f"{name!r} is no system to evaluate. Choose from: {', '.join(SYSTEMS)}."
            )
    return cast(tuple[SystemName, ...], found)
