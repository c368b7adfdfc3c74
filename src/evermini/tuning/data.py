"""A training file, read and counted: the examples, or everything that is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from evermini.service.fine_tuning.spec import MIN_EXAMPLES
from evermini.service.sight import images_of
from evermini.text.chat import ChatTemplate
from evermini.tuning.examples import Example, encode_row
from evermini.tuning.images import MAX_EXAMPLES, ImageReader
from evermini.tuning.rows import Method, RowError, read_rows

MAX_ERRORS = 100
"""Errors that are kept; all are counted."""


@dataclass
class Data:
    """What a file holds.

    Attributes:
        examples: The good ones, in order.
        errors: What is wrong, the first `MAX_ERRORS`.
        num_errors: All of them.
    """

    examples: list[Example] = field(default_factory=list)
    errors: list[RowError] = field(default_factory=list)
    num_errors: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples."""
        return sum(example.num_tokens for example in self.examples)

    @property
    def num_learnt(self) -> int:
        """Tokens of them that are learnt."""
        return sum(example.num_learnt for example in self.examples)

    @property
    def num_images(self) -> int:
        """Images of all examples."""
        return sum(example.num_images for example in self.examples)

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max((example.longest for example in self.examples), default=0)

    def _note(self, *errors: RowError) -> None:
        self.num_errors += len(errors)
        self.errors += errors[: max(0, MAX_ERRORS - len(self.errors))]


def read_data(
    path: Path,
    method: Method,
    template: ChatTemplate,
    window: int,
    *,
    min_examples: int = MIN_EXAMPLES,
    images: ImageReader | None = None,
) -> Data:
    """Read a training or validation file.

    Args:
        path: The file.
        method: What its lines are.
        template: The model's.
        window: Tokens that the model can attend to.
        min_examples: How many there must be.
        images: Looks at images; ``None``: the model reads text only, and rows with images are errors.

    Raises:
        EngineStoppedError: Reading was told to stop while images were looked at.
        ConfigError: Images cannot be looked at on this machine.
    """
    data = Data()
    num_rows = num_seeing = 0
    sees = images is not None and images.sees
    with path.open("rb") as file:
        for row in read_rows(file, method, sees=sees):
            num_rows += 1
            if isinstance(row, list):
                data._note(*row)
                continue
            if images is not None and sees:
                line = row.line
                row = images.read(row)
                if isinstance(row, list):
                    data._note(*row)
                    continue
                if images_of(row.messages):
                    num_seeing += 1
                    if num_seeing == MAX_EXAMPLES + 1:
                        words = f"More than {MAX_EXAMPLES:,} examples of this file have images: leave some out."
                        data._note(RowError(line, "", words))
            example = encode_row(template, row, window, images.image_token_id if images else -1)
            if isinstance(example, RowError):
                data._note(example)
            else:
                data.examples.append(example)
    if num_rows < min_examples:
        least = "one example" if min_examples == 1 else f"{min_examples} examples"
        data._note(
            RowError(
                num_rows + 1,
                "",
                f"The file has {num_rows} examples. It must have at least {least}.",
            )
        )
    return data
