"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the rotate-half form of Hugging Face checkpoints."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from evermini.errors import UnsupportedArchitectureError
from evermini.models.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Return the rotation per position of each dimension pair: (head_dim / 2,) float64.

    Raises:
        UnsupportedArchitectureError: ``config.rope_scaling`` is of a kind other than ``linear`` or ``llama3``.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    if scaling is None or kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / float(scaling["factor"])
    if kind == "llama3":
        return _llama3(frequencies, scaling)
    raise UnsupportedArchitectureError(
        f"RoPE scaling {kind!r} is not supported; 'linear' and 'llama3' are. Use a checkpoint without it."
    )


def _llama3(frequencies: Tensor, scaling: dict[str, float]) -> Tensor:
    """Slow down low frequencies, keep high ones, blend between (Llama 3.1 model card)."""
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = float(scaling["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (blend + (1 - blend) / factor)


def rope_tables(config: ModelConfig, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Return cosines and sines, each (max_position, head_dim / 2) float32, computed in float64."""
    positions = torch.arange(config.max_position, dtype=torch.float64)
    angles = torch.outer(positions, inverse_frequencies(config))
    return angles.cos().float().to(device), angles.sin().float().to(device)


def section_tables(
    config: ModelConfig, cos: Tensor, sin: Tensor, axes: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of positions that have three axes (M-RoPE), each (T, head_dim / 2).

    Args:
        config: The model's shape; its ``rope_sections`` say which dimension pair turns by which axis.
        cos: From `rope_tables`.
        sin: From `rope_tables`.
        axes: (3, T) int64, positions in time, height and width; where all three are the same, plain RoPE comes out.
    """
    sections = torch.tensor(config.rope_sections, device=axes.device)
    axis = torch.repeat_interleave(torch.arange(len(sections), device=axes.device) % 3, sections)
    pairs = torch.arange(len(axis), device=axes.device)
    rows = axes[axis].t().contiguous()  # (T, head_dim / 2), and so is what it selects
    return cos[rows, pairs], sin[rows, pairs]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` (T, heads, head_dim) by the angles ``cos``, ``sin`` (T, head_dim / 2) of its positions."""
    first, second = x.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
