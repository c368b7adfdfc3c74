"""GGUF files as checkpoints: metadata to `ModelConfig`, ggml tensor names to Hugging Face ones.

Two things are undone that the converter to GGUF did: Llama's query and key rows are interleaved there (ggml rotates
neighbouring pairs, Hugging Face the two halves of a head), and Llama 3's RoPE scaling is stored as one factor per
frequency in ``rope_freqs.weight``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from evermini.errors import (
    DamagedCheckpointError,
    EverminiError,
    UnsupportedArchitectureError,
)
from evermini.models.checkpoint import (
    Checkpoint,
    Shape,
    TokenizerSource,
    as_ids,
    check_config,
    check_parameters,
)
from evermini.models.config import Family, ModelConfig
from evermini.models.gguf_file import GgufFile

if TYPE_CHECKING:
    from torch import Tensor

_FAMILIES: dict[str, Family] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_ROPE_FREQS = "rope_freqs.weight"


_T = TypeVar("_T", int, float, str)


class GgufCheckpoint(Checkpoint):
    """A model in one GGUF file, or in the parts of a split one.

    Args:
        path: The file; any part of a split one.

    Raises:
        UnsupportedArchitectureError: Not a dense Llama, Qwen2 or Qwen3 model.
        UnsupportedQuantizationError: A tensor has a type that cannot be dequantised.
        DamagedCheckpointError: A file is truncated, or a key, tensor or part is missing.
    """

    def __init__(self, path: Path) -> None:
        self._files = _open_parts(path)
        self.path = self._files[0].path
        metadata = self._files[0].metadata
        # HF name -> (file, GGUF name). Names unknown here are kept as they are, for check_parameters to refuse.
        self._where = {
            hf_name(name): (file, name)
            for file in self._files
            for name in file.tensors
            if name != _ROPE_FREQS
        }
        self.config = self._read_config(_Metadata(self.path, metadata))
        check_config(self.path, self.config)
        found = {name: file.tensors[inner].shape for name, (file, inner) in self._where.items()}
        self.shapes = check_parameters(self.path, self.config, found)
        self.tokenizer = TokenizerSource(
            format="gguf",
            metadata={k: v for k, v in metadata.items() if k.startswith("tokenizer.")},
            tokenizer_json=None,
            chat_template=metadata.get("tokenizer.chat_template"),
            eos_ids=as_ids(metadata.get("tokenizer.ggml.eos_token_id")),
            vocab_size=self.config.vocab_size,
        )

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows ``start:stop`` of one parameter; see `Checkpoint.rows`."""
        import torch

        file, inner = self._where[name]
        match = re.search(r"\.([qk])_proj\.", name)
        if self.config.family == "llama" and match:
            heads = self.config.num_heads if match[1] == "q" else self.config.num_kv_heads
            values = uninterleave(file.read(inner), heads)[start:stop]
        else:
            values = file.read(inner, start, stop)
        return torch.from_numpy(np.ascontiguousarray(values))

    def weight_files(self) -> list[Path]:
        """Return the GGUF file, or all parts in order."""
        return [file.path for file in self._files]

    def _read_config(self, metadata: _Metadata) -> ModelConfig:
        architecture = metadata.get("general.architecture", str)
        family = _FAMILIES.get(architecture)
        if family is None:
            raise UnsupportedArchitectureError(
                f"{self.path} is a {architecture!r} model, which is not supported. "
                f"Supported GGUF architectures: {', '.join(_FAMILIES)} (dense)."
            )
        get = metadata.scoped(architecture)
        if get("expert_count", int, 0):
            raise UnsupportedArchitectureError(
                f"{self.path} is a mixture-of-experts model, which is not supported. "
                f"Supported: dense models of {', '.join(_FAMILIES)}."
            )
        hidden = get("embedding_length", int)
        num_heads = get("attention.head_count", int)
        if num_heads <= 0:
            raise metadata.error(f"attention.head_count is {num_heads}")
        rope_dim = get("rope.dimension_count", int, 0)
        head_dim = get("attention.key_length", int, rope_dim or hidden // num_heads)
        value_dim = get("attention.value_length", int, head_dim)
        if value_dim != head_dim or (rope_dim and rope_dim != head_dim):
            raise UnsupportedArchitectureError(
                f"{self.path}: keys of {head_dim}, values of {value_dim} and RoPE over {rope_dim or head_dim} "
                "dimensions. Only models where the three are equal are supported."
            )
        return ModelConfig(
            family=family,
            vocab_size=self._shape("model.embed_tokens.weight")[0],
            hidden_size=hidden,
            intermediate_size=get("feed_forward_length", int),
            num_layers=get("block_count", int),
            num_heads=num_heads,
            num_kv_heads=get("attention.head_count_kv", int, num_heads),
            head_dim=head_dim,
            max_position=get("context_length", int),
            rope_theta=get("rope.freq_base", float, 10_000.0),
            rms_norm_eps=get("attention.layer_norm_rms_epsilon", float),
            tie_embeddings="lm_head.weight" not in self._where,
            attention_bias="model.layers.0.self_attn.q_proj.bias" in self._where,
            output_bias="model.layers.0.self_attn.o_proj.bias" in self._where,
            qk_norm=family == "qwen3",
            rope_scaling=self._rope_scaling(get, head_dim),
        )

    def _shape(self, name: str) -> Shape:
        if name not in self._where:
            raise DamagedCheckpointError(
                f"{self.path} has no tensor for {name}: it is incomplete. Fetch or convert it again."
            )
        file, inner = self._where[name]
        return file.tensors[inner].shape

    def _rope_scaling(self, get: Any, head_dim: int) -> dict[str, Any] | None:
        kind = get("rope.scaling.type", str, "none")
        linear = get("rope.scale_linear", float, 1.0)  # the key of files before August 2023
        factor = get("rope.scaling.factor", float, linear)
        if kind not in ("none", "linear"):
            raise UnsupportedArchitectureError(
                f"{self.path} uses RoPE scaling {kind!r}, which is not supported. "
                "Supported: none, linear and llama3."
            )
        for file in self._files:
            if _ROPE_FREQS in file.tensors:
                theta = get("rope.freq_base", float, 10_000.0)
                original = get("rope.scaling.original_context_length", int, 8192)
                return _llama3_scaling(self.path, file.read(_ROPE_FREQS), theta, head_dim, original)
        if (kind == "linear" or linear != 1.0) and factor not in (0.0, 1.0):
            return {"rope_type": "linear", "factor": factor}
        return None


class _Metadata:
    """Typed access to GGUF metadata: a missing or mistyped key is a damaged file, not a traceback."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self._path = path
        self._values = values

    def error(self, cause: str) -> EverminiError:
        return DamagedCheckpointError(
            f"{self._path}: {cause}, which describes no model. Fetch or convert it again."
        )

    def get(self, key: str, kind: type[_T], default: _T | None = None) -> _T:
        value = self._values.get(key, default)
        if value is None:
            raise self.error(f"metadata key {key} is missing")
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # one value per layer, all the same
        if not isinstance(value, (int, float) if kind is float else kind):
            raise self.error(f"metadata key {key} is {value!r}, not {kind.__name__}")
        return kind(value)

    def scoped(self, architecture: str) -> Any:
        """Return `get` for keys below ``architecture.``."""
        return lambda key, kind, *default: self.get(f"{architecture}.{key}", kind, *default)


def _open_parts(path: Path) -> list[GgufFile]:
    """Open a file, and its siblings if it says it is a part of a split model."""
    first = GgufFile(path)
    count = first.metadata.get("split.count", 1)
    if count <= 1:
        return [first]
    match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
    if not match or int(match[2]) != count:
        raise DamagedCheckpointError(
            f"{path} is one of {count} parts of a split model, and its name does not tell where the others are. "
            f"Name the parts NAME-00001-of-{count:05d}.gguf and so on."
        )
    names = [f"{match[1]}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise DamagedCheckpointError(
            f"{path} is one of {count} parts of a split model; missing beside it: {', '.join(missing)}. Fetch them."
        )
    return [first if name == path.name else GgufFile(path.parent / name) for name in names]


def hf_name(name: str) -> str:
    """Return a tensor's Hugging Face name; one that is not known here stays as it is."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in LAYER_NAMES:
        return f"model.layers.{int(match[1])}.{LAYER_NAMES[match[2]]}.{match[3]}"
    return name


def uninterleave(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Undo the converter's reordering of rows: (x0 y0 x1 y1 ...) of each head back to (x0 x1 ... y0 y1 ...)."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def interleave(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Reorder rows as the converter does; the inverse of `uninterleave`."""
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _llama3_scaling(
    path: Path, factors: np.ndarray[Any, Any], theta: float, head_dim: int, original: int
) -> dict[str, Any]:
    """Return the Hugging Face description of per-frequency factors, checked against them.

    All Llama 3.x models use bounds 1 and 4, so the one unknown is the factor of the lowest frequencies.
    """
    low, high, factor = 1.0, 4.0, float(factors.max())
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise UnsupportedArchitectureError(
            f"{path} holds RoPE factors ({_ROPE_FREQS}) other than those of Llama 3 for a window of {original}. "
            "Supported RoPE scalings: none, linear and llama3."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
