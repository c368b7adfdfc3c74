"""Find a model's retrieval heads: which (layer, query head) points at the passage that answers a question.

    evermini calibrate mini

Synthetic documents with known answers (`evermini.recall.synthetic`) are indexed and asked exactly as in use, over all
candidate layers. A head's worth is the mean reciprocal rank of the answer's block among all blocks, averaged over the
kinds of question. Stopping early costs recall and saves time, so the vote of the best heads is measured, on a document
that the ranking has not seen, for every depth; the shallowest depth within a tolerance of the best one is taken.

Related: retrieval heads (Wu et al. 2024, arXiv 2404.15574), QRHead (Zhang et al. 2025, arXiv 2506.09944).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from evermini.errors import ModelError
from evermini.models.batch import IndexModel
from evermini.recall.calibration import Calibration
from evermini.recall.recall import Progress
from evermini.recall.scan import BLOCK, KeyRun, block_mass, even_starts, quantize_keys
from evermini.recall.segment import ModelTokenizer, Segment, TextTokenizer, tokenize
from evermini.recall.select import NULL_QUESTION
from evermini.recall.synthetic import KINDS, Document, generate
from evermini.recall.windows import Windows

Head = tuple[int, int]


@dataclass(frozen=True)
class CalibrationProgress(Progress):
    """How far a calibration is, in tokens of the texts that the model is measured on."""

    stage: ClassVar[str] = "calibrate"


OnCalibration = Callable[[CalibrationProgress], None]
"""Told how a calibration goes, after every pass of the model; what it raises ends the calibration."""


@dataclass(frozen=True)
class Plan:
    """What to measure and how to choose.

    Attributes:
        num_chars: Length of each document; about four characters a token.
        questions_per_kind: Questions of each of the four kinds, per document.
        num_heads: Heads that vote, at most.
        least_gain: What a further head must add to the vote's mean reciprocal rank.
        max_pairs: (layer, key/value head) pairs at most: they set the index's size and the scan's time.
        max_depth: Share of the layers that are candidates.
        tolerance: The shallowest depth whose recall is within this of the best one is taken.
    """

    num_chars: int = 40_000
    questions_per_kind: int = 8
    num_heads: int = 6
    least_gain: float = 0.002
    max_pairs: int = 4
    max_depth: float = 0.65
    tolerance: float = 0.02


@dataclass(frozen=True)
class _Measured:
    """Documents: per question its kind, the answer's blocks and all heads' scores (layers, heads, blocks)."""

    kinds: list[str]
    gold: list[list[list[int]]]
    scores: list[Tensor]


def default_prefix(tokenizer: ModelTokenizer) -> list[int]:
    """Return what to put before every pass: the token a text begins with, and a line break."""
    first = tokenizer.bos_id if tokenizer.bos_id is not None else min(tokenizer.eos_ids)
    return [first, *tokenizer.encode("\n")]


def default_windows(prefix: Sequence[int], max_position: int) -> Windows:
    """Return the windows that calibration uses, fitted to the model."""
    return Windows(tuple(prefix)).fitted(max_position)


def calibrate(
    model: IndexModel,
    tokenizer: ModelTokenizer,
    weights: str,
    *,
    prefix: Sequence[int],
    plan: Plan | None = None,
    progress: OnCalibration = lambda _: None,
) -> Calibration:
    """Measure a model and choose its heads.

    Args:
        model: The index model.
        tokenizer: Its tokenizer.
        weights: Fingerprint of its checkpoint.
        prefix: Token ids to put before every pass (a chat's beginning, or the BOS token); at least one.
        plan: What to measure.
        progress: Told how it goes.

    Raises:
        ModelError: Its native window or head_dim does not suit.
    """
    plan = plan or Plan()
    config = model.config
    if config.head_dim % 4:
        raise ModelError(
            f"Recall needs a head_dim divisible by 4, not {config.head_dim}. Use another index model."
        )
    assert prefix
    windows = default_windows(prefix, config.max_position)
    group = config.num_heads // config.num_kv_heads
    layers = range(max(1, round(config.num_layers * plan.max_depth)))
    documents = [generate(seed, plan.num_chars, plan.questions_per_kind) for seed in range(1, 4)]
    texts = [tokenize(tokenizer, Segment(document.text)) for document in documents]
    meter = _Meter(
        sum(len(ids) for ids, _ in texts),
        sum(windows.num_chunks(len(ids)) for ids, _ in texts)
        + sum(len(document.questions) + 1 for document in documents),
        progress,
    )
    measured: list[_Measured] = []
    means: Tensor | None = None
    for document, (ids, starts) in zip(documents, texts, strict=True):
        keys = _all_keys(model, windows, ids, list(layers), meter)
        means = keys.mean(2) if means is None else means  # (layers, kv_heads, head_dim)
        centred = keys - means[:, :, None]
        measured.append(
            _measure(model, tokenizer, windows, document, centred, starts, list(layers), meter)
        )
    assert means is not None
    first, second, unseen = measured
    seen = _Measured(
        first.kinds + second.kinds, first.gold + second.gold, first.scores + second.scores
    )
    alone = _worth(seen, seen.scores)  # (layers, heads)
    curve = [
        _at_depth(depth, alone, seen, unseen, config.num_layers, group, plan) for depth in layers
    ]
    best = max(point["mrr"] for point in curve)
    chosen = next(point for point in curve if point["mrr"] >= best - plan.tolerance)
    heads = tuple((layer, head) for layer, head in chosen["heads"])
    result = Calibration(
        weights=weights, head_dim=config.head_dim, group=group, heads=heads, means=(), windows=windows,
        measured={"curve": curve, "chosen": chosen, "num_layers": config.num_layers},
    )  # fmt: skip
    rows = tuple(
        tuple(round(v, 4) for v in means[layer, kv].tolist()) for layer, kv in result.pairs
    )
    return Calibration(**{**result.__dict__, "means": rows})


class _Meter:
    """Tells how far a calibration is: ``num_steps`` passes over ``num_tokens`` tokens."""

    def __init__(self, num_tokens: int, num_steps: int, report: OnCalibration) -> None:
        self._num_tokens, self._num_steps, self._report = num_tokens, num_steps, report
        self._num_done = 0
        self._began = time.monotonic()
        self._tell()

    def step(self) -> None:
        """Count a pass."""
        self._num_done += 1
        self._tell()

    def _tell(self) -> None:
        done = self._num_tokens * self._num_done // self._num_steps
        seconds = time.monotonic() - self._began
        rate = done / seconds if seconds > 0 else 0.0
        eta = (self._num_tokens - done) / rate if rate else None
        self._report(CalibrationProgress(done, self._num_tokens, seconds, rate, eta))


def _all_keys(
    model: IndexModel, windows: Windows, ids: np.ndarray[Any, Any], layers: list[int], meter: _Meter
) -> Tensor:
    """Return keys (layers, kv_heads, n, head_dim) of a document's tokens."""
    parts = []
    for chunk in range(windows.num_chunks(len(ids))):
        first, end = windows.chunk_range(chunk, len(ids))
        passed = model.index_pass(torch.from_numpy(windows.chunk_pass(ids, chunk)), layers)
        parts.append(torch.stack([k[first - end :].transpose(0, 1) for _, k in passed]))
        meter.step()
    return torch.cat(parts, 2)


def _measure(
    model: IndexModel, tokenizer: TextTokenizer, windows: Windows, document: Document,
    keys: Tensor, starts: np.ndarray[Any, Any], layers: list[int], meter: _Meter,
) -> _Measured:  # fmt: skip
    num_blocks = -(-keys.shape[2] // BLOCK)
    runs = [[[KeyRun(*quantize_keys(k), 0, even_starts(len(k)))] for k in layer] for layer in keys]

    def votes(question: str) -> Tensor:
        """Return each head's mean mass per block (layers, heads, blocks)."""
        ids = tokenizer.encode(question)
        passed = model.index_pass(torch.tensor([*windows.prefix, *ids]), layers)
        result = []
        for (q, _), by_head in zip(passed, runs, strict=True):
            group = q.shape[1] // len(by_head)
            for head, run in enumerate(by_head):
                asked = q[-len(ids) :, head * group : (head + 1) * group].transpose(0, 1)
                mass = block_mass(asked.reshape(-1, q.shape[2]).contiguous(), run, num_blocks)
                result.append(mass.T.reshape(group, len(ids), num_blocks).mean(1))
        meter.step()
        return torch.cat(result).view(len(layers), -1, num_blocks)

    null = votes(NULL_QUESTION)
    gold = []
    for question in document.questions:
        places = []
        for start, end in question.gold:
            first, last = np.searchsorted(starts, [start, end - 1], side="right") - 1
            places.append(list(range(int(first) // BLOCK, int(last) // BLOCK + 1)))
        gold.append(places)
    scores = [votes(question.text) - null for question in document.questions]
    return _Measured([question.kind for question in document.questions], gold, scores)


def smooth(scores: Tensor) -> Tensor:
    """Return scores in which a passage that straddles two blocks counts as much as one that lies inside a block."""
    padded = torch.nn.functional.pad(scores, (1, 1))
    return scores + torch.maximum(padded[..., :-2], padded[..., 2:]).clamp_min(0) / 2


def answer_rank(scores: Tensor, gold: Sequence[int]) -> Tensor:
    """Return how many blocks outside the answer and its neighbours score higher than it, per leading dimension."""
    smoothed = smooth(scores)
    others = torch.ones(scores.shape[-1], dtype=torch.bool)
    for block in gold:
        others[max(0, block - 1) : block + 2] = False
    best = smoothed[..., list(gold)].amax(-1, keepdim=True)
    return (smoothed[..., others] > best).sum(-1)


def _worth(measured: _Measured, scores: Sequence[Tensor]) -> Tensor:
    """Return the mean reciprocal rank of the answer, every kind of question counting alike.

    Args:
        measured: The questions.
        scores: One tensor (..., blocks) per question; leading dimensions are kept.
    """
    by_kind = []
    for kind in KINDS:
        ranks = [
            answer_rank(score, gold[0])  # of two hops, only the first can be seen from the question
            for k, gold, score in zip(measured.kinds, measured.gold, scores, strict=True)
            if k == kind
        ]
        by_kind.append((1 / (1 + torch.stack(ranks).float())).mean(0))
    return torch.stack(by_kind).mean(0)


def _choose(depth: int, alone: Tensor, seen: _Measured, group: int, plan: Plan) -> list[Head]:
    """Return the heads to take if layer ``depth`` is the last one.

    More heads are not better by themselves: weak ones drown strong ones. So a head joins the best ones only while it
    improves their vote.
    """
    candidates = [
        divmod(i, alone.shape[1])
        for i in alone[: depth + 1].flatten().argsort(descending=True).tolist()
    ]
    pool = [head for head in candidates[:10] if alone[head] >= alone[candidates[0]] / 2]
    heads = [pool.pop(0)]
    best = float(alone[heads[0]])
    while pool and len(heads) < plan.num_heads:
        votes = []
        for head in pool:
            pairs = {(layer, h // group) for layer, h in [*heads, head]}
            if len(pairs) <= plan.max_pairs:
                votes.append((float(_worth(seen, _vote(seen, [*heads, head]))), head))
        if not votes:
            break
        value, head = max(votes, key=lambda vote: vote[0])
        if value < best + plan.least_gain:
            break
        best = value
        heads.append(head)
        pool.remove(head)
    return heads


def _vote(measured: _Measured, heads: Sequence[Head]) -> list[Tensor]:
    return [
        torch.stack([scores[layer, head] for layer, head in heads]).sum(0)
        for scores in measured.scores
    ]


def _at_depth(
    depth: int,
    alone: Tensor,
    seen: _Measured,
    unseen: _Measured,
    num_layers: int,
    group: int,
    plan: Plan,
) -> dict[str, Any]:
    """Return what is taken if layer ``depth`` is the last one, and its recall on an unseen document."""
    heads = _choose(depth, alone, seen, group, plan)
    votes = _vote(unseen, heads)
    ranks = torch.stack(
        [answer_rank(v, gold[0]) for gold, v in zip(unseen.gold, votes, strict=True)]
    )
    by_kind = {
        kind: round(float((ranks[[k == kind for k in unseen.kinds]] < 4).float().mean()), 3)
        for kind in KINDS
    }
    return {
        "last_layer": depth,
        "heads": heads,
        "mrr": round(float(_worth(unseen, votes)), 4),
        "recall_at_4": round(float((ranks < 4).float().mean()), 4),
        "recall_at_4_by_kind": by_kind,
        # Of the last layer only the projections are computed, about a tenth of it.
        "cost": round((depth + 0.1) / num_layers, 3),
    }
