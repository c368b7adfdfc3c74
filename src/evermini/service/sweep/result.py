"""What a sweep gives: a prompt that fits, what was found on the way, and what the answer is held to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from evermini.recall.recall import Progress
from evermini.service.generation import Usage

_BEFORE_FIGURE = 120
"""Characters of an answer in which the figure that was asked for must come."""
_SLACK = 60
"""Characters that an answer may say of a part beyond the note on it; more would be from elsewhere."""

Task = Literal["tally", "check", "collect", "note"]


@dataclass(frozen=True)
class SweepProgress(Progress):
    """How far a sweep is, in tokens of the text."""

    stage: ClassVar[str] = "sweep"


@dataclass(frozen=True)
class Found:
    """What the windows gave; the rest as in `Swept`.

    Attributes:
        head: Says to the model what was done and found.
        lines: Say the rest, the first ones what must not be left out.
    """

    task: Task
    question: str
    num_windows: int
    head: str
    lines: tuple[str, ...]
    counts: dict[str, int] | None = None
    items: tuple[str, ...] | None = None
    num_empty: int = 0
    num_dropped: int = 0
    num_rounds: int = 0
    figures: tuple[int, ...] = ()
    parts: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Swept:
    """A prompt that fits, made by reading all of one that does not.

    Attributes:
        prompt: What the engine computes.
        texts: The same before the chat template, by message.
        full_tokens: Tokens that were sent.
        task: How it was read.
        question: What was asked of each window; of a record, with its two answers.
        num_windows: Windows (or records) read by the model.
        counts: How many records got which answer, or how often words occur.
        items: What was collected, or the records that have the wanted answer, in order.
        num_empty: Windows that had nothing to say.
        num_dropped: Items, and sentences of notes, that were written though the text does not have them; they are
            left out.
        num_rounds: Rounds in which notes were shortened.
        tokens_read: Tokens computed on the way, prompts of all windows together...
        tokens_written: ...and what was written.
        seconds: Time for it.
        figures: Numbers that were computed, the answer first, if the question asks for a number.
        parts: Names of all documents, each with the characters of the note on it, if the answer is to go through them.
        spent: The tokens of all questions to an upstream engine, as it counts them; ``None``: they were asked here.
    """

    prompt: Sequence[int]
    texts: Sequence[str]
    full_tokens: int
    task: Task
    question: str
    num_windows: int
    counts: dict[str, int] | None
    items: tuple[str, ...] | None
    num_empty: int
    num_dropped: int
    num_rounds: int
    tokens_read: int
    tokens_written: int
    seconds: float
    figures: tuple[int, ...] = ()
    parts: tuple[tuple[str, int], ...] = ()
    spent: Usage | None = None

    @property
    def stated(self) -> str | None:
        """A regular expression of answers that state what was found; ``None`` if it need not be held to that.

        That is the figure and no other number, or a line on every part: a small model that is told "the result: 59" may
        still write 60, and of fourteen essays it goes into two.
        """
        if self.parts:
            return r"\n".join(
                rf"- {re.escape(name)}: [^\n]{{8,{length + _SLACK}}}[.!?]"
                for name, length in self.parts
            )
        if not self.figures:
            return None
        first, *_ = every = ["|".join(dict.fromkeys((str(n), f"{n:,}"))) for n in self.figures]
        return rf"[^0-9]{{0,{_BEFORE_FIGURE}}}({first})([^0-9]+({'|'.join(every)}))*[^0-9]*"
