"""What int8 costs: perplexity on real prose against the float32 oracle."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import pytest
import torch

from evermini.models.batch import Model
from evermini.models.checkpoint import open_checkpoint
from evermini.models.load import load_model
from evermini.text.tokenizer import Tokenizer
from tests.batches import make_batch
from tests.conftest import data_file

WINDOW = 1000


def perplexity(model: Model, ids: list[int]) -> float:
    total, count = 0.0, 0
    kv, blocks = model.new_kv_cache(32), list(range(32))
    for start in range(0, len(ids) - WINDOW + 1, WINDOW):
        part = ids[start : start + WINDOW]
        logits = model.forward(make_batch([(part, 0, blocks)], all_rows=True), kv)
        targets = torch.tensor(part[1:])
        total += torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum").item()
        count += len(targets)
    return math.exp(total / count)


@pytest.mark.parametrize(
    "num_tokens", [4000, pytest.param(20000, marks=pytest.mark.slow)], ids=["4k", "20k"]
)
def test_int8_perplexity_within_one_percent(nano_path: Path, num_tokens: int) -> None:
    with gzip.open(data_file("prose/debian_handbook_en.txt.gz"), "rt") as file:
        text = file.read(num_tokens * 6)
    checkpoint = open_checkpoint(nano_path)
    ids = Tokenizer(checkpoint.tokenizer).encode(text)[:num_tokens]
    assert len(ids) == num_tokens
    exact = perplexity(load_model(checkpoint, device="cpu", precision="fp32"), ids)
    int8 = perplexity(load_model(checkpoint, device="cpu", precision="int8"), ids)
    print(
        f"perplexity over {num_tokens} tokens: fp32 {exact:.4f}, int8 {int8:.4f} ({int8 / exact - 1:+.2%})"
    )
    assert abs(int8 / exact - 1) < 0.01
