"""Adapters for tests: random factors in the files that peft's ``save_pretrained`` writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from evermini.models.checkpoint import parameter_shapes
from evermini.models.config import ModelConfig
from evermini.models.lora import TARGETS, LoraWeights, read_peft

ALL = tuple(target.partition(".")[2] for target in TARGETS)


def write_adapter(
    folder: Path,
    config: ModelConfig,
    *,
    seed: int = 0,
    rank: int = 4,
    targets: Sequence[str] = ALL,
    strength: float = 0.3,
    layers: Sequence[int] | None = None,
    extra: dict[str, Tensor] | None = None,
    **settings: Any,
) -> Path:
    """Write a random adapter for a model of shape ``config``.

    Args:
        strength: Size of what it adds, as a share of a random weight's.
        extra: Tensors to write besides.
        settings: Fields of ``adapter_config.json`` that differ; ranks follow ``rank_pattern`` by a target's name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(targets),
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        **settings,
    }
    generator = torch.Generator().manual_seed(seed)
    shapes = parameter_shapes(config)
    tensors: dict[str, Tensor] = {}
    for index in range(config.num_layers) if layers is None else layers:
        for target in TARGETS:
            short = target.partition(".")[2]
            if short not in targets:
                continue
            outputs, inputs = shapes[f"model.layers.{index}.{target}.weight"]
            r = described["rank_pattern"].get(short, rank)
            prefix = f"base_model.model.model.layers.{index}.{target}"
            a = torch.randn(r, inputs, generator=generator) / inputs**0.5
            b = torch.randn(outputs, r, generator=generator) * strength / (2 * r**0.5)
            tensors[f"{prefix}.lora_A.weight"] = a
            tensors[f"{prefix}.lora_B.weight"] = b
    save_file(tensors | (extra or {}), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


def random_lora(folder: Path, config: ModelConfig, **options: Any) -> LoraWeights:
    """Write one and read it."""
    return read_peft(write_adapter(folder, config, **options))
