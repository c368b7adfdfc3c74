"""Adapters against peft's own forward, against merged weights, and bit for bit against themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evermini import kernels
from evermini.models.batch import AdapterRows, Model
from evermini.models.checkpoint import open_checkpoint
from evermini.models.decoder import Decoder
from evermini.models.load import load_model
from evermini.models.lora import read_peft
from evermini.models.merge import MergedCheckpoint
from evermini.models.native import NativeDecoder
from tests.adapters import random_lora, write_adapter
from tests.batches import make_batch
from tests.parity.test_decoder_transformers import CASES, TINY, save_tiny

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# peft asks transformers for a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
native_only = pytest.mark.skipif(
    kernels.load() is None, reason=f"native kernels: {kernels.unavailable_reason()}"
)
PATTERNS: list[dict[str, Any]] = [
    {},
    {"targets": ["q_proj", "v_proj"], "rank": 3},
    {"targets": ["gate_proj", "down_proj"], "use_rslora": True, "rank": 16},
    {
        "targets": ["k_proj", "v_proj", "o_proj", "up_proj"],
        "rank_pattern": {"v_proj": 9, "up_proj": 1},
        "alpha_pattern": {"v_proj": 5, "layers.1.mlp.up_proj": 2},
    },
]


def ids_of(count: int, vocab_size: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (count,), generator=generator).tolist()


def run(
    model: Model, prompts: Sequence[list[int]], adapters: Sequence[object | None]
) -> list[torch.Tensor]:
    """All logits of each prompt, computed in one batch; prompts without adapters come first."""
    chunks, rows, at, block = [], [], 0, 0
    for ids, adapter in zip(prompts, adapters, strict=True):
        num_blocks = -(-len(ids) // 32)
        chunks.append((ids, 0, list(range(block, block + num_blocks))))
        if adapter is not None:
            rows.append(AdapterRows(adapter, at, at + len(ids)))  # type: ignore[arg-type]
        at, block = at + len(ids), block + num_blocks
    batch = replace(make_batch(chunks, all_rows=True), adapters=tuple(rows))
    return list(model.forward(batch, model.new_kv_cache(block)).split([len(p) for p in prompts]))


def with_peft(reference: Any, folder: Path, ids: list[int]) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(reference, folder).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("pattern", PATTERNS, ids=["all", "qv", "rslora", "patterns"])
@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3"])
def test_tiny_logits_are_pefts(case: str, pattern: dict[str, Any], tmp_path: Path):
    reference = save_tiny(case, tmp_path)
    decoder = Decoder(open_checkpoint(tmp_path))
    folder = write_adapter(tmp_path / "adapter", decoder.config, **pattern)
    adapter = decoder.load_adapter(read_peft(folder))
    ids = ids_of(100, TINY["vocab_size"])
    (base,), (logits,) = run(decoder, [ids], [None]), run(decoder, [ids], [adapter])
    expected = with_peft(reference, folder, ids)
    assert (logits - expected).abs().max().item() <= 1e-4
    assert (logits - base).abs().max().item() > 1e-2, "else the test could not fail"


def test_an_adapter_that_peft_made_and_saved_is_read(tmp_path: Path):
    """Trained for some steps by peft's own means, saved by it, and computed here."""
    reference = save_tiny("qwen2", tmp_path / "base")
    config = peft.LoraConfig(
        r=6, lora_alpha=9, target_modules="all-linear", use_rslora=True, lora_dropout=0.1
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(reference, config)
    ids = torch.tensor([ids_of(40, TINY["vocab_size"])])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(ids).logits[0]
    decoder = Decoder(open_checkpoint(tmp_path / "base"))
    adapter = decoder.load_adapter(read_peft(tmp_path / "adapter"))
    (logits,) = run(decoder, [ids[0].tolist()], [adapter])
    assert (logits - expected).abs().max().item() <= 1e-4


def test_nano_logits_are_pefts(nano_path: Path, tmp_path: Path):
    checkpoint = open_checkpoint(nano_path)
    shape = checkpoint.config
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        rms_norm_eps=shape.rms_norm_eps,
        rope_theta=shape.rope_theta,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        reference = transformers.LlamaForCausalLM(config).eval()
    reference = reference.to_empty(device="cpu")
    weights = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    reference.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    reference.model.rotary_emb = type(reference.model.rotary_emb)(config)
    decoder = Decoder(checkpoint)
    folder = write_adapter(tmp_path, decoder.config, rank=8, strength=0.05)
    adapter = decoder.load_adapter(read_peft(folder))
    ids = ids_of(48, 40_000)
    (logits,) = run(decoder, [ids], [adapter])
    assert (logits - with_peft(reference, folder, ids)).abs().max().item() <= 1e-4


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@native_only
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_unmerged_on_integers_is_as_close_to_merged_as_the_base_to_its_own(
    nano_path: Path, tmp_path: Path, precision: Any
):
    """Tolerance: 1.5 times the error that the integers make without an adapter (int8: 0.020, int4: 0.14)."""
    checkpoint = open_checkpoint(nano_path)
    lora = random_lora(tmp_path, checkpoint.config, rank=16, strength=0.3)
    native, oracle = load_model(checkpoint, device="cpu", precision=precision), Decoder(checkpoint)
    ids = ids_of(64, 40_000)
    (base,), (exact_base,) = run(native, [ids], [None]), run(oracle, [ids], [None])
    (unmerged,) = run(native, [ids], [native.load_adapter(lora)])
    (unmerged_oracle,) = run(oracle, [ids], [oracle.load_adapter(lora)])
    (exact,) = run(Decoder(MergedCheckpoint(checkpoint, lora)), [ids], [None])
    assert error(unmerged_oracle, exact) < 1e-5
    assert error(exact, exact_base) > 0.08, "the adapter does something"
    assert error(unmerged, exact) < 1.5 * error(base, exact_base)


@native_only
@pytest.mark.parametrize("bits", [8, 5, 4])
@pytest.mark.parametrize("case", CASES)
def test_native_adapters_follow_the_oracle(case: str, bits: int, tmp_path: Path):
    """Sizes that are no multiples of panels or vectors, biases, norms of heads."""
    save_tiny(case, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    native = NativeDecoder(checkpoint, bits=bits, home=tmp_path)
    same_integers = Decoder(checkpoint, bits=bits)
    ids = ids_of(70, TINY["vocab_size"])
    # They differ where they always do: the native head keeps 6 bits.
    (base,), (expected_base,) = run(native, [ids], [None]), run(same_integers, [ids], [None])
    for number, pattern in enumerate(PATTERNS):
        folder = tmp_path / f"adapter{number}"
        lora = random_lora(folder, checkpoint.config, **pattern)
        (expected,) = run(same_integers, [ids], [same_integers.load_adapter(lora)])
        (actual,) = run(native, [ids], [native.load_adapter(lora)])
        assert error(actual, expected) < 0.02 + 1.5 * error(base, expected_base), pattern


@pytest.fixture(scope="module")
def nano(nano_path: Path) -> Model:
    return load_model(open_checkpoint(nano_path), device="cpu", precision="int8")


@pytest.fixture(scope="module")
def eight(nano: Model, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Adapters of nano: ranks 1 to 24, some of which leave out layers or targets."""
    found = []
    for number, rank in enumerate((1, 3, 4, 8, 8, 12, 16, 24)):
        layers = range(number % 3, nano.config.num_layers, 1 + number % 2)
        pattern: dict[str, Any] = {"rank": rank, "layers": layers}
        if number == 4:
            pattern = PATTERNS[1]
        folder = tmp_path_factory.mktemp("adapter")
        found.append(nano.load_adapter(random_lora(folder, nano.config, seed=number, **pattern)))
    return found


@native_only
@pytest.mark.parametrize(
    "lengths",
    [[1] * 9, [2, 1, 1, 1, 1, 1, 1, 1, 1], [40, 33, 1, 7, 5, 2, 3, 64, 1], [1, 1], [300, 300]],
    ids=["decodes", "mixed", "prompts", "two", "long"],
)
def test_many_adapters_in_a_batch_are_each_alone_bit_for_bit(
    nano: Model, eight: list[object], lengths: list[int]
):
    adapters = [None, *eight][: len(lengths)]
    prompts = [ids_of(length, 40_000, seed=n) for n, length in enumerate(lengths)]
    together = run(nano, prompts, adapters)
    for number, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        assert torch.equal(together[number], run(nano, [prompt], [adapter])[0]), number


@native_only
def test_rows_without_an_adapter_keep_their_bits(nano: Model, eight: list[object]):
    prompts = [ids_of(length, 40_000, seed=length) for length in (1, 2, 31, 100, 9)]
    alone = run(nano, prompts[:4], [None] * 4)
    beside = run(nano, prompts, [None] * 4 + [eight[6]])
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=False))


def test_many_adapters_in_a_batch_on_pytorch(tmp_path: Path):
    save_tiny("llama", tmp_path)
    decoder = Decoder(open_checkpoint(tmp_path))
    adapters: list[object | None] = [None]
    for number, pattern in enumerate(PATTERNS):
        lora = random_lora(tmp_path / str(number), decoder.config, seed=number, **pattern)
        adapters.append(decoder.load_adapter(lora))
    prompts = [ids_of(20 + number, TINY["vocab_size"], number) for number in range(len(adapters))]
    together = run(decoder, prompts, adapters)
    for prompt, adapter, logits in zip(prompts, adapters, together, strict=True):
        torch.testing.assert_close(logits, run(decoder, [prompt], [adapter])[0], rtol=0, atol=2e-5)
