"""Tiny GGUF files for tests, written with the `gguf` package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 32, 64, 2, 4, 2, 16, 50

# The pre-tokenizer and one merge are enough for a file that opens and encodes.
TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [
        *("<|end|>", "a", "b", "ab", "\u0120"),
        *(f"unused{i}" for i in range(VOCAB - 5)),
    ],
    "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, *[5] * (VOCAB - 5)],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 0,
}


def tiny_metadata(arch: str = "llama") -> dict[str, Any]:
    """Return the keys of a tiny model."""
    return {
        f"{arch}.block_count": LAYERS,
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.feed_forward_length": INNER,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.key_length": HEAD_DIM,
        f"{arch}.attention.value_length": HEAD_DIM,
        f"{arch}.rope.freq_base": 20_000.0,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        **TOKENIZER,
    }


def tiny_tensors(arch: str = "llama", seed: int = 0) -> dict[str, np.ndarray]:
    """Return the tensors of a tiny model under GGUF names, as a converter would write them."""
    rng = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (HIDDEN,),
            f"blk.{i}.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"blk.{i}.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{i}.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{i}.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"blk.{i}.ffn_norm.weight": (HIDDEN,),
            f"blk.{i}.ffn_gate.weight": (INNER, HIDDEN),
            f"blk.{i}.ffn_up.weight": (INNER, HIDDEN),
            f"blk.{i}.ffn_down.weight": (HIDDEN, INNER),
        }
        if arch == "qwen2":
            shapes |= {
                f"blk.{i}.attn_q.bias": (HEADS * HEAD_DIM,),
                f"blk.{i}.attn_k.bias": (KV_HEADS * HEAD_DIM,),
                f"blk.{i}.attn_v.bias": (KV_HEADS * HEAD_DIM,),
            }
        if arch == "qwen3":
            shapes |= {
                f"blk.{i}.attn_q_norm.weight": (HEAD_DIM,),
                f"blk.{i}.attn_k_norm.weight": (HEAD_DIM,),
            }
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write_gguf(
    path: Path,
    arch: str = "llama",
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    kinds: Mapping[str, GGMLQuantizationType] | None = None,
) -> Path:
    """Write a GGUF file.

    Args:
        path: Where to.
        arch: ``general.architecture``.
        metadata: Keys to add to or change in the tiny model's; None takes a key out.
        tensors: All tensors; default the tiny model's.
        kinds: Types of tensors given as raw bytes (uint8).
    """
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (tiny_metadata(arch) | dict(metadata or {})).items():
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, values in (tiny_tensors(arch) if tensors is None else tensors).items():
        writer.add_tensor(name, values, raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
