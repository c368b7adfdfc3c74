"""Continuous batching: many requests share each forward pass of one model.

    engine = Engine(model, num_blocks=256, max_batch_tokens=512, max_num_seqs=16, max_waiting=64)
    engine.add("a", prompt_ids, SamplingParams(max_tokens=8))
    while engine.has_work:
        for request_id, event in engine.step(): ...

Single-threaded and synchronous; `evermini.engine.worker` runs it in a thread. It sees token ids only.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter, abc
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from evermini.engine.adapters import LoadedAdapter
from evermini.engine.kv import BlockManager, PrefixChain, blocks_for
from evermini.engine.masks import MaskFiller, MaskTimes, PendingMasks
from evermini.engine.prompt_disk import MAX_COPIES, MIN_TOKENS, PromptDisk, PromptDiskStats
from evermini.engine.request import (
    INTERACTIVE,
    Embedded,
    Emphasis,
    Event,
    Finished,
    FinishReason,
    PromptDone,
    SamplingParams,
    check_request,
)
from evermini.engine.rows import batch_of, draws, wanted_rows
from evermini.engine.sampler import Sampler, prompt_logprobs
from evermini.engine.scheduler import Chunk, Scheduler
from evermini.engine.sequence import Sequence
from evermini.engine.speculation import Drafter
from evermini.errors import (
    EngineError,
    GrammarLimitError,
    OverloadedError,
)
from evermini.models.batch import BLOCK_SIZE, Adapter, Model
from evermini.models.lora import LoraWeights

log = logging.getLogger(__name__)

RESTORE_WAIT_SECONDS = 0.005
"""How long a step without anything to compute waits for the disk, so that a new request or an abort is soon seen."""

CLOSE_SECONDS = 5.0
"""How long the end of an engine may wait for the disk."""


@dataclass(frozen=True)
class EngineStats:
    """A snapshot; the counters run from the engine's start.

    Attributes:
        running: Requests being computed.
        waiting: Requests waiting for admission.
        kv_blocks_used: Blocks owned by running requests.
        kv_blocks_cached: Blocks without an owner whose content can be shared.
        kv_blocks_total: All blocks.
        prompt_tokens: Tokens of the prompts computed so far...
        cached_tokens: ...of which were found in KV memory or on the disk.
        restored_tokens: Tokens whose keys and values were read from the disk.
        generated_tokens: Tokens drawn.
        preemptions: Times a request lost its blocks to an older one.
        steps: Forward passes.
        step_seconds: Time spent in them, sampling included.
        finished: Requests ended, by reason.
        mask_times: How long the masks of a step took, for steps that had any.
        drafted_tokens: Guessed tokens that were verified...
        accepted_tokens: ...of which were right.
        disk: Computed prompts on the disk.
    """

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_cached: int
    kv_blocks_total: int
    prompt_tokens: int
    cached_tokens: int
    restored_tokens: int
    generated_tokens: int
    preemptions: int
    steps: int
    step_seconds: float
    finished: abc.Mapping[FinishReason, int]
    mask_times: MaskTimes
    drafted_tokens: int
    accepted_tokens: int
    disk: PromptDiskStats


class Engine:
    """Runs requests to their end; see the module docstring.

    Args:
        model: The model.
        num_blocks: Blocks of KV memory (``BLOCK_SIZE`` tokens each).
        max_batch_tokens: Tokens per step at most. Larger steps prefill a little faster; smaller ones let streams
            flow more evenly. (Beside running streams, prompts get a quarter of it.)
        max_num_seqs: Requests computed at once.
        max_waiting: Requests that may wait beyond these.
        prefix_caching: Share and keep the blocks of equal prefixes.
        speculation: Verify guessed tokens several at a time; see `evermini.engine.speculation`.
        disk: Where computed prompts outlive KV memory and the process; `close` closes it.
    """

    def __init__(
        self,
        model: Model,
        *,
        num_blocks: int,
        max_batch_tokens: int,
        max_num_seqs: int,
        max_waiting: int,
        prefix_caching: bool = True,
        speculation: bool = True,
        disk: PromptDisk | None = None,
    ) -> None:
        self._model = model
        self._speculation = speculation
        self._disk = disk
        self._blocks = BlockManager(num_blocks, prefix_caching=prefix_caching)
        self._scheduler = Scheduler(
            self._blocks,
            max_batch_tokens=max_batch_tokens,
            max_num_seqs=max_num_seqs,
            speculation=speculation,
            disk=disk,
        )
        self._kv = model.new_kv_cache(num_blocks)
        self.hidden_size = model.config.hidden_size
        self.max_unfinished = max_num_seqs + max_waiting
        self.max_model_len = min(model.config.max_position, num_blocks * BLOCK_SIZE)
        self._masks = MaskFiller(model.config.vocab_size)
        self._sequences: dict[str, Sequence] = {}
        self._events: list[tuple[str, Event]] = []
        self._num_added = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._restored_tokens = 0
        self._generated_tokens = 0
        self._drafted_tokens = 0
        self._accepted_tokens = 0
        self._steps = 0
        self._step_seconds = 0.0
        self._finished: Counter[FinishReason] = Counter()

    @property
    def has_work(self) -> bool:
        """A request is unfinished, or an event not yet returned by `step`."""
        return bool(self._sequences or self._events)

    def load_adapter(self, lora: LoraWeights) -> Adapter:
        """Return an adapter as the model computes with it; safe from any thread.

        Raises:
            AdapterError: It does not fit the model.
        """
        return self._model.load_adapter(lora)

    def validate(self, prompt_ids: abc.Sequence[int], params: SamplingParams) -> None:
        """Refuse what could never be served. Changes nothing; safe from any thread.

        Raises:
            ContextLengthError: Prompt and ``max_tokens`` exceed `max_model_len`.
            InvalidRequestError: Another value is out of range.
        """
        vocab_size = self._model.config.vocab_size
        check_request(prompt_ids, params, window=self.max_model_len, vocab_size=vocab_size)

    def add(
        self,
        request_id: str,
        prompt_ids: abc.Sequence[int],
        params: SamplingParams,
        *,
        cache_salt: bytes = b"",
        priority: int = INTERACTIVE,
        adapter: LoadedAdapter | None = None,
        embedded: Embedded | None = None,
        emphasis: Emphasis | None = None,
    ) -> None:
        """Let a request wait for the next steps.

        Args:
            request_id: Not the id of an unfinished request.
            prompt_ids: At least one token.
            params: How to generate.
            cache_salt: Requests with different salts share no KV memory.
            priority: `INTERACTIVE` or `BATCH`.
            adapter: What to compute it with, on top of the model; with another one no KV memory is shared.
            embedded: The images in the prompt.
            emphasis: Tokens of the prompt that weigh more.

        Raises:
            ContextLengthError: Prompt and ``max_tokens`` exceed `max_model_len`.
            InvalidRequestError: Another value is out of range.
            OverloadedError: Too many requests are unfinished.
        """
        self.validate(prompt_ids, params)
        if request_id in self._sequences:
            raise ValueError(f"request {request_id!r} is not finished; choose another id")
        if len(self._sequences) >= self.max_unfinished:
            raise overloaded(self.max_unfinished)
        seed = secrets.randbits(64) if params.seed is None else params.seed % 2**64
        token_ids = list(prompt_ids)
        sequence = Sequence(
            request_id=request_id,
            arrival=self._num_added,
            priority=priority,
            token_ids=token_ids,
            num_prompt=len(prompt_ids),
            params=params,
            sampler=Sampler(params, seed),
            chain=PrefixChain(
                cache_salt,
                b"" if adapter is None else adapter.key,
                () if embedded is None else embedded.runs,
                emphasis,
            ),
            constraint=None if params.constraint is None else params.constraint.start(),
            drafter=Drafter(token_ids, params.prediction, params.stop_token_ids)
            if self._speculation or params.prediction
            else None,
            adapter=adapter,
            embedded=embedded,
            emphasis=emphasis,
        )
        self._num_added += 1
        self._sequences[request_id] = sequence
        self._scheduler.add(sequence)

    def abort(self, request_id: str, message: str = "") -> None:
        """End a request now and free its blocks; `step` returns its `Finished`. Unknown ids are ignored."""
        if sequence := self._sequences.get(request_id):
            self._finish(sequence, "abort", message)

    def step(self) -> list[tuple[str, Event]]:
        """Compute one batch and return what happened, in order, as (request id, event).

        A failing model ends the requests of this step with `Finished` ``"error"``; the engine lives on.
        """
        self._take_restored()
        if chunks := self._scheduler.schedule():
            started = time.perf_counter()
            masks = self._masks.begin([c.sequence for c in chunks if draws(c)])
            try:
                logits, hidden = self._forward(chunks)
            except Exception as error:
                masks.discard()
                self._fail(chunks, error)
            else:
                self._pool(chunks, hidden)
                self._advance(chunks, logits, masks)
            self._steps += 1
            self._step_seconds += time.perf_counter() - started
        elif self._disk is not None:
            restores = [s.restore for s in self._scheduler.running if s.restore is not None]
            if restores and not self._events:
                self._disk.wait(restores, RESTORE_WAIT_SECONDS)
        events, self._events = self._events, []
        return events

    def stats(self) -> EngineStats:
        """Return a snapshot of gauges and counters."""
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_blocks_used=self._blocks.num_used,
            kv_blocks_cached=self._blocks.num_cached,
            kv_blocks_total=self._blocks.num_blocks,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            restored_tokens=self._restored_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=self._scheduler.num_preemptions,
            steps=self._steps,
            step_seconds=self._step_seconds,
            finished=dict(self._finished),
            mask_times=self._masks.times(),
            drafted_tokens=self._drafted_tokens,
            accepted_tokens=self._accepted_tokens,
            disk=self.disk_stats(),
        )

    def disk_stats(self) -> PromptDiskStats:
        """Return what is known of computed prompts on the disk; safe from any thread."""
        return PromptDiskStats() if self._disk is None else self._disk.stats()

    def close(self) -> None:
        """Let what waits to be written to the disk get there; the engine's last call."""
        if self._disk is not None:
            self._disk.close(CLOSE_SECONDS)

    def check_integrity(self) -> None:
        """Check KV memory and that exactly the running requests own blocks.

        Raises:
            AssertionError: Something is inconsistent; names it.
        """
        self._blocks.check_integrity()
        running, waiting = self._scheduler.running, self._scheduler.waiting
        assert self._blocks.owners == {s.request_id for s in running}, "owners are not the running"
        assert {s.request_id for s in running + waiting} == self._sequences.keys()
        for queue in (running, waiting):
            assert queue == sorted(queue, key=lambda s: s.rank), "a queue is out of order"
        assert all(s.is_running for s in running), "a running request believes it waits"
        assert not any(s.is_running or s.num_computed for s in waiting), (
            "a waiting request has blocks"
        )
        for sequence in running:
            has = len(self._blocks.table(sequence.request_id))
            assert has >= blocks_for(sequence.num_computed), f"{sequence.request_id} lacks blocks"
            assert has <= blocks_for(len(sequence.token_ids)), (
                f"{sequence.request_id} kept blocks of a draft"
            )

    def _take_restored(self) -> None:
        """Book what has been read from the disk: copy blocks into KV memory and publish them."""
        if self._disk is None:
            return
        limit = MAX_COPIES
        for sequence in self._scheduler.running:
            if sequence.restore is None:
                continue
            rows, is_over = self._disk.take(sequence.restore, limit)
            limit -= len(rows)
            if rows:
                first = sequence.num_computed // BLOCK_SIZE
                table = self._blocks.table(sequence.request_id)
                self._kv.copy_in(table[first : first + len(rows)], torch.stack(list(rows)))
                num_tokens = len(rows) * BLOCK_SIZE
                sequence.num_computed += num_tokens
                self._blocks.publish(sequence.request_id, sequence.chain.keys[: first + len(rows)])
                self._restored_tokens += num_tokens
            if is_over:
                sequence.restore = None

    def _forward(self, chunks: list[Chunk]) -> tuple[Tensor, Tensor | None]:
        """Return the logits (R, vocab_size) of all `wanted_rows`, chunk after chunk.

        Also the hidden states of all rows, if one of the chunks wants them.
        """
        tables = [self._blocks.table(chunk.sequence.request_id) for chunk in chunks]
        batch = batch_of(chunks, tables)
        with torch.inference_mode():
            if any(chunk.sequence.is_pooling for chunk in chunks):
                return self._model.forward_hidden(batch, self._kv)
            return self._model.forward(batch, self._kv), None

    def _pool(self, chunks: list[Chunk], hidden: Tensor | None) -> None:
        """Add up the hidden states of the prompts that want it; each token counts once, preempted or not."""
        row = 0
        for chunk in chunks:
            sequence, first = chunk.sequence, row
            row += chunk.context - chunk.start
            if hidden is None or not sequence.is_pooling:
                continue
            begin = max(chunk.start, sequence.num_pooled)
            if begin >= chunk.end:
                continue
            rows = hidden[first + begin - chunk.start : first + chunk.end - chunk.start]
            total = rows.double().sum(0)
            sequence.pooled = total if sequence.pooled is None else sequence.pooled + total
            sequence.num_pooled = chunk.end

    def _advance(self, chunks: list[Chunk], logits: Tensor, masks: PendingMasks) -> None:
        """Book what the step computed: publish blocks, score prompts, draw tokens, end requests."""
        row = 0
        for chunk in chunks:
            sequence, num_rows = chunk.sequence, len(wanted_rows(chunk))
            mine = logits[row : row + num_rows]
            row += num_rows
            if sequence.cached_tokens is None:
                sequence.cached_tokens = chunk.start
            sequence.num_computed = chunk.end
            ended: FinishReason | None = None
            message = ""
            try:
                self._score_prompt(chunk, mine)
                if sequence.num_remaining == 0:
                    self._report_prompt(sequence)
                    ended = self._draw(chunk, mine, masks)
            except GrammarLimitError as error:
                ended, message = "grammar", error.message
            except EngineError as error:
                ended, message = "error", error.message
            sequence.chain.extend(sequence.token_ids)
            self._blocks.publish(
                sequence.request_id, sequence.chain.keys[: sequence.num_computed // BLOCK_SIZE]
            )
            self._offer(chunk)
            if chunk.draft:
                self._blocks.shrink(sequence.request_id, len(sequence.token_ids))
            if ended is not None:
                self._finish(sequence, ended, message)

    def _offer(self, chunk: Chunk) -> None:
        """Offer the disk the blocks that a request has filled, each once.

        Not those of batches, which would push out everything that somebody waits for; nor of prompts that are scored
        or pooled, for which nothing can be left out when they come again.
        """
        sequence = chunk.sequence
        num_full = sequence.num_computed // BLOCK_SIZE
        if (
            self._disk is None
            or not sequence.params.is_kept
            or sequence.priority > INTERACTIVE
            or sequence.params.max_tokens == 0
            or len(sequence.token_ids) < MIN_TOKENS
            or sequence.num_saved >= num_full
        ):
            return
        table = self._blocks.table(sequence.request_id)
        sequence.num_saved = self._disk.offer(
            sequence.chain.keys[:num_full],
            sequence.num_saved,
            lambda indexes: self._kv.copy_out([table[index] for index in indexes]),
            max(MAX_COPIES, blocks_for(chunk.end - chunk.start)),
        )

    def _score_prompt(self, chunk: Chunk, logits: Tensor) -> None:
        """Append the log-probabilities of the prompt tokens that this chunk's rows predict."""
        sequence = chunk.sequence
        num_top = sequence.params.prompt_logprobs
        if num_top is None or not sequence.is_scoring:
            return
        first = len(sequence.prompt_logprobs)
        next_ids = sequence.token_ids[first : min(chunk.end + 1, sequence.num_prompt)]
        sequence.prompt_logprobs += prompt_logprobs(logits[: len(next_ids)], next_ids, num_top)

    def _report_prompt(self, sequence: Sequence) -> None:
        """Say once that the prompt is computed."""
        if sequence.prompt_done:
            return
        assert sequence.cached_tokens is not None
        is_scored = sequence.params.prompt_logprobs is not None
        scored = tuple(sequence.prompt_logprobs) if is_scored else None
        pooled = None
        if sequence.pooled is not None:
            pooled = tuple((sequence.pooled / sequence.num_prompt).tolist())
        self._events.append(
            (sequence.request_id, PromptDone(sequence.cached_tokens, scored, pooled))
        )
        sequence.prompt_done = True
        self._prompt_tokens += sequence.num_prompt
        self._cached_tokens += sequence.cached_tokens

    def _draw(self, chunk: Chunk, logits: Tensor, masks: PendingMasks) -> FinishReason | None:
        """Draw a token from the last known token's row, then from each row whose draft token was drawn before it.

        Returns:
            Why the request ends now; ``None``: it goes on.
        """
        sequence, params = chunk.sequence, chunk.sequence.params
        drafter, constraint = sequence.drafter, sequence.constraint
        if sequence.num_generated == params.max_tokens:  # the prompt alone was asked for
            return "length"
        self._drafted_tokens += len(chunk.draft)
        mask = masks.of(sequence)
        for row, guess in zip(logits[-1 - len(chunk.draft) :], (*chunk.draft, None), strict=True):
            output = sequence.sampler.draw(row.numpy(), mask)
            if output.token_id in params.stop_token_ids:
                return "stop"
            if constraint is not None:
                constraint.advance(output.token_id)
            sequence.token_ids.append(output.token_id)
            self._generated_tokens += 1
            if drafter is not None:
                output = replace(output, is_predicted=drafter.observe())
            self._events.append((sequence.request_id, output))
            is_right = output.token_id == guess
            if is_right:
                sequence.num_computed += 1
                self._accepted_tokens += 1
            if constraint is not None and constraint.is_done:
                return "stop"
            if sequence.num_generated == params.max_tokens:
                return "length"
            if not is_right:
                break
            mask = masks.refilled(sequence)
        return None

    def _fail(self, chunks: list[Chunk], error: Exception) -> None:
        log.error("a model step failed; %d requests are lost", len(chunks), exc_info=error)
        message = (
            f"The model failed while computing this request ({type(error).__name__}: {error}). "
            "The server goes on; send the request again, or shorten it if memory ran out."
        )
        for chunk in chunks:
            self._finish(chunk.sequence, "error", message)

    def _finish(self, sequence: Sequence, reason: FinishReason, message: str = "") -> None:
        if self._disk is not None:
            self._disk.note_use(sequence.chain.keys[: sequence.num_computed // BLOCK_SIZE])
        self._scheduler.remove(sequence)
        del self._sequences[sequence.request_id]
        self._finished[reason] += 1
        self._events.append((sequence.request_id, Finished(reason, message)))


def overloaded(max_unfinished: int) -> OverloadedError:
    """Return the error for a full queue."""
    return OverloadedError(
        f"{max_unfinished} requests are already running or waiting. Try again in a moment, or raise max_waiting."
    )
