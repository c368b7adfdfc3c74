"""Token masks of a step, worked out in a thread while the model computes the logits they will be applied to."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import abc
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from evermini.engine.sampler import Mask
from evermini.engine.sequence import Sequence
from evermini.errors import GrammarLimitError

MASK_BUCKETS = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
"""Upper bounds of the histogram of `MaskTimes`, in seconds."""


@dataclass(frozen=True)
class MaskTimes:
    """Masks by the time they took: those of a step's requests together, then each further row's of a draft.

    Attributes:
        counts: Observations per bucket of `MASK_BUCKETS`, then those beyond the last bound.
        seconds: The sum.
        waited_seconds: Of it, what the forward passes did not hide.
    """

    counts: tuple[int, ...]
    seconds: float
    waited_seconds: float


class PendingMasks:
    """The masks of one step, perhaps still being worked out."""

    def __init__(
        self, filler: MaskFiller, rows: dict[str, Tensor], work: Future[_Filled] | None
    ) -> None:
        self._filler = filler
        self._rows = rows
        self._work = work
        self._errors: dict[str, GrammarLimitError] = {}

    def of(self, wanted: Sequence) -> Mask | None:
        """Return the mask of ``wanted``, waiting for it; ``None`` if it has no grammar.

        Raises:
            GrammarLimitError: The grammar is beyond its limits here.
        """
        if wanted.constraint is None:
            return None
        self.discard()
        if error := self._errors.get(wanted.request_id):
            raise error
        row: Mask = self._rows[wanted.request_id].numpy()
        return row

    def refilled(self, wanted: Sequence) -> Mask | None:
        """Return the mask of ``wanted`` after its grammar was advanced within the step, as `of` does."""
        if wanted.constraint is None:
            return None
        self.discard()
        began = time.perf_counter()
        row = self._rows[wanted.request_id]
        wanted.constraint.fill_mask(row)
        seconds = time.perf_counter() - began
        self._filler._note(seconds, waited=seconds)
        mask: Mask = row.numpy()
        return mask

    def discard(self) -> None:
        """Wait until nobody uses the grammars' states any more."""
        if self._work is not None:
            self._errors = self._filler._collect(self._work)
            self._work = None


@dataclass(frozen=True)
class _Filled:
    errors: dict[str, GrammarLimitError]
    seconds: float


class MaskFiller:
    """Fills the masks of one engine's steps.

    Args:
        vocab_size: Tokens of the model.
    """

    def __init__(self, vocab_size: int) -> None:
        self._num_words = -(-vocab_size // 32)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="evermini-masks")
        self._counts = [0] * (len(MASK_BUCKETS) + 1)
        self._seconds = 0.0
        self._waited_seconds = 0.0

    def begin(self, sequences: abc.Sequence[Sequence]) -> PendingMasks:
        """Begin to fill the masks of those of ``sequences`` that have a grammar."""
        constrained = [s for s in sequences if s.constraint is not None]
        if not constrained:
            return PendingMasks(self, {}, None)
        rows = torch.zeros((len(constrained), self._num_words), dtype=torch.int32)
        by_id = {s.request_id: row for s, row in zip(constrained, rows, strict=True)}
        return PendingMasks(self, by_id, self._thread.submit(_fill, constrained, by_id))

    def times(self) -> MaskTimes:
        """Return how long masks took so far."""
        return MaskTimes(tuple(self._counts), self._seconds, self._waited_seconds)

    def _collect(self, work: Future[_Filled]) -> dict[str, GrammarLimitError]:
        began = time.perf_counter()
        filled = work.result()
        self._note(filled.seconds, waited=time.perf_counter() - began)
        return filled.errors

    def _note(self, seconds: float, waited: float) -> None:
        self._waited_seconds += waited
        self._seconds += seconds
        self._counts[bisect_left(MASK_BUCKETS, seconds)] += 1


def _fill(constrained: abc.Sequence[Sequence], rows: dict[str, Tensor]) -> _Filled:
    began = time.perf_counter()
    errors = {}
    for one in constrained:
        assert one.constraint is not None
        try:
            one.constraint.fill_mask(rows[one.request_id])
        except GrammarLimitError as error:  # ends this request; its batch mates go on
            errors[one.request_id] = error
    return _Filled(errors, time.perf_counter() - began)
