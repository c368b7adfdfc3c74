"""What is asked: a text with its questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from evermini.evals.score import Scorer

Labels = Mapping[str, str | int | float]


@dataclass(frozen=True)
class Question:
    """A question to a case's text.

    Attributes:
        id: Its name, unique in the case.
        text: What is asked.
        answers: What a right answer has; each item lists ways to write one thing.
        gold: The passages of the text that an answer needs, word for word; empty where it needs all of the text.
        scorer: How an answer is judged.
        wrong: What a right answer must not have, such as the values of look-alikes.
        max_tokens: Room for the answer.
        labels: What results are grouped by.
    """

    id: str
    text: str
    answers: tuple[tuple[str, ...], ...]
    gold: tuple[str, ...]
    scorer: Scorer = "all"
    wrong: tuple[str, ...] = ()
    max_tokens: int = 48
    labels: Labels = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A text and its questions: one prompt each, which share the text.

    Attributes:
        instruction: The prompt's first paragraph.
        text: What is read.
        questions: What is asked, each for itself.
        num_tokens: Tokens of the text.
        room: Tokens of a prompt and its answer together, at most.
    """

    instruction: str
    text: str
    questions: tuple[Question, ...]
    num_tokens: int
    room: int


@dataclass(frozen=True)
class CasePlan:
    """A case that is not made yet; a finished one need not be made again.

    Attributes:
        id: Its name, unique in the run.
        labels: What all its results are grouped by.
        build: Makes it, the same one every time.
    """

    id: str
    labels: Labels
    build: Callable[[], Case]


INSTRUCTION = "Read this text. A question about it follows at its end."
"""First paragraph of most prompts."""


def user_message(instruction: str, text: str, question: str) -> str:
    """Return the message that holds a text and a question to it."""
    return f"{instruction}\n\n{text}\n\n{question}"
