"""Where a training computes, and how precisely. Imports torch alone: checking a file needs no more."""

from __future__ import annotations

import os
from typing import Literal

import torch

from evermini.errors import ConfigError

_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")
"""Any of these multiplies in bf16; the last is ARM's."""


def pick_device(name: str) -> torch.device:
    """Return the device of a setting.

    Raises:
        ConfigError: There is no such GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device is {name}, but PyTorch sees no GPU. Set it to cpu.")
    return torch.device(name)


def own_device(name: str) -> torch.device:
    """Return the device of this process: of several that train together, each has a GPU of its own.

    Raises:
        ConfigError: There is no such GPU.
    """
    device, rank = pick_device(name), os.environ.get("LOCAL_RANK")
    if device.type == "cuda" and device.index is None and rank is not None:
        return torch.device("cuda", int(rank))
    return device


def pick_dtype(precision: Literal["auto", "fp32", "bf16"], device: torch.device) -> torch.dtype:
    """Return what the base is kept and computed in.

    ``auto`` is bf16 on a GPU and on CPUs that multiply in it (AVX512-BF16, AMX, and ARM's), which are several times as
    fast in it, and fp32 on others, which emulate it. The adapter is fp32 in either case.
    """
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    has = torch.cpu.get_capabilities()
    is_quick = device.type == "cuda" or any(has.get(name) for name in _BF16_INSTRUCTIONS)
    return torch.bfloat16 if is_quick else torch.float32
