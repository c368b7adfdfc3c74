"""A checkpoint as a `transformers` model to train adapters on: GGUF dequantised, or the original safetensors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from evermini.errors import ConfigError
from evermini.models.checkpoint import Checkpoint
from evermini.models.config import ModelConfig

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The matrices that get an adapter: all of a layer's."""


def transformers_config(config: ModelConfig) -> Any:
    """Return `transformers`' description of a model of this shape."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= config.rope_scaling
    shape: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    match config.family:
        case "llama":
            return LlamaConfig(
                **shape, head_dim=config.head_dim, attention_bias=config.attention_bias
            )
        case "qwen2":
            return Qwen2Config(**shape)
        case "qwen3":
            return Qwen3Config(
                **shape, head_dim=config.head_dim, attention_bias=config.attention_bias
            )


def load_base(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the model with the checkpoint's weights, frozen, in ``dtype``."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            transformers_config(checkpoint.config), dtype=dtype, attn_implementation="sdpa"
        )
    weights = {name: checkpoint.tensor(name).to(dtype) for name in sorted(checkpoint.names())}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    left = [name for name, value in model.named_parameters() if value.is_meta]
    assert not left, f"no weights for {left[:3]}"
    model.requires_grad_(False)
    return model.to(device)


def load_base_4bit(checkpoint: Checkpoint, *, device: torch.device, scratch: Path) -> Any:
    """Return the model with its matrices in four bits (NF4), for QLoRA.

    Args:
        checkpoint: The weights.
        device: A GPU.
        scratch: A folder for a copy of the weights, which is deleted again.

    Raises:
        ConfigError: There is no GPU, or bitsandbytes is not installed.
    """
    if device.type != "cuda":
        raise ConfigError("x_evermini.quantize needs a GPU. Leave it out to train on the CPU.")
    try:
        import bitsandbytes  # noqa: F401 - transformers imports it later, with a worse message
    except ModuleNotFoundError:
        raise ConfigError(
            "x_evermini.quantize needs bitsandbytes. Install it with `pip install bitsandbytes`, or leave it out."
        ) from None
    shutil.rmtree(scratch, ignore_errors=True)
    base = load_base(checkpoint, device=torch.device("cpu"), dtype=torch.bfloat16)
    base.save_pretrained(scratch)
    try:
        return AutoModelForCausalLM.from_pretrained(
            scratch,
            dtype=torch.bfloat16,
            device_map={"": device},
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            ),
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
