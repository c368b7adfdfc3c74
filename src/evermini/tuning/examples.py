"""Examples as token ids: what the model sees, and which of the tokens it has to learn.

A prompt is rendered by the code that renders it when the model is served, and an answer is what the model's template
writes behind it. Of a conversation with several answers one sequence is made where the template writes each prompt as
the beginning of the next one, and one for each answer where it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evermini.errors import InvalidRequestError
from evermini.service.rendering import encode_answer
from evermini.text.chat import ChatTemplate
from evermini.tuning.rows import PreferenceRow, Row, RowError, SupervisedRow

Ids = NDArray[np.int32]
IGNORED = -100
"""Label of a token that is not learnt."""


@dataclass(frozen=True)
class TokenSequence:
    """A sequence to learn from.

    Attributes:
        ids: Tokens.
        labels: The tokens that are learnt; `IGNORED` elsewhere.
    """

    ids: Ids
    labels: Ids


@dataclass(frozen=True)
class SupervisedExample:
    """An example's sequences; nearly always one."""

    line: int
    sequences: tuple[TokenSequence, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(one.ids) for one in self.sequences)

    @property
    def num_learnt(self) -> int:
        """Tokens that are learnt."""
        return sum(int((one.labels != IGNORED).sum()) for one in self.sequences)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(one.ids) for one in self.sequences)


@dataclass(frozen=True)
class PreferenceExample:
    """A prompt with the better and the worse answer."""

    line: int
    prompt: Ids
    chosen: Ids
    rejected: Ids

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, twice, and both answers."""
        return 2 * len(self.prompt) + self.num_learnt

    @property
    def num_learnt(self) -> int:
        """Tokens of both answers."""
        return len(self.chosen) + len(self.rejected)

    @property
    def longest(self) -> int:
        """Tokens of the prompt with the longer answer."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


Example = SupervisedExample | PreferenceExample


def encode_row(template: ChatTemplate, row: Row, window: int) -> Example | RowError:
    """Return a row as token ids, or why that is not possible.

    Args:
        template: The model's.
        row: What to encode.
        window: Tokens that the model can attend to.
    """
    try:
        example = (
            _supervised(template, row)
            if isinstance(row, SupervisedRow)
            else _preference(template, row)
        )
    except InvalidRequestError as error:
        return RowError(row.line, error.param or "", error.message)
    if example.longest > window:
        path = "messages" if isinstance(row, SupervisedRow) else "input.messages"
        return RowError(
            row.line,
            path,
            f"This example has {example.longest} tokens, more than the model's window of {window}. Shorten it or leave "
            "it out: nothing is cut.",
        )
    return example


def _supervised(template: ChatTemplate, row: SupervisedRow) -> SupervisedExample:
    sequences: list[tuple[list[int], list[bool]]] = []
    for target in row.targets:
        prompt, answer = encode_answer(template, row.messages[: target + 1], row.toolset)
        mask = [False] * len(prompt)
        if sequences:
            before, learnt = sequences[-1]
            if prompt[: len(before)] == before:
                mask[: len(before)] = learnt
                sequences.pop()
        sequences.append((prompt + answer, mask + [True] * len(answer)))
    return SupervisedExample(row.line, tuple(_sequence(ids, mask) for ids, mask in sequences))


def _sequence(ids: Sequence[int], mask: Sequence[bool]) -> TokenSequence:
    tokens = np.asarray(ids, np.int32)
    return TokenSequence(tokens, np.where(np.asarray(mask), tokens, IGNORED).astype(np.int32))


def _preference(template: ChatTemplate, row: PreferenceRow) -> PreferenceExample:
    prompt, chosen = encode_answer(template, (*row.messages, row.preferred), row.toolset)
    _, rejected = encode_answer(template, (*row.messages, row.rejected), row.toolset)
    ids = (np.asarray(part, np.int32) for part in (prompt, chosen, rejected))
    return PreferenceExample(row.line, *ids)
