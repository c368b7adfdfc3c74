"""Adapters in other files: peft's folder written anew, and llama.cpp's GGUF read."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from evermini.errors import AdapterError, DamagedCheckpointError, UnsupportedQuantizationError
from evermini.models.config import ModelConfig
from evermini.models.gguf import LAYER_NAMES, uninterleave
from evermini.models.gguf_file import GgufFile
from evermini.models.lora import CONFIG_FILE, WEIGHTS_FILE, LoraFactors, LoraWeights

_GGUF_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight\.lora_([ab])")


def write_peft(lora: LoraWeights, folder: Path) -> None:
    """Write an adapter as peft's ``save_pretrained`` does; peft and `evermini.models.lora.read_peft` read it.

    Args:
        lora: The adapter.
        folder: Created if need be.
    """
    from safetensors.torch import save_file

    names = {key: f"model.layers.{key[0]}.{key[1]}" for key in lora.factors}
    ranks = {key: factors.rank for key, factors in lora.factors.items()}
    alphas = {key: factors.scale * factors.rank for key, factors in lora.factors.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lora.base_name,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(names.values()),
        "rank_pattern": {names[key]: value for key, value in ranks.items() if value != rank},
        "alpha_pattern": {names[key]: value for key, value in alphas.items() if value != alpha},
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {}
    for key, factors in lora.factors.items():
        tensors[f"base_model.model.{names[key]}.lora_A.weight"] = factors.a.contiguous()
        tensors[f"base_model.model.{names[key]}.lora_B.weight"] = factors.b.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")


def read_gguf_lora(path: Path, base: ModelConfig) -> LoraWeights:
    """Read an adapter that llama.cpp's ``convert_lora_to_gguf.py`` or ``llama-export-lora`` wrote.

    Args:
        path: The file.
        base: Shape of the model that it belongs to: Llama's query and key rows are reordered in GGUF, head by head.

    Raises:
        AdapterError: It is no adapter, is one of another kind or family, or has a part that is not supported.
    """
    try:
        file = GgufFile(path)
    except (DamagedCheckpointError, UnsupportedQuantizationError) as error:
        raise AdapterError(error.message) from error
    found = {key: file.metadata.get(key) for key in ("general.type", "adapter.type")}
    if found != {"general.type": "adapter", "adapter.type": "lora"}:
        raise AdapterError(
            f"{path} is no LoRA adapter: its general.type is {found['general.type']!r} and its adapter.type "
            f"{found['adapter.type']!r}. Serve a whole model with `evermini serve --model {path}`."
        )
    family = file.metadata.get("general.architecture")
    if family != base.family:
        raise AdapterError(
            f"{path} is an adapter for a {family} model, this tier's is a {base.family} model. Choose the tier that it "
            "was trained on."
        )
    alpha = float(file.metadata.get("adapter.lora.alpha") or 0.0)
    parts: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for name in file.tensors:
        match = _GGUF_TENSOR.fullmatch(name)
        target = LAYER_NAMES.get(match[2]) if match else None
        if match is None or target is None or not target.endswith("_proj"):
            raise AdapterError(
                f"{path} holds {name}, which is no LoRA factor of a linear layer of the decoder. Train it anew without."
            )
        values = file.read(name)
        if match[3] == "b" and family == "llama" and match[2] in ("attn_q", "attn_k"):
            heads = base.num_heads if match[2] == "attn_q" else base.num_kv_heads
            if (
                values.shape[0] == heads * base.head_dim
            ):  # else `LoraWeights.check` says what is wrong
                values = uninterleave(values, heads)
        tensor = torch.from_numpy(values.copy())
        parts.setdefault((int(match[1]), target), {})[match[3]] = tensor
    factors = {}
    for key, pair in sorted(parts.items()):
        if pair.keys() != {"a", "b"} or pair["a"].shape[0] != pair["b"].shape[1]:
            raise AdapterError(
                f"{path}: the two factors of {key[1]} in layer {key[0]} do not fit together. Convert it again."
            )
        rank = pair["a"].shape[0]
        factors[key] = LoraFactors(pair["a"], pair["b"], alpha / rank if alpha else 1.0)
    if not factors:
        raise AdapterError(f"{path} holds no LoRA factors. Convert it again.")
    return LoraWeights(factors, _base_name(file.metadata))


def _base_name(metadata: dict[str, Any]) -> str | None:
    name = metadata.get("general.base_model.0.name")
    return name if isinstance(name, str) and name else None


def _commonest(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]
