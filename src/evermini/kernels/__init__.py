"""Native CPU kernels: plain C, compiled once for this machine's CPU, loaded with ctypes.

The sources beside this file are compiled on first use with the system's C compiler (``$CC``, ``cc``, ``gcc`` or
``clang``) into ``EVERMINI_HOME/kernels``; the file's name carries a hash of sources, flags, compiler and CPU, so a home
directory shared between machines is safe. Without a compiler, `load` returns ``None`` and `unavailable_reason` says
why: the same integer arithmetic then runs on PyTorch operations, several times slower.

``EVERMINI_KERNELS=0`` switches them off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from evermini.config import default_home

logger = logging.getLogger(__name__)

SOURCES = ("linear.c", "lora.c", "attention.c", "decoder.c", "encoder.c", "recall.c")
HEADERS = ("simd.h", "evermini.h", "tiles.h")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi")

_P = ctypes.c_void_p
_I = ctypes.c_int64


class Linear(ctypes.Structure):
    """``Linear`` of evermini.h."""

    _fields_ = (
        ("data", _P), ("scale", _P), ("bias", _P), ("n", _I), ("k", _I), ("k_padded", _I), ("bits", _I),
    )  # fmt: skip


class Activation(ctypes.Structure):
    """``Activation`` of evermini.h."""

    _fields_ = (("q", _P), ("scale", _P), ("group_sums", _P))


class LoraFactors(ctypes.Structure):
    """``LoraFactors`` of evermini.h."""

    _fields_ = (("a", _P), ("b", _P), ("scale", ctypes.c_float), ("rank", _I), ("start", _I))


LORA_PARTS = 7
LoraLayer = LoraFactors * LORA_PARTS
"""``LoraLayer`` of evermini.h: q, k, v, o, gate, up, down."""


class Lora(ctypes.Structure):
    """``Lora`` of evermini.h."""

    _fields_ = (
        ("first", _I), ("num_segments", _I), ("stride", _I), ("starts", _P), ("segments", _P), ("layers", _P),
        ("x", _P), ("t", _P),
    )  # fmt: skip


class Batch(ctypes.Structure):
    """``Batch`` of evermini.h."""

    _fields_ = (
        ("num_tokens", _I), ("num_seqs", _I), ("max_blocks", _I), ("positions", _P), ("slots", _P),
        ("query_start", _P), ("context_lens", _P), ("block_tables", _P), ("lora", _P),
        ("bias", ctypes.POINTER(_P)), ("bias_lens", ctypes.POINTER(_I)),
    )  # fmt: skip


class Shape(ctypes.Structure):
    """``Shape`` of evermini.h."""

    _fields_ = (
        ("hidden_size", _I), ("intermediate_size", _I), ("num_heads", _I), ("num_kv_heads", _I), ("head_dim", _I),
        ("rms_eps", ctypes.c_float), ("query_scale", ctypes.c_float), ("cos", _P), ("sin", _P),
    )  # fmt: skip


class Layer(ctypes.Structure):
    """``Layer`` of evermini.h."""

    _fields_ = (
        ("qkv", Linear), ("o", Linear), ("gate_up", Linear), ("down", Linear),
        ("input_norm", _P), ("post_norm", _P), ("q_norm", _P), ("k_norm", _P),
    )  # fmt: skip


class Workspace(ctypes.Structure):
    """``Workspace`` of evermini.h."""

    _fields_ = (("act", Activation), ("qkv", _P), ("attn", _P), ("gated", _P))


class EncoderLayer(ctypes.Structure):
    """``EncoderLayer`` of encoder.c."""

    _fields_ = (
        ("qkv", Linear), ("o", Linear), ("up", Linear), ("down", Linear),
        ("norm1", _P), ("bias1", _P), ("norm2", _P), ("bias2", _P),
    )  # fmt: skip


class EncoderShape(ctypes.Structure):
    """``EncoderShape`` of encoder.c."""

    _fields_ = (
        ("hidden_size", _I), ("num_heads", _I), ("head_dim", _I), ("is_gated", _I), ("eps", ctypes.c_float),
    )  # fmt: skip


class EncoderBatch(ctypes.Structure):
    """``EncoderBatch`` of encoder.c."""

    _fields_ = (
        ("num_rows", _I), ("span_of_row", _P), ("starts", _P), ("blocks", _P), ("cos", _P), ("sin", _P),
        ("hidden", _P), ("q", _P), ("k", _P), ("v", _P), ("act", Activation), ("wide", _P), ("attn", _P),
    )  # fmt: skip


class Run(ctypes.Structure):
    """``Run`` of recall.c."""

    _fields_ = (
        ("keys", _P), ("scales", _P), ("starts", _P), ("num_blocks", _I), ("first_block", _I),
    )  # fmt: skip


_Ptr = ctypes.POINTER
_SIGNATURES = {
    "em_layers": (_Ptr(Shape), _P, _I, _Ptr(Batch), _Ptr(Workspace), _P, _Ptr(_P), _Ptr(_P)),
    "em_qkv": (_Ptr(Shape), _Ptr(Layer), _Ptr(Workspace), _P, _I),
    "em_logits": (_Ptr(Shape), _P, _Ptr(Linear), _Ptr(Workspace), _P, _I, _P),
    "em_encoder_keys": (_Ptr(EncoderShape), _Ptr(EncoderLayer), _Ptr(EncoderBatch), _I, _I),
    "em_encoder_rows": (_Ptr(EncoderShape), _Ptr(EncoderLayer), _Ptr(EncoderBatch), _I, _I),
    "em_scan": (_Ptr(Run), _I, _I, _P, _P, _P, _I, _P, _P),
    "em_linear": (_Ptr(Linear), _Ptr(Activation), _P, _I, _P),
}

_reason: str | None = None


def unavailable_reason() -> str | None:
    """Return why `load` gave ``None``, or ``None`` if the kernels are there."""
    load()
    return _reason


@functools.cache
def load() -> ctypes.CDLL | None:
    """Compile (once per machine) and load the kernels; ``None`` if this machine cannot."""
    global _reason
    if os.environ.get("EVERMINI_KERNELS") == "0":
        _reason = "switched off by EVERMINI_KERNELS=0"
        return None
    try:
        library = _open(_build())
    except (OSError, subprocess.SubprocessError) as error:
        _reason = str(error)
        logger.warning(
            "native kernels unavailable, falling back to slower PyTorch operations: %s. "
            "Install a C compiler with OpenMP (Debian/Ubuntu: apt install gcc).",
            _reason,
        )
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = None
    return library


def version() -> str:
    """Return what names the kernels in use, by their sources, flags, compiler and CPU; empty without them."""
    library = load()
    return "" if library is None else Path(library._name).stem


def _build() -> Path:
    """Return the path of the compiled library, compiling it if it is not there yet."""
    compiler = next(
        filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None
    )
    if compiler is None:
        raise FileNotFoundError("no C compiler found ($CC, cc, gcc, clang)")
    folder = Path(__file__).parent
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    digest = hashlib.sha256(f"{FLAGS}{version.stdout}{_cpu()}".encode())
    for name in (*SOURCES, *HEADERS):
        digest.update((folder / name).read_bytes())
    target = default_home() / "kernels" / f"evermini-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        output = Path(temporary) / target.name
        command = [
            compiler,
            *FLAGS,
            *(str(folder / name) for name in SOURCES),
            "-o",
            str(output),
            "-lm",
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if result.returncode:
            raise OSError(f"{compiler} failed: {result.stderr.strip()[-2000:]}")
        output.replace(target)
    return target


def _open(path: Path) -> ctypes.CDLL:
    # PyTorch ships its own OpenMP runtime under another name. Making its symbols global before ours is loaded lets both
    # share one pool of threads; two pools would spin against each other.
    for bundled in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        ctypes.CDLL(str(bundled), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))


def _cpu() -> str:
    """Return what tells this CPU's instruction set from another's."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    lines = [
        line
        for line in text.splitlines()
        if line.startswith(("model name", "flags", "Features", "CPU part"))
    ]
    return "\n".join(sorted(set(lines)))
