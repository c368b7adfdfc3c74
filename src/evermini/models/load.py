"""From a checkpoint to a model that computes: which device, which precision, which implementation."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Literal

import torch

from evermini import kernels
from evermini.errors import ConfigError
from evermini.models.checkpoint import Checkpoint
from evermini.models.decoder import Decoder
from evermini.models.native import NativeDecoder

logger = logging.getLogger(__name__)

Precision = Literal["auto", "fp32", "bf16", "int8", "int6", "int5", "int4"]


def load_model(
    checkpoint: Checkpoint,
    *,
    device: str = "auto",
    precision: Precision = "auto",
    threads: int | None = None,
    home: Path | None = None,
) -> NativeDecoder | Decoder:
    """Load ``checkpoint``'s weights.

    Args:
        checkpoint: An open checkpoint.
        device: ``auto`` (CUDA if there is one, else CPU), ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``auto`` is int8 on the CPU and bf16 on CUDA. ``int4`` to ``int8`` are CPU only.
        home: Folder of all caches; by default `evermini.config.default_home`.
        threads: CPU threads for PyTorch and the kernels, of the whole process; ``None`` leaves them alone.

    Raises:
        ConfigError: The device is not there, or the precision does not run on it.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ConfigError(
                f"device {device!r} asked for, but PyTorch sees no CUDA GPU. Use device 'cpu'."
            )
        if precision.startswith("int"):
            raise ConfigError(
                f"precision {precision!r} runs on the CPU only. Use 'bf16' or 'fp32' on CUDA."
            )
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        return Decoder(checkpoint, dtype=dtype, device=device)
    if precision in ("fp32", "bf16"):
        return Decoder(checkpoint, dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
    bits = 8 if precision == "auto" else int(precision.removeprefix("int"))
    if kernels.load() is None:
        return Decoder(checkpoint, bits=bits)
    if checkpoint.config.head_dim % 16:
        logger.warning(
            "head_dim %d is not a multiple of 16: the native kernels cannot run this model, "
            "falling back to slower PyTorch operations",
            checkpoint.config.head_dim,
        )
        return Decoder(checkpoint, bits=bits)
    return NativeDecoder(checkpoint, bits=bits, home=home)


def numerics() -> str:
    """Return what decides the last bits of a model's values on this machine, beside its weights and precision."""
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        sources.update(path.read_bytes())
    return f"torch {torch.__version__} kernels {kernels.version()} models {sources.hexdigest()}"
