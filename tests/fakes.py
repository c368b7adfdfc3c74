"""Small stand-ins that behave like the real thing, shared by all tests."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from evermini.engine.engine import Engine
from evermini.engine.request import Event, Finished, PromptDone, SamplingParams, TokenOutput
from evermini.errors import EngineError
from evermini.models.batch import BLOCK_SIZE, AdapterRows, ForwardBatch, KVCache
from evermini.models.config import ModelConfig
from evermini.models.lora import LoraWeights


def tiny_config(vocab_size: int = 97, max_position: int = 8192) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        max_position=max_position,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        tie_embeddings=False,
    )


class TinyAdapter:
    """Changes every hidden state of its rows in every layer."""

    num_bytes = 1000

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(1000 + seed)
        self.shift = torch.randn(32, generator=generator, dtype=torch.float64)


class TinyModel:
    """Two layers of causal attention with random weights, in float64 (so batching cannot flip an argmax).

    Every key and value goes through the KV cache by way of ``slots`` and ``block_tables`` alone, and each earlier
    token changes the output: one wrong, stale or foreign block shows. Blocks it is handed for the first time
    hold NaN: reading what was never written shows.

    Attributes:
        batches: Tokens per sequence of every step so far, e.g. ``[[32, 1, 1], [1, 1]]``.
        fail_on: Raise in the step with this number (0 is the first).
    """

    def __init__(self, config: ModelConfig | None = None, seed: int = 0) -> None:
        self.config = config or tiny_config()
        self.batches: list[list[int]] = []
        self.fail_on: int | None = None
        c, gen = self.config, torch.Generator().manual_seed(seed)
        width = c.num_heads * c.head_dim

        def weight(*shape: int) -> Tensor:
            return torch.randn(shape, generator=gen, dtype=torch.float64) / shape[0] ** 0.5

        self._embed = weight(c.vocab_size, c.hidden_size) * c.vocab_size**0.5
        self._head = weight(c.hidden_size, c.vocab_size) * 3
        self._layers = [
            {
                "q": weight(c.hidden_size, width),
                "k": weight(c.hidden_size, c.head_dim),
                "v": weight(c.hidden_size, c.head_dim),
                "o": weight(width, c.hidden_size),
            }
            for _ in range(c.num_layers)
        ]

    def new_kv_cache(self, num_blocks: int) -> KVCache:
        kv = KVCache(self.config, num_blocks, torch.float64)
        for memory in (*kv.k, *kv.v):
            memory.fill_(torch.nan)
        return kv

    def load_adapter(self, lora: LoraWeights) -> TinyAdapter:
        return TinyAdapter(lora.rank)

    def forward(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        return self.forward_hidden(batch, kv)[0]

    def forward_hidden(self, batch: ForwardBatch, kv: KVCache) -> tuple[Tensor, Tensor]:
        c = self.config
        starts = batch.query_start.tolist()
        self.batches.append([end - start for start, end in itertools.pairwise(starts)])
        if self.fail_on == len(self.batches) - 1:
            raise RuntimeError("injected failure")
        hidden = self._embed[batch.token_ids] + self._place(batch.positions)
        block, offset = batch.slots // BLOCK_SIZE, batch.slots % BLOCK_SIZE
        for layer, weights in enumerate(self._layers):
            for part in batch.adapters:
                assert isinstance(part.adapter, TinyAdapter)
                hidden[part.start : part.end] += part.adapter.shift
            x = hidden / hidden.norm(dim=-1, keepdim=True) * c.hidden_size**0.5
            q = (x @ weights["q"]).view(-1, c.num_heads, c.head_dim)
            kv.k[layer][block, 0, :, offset] = x @ weights["k"]
            kv.v[layer][block, 0, offset] = x @ weights["v"]
            out = torch.empty_like(q)
            for s, context in enumerate(batch.context_lens.tolist()):
                rows = slice(starts[s], starts[s + 1])
                table = batch.block_tables[s, : -(-context // BLOCK_SIZE)].long()
                k = kv.k[layer][table, 0].transpose(1, 2).reshape(-1, c.head_dim)[:context]
                v = kv.v[layer][table, 0].reshape(-1, c.head_dim)[:context]
                scores = torch.einsum("thd,cd->htc", q[rows], k) / c.head_dim**0.5
                future = torch.arange(context) > batch.positions[rows, None]
                scores = scores.masked_fill(future, -torch.inf)
                out[rows] = torch.einsum("htc,cd->thd", scores.softmax(-1), v)
            # The sine makes a chaos of it: every earlier token, however little attended to, has its say.
            hidden = hidden + 3 * torch.sin(300 * out.reshape(len(x), -1) @ weights["o"])
        return (hidden[batch.logits_rows] @ self._head).float(), hidden.float()

    def _place(self, positions: Tensor) -> Tensor:
        half = self.config.hidden_size // 2
        angles = positions[:, None] / 100.0 ** (torch.arange(half, dtype=torch.float64) / half)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class ScriptedModel(TinyModel):
    """Writes what it is told to, whatever it is asked: one request with one choice at a time.

    It goes on from the text that is there: a grammar may have chosen other tokens for what it forces.

    Args:
        config: The model's.
        vocabulary: Tokens by their bytes, each single byte among them.
        end_id: The end token.
    """

    def __init__(self, config: ModelConfig, vocabulary: dict[bytes, int], end_id: int) -> None:
        super().__init__(config)
        self._vocabulary, self._end_id = vocabulary, end_id
        self._bytes = {token_id: raw for raw, token_id in vocabulary.items()}
        self._tokens: dict[int, int] = {}
        self.say(b"", [])

    def say(self, script: bytes, cuts: list[int]) -> None:
        """Let the next answer be ``script``; its tokens are as long as can be without going over one of the cuts."""
        self._script, self._cuts = script, sorted([*cuts, len(script)])
        self._start: int | None = None

    def forward_hidden(self, batch: ForwardBatch, kv: KVCache) -> tuple[Tensor, Tensor]:
        hidden = torch.zeros(len(batch.token_ids), self.config.hidden_size)
        self._tokens.update(zip(batch.positions.tolist(), batch.token_ids.tolist(), strict=True))
        positions = batch.positions[batch.logits_rows].tolist()
        logits = torch.zeros(len(positions), self.config.vocab_size)
        for row, position in enumerate(positions):
            if self._start is None:
                self._start = position  # the last token of the prompt
            logits[row, self._next(self._start, position)] = 50.0
        return logits, hidden

    def _next(self, start: int, position: int) -> int:
        written = [self._bytes.get(self._tokens[p], b"") for p in range(start + 1, position + 1)]
        at = len(b"".join(written))
        end = next((cut for cut in self._cuts if cut > at), at)
        for length in range(end - at, 0, -1):
            if (token_id := self._vocabulary.get(self._script[at : at + length])) is not None:
                return token_id
        return self._end_id


def greedy_oracle(
    model: TinyModel, prompt_ids: list[int], num_tokens: int, adapter: TinyAdapter | None = None
) -> list[int]:
    """Generate greedily without the engine: the whole sequence anew for each token, in blocks of its own."""
    token_ids = list(prompt_ids)
    for _ in range(num_tokens):
        length = len(token_ids)
        num_blocks = -(-length // BLOCK_SIZE)
        batch = ForwardBatch(
            token_ids=torch.tensor(token_ids),
            positions=torch.arange(length),
            slots=torch.arange(length),
            query_start=torch.tensor([0, length], dtype=torch.int32),
            context_lens=torch.tensor([length], dtype=torch.int32),
            block_tables=torch.arange(num_blocks, dtype=torch.int32)[None],
            logits_rows=torch.tensor([length - 1]),
            adapters=() if adapter is None else (AdapterRows(adapter, 0, length),),
        )
        token_ids.append(int(model.forward(batch, model.new_kv_cache(num_blocks)).argmax()))
    return token_ids[len(prompt_ids) :]


@dataclass
class Outcome:
    """All events of one request, sorted out; ``steps`` says after which step each token came."""

    tokens: list[int] = field(default_factory=list)
    outputs: list[TokenOutput] = field(default_factory=list)
    prompt: PromptDone | None = None
    finished: Finished | None = None
    steps: list[int] = field(default_factory=list)

    def add(self, event: Event, step: int = 0) -> None:
        assert self.finished is None, f"{event} after {self.finished}"
        match event:
            case PromptDone():
                assert self.prompt is None
                self.prompt = event
            case TokenOutput():
                assert self.prompt is not None
                self.tokens.append(event.token_id)
                self.outputs.append(event)
                self.steps.append(step)
            case Finished():
                self.finished = event


def drive(
    engine: Engine,
    outcomes: dict[str, Outcome] | None = None,
    *,
    max_steps: int = 10_000,
    after_step: Callable[[int], None] = lambda step: None,
) -> dict[str, Outcome]:
    """Step until nothing is left, checking the engine's state after each step."""
    outcomes = {} if outcomes is None else outcomes
    for step in range(max_steps):
        if not engine.has_work:
            break
        for request_id, event in engine.step():
            outcomes.setdefault(request_id, Outcome()).add(event, step)
        engine.check_integrity()
        after_step(step)
    else:
        raise AssertionError(f"not done after {max_steps} steps")
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0), stats
    assert all(outcome.finished for outcome in outcomes.values())
    return outcomes


def random_prompt(length: int, seed: int = 0) -> list[int]:
    """Return tokens of the tiny vocabulary."""
    draw = random.Random(f"{length} {seed}")
    return [draw.randrange(97) for _ in range(length)]


def drive_crowd(
    engine: Engine, requests: Mapping[str, tuple[list[int], SamplingParams]], draw: random.Random
) -> tuple[dict[str, Outcome], set[str]]:
    """Run requests that arrive some at a time, with now and then an abort; return outcomes and who was aborted."""
    arrivals = iter(requests.items())
    outcomes: dict[str, Outcome] = {}
    aborted: set[str] = set()

    def feed(step: int) -> None:
        for _ in range(draw.randrange(3)):
            if (item := next(arrivals, None)) is not None:
                engine.add(item[0], *item[1])
        if draw.random() < 0.1:
            victim = draw.choice(list(requests))
            engine.abort(victim)
            aborted.add(victim)

    while len(outcomes) < len(requests):
        feed(0)
        drive(engine, outcomes, after_step=feed)
    return outcomes, aborted


END = 5
"""The tiny vocabulary's end token."""


class Steps:
    """A grammar of fixed length: the i-th token is one of ``sets[i]``; then the end, or ``sets`` over again."""

    def __init__(self, *sets: set[int], endless: bool = False) -> None:
        self.sets, self.endless = sets, endless

    def start(self) -> StepsState:
        return StepsState(self)


class StepsState:
    def __init__(self, grammar: Steps) -> None:
        self._grammar = grammar
        self._at = 0
        self.drawn: list[int] = []

    def _allowed(self, at: int) -> set[int]:
        sets = self._grammar.sets
        if at < len(sets) or self._grammar.endless:
            return sets[at % len(sets)] | ({END} if at and at % len(sets) == 0 else set())
        return {END}

    def fill_mask(self, row: Tensor) -> None:
        bits = np.zeros(row.numel() * 32, bool)
        bits[list(self._allowed(self._at))] = True
        row.numpy()[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def advance(self, token_id: int) -> None:
        if token_id not in self._allowed(self._at):
            raise EngineError("not allowed")
        self._at += 1
        self.drawn.append(token_id)

    def num_valid(self, token_ids: Sequence[int]) -> int:
        for count, token_id in enumerate(token_ids):
            if token_id not in self._allowed(self._at + count):
                return count
        return len(token_ids)

    def forced(self) -> list[int]:
        tokens: list[int] = []
        while len(only := self._allowed(self._at + len(tokens))) == 1 and only != {END}:
            tokens += only
        return tokens

    @property
    def is_done(self) -> bool:
        return not self._grammar.endless and self._at == len(self._grammar.sets)
