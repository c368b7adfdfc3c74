"""What the engine asks of a grammar: which tokens may come next. How it knows is not the engine's business.

A `Constraint` is shared by all choices of a request (and by requests with the same grammar); each choice starts a
`ConstraintState` of its own, which lives as long as its sequence, preemptions included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class ConstraintState(Protocol):
    """Where one choice stands in its grammar. Used by one thread at a time."""

    def fill_mask(self, row: Tensor) -> None:
        """Write which tokens may come next into ``row`` (ceil(vocab_size / 32),), int32 on the CPU.

        Token ``i`` is bit ``i % 32`` of word ``i // 32``, 1 if allowed. End tokens are allowed exactly where the
        grammar may end.

        Raises:
            GrammarLimitError: The next tokens cannot be worked out within the grammar's limits.
        """

    def advance(self, token_id: int) -> None:
        """Take the token that was drawn; it must be allowed and no end token.

        Raises:
            GrammarLimitError: What follows is beyond the grammar's limits.
            EngineError: The token is not allowed.
        """

    def num_valid(self, token_ids: Sequence[int]) -> int:
        """Return how many of ``token_ids``, from the first on, could come next. Changes nothing."""

    def forced(self) -> Sequence[int]:
        """Return the tokens that must come next, one after the other; may be empty though there are some."""

    @property
    def is_done(self) -> bool:
        """The grammar is complete: nothing but an end token may follow."""


class Constraint(Protocol):
    """An immutable grammar; safe to use from several threads."""

    def start(self) -> ConstraintState:
        """Return a state at the grammar's beginning."""
