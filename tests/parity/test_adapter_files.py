"""Adapters in other programs' files: llama.cpp's LoRA files in, peft's, transformers' and GGUF models out."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from evermini.errors import AdapterError, InvalidRequestError
from evermini.models.checkpoint import Checkpoint, open_checkpoint
from evermini.models.config import ModelConfig
from evermini.models.decoder import Decoder
from evermini.models.lora import LoraWeights, read_peft
from evermini.models.lora_files import read_gguf_lora, write_peft
from evermini.models.merge import MergedCheckpoint
from evermini.service.export import export
from evermini.text.tokenizer import Tokenizer
from tests.adapters import random_lora, write_adapter
from tests.parity.test_adapters import error, ids_of, run, with_peft
from tests.parity.test_decoder_transformers import TINY, save_tiny

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

# peft asks transformers for a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def write_gguf_lora(
    path: Path, lora: LoraWeights, config: ModelConfig, alpha: float, **changes: str
) -> Path:
    """Write an adapter as llama.cpp's convert_lora_to_gguf.py does: B like a weight's rows, so reordered for Llama."""
    writer = gguf.GGUFWriter(path, changes.get("arch", config.family))
    writer.add_type(changes.get("type", "adapter"))
    writer.add_string("adapter.type", changes.get("kind", "lora"))
    writer.add_float32("adapter.lora.alpha", alpha)
    for (index, target), factors in lora.factors.items():
        short = target.partition(".")[2]
        b = factors.b.numpy()
        if config.family == "llama" and short in ("q_proj", "k_proj"):
            heads = config.num_heads if short == "q_proj" else config.num_kv_heads
            pairs = b.reshape(heads, 2, b.shape[0] // heads // 2, b.shape[1])
            b = np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(b.shape))
        name = f"blk.{index}.{NAMES[short]}.weight"
        writer.add_tensor(f"{name}.lora_a", factors.a.numpy())
        writer.add_tensor(f"{name}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def same(a: LoraWeights, b: LoraWeights) -> None:
    assert a.factors.keys() == b.factors.keys()
    for key, factors in a.factors.items():
        assert torch.equal(factors.a, b.factors[key].a), key
        assert torch.equal(factors.b, b.factors[key].b), key
        assert factors.scale == pytest.approx(b.factors[key].scale), key


@pytest.mark.parametrize("case", ["llama", "qwen2"])
def test_a_lora_file_of_llamacpp_is_read(case: str, tmp_path: Path):
    save_tiny(case, tmp_path)
    config = open_checkpoint(tmp_path).config
    lora = random_lora(tmp_path / "a", config, rank=5)
    path = write_gguf_lora(tmp_path / "lora.gguf", lora, config, alpha=10.0)
    same(read_gguf_lora(path, config), lora)


def test_other_gguf_files_are_refused(tmp_path: Path, nano_path: Path):
    save_tiny("qwen2", tmp_path)
    config = open_checkpoint(tmp_path).config
    lora = random_lora(tmp_path / "a", config)
    path = tmp_path / "lora.gguf"
    with pytest.raises(AdapterError, match="no LoRA adapter"):
        read_gguf_lora(nano_path, config)
    write_gguf_lora(path, lora, config, 8.0, kind="control_vector")
    with pytest.raises(AdapterError, match="control_vector"):
        read_gguf_lora(path, config)
    write_gguf_lora(path, lora, config, 8.0, arch="llama")
    with pytest.raises(AdapterError, match="adapter for a llama model"):
        read_gguf_lora(path, config)
    write_gguf_lora(path, lora, config, 8.0)
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(AdapterError, match="not a usable GGUF file"):
        read_gguf_lora(path, config)


def test_what_is_written_for_peft_is_what_peft_computes(tmp_path: Path):
    reference = save_tiny("qwen2", tmp_path)
    decoder = Decoder(open_checkpoint(tmp_path))
    lora = random_lora(
        tmp_path / "a",
        decoder.config,
        layers=[0, 2],
        rank_pattern={"v_proj": 7},
        alpha_pattern={"up_proj": 3},
        use_rslora=True,
    )
    write_peft(lora, tmp_path / "b")
    same(read_peft(tmp_path / "b"), lora)
    ids = ids_of(50, TINY["vocab_size"])
    (logits,) = run(decoder, [ids], [decoder.load_adapter(lora)])
    expected = with_peft(reference, tmp_path / "b", ids)
    assert (logits - expected).abs().max().item() <= 1e-4


@pytest.mark.parametrize("case", ["llama-rope3", "llama-tied-bias", "qwen2", "qwen3"])
def test_a_merged_model_loads_in_transformers(case: str, tmp_path: Path):
    save_tiny(case, tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    folder = write_adapter(tmp_path / "a", base.config)
    out = export(folder, base, "safetensors", tmp_path / "out", "ft:x")
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = ids_of(60, TINY["vocab_size"])
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    (ours,) = run(Decoder(open_checkpoint(out)), [ids], [None])
    assert (logits - ours).abs().max().item() <= 1e-4
    (merged,) = run(Decoder(MergedCheckpoint(base, read_peft(folder))), [ids], [None])
    assert error(logits, merged) < 3e-3, "what float16 weights lose"


@pytest.fixture(scope="module")
def nano(nano_path: Path) -> Checkpoint:
    return open_checkpoint(nano_path)


@pytest.fixture(scope="module")
def adapter(nano: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), nano.config, rank=8)


def test_nano_merged_from_gguf_loads_in_transformers(
    nano: Checkpoint, adapter: Path, tmp_path: Path
):
    out = export(adapter, nano, "safetensors", tmp_path / "out", "ft:x")
    assert {path.name for path in out.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
        "chat_template.jinja",
    }  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ours = Tokenizer(nano.tokenizer)
    text = "Hello, world! 12345\n\tdef f(x): return x  # naïve ☕"
    assert tokenizer.encode(text, add_special_tokens=False) == ours.encode(text)
    assert tokenizer.decode(ours.encode(text)) == text
    chat = [{"role": "user", "content": "Hi"}]
    shown = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert "Hi" in shown
    assert tokenizer.eos_token == ours.named_tokens["eos_token"]
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = ids_of(40, 40_000)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    (merged,) = run(Decoder(MergedCheckpoint(nano, read_peft(adapter))), [ids], [None])
    assert error(logits, merged) < 3e-3
    assert Tokenizer(open_checkpoint(out).tokenizer).encode(text) == ours.encode(text)


def test_nano_merged_as_gguf(nano: Checkpoint, adapter: Path, tmp_path: Path):
    path = export(adapter, nano, "gguf", tmp_path / "out", "ft:a:b:c:d")
    assert path.name == "ft-a-b-c-d.gguf"
    written = open_checkpoint(path)
    assert written.config == nano.config
    assert written.tokenizer == nano.tokenizer
    ids = ids_of(40, 40_000)
    (logits,) = run(Decoder(written), [ids], [None])
    (merged,) = run(Decoder(MergedCheckpoint(nano, read_peft(adapter))), [ids], [None])
    (base,) = run(Decoder(nano), [ids], [None])
    assert error(logits, merged) < 0.02 < 0.05 < error(base, merged)


def test_what_cannot_be_exported(nano: Checkpoint, adapter: Path, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(InvalidRequestError, match="is there already"):
        export(adapter, nano, "peft", tmp_path / "full", "ft:x")
    save_tiny("llama", tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    folder = write_adapter(tmp_path / "a", base.config)
    with pytest.raises(AdapterError, match="--format safetensors"):
        export(folder, base, "gguf", tmp_path / "out", "ft:x")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out.*"))
