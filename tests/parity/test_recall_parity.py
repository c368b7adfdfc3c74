"""Recall's fast paths against slow oracles: the scan, the index pass, and both together on the real nano."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from evermini import kernels
from evermini.models.checkpoint import open_checkpoint
from evermini.models.decoder import Decoder
from evermini.models.load import load_model
from evermini.recall import scan
from evermini.recall.calibrate import Plan, calibrate, default_prefix
from evermini.recall.calibration import Calibration, find_calibration, save_calibration
from evermini.recall.load import load_calibration, open_recall
from evermini.recall.scan import (
    BLOCK,
    KeyRun,
    block_mass,
    even_starts,
    quantize_keys,
    weighted_mass,
)
from evermini.recall.segment import cut
from evermini.recall.select import Policy
from evermini.recall.synthetic import KINDS, generate
from evermini.text.tokenizer import Tokenizer
from tests.conftest import data_file

needs_kernels = pytest.mark.skipif(kernels.load() is None, reason=str(kernels.unavailable_reason()))


def random_runs(lengths, dim: int, seed: int = 0) -> tuple[list[KeyRun], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    runs, whole, block = [], [], 0
    for length in lengths:
        keys = 2 * torch.randn(length, dim, generator=generator)
        whole.append(keys)
        runs.append(KeyRun(*quantize_keys(keys), block, even_starts(length)))
        block += -(-length // BLOCK)
    return runs, torch.cat(whole)


def exact(queries: torch.Tensor, runs: list[KeyRun]) -> torch.Tensor:
    """Softmax over all dequantised keys at once, in float64."""
    scores = (
        torch.cat([r.keys.double() * r.scales[:, None].double() for r in runs]) @ queries.double().T
    )
    mass = (scores * queries.shape[1] ** -0.5).softmax(0)
    parts, at = [], 0
    for run in runs:
        part = mass[at : at + len(run.keys)]
        at += len(run.keys)
        parts.append(
            torch.nn.functional.pad(part, (0, 0, 0, -len(part) % BLOCK))
            .view(-1, BLOCK, part.shape[1])
            .sum(1)
        )
    return torch.cat(parts)


@needs_kernels
@pytest.mark.parametrize("lengths", [[1], [31], [32], [33], [64, 5, 96, 1], [2048, 2048, 777]])
@pytest.mark.parametrize(("dim", "num_queries"), [(64, 1), (64, 64), (128, 65), (20, 7)])
def test_scan_is_exact_softmax(lengths, dim, num_queries):
    runs, _ = random_runs(lengths, dim)
    queries = 3 * torch.randn(num_queries, dim, generator=torch.Generator().manual_seed(1))
    rounded, scales = quantize_keys(queries)
    blocks = sum(-(-length // BLOCK) for length in lengths)
    mass = block_mass(queries, runs, blocks)
    assert mass.shape == (blocks, num_queries)
    torch.testing.assert_close(
        mass.double(), exact(rounded * scales[:, None], runs), rtol=1e-3, atol=1e-6
    )


@needs_kernels
def test_native_scan_equals_pytorch(monkeypatch):
    runs, _ = random_runs([500, 2048, 31], 64)
    queries = torch.randn(70, 64, generator=torch.Generator().manual_seed(1)) * 5
    native = block_mass(queries, runs, 81)
    monkeypatch.setattr(scan.kernels, "load", lambda: None)
    torch.testing.assert_close(native, block_mass(queries, runs, 81), rtol=1e-4, atol=1e-7)


@needs_kernels
@pytest.mark.parametrize("num_queries", [1, 16, 17, 33, 48, 64, 65, 100, 130])
def test_every_number_of_panels_equals_pytorch(monkeypatch, num_queries):
    """Queries are scored 16 to 64 at a time, and keys 8, 4 and 1 at a time."""
    runs, _ = random_runs([5, 29, 77, 2048], 64)
    queries = torch.randn(num_queries, 64, generator=torch.Generator().manual_seed(1)) * 5
    native = block_mass(queries, runs, 69)
    monkeypatch.setattr(scan.kernels, "load", lambda: None)
    torch.testing.assert_close(native, block_mass(queries, runs, 69), rtol=1e-4, atol=1e-7)


def test_weighted_mass_is_the_masses_weighed():
    runs, _ = random_runs([500, 2048, 31], 64)
    generator = torch.Generator().manual_seed(1)
    queries, weights = (
        torch.randn(23, 64, generator=generator),
        torch.randn(23, generator=generator),
    )
    together = weighted_mass(queries, weights, runs, 81)
    slow = (block_mass(queries, runs, 81).double() @ weights.double()).float()
    torch.testing.assert_close(together, slow, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_kernels), False])
def test_blocks_of_any_length_share_the_mass(monkeypatch, native):
    """A block's mass is the sum of its keys' masses, wherever the blocks end."""
    (even,), _ = random_runs([320], 64)
    cuts = torch.tensor([0, 1, 33, 40, 72, 75, 107, 128, 160, 191, 192, 224, 250, 260, 292, 320])
    uneven = KeyRun(even.keys, even.scales, 0, cuts.to(torch.int32))
    single = KeyRun(even.keys, even.scales, 0, torch.arange(321, dtype=torch.int32))
    queries = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)) * 3
    if not native:
        monkeypatch.setattr(scan.kernels, "load", lambda: None)
    alone = block_mass(queries, [single], 320)
    together = torch.stack([alone[a:b].sum(0) for a, b in itertools.pairwise(cuts.tolist())])
    torch.testing.assert_close(block_mass(queries, [uneven], 15), together, rtol=1e-4, atol=1e-7)


def test_int8_keys_and_queries_lose_little():
    runs, keys = random_runs([4096], 64)
    queries = 2 * torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    mass = (keys @ queries.T / 8).softmax(0).view(-1, BLOCK, 40).sum(1)
    moved = (block_mass(queries, runs, 128) - mass).abs().sum(0) / 2
    assert moved.max() < 0.05


def test_cut_into_runs_equals_whole():
    """Bit for bit: where records end on disk cannot change what is found."""
    (whole,), _ = random_runs([2048], 64)
    queries = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    pieces = [
        KeyRun(whole.keys[i : i + 96], whole.scales[i : i + 96], i // BLOCK, even_starts(min(96, 2048 - i)))
        for i in range(0, 2048, 96)
    ]  # fmt: skip
    assert torch.equal(block_mass(queries, [whole], 64), block_mass(queries, pieces, 64))


@pytest.fixture(scope="module")
def tokenizer(nano_path: Path) -> Tokenizer:
    return Tokenizer(open_checkpoint(nano_path).tokenizer)


@pytest.fixture(scope="module")
def nano(nano_path: Path):
    return load_model(open_checkpoint(nano_path), device="cpu", precision="int8")


@needs_kernels
def test_native_index_pass_follows_the_oracle(nano, nano_path, tokenizer):
    ids = torch.tensor(tokenizer.encode(generate(5, 1200, 1).text))
    layers = [4, 0, 6]
    native = nano.index_pass(ids, layers)
    oracle = Decoder(open_checkpoint(nano_path)).index_pass(ids, layers)
    for (q, k), (q_exact, k_exact) in zip(native, oracle, strict=True):
        assert q.shape == (len(ids), 9, 64)
        assert k.shape == (len(ids), 3, 64)
        assert (q - q_exact).norm() / q_exact.norm() < 0.05
        assert (k - k_exact).norm() / k_exact.norm() < 0.05


def test_index_pass_is_causal_and_repeatable(nano, tokenizer):
    ids = torch.tensor(tokenizer.encode(generate(5, 1200, 1).text))
    (q, k), (_, k_first) = nano.index_pass(ids, [3, 1])
    again = nano.index_pass(ids[:100], [1, 3])
    assert torch.equal(again[1][1], k[:100])
    assert torch.equal(again[1][0], q[:100])
    assert torch.equal(again[0][1], k_first[:100])


def test_the_catalogue_is_calibrated(nano_path, tmp_path):
    checkpoint = open_checkpoint(nano_path)
    found = find_calibration(tmp_path, checkpoint.fingerprint)
    assert found is not None
    assert found.measured["chosen"]["recall_at_4"] > 0.9
    assert max(found.layers) < 0.7 * checkpoint.config.num_layers


def test_nano_finds_what_is_asked_and_where(nano, nano_path, tokenizer, tmp_path):
    document = generate(77, 20_000, 3)
    recall = open_recall(nano, tokenizer, open_checkpoint(nano_path).fingerprint, tmp_path)
    context = cut(document.text, max_chars=8_000)
    recall.ingest(context)
    found = dict.fromkeys(KINDS, 0)
    for question in document.questions:
        selection = recall.ask(context, question.text, Policy(max_tokens=700))
        assert selection.num_tokens <= 700 < selection.num_context_tokens / 5
        start, end = question.gold[0]
        found[question.kind] += any(
            s.chars[0] <= start and end - 40 <= s.chars[1] for s in selection.spans
        )
    assert sum(found.values()) >= 10, found
    assert found["lookalike"] == 3


def test_nano_finds_both_facts_of_a_chain(nano, nano_path, tokenizer, tmp_path):
    """HotpotQA: a question names one thing, and what is asked of it stands in another paragraph."""
    path = data_file("hotpotqa/hotpot_distractor_sample.jsonl")
    items = [json.loads(line) for line in path.read_text().splitlines()[:6]]
    places, text = {}, ""
    for item in items:
        for title, sentences in zip(*item["context"].values(), strict=True):
            paragraph = f"{title}\n{''.join(sentences)}\n\n"
            places[title] = range(len(text), len(text) + len(paragraph))
            text += paragraph
    context = cut(text)
    recall = open_recall(nano, tokenizer, open_checkpoint(nano_path).fingerprint, tmp_path)

    hits = 0
    for item in items:
        best = [sum(s.chars) // 2 for s in recall.rank(context, item["question"])[:6]]
        gold = {*item["supporting_facts"]["title"]}
        hits += all(any(middle in places[title] for middle in best) for title in gold)
    assert hits >= 4


def test_an_unknown_model_calibrates_itself_once(nano, tokenizer, tmp_path):
    plan = Plan(num_chars=2_500, questions_per_kind=1, max_depth=0.1)
    said = []
    first = load_calibration(nano, tokenizer, "unknown", tmp_path, progress=said.append, plan=plan)
    assert {report.stage for report in said} == {"calibrate"}
    done = [report.done_tokens for report in said]
    assert len(done) > 15, "told after every pass"
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, said[0].total_tokens)
    assert first.weights == "unknown"
    assert first.heads
    assert max(first.layers) <= 2
    assert load_calibration(nano, tokenizer, "unknown", tmp_path, progress=said.append) == first
    assert len(said) == len(done), "known now"
    again = calibrate(nano, tokenizer, "unknown", prefix=default_prefix(tokenizer), plan=plan)
    assert again == first, "calibration is deterministic"


def test_calibration_file_round_trip(tmp_path, nano_path):
    calibration = find_calibration(tmp_path, open_checkpoint(nano_path).fingerprint)
    assert calibration is not None
    copy = Calibration.from_json(calibration.to_json())
    assert copy == calibration
    assert copy.fingerprint == calibration.fingerprint
    save_calibration(tmp_path, copy)
    assert find_calibration(tmp_path, calibration.weights) == calibration
