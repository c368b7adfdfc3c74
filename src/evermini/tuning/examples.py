"""Examples as token ids: what the model sees, and which of the tokens it has to learn.

A prompt is rendered by the code that renders it when the model is served, and an answer is what the model's template
writes behind it. Of a conversation with several answers one sequence is made where the template writes each prompt as
the beginning of the next one, and one for each answer where it does not.

An image is the tokens that it takes in the prompt; which of them are read from its embeddings is told beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evermini.errors import InvalidRequestError
from evermini.service.rendering import encode_answer
from evermini.service.sight import Seen, images_of, place
from evermini.text.chat import ChatTemplate
from evermini.tuning.rows import PreferenceRow, Row, RowError, SupervisedRow

Ids = NDArray[np.int32]
IGNORED = -100
"""Label of a token that is not learnt."""


@dataclass(frozen=True)
class PlacedImage:
    """An image in a sequence.

    Attributes:
        start: Its first token.
        key: By which `evermini.tuning.images.ImageStore` knows it, in hex.
        grid: Rows and columns of its tokens' positions, for models whose positions have three axes.
    """

    start: int
    key: str
    grid: tuple[int, int] | None


@dataclass(frozen=True)
class TokenSequence:
    """A sequence to learn from.

    Attributes:
        ids: Tokens.
        labels: The tokens that are learnt; `IGNORED` elsewhere.
        images: What it shows, in order.
    """

    ids: Ids
    labels: Ids
    images: tuple[PlacedImage, ...] = ()


@dataclass(frozen=True)
class SupervisedExample:
    """An example's sequences; nearly always one."""

    line: int
    sequences: tuple[TokenSequence, ...]

    @property
    def num_images(self) -> int:
        """Images in all sequences."""
        return sum(len(one.images) for one in self.sequences)

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
    """A prompt, which may show images, with the better and the worse answer."""

    line: int
    prompt: Ids
    chosen: Ids
    rejected: Ids
    images: tuple[PlacedImage, ...] = ()

    @property
    def num_images(self) -> int:
        """Images in the prompt."""
        return len(self.images)

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


def encode_row(
    template: ChatTemplate, row: Row, window: int, image_token_id: int = -1
) -> Example | RowError:
    """Return a row as token ids, or why that is not possible.

    Args:
        template: The model's.
        row: What to encode; its images have been looked at.
        window: Tokens that the model can attend to.
        image_token_id: What the template writes for an image.
    """
    try:
        example = (
            _supervised(template, row, image_token_id)
            if isinstance(row, SupervisedRow)
            else _preference(template, row, image_token_id)
        )
    except InvalidRequestError as error:
        return RowError(row.line, error.param or "", error.message)
    if example.longest > window:
        path = "messages" if isinstance(row, SupervisedRow) else "input.messages"
        in_images = sum(len(image.token_ids) for image in images_of(row.messages))
        of_them = f" ({in_images} of them in its images)" if in_images else ""
        return RowError(
            row.line,
            path,
            f"This example has {example.longest} tokens{of_them}, more than the model's window of {window}. Shorten it "
            "or leave it out: nothing is cut.",
        )
    return example


def _supervised(
    template: ChatTemplate, row: SupervisedRow, image_token_id: int
) -> SupervisedExample:
    sequences: list[tuple[list[int], list[bool], list[Seen]]] = []
    for target in row.targets:
        prompt, answer = encode_answer(template, row.messages[: target + 1], row.toolset)
        mask = [False] * len(prompt)
        if sequences:
            before, learnt, _ = sequences[-1]
            if prompt[: len(before)] == before:
                mask[: len(before)] = learnt
                sequences.pop()
        images = images_of(row.messages[:target])
        sequences.append((prompt + answer, mask + [True] * len(answer), images))
    return SupervisedExample(
        row.line,
        tuple(_sequence(ids, mask, image_token_id, images) for ids, mask, images in sequences),
    )


def _sequence(
    ids: Sequence[int], mask: Sequence[bool], image_token_id: int, images: Sequence[Seen]
) -> TokenSequence:
    tokens, placed, taken = _with_images(ids, image_token_id, images)
    learnt = np.repeat(np.asarray(mask), taken)
    return TokenSequence(tokens, np.where(learnt, tokens, IGNORED).astype(np.int32), placed)


def _preference(
    template: ChatTemplate, row: PreferenceRow, image_token_id: int
) -> PreferenceExample:
    prompt, chosen = encode_answer(template, (*row.messages, row.preferred), row.toolset)
    _, rejected = encode_answer(template, (*row.messages, row.rejected), row.toolset)
    tokens, placed, _ = _with_images(prompt, image_token_id, images_of(row.messages))
    better, worse = (np.asarray(part, np.int32) for part in (chosen, rejected))
    return PreferenceExample(row.line, tokens, better, worse, placed)


def _with_images(
    ids: Sequence[int], image_token_id: int, images: Sequence[Seen]
) -> tuple[Ids, tuple[PlacedImage, ...], NDArray[np.int64]]:
    """Return a sequence with all tokens that its images take, where these are, and what each token has become.

    Raises:
        InvalidRequestError: The template wrote another number of images.
    """
    taken = np.ones(len(ids), np.int64)
    if not images:
        return np.asarray(ids, np.int32), (), taken
    whole, places = place(ids, image_token_id, images)
    taken[np.asarray(ids) == image_token_id] = [len(image.token_ids) for image in images]
    placed = tuple(PlacedImage(at.start, at.image.key.hex(), at.image.grid) for at in places)
    return np.asarray(whole, np.int32), placed, taken
