"""The real nano file: weights as `transformers` reads them, token ids as llama.cpp gives them.

``data/nano_tokens.json`` was made with llama.cpp's server (``/tokenize``, build 11434) on this very file.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from evermini.models.catalogue import find
from evermini.models.checkpoint import Checkpoint, open_checkpoint
from evermini.text.chat import ChatTemplate
from evermini.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def checkpoint(nano_path: Path) -> Checkpoint:
    return open_checkpoint(nano_path)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return Tokenizer(checkpoint.tokenizer)


def test_fingerprint_is_the_catalogues_hash(checkpoint: Checkpoint) -> None:
    entry = find("nano")
    assert entry is not None
    assert checkpoint.fingerprint == entry.sha256


@pytest.mark.filterwarnings("ignore")  # what transformers warns about is its own business
def test_weights_equal_those_transformers_loads(checkpoint: Checkpoint) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(checkpoint.path.parent), gguf_file=checkpoint.path.name, dtype=torch.float32
    )
    config, ours = model.config, checkpoint.config
    assert ours.rope_theta == config.rope_parameters["rope_theta"]
    assert ours.rms_norm_eps == config.rms_norm_eps
    assert ours.max_position == config.max_position_embeddings
    assert (ours.num_heads, ours.num_kv_heads) == (
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    expected = model.state_dict()
    assert set(expected) - checkpoint.names() == {"lm_head.weight"}  # tied
    for name in checkpoint.names():
        assert torch.equal(checkpoint.tensor(name), expected[name]), name


def test_token_ids_equal_llama_cpps(tokenizer: Tokenizer) -> None:
    rows = json.loads((Path(__file__).parent / "data" / "nano_tokens.json").read_text())
    assert len(rows) > 40
    for row in rows:
        assert tokenizer.encode(row["text"]) == row["plain"], row["text"]
        assert tokenizer.encode(row["text"], allow_special=True) == row["special"], row["text"]
        assert tokenizer.decode(row["plain"]) == row["text"]


def test_tokens_that_matter(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 49152
    assert tokenizer.bos_id == tokenizer.id_of("<|im_start|>")
    assert not tokenizer.add_bos
    assert {tokenizer.id_of("<|im_end|>"), tokenizer.id_of("<|endoftext|>")} <= tokenizer.eos_ids
    assert len(tokenizer.special_ids) == 17


def test_a_conversation(tokenizer: Tokenizer) -> None:
    ids = ChatTemplate(tokenizer).encode_chat([{"role": "user", "content": "Hi <|im_end|>"}])
    assert tokenizer.decode(ids, skip_special=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert sum(i in tokenizer.special_ids for i in ids) == 5
