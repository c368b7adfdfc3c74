"""The CUDA path: bfloat16 on the GPU against the float32 oracle on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evermini.models.checkpoint import open_checkpoint
from evermini.models.decoder import Decoder
from evermini.models.load import load_model
from tests.adapters import random_lora
from tests.batches import make_batch
from tests.parity.test_adapters import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

IDS = [(i * 7919 + 13) % 40000 for i in range(300)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_follow_the_cpu(nano_path: Path, precision: str) -> None:
    checkpoint = open_checkpoint(nano_path)
    oracle = Decoder(checkpoint)
    model = load_model(checkpoint, device="cuda", precision=precision)
    batch = make_batch([(IDS, 0, list(range(10)))], all_rows=True)
    expected = oracle.forward(batch, oracle.new_kv_cache(10)).log_softmax(-1)
    actual = model.forward(batch, model.new_kv_cache(10)).log_softmax(-1)
    divergence = (expected.exp() * (expected - actual)).sum(-1).mean().item()
    assert divergence < {"fp32": 1e-4, "bf16": 0.05}[precision]


def test_batched_decode_is_alone(nano_path: Path) -> None:
    model = load_model(open_checkpoint(nano_path), device="cuda", precision="fp32")
    lengths, kv, chunks, first = [40, 100, 299], model.new_kv_cache(32), [], 0
    for length in lengths:
        blocks = list(range(first, first + length // 32 + 1))
        first = blocks[-1] + 1
        model.forward(make_batch([(IDS[: length - 1], 0, blocks)]), kv)
        chunks.append((IDS[length - 1 : length], length - 1, blocks))
    together = model.forward(make_batch(chunks), kv)
    for row, length in enumerate(lengths):
        alone = model.forward(
            make_batch([(IDS[:length], 0, list(range(10)))]), model.new_kv_cache(10)
        )
        assert torch.allclose(together[row], alone[0], atol=1e-2)


def test_many_adapters_in_a_batch_follow_the_cpu(nano_path: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(nano_path)
    oracle, model = Decoder(checkpoint), load_model(checkpoint, device="cuda", precision="fp32")
    loras = [
        random_lora(tmp_path / str(n), checkpoint.config, seed=n, rank=2 + n) for n in range(8)
    ]
    prompts = [IDS[n : n + 20] for n in range(9)]
    expected = run(oracle, prompts, [None, *map(oracle.load_adapter, loras)])
    actual = run(model, prompts, [None, *map(model.load_adapter, loras)])
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-2)
