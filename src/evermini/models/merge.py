"""An adapter merged into its base: as a checkpoint, and written as a Hugging Face folder or a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from evermini.errors import AdapterError, UnsupportedArchitectureError
from evermini.models.checkpoint import Checkpoint
from evermini.models.config import ModelConfig
from evermini.models.gguf import hf_name, interleave
from evermini.models.gguf_file import GgufFile
from evermini.models.lora import LoraWeights

SHARD_BYTES = 2 * 10**9
_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}


class MergedCheckpoint(Checkpoint):
    """A base with an adapter in its weights; computed when they are read.

    Args:
        base: The base.
        lora: Fits it.

    Raises:
        AdapterError: It does not fit.
        UnsupportedArchitectureError: The base is a vision-language checkpoint.
    """

    def __init__(self, base: Checkpoint, lora: LoraWeights) -> None:
        lora.check(base.config)
        if base.vision is not None:
            raise UnsupportedArchitectureError(
                f"{base.path} is a vision-language checkpoint; merged, it would be its language model alone. Export "
                "the adapter as peft, and merge it with the tools of transformers."
            )
        self.path, self.config, self.shapes = base.path, base.config, base.shapes
        self.tokenizer = base.tokenizer
        self._base = base
        self._factors = {
            f"model.layers.{index}.{target}.weight": factors
            for (index, target), factors in lora.factors.items()
        }

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows ``start:stop`` of one parameter; see `Checkpoint.rows`."""
        rows = self._base.rows(name, start, stop)
        factors = self._factors.get(name)
        if factors is not None:
            rows += (factors.b[start:stop] @ factors.a).mul_(factors.scale)
        return rows

    def weight_files(self) -> list[Path]:
        """Return none: it is in no file."""
        return []


def write_safetensors(checkpoint: Checkpoint, folder: Path) -> None:
    """Write ``config.json`` and the weights (matrices in float16, the rest in float32) as `transformers` reads them.

    Args:
        checkpoint: The model.
        folder: Exists.
    """
    from safetensors.torch import save_file

    config = transformers_config(checkpoint.config) | {"dtype": "float16"}
    if checkpoint.tokenizer.eos_ids:
        config["eos_token_id"] = list(checkpoint.tokenizer.eos_ids)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, shape in checkpoint.shapes.items():
        num_bytes = int(np.prod(shape)) * (2 if len(shape) > 1 else 4)
        if shards[-1] and size + num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
        total += num_bytes
    files: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = "model.safetensors"
        files |= dict.fromkeys(names, file)
        tensors = {name: checkpoint.tensor(name) for name in names}
        tensors = {name: t.half() if t.ndim > 1 else t for name, t in tensors.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def transformers_config(config: ModelConfig) -> dict[str, Any]:
    """Return the ``config.json`` of a model of this shape."""
    architecture, model_type = _ARCHITECTURES[config.family]
    rope: dict[str, Any] = {"rope_type": "default"} | (config.rope_scaling or {})
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.output_bias if config.family == "qwen3" else config.attention_bias,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "rope_scaling": config.rope_scaling,
    }


def write_gguf(base: Checkpoint, lora: LoraWeights, path: Path, name: str) -> None:
    """Write the merged model as one GGUF file: all of the base's as it is, but for what the adapter changes.

    Those matrices are Q8_0 (float16 where their rows are no multiple of 32), for requantising them to the base's few
    bits would lose what was trained.

    Args:
        base: A GGUF file.
        lora: Fits it.
        path: Where to write.
        name: What the file calls itself.

    Raises:
        AdapterError: The base is no single GGUF file, or the adapter does not fit it.
    """
    import gguf

    lora.check(base.config)
    files = base.weight_files()
    if len(files) != 1 or files[0].suffix != ".gguf":
        raise AdapterError(
            f"{base.path} is no single GGUF file, so no GGUF file can be made from it. Export with --format "
            "safetensors and convert that with llama.cpp's convert_hf_to_gguf.py."
        )
    source, reader = GgufFile(files[0]), gguf.GGUFReader(files[0])
    factors = {
        f"model.layers.{index}.{target}.weight": found
        for (index, target), found in lora.factors.items()
    }
    writer = gguf.GGUFWriter(path, arch=source.metadata["general.architecture"])
    try:
        for field in reader.fields.values():
            if field.name == gguf.Keys.General.ARCHITECTURE or field.name.startswith("GGUF."):
                continue
            value = name if field.name == gguf.Keys.General.NAME else field.contents()
            is_array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(
                field.name, value, field.types[0], sub_type=field.types[-1] if is_array else None
            )
        writer.data_alignment = reader.alignment
        for tensor in reader.tensors:
            found = factors.get(hf_name(tensor.name))
            if found is None:
                writer.add_tensor_info(
                    tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type
                )  # fmt: skip
                continue
            rows, columns = found.b.shape[0], found.a.shape[1]
            kind = _kind(columns)
            block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
            row_bytes = columns // block * num_bytes
            is_half = kind == gguf.GGMLQuantizationType.F16
            shape = (
                rows,
                columns if is_half else row_bytes,
            )  # the writer wants quantised rows in bytes
            dtype: np.dtype[Any] = np.dtype(np.float16 if is_half else np.uint8)
            writer.add_tensor_info(tensor.name, shape, dtype, rows * row_bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            found = factors.get(hf_name(tensor.name))
            if found is None:
                writer.write_tensor_data(tensor.data)
                continue
            delta = found.delta().numpy()
            if base.config.family == "llama" and tensor.name.split(".")[2] in ("attn_q", "attn_k"):
                is_query = ".attn_q." in tensor.name
                heads = base.config.num_heads if is_query else base.config.num_kv_heads
                delta = interleave(delta, heads)
            merged = source.read(tensor.name) + delta
            writer.write_tensor_data(gguf.quants.quantize(merged, _kind(merged.shape[1])))
    finally:
        writer.close()


def _kind(columns: int) -> Any:
    import gguf

    kinds = gguf.GGMLQuantizationType
    return kinds.F16 if columns % 32 else kinds.Q8_0
