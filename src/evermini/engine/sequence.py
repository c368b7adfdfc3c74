"""One request inside the engine: the facts; everything else is derived from them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from evermini.engine.adapters import LoadedAdapter
from evermini.engine.constraint import ConstraintState
from evermini.engine.kv import BlockKey, PrefixChain
from evermini.engine.prompt_disk import Restore
from evermini.engine.request import Embedded, Emphasis, SamplingParams, TokenLogprob
from evermini.engine.sampler import Sampler
from evermini.engine.speculation import Drafter
from evermini.models.batch import BLOCK_SIZE


@dataclass(eq=False)
class Sequence:
    """A request's tokens and how far they are computed.

    Generated tokens are appended to ``token_ids``; whoever has more known than computed tokens has work to do. So
    prefill, decode and recompute after a preemption are one thing: compute ``token_ids[num_computed:]``, and when
    nothing is left, draw the next token.

    Attributes:
        request_id: Also the owner's name in KV memory.
        arrival: Serial number; lower is older.
        priority: Lower numbers go first, whatever their age.
        token_ids: Prompt and generated tokens.
        num_prompt: Tokens of the prompt.
        params: How to generate.
        sampler: Draws this request's tokens.
        constraint: Where the output stands in its grammar, if it has one.
        chain: Keys of the full blocks of ``token_ids``.
        drafter: Guesses what comes next; ``None``: one token is computed at a time.
        adapter: What it is computed with, on top of the model.
        embedded: The images in the prompt.
        emphasis: Tokens of the prompt that weigh more.
        is_running: Admitted, so it owns blocks; else it waits.
        num_computed: Tokens whose keys and values are in KV memory.
        cached_tokens: Prompt tokens found in KV memory or on the disk; ``None`` until a first one is computed.
        restore: Blocks that are being read from the disk; until that is over, nothing is computed.
        num_saved: Leading blocks that the disk has been offered.
        prompt_logprobs: One entry per scored prompt token, if asked for.
        num_pooled: Prompt tokens whose hidden states are in ``pooled``.
        pooled: Their sum, if asked for.
        prompt_done: `PromptDone` has been sent.
        preempted: Waits for the second time.
        num_overtaken: Younger requests admitted while this one waited for memory.
        patience: Steps left to wait for a prefix that another request computes.
        awaited: Length of that prefix, in blocks, when last looked at.
    """

    request_id: str
    arrival: int
    token_ids: list[int]
    num_prompt: int
    params: SamplingParams
    sampler: Sampler
    chain: PrefixChain
    priority: int = 0
    constraint: ConstraintState | None = None
    drafter: Drafter | None = None
    adapter: LoadedAdapter | None = None
    embedded: Embedded | None = None
    emphasis: Emphasis | None = None
    is_running: bool = False
    num_computed: int = 0
    cached_tokens: int | None = None
    restore: Restore | None = None
    num_saved: int = 0
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    num_pooled: int = 0
    pooled: Tensor | None = None
    prompt_done: bool = False
    preempted: bool = False
    num_overtaken: int = 0
    patience: int = 0
    awaited: int = -1

    @property
    def rank(self) -> tuple[int, int]:
        """Order of all queues: by priority, then by age."""
        return self.priority, self.arrival

    @property
    def num_remaining(self) -> int:
        """Known tokens that are not computed."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_generated(self) -> int:
        """Tokens drawn so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def is_decoding(self) -> bool:
        """Only the last drawn token is not computed."""
        return self.num_remaining == 1 and self.num_generated > 0

    @property
    def is_scoring(self) -> bool:
        """Prompt tokens are still to be scored, so their rows must be computed."""
        return self.params.prompt_logprobs is not None and self.num_unscored > 0

    @property
    def is_pooling(self) -> bool:
        """Hidden states of prompt tokens are still to be added up."""
        return self.params.pool and self.num_pooled < self.num_prompt

    @property
    def num_unscored(self) -> int:
        """Prompt tokens without a log-probability."""
        return self.num_prompt - len(self.prompt_logprobs)

    @property
    def shareable(self) -> list[BlockKey]:
        """Keys of the leading blocks whose results nobody needs: all but the last token's, or the scored or pooled."""
        limit = len(self.token_ids) - 1
        if self.is_pooling:
            limit = min(limit, self.num_pooled)
        if self.is_scoring:
            limit = min(limit, len(self.prompt_logprobs) - 1)
        return self.chain.keys[: limit // BLOCK_SIZE]
