"""What goes into the engine and what comes out: token ids and numbers, never text or images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from evermini.engine.constraint import Constraint
from evermini.errors import ContextLengthError, InvalidRequestError
from evermini.models.batch import KEY_STEP

FinishReason = Literal["stop", "length", "abort", "error", "grammar"]


INTERACTIVE = 0
"""Priority of requests that somebody waits for."""
BATCH = 1
"""Priority of requests that nobody waits for: they take what the others leave."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen.

    Attributes:
        max_tokens: Tokens to generate at most (>= 0; 0 only scores the prompt).
        min_tokens: Stop tokens are masked until this many tokens are out.
        temperature: 0 is greedy.
        top_p: Nucleus mass, (0, 1].
        presence_penalty: Subtracted once from every token already generated.
        frequency_penalty: Subtracted per occurrence from every token already generated.
        logit_bias: Token id → bias added to its logit.
        seed: Same seed and prompt → same tokens, whatever else is in the batch. ``None``: random.
        stop_token_ids: Generation ends when one is drawn; it is not part of the output.
        top_logprobs: ``None``: no log-probabilities; n >= 0: the drawn token's and the n most likely ones'.
        prompt_logprobs: As ``top_logprobs``, for each prompt token (echo).
        constraint: Only tokens that it allows are drawn, whatever the bias; the output ends (``"stop"``) as soon as
            nothing may follow.
        pool: Return the mean of the prompt's hidden states in `PromptDone`.
        prediction: The output that is expected; right tokens in it save time and change nothing.
        is_kept: What is computed may be kept on the disk.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None
    pool: bool = False
    prediction: tuple[int, ...] = ()
    is_kept: bool = True


@dataclass(frozen=True)
class EmbeddedRun:
    """Neighbouring tokens of a prompt that stand for a part of an image.

    Attributes:
        start: Position of the first one in the prompt.
        values: (n, hidden_size) float32 on the CPU, what enters the first layer in their place.
        key: Hash (32 bytes) of what the values were made from: equal keys mean equal values.
    """

    start: int
    values: Tensor
    key: bytes

    @property
    def end(self) -> int:
        """Position after the last one."""
        return self.start + self.values.shape[0]


@dataclass(frozen=True, eq=False)
class Embedded:
    """The images in a prompt.

    Attributes:
        runs: By ascending position, without overlaps.
        axes: (3, tokens of the prompt) int64, positions in time, height and width, for models that have three axes
            (M-RoPE); ``None``: positions are numbers. They follow from the tokens and the runs' keys, so equal
            prefixes have equal ones.
    """

    runs: tuple[EmbeddedRun, ...]
    axes: np.ndarray | None = None

    def positions(self, start: int, stop: int) -> np.ndarray:
        """Return the positions of tokens ``start:stop`` on the three axes, (3, n); the prompt may end before."""
        assert self.axes is not None, "only for models with three axes"
        num_prompt = self.axes.shape[1]
        written = np.arange(max(start, num_prompt), stop) + self._shift
        return np.concatenate(
            [self.axes[:, start:stop], np.broadcast_to(written, (3, len(written)))], axis=1
        )

    @cached_property
    def _shift(self) -> int:
        """What is added to a generated token's place in the sequence to get its position."""
        assert self.axes is not None, "only for models with three axes"
        num_prompt: int = self.axes.shape[1]
        return int(self.axes.max()) + 1 - num_prompt


@dataclass(frozen=True)
class Emphasis:
    """Tokens of a prompt that get more attention than they would by themselves.

    In every layer and head a bias is added to the scores of their keys before the softmax, for all tokens that come
    after them: against all others they weigh ``exp(bias)`` times as much. Attention steering (PASTA, Zhang et al. 2023;
    SpotLight, Venkateswaran and Contractor 2025) in its simplest form: no head is chosen, and the strength is fixed.

    Attributes:
        ranges: First and past-the-end position, and the bias in nats; ascending, without overlaps.
    """

    ranges: tuple[tuple[int, int, float], ...]

    @cached_property
    def key_bias(self) -> Tensor:
        """What is added, by position: (n,) float32, as `ForwardBatch.key_bias` has it."""
        end = self.ranges[-1][1] if self.ranges else 0
        values = torch.zeros(-(-end // KEY_STEP) * KEY_STEP)
        for first, last, bias in self.ranges:
            values[first:last] = bias
        return values


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probability of ``token_id`` under the model (before temperature and penalties).

    ``top`` holds the most likely (token id, log-probability) pairs, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenOutput:
    """One generated token; ``is_predicted``: a further token of the request's prediction appeared with it."""

    token_id: int
    logprob: TokenLogprob | None = None
    is_predicted: bool = False


@dataclass(frozen=True)
class PromptDone:
    """The prompt is computed; sent once, before the first token.

    ``cached_tokens`` of the prompt were found in KV memory or on the disk. ``prompt_logprobs`` (if asked for) has one
    entry per prompt token; the first is ``None``. ``pooled`` (if asked for) is the mean over the prompt's tokens of
    what the model's head sees, one number per dimension.
    """

    cached_tokens: int
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    pooled: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Finished:
    """The last event of every request; ``message`` explains an ``error``, or what is wrong with its ``grammar``."""

    reason: FinishReason
    message: str = ""


Event = PromptDone | TokenOutput | Finished


def check_request(
    prompt_ids: Sequence[int], params: SamplingParams, *, window: int, vocab_size: int
) -> None:
    """Refuse what could never be served.

    Args:
        prompt_ids: The prompt.
        params: How to generate.
        window: Tokens that prompt and output may have together.
        vocab_size: Token ids are below it.

    Raises:
        ContextLengthError: Prompt and ``max_tokens``, or the prediction, exceed the window.
        InvalidRequestError: Another value is out of range.
    """
    num_prompt = len(prompt_ids)
    if num_prompt == 0:
        raise InvalidRequestError("The prompt is empty. Send at least one token.")
    if params.max_tokens < 0:
        raise InvalidRequestError(f"max_tokens is {params.max_tokens}; it must be at least 0.")
    if num_prompt + params.max_tokens > window:
        raise ContextLengthError(
            f"This model's maximum context length is {window} tokens. However, you requested "
            f"{num_prompt + params.max_tokens} tokens ({num_prompt} in the messages, {params.max_tokens} in the "
            "completion). Please reduce the length of the messages or completion.",
            param="messages",
        )
    if not (min(prompt_ids) >= 0 and max(prompt_ids) < vocab_size):
        raise InvalidRequestError(
            f"The prompt has a token id outside 0..{vocab_size - 1}. Use this model's tokenizer."
        )
    if len(params.prediction) > window:
        raise ContextLengthError(
            f"This model's maximum context length is {window} tokens. However, your prediction resulted in "
            f"{len(params.prediction)} tokens. Please reduce its length.",
            param="prediction",
        )
    if params.prediction and not (
        min(params.prediction) >= 0 and max(params.prediction) < vocab_size
    ):
        raise InvalidRequestError(
            f"The prediction has a token id outside 0..{vocab_size - 1}. Use this model's tokenizer.",
            param="prediction",
        )
    for token_id in (*params.logit_bias, *params.stop_token_ids):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"Token id {token_id} is outside 0..{vocab_size - 1}. Use this model's tokenizer.",
                param="logit_bias" if token_id in params.logit_bias else None,
            )
    if not params.temperature >= 0.0:
        raise InvalidRequestError(
            f"temperature is {params.temperature}; it must be at least 0.", param="temperature"
        )
    if not 0.0 < params.top_p <= 1.0:
        raise InvalidRequestError(
            f"top_p is {params.top_p}; it must be above 0 and at most 1.", param="top_p"
        )
