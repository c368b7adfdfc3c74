"""From a row of logits to a token, one request at a time.

Rows are handled one by one: a row's result then cannot depend on its batch mates, and on one core that is also
faster than batched torch operations (152k logits: argmax 10 us against 180 us). Randomness is one number per token,
a pure function of (seed, index of the token), so a preempted request continues as if nothing had happened.

Order of operations: logit_bias, penalties, masks (grammar, min_tokens), temperature, top_p. So no bias brings back
what a grammar forbids, and the nucleus is one of allowed tokens. Log-probabilities are those of the model itself,
before any of these.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from torch import Tensor

from evermini.engine.request import SamplingParams, TokenLogprob, TokenOutput
from evermini.errors import EngineError, GrammarLimitError

Row = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]
Mask = npt.NDArray[np.int32]

MIN_TEMPERATURE = 1e-5
"""Below it, sampling is greedy: float32 logits divided by less would overflow, and the limit is the same."""

_FEW = 1024  # weights that are quicker sorted than halved once more
_SEGMENT = 1024  # the inverse CDF first finds the segment, then the token in it


class Sampler:
    """Draws the tokens of one request.

    Args:
        params: How to draw.
        seed: Of the random numbers, 0 <= seed < 2**64.
    """

    def __init__(self, params: SamplingParams, seed: int) -> None:
        self._params = params
        self._seed = seed
        self._num_drawn = 0
        self._counts: dict[int, int] = {}
        self._penalized = bool(params.presence_penalty or params.frequency_penalty)
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.intp)
        self._biases = np.fromiter(params.logit_bias.values(), np.float32)
        self._stop_ids = np.fromiter(params.stop_token_ids, np.intp)

    def draw(self, logits: Row, mask: Mask | None = None) -> TokenOutput:
        """Draw the next token from ``logits`` (vocab_size,), which are left as they are.

        Args:
            logits: The model's.
            mask: Bits of the allowed tokens, as `ConstraintState.fill_mask` writes them; ``None``: all.

        Raises:
            EngineError: The logits have no finite maximum.
            GrammarLimitError: No token is allowed.
        """
        params = self._params
        adjusted = self._adjust(logits, mask)
        best = int(adjusted.argmax())
        if mask is not None and adjusted[best] == -np.inf:
            _require_finite(logits.max())
            raise GrammarLimitError(
                "No token of this model can go on where the requested grammar stands. Change the grammar: it asks for "
                "characters that the model cannot write."
            )
        _require_finite(adjusted[best])
        if params.temperature < MIN_TEMPERATURE:
            token_id = best
        else:
            weights = np.exp((adjusted - adjusted[best]) / np.float32(params.temperature))
            token_id = _choose(weights, params.top_p, uniform(self._seed, self._num_drawn))
        self._num_drawn += 1
        if self._penalized:
            self._counts[token_id] = self._counts.get(token_id, 0) + 1
        if params.top_logprobs is None:
            return TokenOutput(token_id)
        return TokenOutput(token_id, logprob(logits, token_id, params.top_logprobs))

    def _adjust(self, logits: Row, mask: Mask | None) -> Row:
        """Apply bias, penalties and masks, copying only if there is something to apply."""
        params = self._params
        masked = len(self._stop_ids) and self._num_drawn < params.min_tokens
        if not (len(self._bias_ids) or self._counts or masked or mask is not None):
            return logits
        adjusted = logits.copy()
        adjusted[self._bias_ids] += self._biases
        if self._counts:
            ids = np.fromiter(self._counts.keys(), np.intp)
            counts = np.fromiter(self._counts.values(), np.float32)
            adjusted[ids] -= params.frequency_penalty * counts + params.presence_penalty
        if masked:
            adjusted[self._stop_ids] = -np.inf
        if mask is not None:
            allowed = np.unpackbits(mask.view(np.uint8), count=len(logits), bitorder="little")
            adjusted[allowed == 0] = -np.inf
        return adjusted


def uniform(seed: int, index: int) -> float:
    """Return the ``index``-th random number in [0, 1) of ``seed`` (Philox 4x64, Salmon et al. 2011)."""
    word = np.random.Philox(key=seed, counter=index).random_raw()
    return float(int(word) >> 11) * 2.0**-53


def logprob(logits: Row, token_id: int, num_top: int) -> TokenLogprob:
    """Return the log-probability of ``token_id`` and the ``num_top`` most likely tokens', best first.

    Raises:
        EngineError: The logits have no finite maximum.
    """
    best = logits.max()
    _require_finite(best)
    log_sum = float(best) + float(np.log(np.exp(logits - best).sum(dtype=np.float64)))
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        num_top = min(num_top, len(logits))
        threshold = np.partition(logits, -num_top)[-num_top]
        ids = _descending(logits, np.flatnonzero(logits >= threshold))[:num_top]
        top = tuple((int(i), float(logits[i]) - log_sum) for i in ids)
    return TokenLogprob(token_id, float(logits[token_id]) - log_sum, top)


def prompt_logprobs(logits: Tensor, next_ids: list[int], num_top: int) -> list[TokenLogprob]:
    """Return `logprob` of ``next_ids[i]`` under row ``i`` of ``logits`` (rows, vocab_size)."""
    return [
        logprob(row, token_id, num_top)
        for row, token_id in zip(logits.numpy(), next_ids, strict=True)
    ]


def _choose(weights: Row, top_p: float, u: float) -> int:
    """Draw an index with probability proportional to ``weights``, among the nucleus of mass ``top_p``.

    The inverse CDF runs in token order, not in order of probability: rounding that swaps two nearly equal tokens
    then moves no boundary by more than the rounding.
    """
    if top_p >= 1.0:
        return _invert(weights, u)
    ids = _nucleus(weights, top_p)
    return int(ids[_invert(weights[ids], u)])


def _nucleus(weights: Row, top_p: float) -> Ids:
    """Return, ascending, the smallest set of most likely tokens with at least ``top_p`` of the mass.

    Sorting 152k weights takes 13 ms. Instead, a level falls (weights are relative to the largest, 1.0) until the
    weights above it have the mass, and among these the smallest one needed is searched by halving.
    """
    target = missing = top_p * float(weights.sum(dtype=np.float64))
    for level in (1e-2, 1e-4, 1e-6, 0.0):
        values = weights[weights >= level]
        if level == 0.0 or values.sum(dtype=np.float64) >= target:
            break
    while len(values) > _FEW:
        middle = len(values) // 2
        values = np.partition(values, middle)
        mass = float(values[middle:].sum(dtype=np.float64))
        if mass >= missing:
            values = values[middle:]
        else:
            missing -= mass
            values = values[:middle]
    values = np.sort(values)[::-1]
    last = int(np.searchsorted(values.cumsum(dtype=np.float64), missing))
    smallest = float(values[min(last, len(values) - 1)])
    chosen = weights > smallest
    if smallest > 0.0:  # zero only if rounding asks for more than there is
        missing = target - float(weights[chosen].sum(dtype=np.float64))
        ties = np.flatnonzero(weights == smallest)
        chosen[ties[: max(1, math.ceil(missing / smallest))]] = True
    return np.flatnonzero(chosen)


def _invert(weights: Row, u: float) -> int:
    """Return the first index whose cumulative weight exceeds ``u`` of the total."""
    starts = np.arange(0, len(weights), _SEGMENT)
    segments = np.add.reduceat(weights, starts, dtype=np.float64).cumsum()
    target = u * segments[-1]
    segment = min(int(np.searchsorted(segments, target, side="right")), len(segments) - 1)
    begin = segment * _SEGMENT
    before = segments[segment - 1] if segment else 0.0
    inside = weights[begin : begin + _SEGMENT].cumsum(dtype=np.float64)
    offset = int(np.searchsorted(inside, target - before, side="right"))
    index = begin + min(offset, len(inside) - 1)
    # The two sums are rounded differently, so the target may lie a hair past the last weight of the segment.
    while weights[index] == 0.0:
        index -= 1
    return index


def _descending(values: Row, ids: Ids) -> Ids:
    """Sort ``ids`` by falling value; equal values by rising id."""
    order = np.argsort(-values[ids], kind="stable")
    return ids[order]


def _require_finite(best: np.float32) -> None:
    if not np.isfinite(best):
        raise EngineError(
            "The model's output is not a number, so no token can be drawn. The weights may be damaged: "
            "verify them with `evermini pull`, or try another precision."
        )
