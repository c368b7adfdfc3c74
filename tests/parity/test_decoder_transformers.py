"""Our decoder against `transformers`: tiny random checkpoints of every family, and the real nano weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from evermini.models.checkpoint import open_checkpoint
from evermini.models.decoder import Decoder
from evermini.models.load import load_model
from tests.batches import make_batch

transformers = pytest.importorskip("transformers")

TINY: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
CASES = {
    "llama": ("LlamaConfig", {}),
    "llama-tied-bias": ("LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True}),
    "llama-rope3": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": False}),
}


def save_tiny(case: str, folder: Path) -> Any:
    name, extra = CASES[case]
    torch.manual_seed(7)
    config = getattr(transformers, name)(**TINY, **extra)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # biases and norms start at 0 and 1, which would hide a missing one
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")  # weights only: nothing here reads text
    return model


@pytest.mark.parametrize("case", CASES)
def test_tiny_logits_match(case: str, tmp_path: Path) -> None:
    reference = save_tiny(case, tmp_path)
    decoder = Decoder(open_checkpoint(tmp_path))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, TINY["vocab_size"], (150,), generator=generator)
    with torch.no_grad():
        expected = reference(ids[None]).logits[0]
    kv = decoder.new_kv_cache(8)
    logits = decoder.forward(make_batch([(ids.tolist(), 0, [3, 0, 6, 1, 2])], all_rows=True), kv)
    assert (logits - expected).abs().max().item() <= 1e-4


@pytest.mark.parametrize("case", CASES)
def test_native_kernels_follow_the_oracle(case: str, tmp_path: Path) -> None:
    save_tiny(case, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    oracle = Decoder(checkpoint)
    native = load_model(checkpoint, device="cpu", precision="int8")
    ids = torch.randint(
        0, TINY["vocab_size"], (150,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    batch = make_batch([(ids, 0, [3, 0, 6, 1, 2])], all_rows=True)
    expected = oracle.forward(batch, oracle.new_kv_cache(8))
    logits = native.forward(batch, native.new_kv_cache(8))
    error = (logits - expected).norm() / expected.norm()
    assert error.item() < 0.03  # int8 noise of random weights; a wrong path is off by 1


def test_nano_argmax_matches(nano_path: Path) -> None:
    """Same dequantised weights through `transformers`' own GGUF reader: permutation, RoPE, everything."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        nano_path.parent, gguf_file=nano_path.name, dtype=torch.float32
    ).eval()
    decoder = Decoder(open_checkpoint(nano_path))
    text = Path(__file__).read_bytes() + Path(transformers.__file__).read_bytes()
    ids = [token % 49000 for token in _some_tokens(nano_path, text, 600)]
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0]
    batch = make_batch([(ids, 0, list(range(20)))], all_rows=True)
    logits = decoder.forward(batch, decoder.new_kv_cache(20))
    same = (logits.argmax(-1) == expected.argmax(-1)).float().mean().item()
    assert len(ids) >= 500
    assert same >= 0.995


def _some_tokens(path: Path, text: bytes, count: int) -> list[int]:
    from evermini.text.tokenizer import Tokenizer

    checkpoint = open_checkpoint(path)
    return Tokenizer(checkpoint.tokenizer).encode(text.decode()[:20000])[:count]
