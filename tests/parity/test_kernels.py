"""Native kernels against the arithmetic written out in PyTorch, and bit for bit against themselves."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from evermini import kernels
from evermini.engine.request import Emphasis
from evermini.models.batch import Model
from evermini.models.checkpoint import open_checkpoint
from evermini.models.decoder import Decoder
from evermini.models.load import load_model
from evermini.models.native import ActivationBuffer, NativeDecoder, linear_struct
from evermini.models.packed import pack_linear
from evermini.models.quantize import quantize_activations, quantize_weight, rotate
from tests.batches import make_batch

pytestmark = pytest.mark.skipif(
    kernels.load() is None, reason=f"native kernels: {kernels.unavailable_reason()}"
)


@pytest.fixture(scope="module")
def nano(nano_path: Path) -> NativeDecoder:
    model = load_model(open_checkpoint(nano_path), device="cpu", precision="int8")
    assert isinstance(model, NativeDecoder)
    return model


def native_linear(
    weight: torch.Tensor, bias: torch.Tensor, bits: int, x: torch.Tensor
) -> torch.Tensor:
    packed = dict(pack_linear("w", weight, bias, bits))
    struct = linear_struct(packed, "w", *weight.shape, bits)
    rows, width = x.shape
    buffer, y = ActivationBuffer(rows, width), torch.empty(rows, weight.shape[0])
    library = kernels.load()
    assert library is not None
    library.em_linear(
        ctypes.byref(struct), ctypes.byref(buffer.struct), x.data_ptr(), rows, y.data_ptr()
    )
    return y


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (200, 576), (130, 96), (65, 40), (17, 33)])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 13, 300])
def test_linear_is_the_integer_product(bits: int, n: int, k: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(bits * n + rows)
    weight = torch.randn(n, k, generator=generator)
    weight[3] = 0  # a channel without weights
    bias = torch.randn(n, generator=generator)
    x = torch.randn(rows, k, generator=generator) * torch.logspace(-3, 3, rows)[:, None]
    x[0, 5] = 1000  # an outlier
    quantized = quantize_weight(weight, bits)
    q, scale = quantize_activations(x)
    exact = q.double() @ quantized.int8().double().t()
    expected = exact * scale[:, None].double() * quantized.scale.double() + bias
    actual = native_linear(weight, bias, bits, x)
    # Rounding an activation at a tie may differ by one unit between the two: a few parts in 10,000 of a row.
    torch.testing.assert_close(
        actual.double(), expected, rtol=1e-4, atol=2e-3 * float(expected.abs().max())
    )
    assert ((actual - expected).norm(dim=1) / expected.norm(dim=1) < 2e-3).all()


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_more_bits_lose_less(bits: int) -> None:
    weight = torch.randn(256, 896, generator=torch.Generator().manual_seed(0))
    quantized = quantize_weight(weight, bits)
    restored = quantized.int8().float() * quantized.scale[:, None]
    error = ((restored - rotate(weight)).norm() / weight.norm()).item()
    assert error < {4: 0.10, 5: 0.055, 6: 0.035, 8: 0.012}[bits]


def test_rotation_keeps_products() -> None:
    x, w = torch.randn(5, 576), torch.randn(9, 576)
    torch.testing.assert_close(rotate(x) @ rotate(w).t(), x @ w.t(), rtol=1e-4, atol=1e-4)


IDS = [(i * 7919 + 13) % 40000 for i in range(1500)]


def whole(model: NativeDecoder, ids: list[int]) -> torch.Tensor:
    blocks = list(range(-(-len(ids) // 32)))
    return model.forward(make_batch([(ids, 0, blocks)]), model.new_kv_cache(len(blocks)))[0]


@pytest.mark.parametrize("cut", [1, 31, 64, 500, 1199])
def test_chunked_is_whole_bit_for_bit(nano: NativeDecoder, cut: int) -> None:
    ids, blocks = IDS[:1200], list(range(37, -1, -1))
    kv = nano.new_kv_cache(38)
    nano.forward(make_batch([(ids[:cut], 0, blocks)]), kv)
    logits = nano.forward(make_batch([(ids[cut:], cut, blocks)]), kv)[0]
    assert torch.equal(logits, whole(nano, ids))


def test_batched_is_alone_bit_for_bit(nano: NativeDecoder) -> None:
    """Prefill chunks, decode steps and a long context share a batch; each equals its own run."""
    lengths, kv, chunks, first = [1, 40, 1100, 333], nano.new_kv_cache(64), [], 0
    for length in lengths:
        blocks = list(range(first, first + length // 32 + 1))
        first = blocks[-1] + 1
        done = length - 1 if length in (40, 1100) else 0
        if done:
            nano.forward(make_batch([(IDS[:done], 0, blocks)]), kv)
        chunks.append((IDS[done:length], done, blocks))
    together = nano.forward(make_batch(chunks), kv)
    for row, length in enumerate(lengths):
        assert torch.equal(together[row], whole(nano, IDS[:length])), length


def test_attention_follows_the_oracle_over_splits(nano_path: Path, nano: NativeDecoder) -> None:
    """1,500 tokens cross a split of 1,024: the float32 oracle agrees on the next token and on the distribution."""
    oracle = Decoder(open_checkpoint(nano_path))
    batch = make_batch([(IDS, 0, list(range(47)))])
    expected = oracle.forward(batch, oracle.new_kv_cache(47))[0].log_softmax(-1)
    actual = nano.forward(batch, nano.new_kv_cache(47))[0].log_softmax(-1)
    divergence = (expected.exp() * (expected - actual)).sum().item()
    assert 0 <= divergence < 0.05


EMPHASIS = Emphasis(((3, 40, 4.0), (64, 65, 6.0), (1100, 1130, 5.0)))


def emphasised(
    model: Model, cuts: Sequence[int], emphasis: Emphasis | None, *, within: float = 0.0
) -> torch.Tensor:
    """Return the log-probabilities after `IDS`, computed in pieces up to each of ``cuts``, beside another request."""
    other, kv = IDS[700:740], model.new_kv_cache(49)
    logits = torch.empty(0)
    for start, end in pairwise((0, *cuts)):
        chunks = [(IDS[start:end], start, list(range(47)))]
        if start:
            chunks.append((other, 0, [47, 48]))
        bias = None if emphasis is None else emphasis.key_bias
        batch = replace(make_batch(chunks), key_bias=(bias, None)[: len(chunks)])
        logits = model.forward(batch, kv)
    alone = model.forward(make_batch([(other, 0, [47, 48])]), kv)[0]
    torch.testing.assert_close(logits[1], alone, rtol=0, atol=within)
    return logits[0].log_softmax(-1)


def test_emphasis_is_added_to_the_scores_of_its_keys(nano_path: Path, nano: NativeDecoder) -> None:
    """In chunks and in single steps the same bit for bit, and what the oracle computes with a mask."""
    plain, actual = (emphasised(nano, [1200, 1500], e) for e in (None, EMPHASIS))
    for cuts in ([1, 1110, 1500], [1499, 1500]):
        assert torch.equal(emphasised(nano, cuts, EMPHASIS), actual)
    oracle = Decoder(open_checkpoint(nano_path), bits=8)
    expected = emphasised(oracle, [1200, 1500], EMPHASIS, within=1e-3)
    near, far = ((expected.exp() * (expected - got)).sum() for got in (actual, plain))
    assert 0 <= near < far / 10, (near, far)


def test_the_oracle_decodes_several_with_the_emphasis_of_one(nano_path: Path) -> None:
    oracle = Decoder(open_checkpoint(nano_path))
    first, second, blocks = IDS[:100], IDS[200:240], ([0, 1, 2, 3], [4, 5])
    bias = Emphasis(((3, 40, 4.0),)).key_bias

    def forward(start: int, *parts: list[int]) -> torch.Tensor:
        chunks = [(p[start:], start % len(p), b) for p, b in zip(parts, blocks, strict=False)]
        return oracle.forward(replace(make_batch(chunks), key_bias=(bias, None)[: len(parts)]), kv)

    kv = oracle.new_kv_cache(6)
    whole = forward(0, first, second)
    kv = oracle.new_kv_cache(6)
    forward(0, first[:-1], second[:-1])
    torch.testing.assert_close(forward(-1, first, second), whole, rtol=0, atol=1e-3)
    plain = oracle.forward(make_batch([(first, 0, blocks[0])]), oracle.new_kv_cache(4))[0]
    assert not torch.allclose(plain, whole[0], atol=0.1)


def test_without_kernels_the_same_integers_run_on_pytorch(nano_path: Path) -> None:
    """A machine without a compiler computes the same thing, and says that it is the slow way."""
    code = (
        "import logging, torch; logging.basicConfig(); from pathlib import Path; import evermini.kernels as k;"
        "from evermini.models.checkpoint import open_checkpoint; from evermini.models.load import load_model;"
        "from tests.batches import make_batch; from tests.parity.test_kernels import IDS;"
        f"m = load_model(open_checkpoint(Path({str(nano_path)!r})), device='cpu', precision='int8');"
        "print(type(m).__name__, k.unavailable_reason());"
        "print(m.forward(make_batch([(IDS[:100], 0, [0, 1, 2, 3])]), m.new_kv_cache(4))[0].argmax().item())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"EVERMINI_KERNELS": "0", "PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    kind, argmax = result.stdout.strip().splitlines()
    assert kind == "Decoder switched off by EVERMINI_KERNELS=0"
    assert abs(int(argmax)) < 49152
