"""Hugging Face folders as checkpoints: ``config.json`` and ``*.safetensors``, sharded or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

from evermini.errors import (
    DamagedCheckpointError,
    UnsupportedArchitectureError,
    UnsupportedQuantizationError,
)
from evermini.models.checkpoint import (
    Checkpoint,
    Shape,
    TokenizerSource,
    VisionSource,
    as_ids,
    check_config,
    check_parameters,
    read_json,
)
from evermini.models.config import Family, ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

_FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


@dataclass(frozen=True)
class _VisionFamily:
    """How a vision-language family is written down.

    Attributes:
        family: Its conventions.
        language: The family of its language model.
        text: Beginnings of the names of the language model's parameters, and what a plain checkpoint has there.
        vision: The same of the vision tower's; the names that go on after these are the modules' own.
    """

    family: Literal["qwen2_5_vl", "idefics3"]
    language: Family
    text: Mapping[str, str]
    vision: Mapping[str, str]


_IDEFICS = _VisionFamily(
    "idefics3",
    "llama",
    {"model.text_model.": "model.", "lm_head.": "lm_head."},
    {"model.vision_model.": "vision_model.", "model.connector.": "connector."},
)
_VISION_FAMILIES = {
    # The first of two is how it was published, the other how newer versions of transformers name it.
    "Qwen2_5_VLForConditionalGeneration": _VisionFamily(
        "qwen2_5_vl",
        "qwen2",
        {"model.language_model.": "model.", "model.": "model.", "lm_head.": "lm_head."},
        {"visual.": "", "model.visual.": ""},
    ),
    "Idefics3ForConditionalGeneration": _IDEFICS,
    "SmolVLMForConditionalGeneration": _IDEFICS,
}
_IMAGE_SETTINGS = ("preprocessor_config.json", "processor_config.json")
_DTYPES = ("F32", "F16", "BF16")
_INDEX = "model.safetensors.index.json"


class SafetensorsCheckpoint(Checkpoint):
    """A model in a Hugging Face folder.

    Args:
        path: The folder: ``config.json``, ``model.safetensors`` (or shards and their index), ``tokenizer.json``,
            ``tokenizer_config.json`` and, where the model has them, ``generation_config.json`` and
            ``chat_template.jinja``.

    Raises:
        UnsupportedArchitectureError: Not a dense Llama, Qwen2 or Qwen3 model, nor a Qwen2.5-VL, Idefics3 or SmolVLM
            one, or with an unsupported option.
        UnsupportedQuantizationError: The weights are quantised.
        DamagedCheckpointError: A file or tensor is missing or unreadable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        raw = read_json(path / "config.json")
        self._found: dict[str, tuple[Path, str]] = {}
        self._vision: dict[str, tuple[Path, str]] = {}
        shapes: dict[str, Shape] = {}
        vision_shapes: dict[str, Shape] = {}
        self.config = _read_config(path, raw)
        check_config(path, self.config)
        family = _VISION_FAMILIES.get(_architecture(raw))
        for file in _shards(path):
            for stored, shape in _read_directory(file).items():
                name = stored
                if family is not None:
                    if (seen := _renamed(stored, family.vision)) is not None:
                        self._vision[seen], vision_shapes[seen] = (file, stored), shape
                        continue
                    name = _renamed(stored, family.text) or stored
                # Old checkpoints store RoPE's frequencies; a tied lm_head is a copy of the embedding.
                if name.endswith("rotary_emb.inv_freq"):
                    continue
                if name == "lm_head.weight" and self.config.tie_embeddings:
                    continue
                self._found[name], shapes[name] = (file, stored), shape
        self.shapes = check_parameters(path, self.config, shapes)
        self.tokenizer = _read_tokenizer(path, raw, self.config.vocab_size)
        if family is not None:
            self.tokenizer = replace(self.tokenizer, takes_parts=True)
            image_token_id = _getter(path, raw)("image_token_id", int)
            self.vision = VisionSource(family.family, image_token_id, vision_shapes)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows ``start:stop`` of one parameter; see `Checkpoint.rows`."""
        return _read(*self._found[name], slice(start, stop))

    def vision_tensor(self, name: str) -> Tensor:
        """Read one parameter of the vision tower; see `Checkpoint.vision_tensor`."""
        return _read(*self._vision[name], slice(None))

    def weight_files(self) -> list[Path]:
        """Return ``config.json`` (it holds RoPE's settings), how images are prepared, and the shards in name order."""
        shards = {file for file, _ in (*self._found.values(), *self._vision.values())}
        images = [self.path / name for name in _IMAGE_SETTINGS if self._vision]
        return [self.path / "config.json", *(f for f in images if f.is_file()), *sorted(shards)]


def _read(file: Path, name: str, rows: slice) -> Tensor:
    import torch

    try:
        with safe_open(file, framework="pt") as handle:
            values: Tensor = handle.get_slice(name)[rows]
    except (OSError, SafetensorError) as error:
        raise _damaged(file, error) from error
    # A copy: slices of float32 files are views of the mapping.
    return values.to(torch.float32, copy=True).contiguous()


def _renamed(name: str, beginnings: Mapping[str, str]) -> str | None:
    """Return a name with its beginning replaced; ``None``: it has none of these. The longest one counts."""
    for beginning in sorted(beginnings, key=len, reverse=True):
        if name.startswith(beginning):
            return beginnings[beginning] + name.removeprefix(beginning)
    return None


def _architecture(raw: dict[str, Any]) -> str:
    architectures: list[str] = raw.get("architectures") or [f"model_type {raw.get('model_type')}"]
    return architectures[0]


def _shards(path: Path) -> list[Path]:
    index = path / _INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise DamagedCheckpointError(f"{index} has no weight_map. Fetch it again.")
        names = sorted(set(weight_map.values()))
    elif (path / "model.safetensors").is_file():
        names = ["model.safetensors"]
    else:
        names = sorted(file.name for file in path.glob("*.safetensors"))
    missing = [name for name in names if not (path / name).is_file()]
    if missing or not names:
        what = ", ".join(missing) or f"model.safetensors or {_INDEX}"
        raise DamagedCheckpointError(f"{path} lacks {what}. Fetch the whole folder.")
    return [path / name for name in names]


def _read_directory(file: Path) -> dict[str, Shape]:
    """Return name and shape of each tensor in one file, refusing types that are not plain floats."""
    shapes: dict[str, Shape] = {}
    try:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                part = handle.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    raise UnsupportedQuantizationError(
                        f"{file}: tensor {name} has type {part.get_dtype()}, which cannot be read. "
                        f"Supported: {', '.join(_DTYPES)}. For a quantised model use its GGUF version."
                    )
                shapes[name] = tuple(part.get_shape())
    except (OSError, SafetensorError) as error:
        raise _damaged(file, error) from error
    return shapes


def _read_config(path: Path, raw: dict[str, Any]) -> ModelConfig:
    architecture = _architecture(raw)
    sees = _VISION_FAMILIES.get(architecture)
    family = _FAMILIES.get(architecture) if sees is None else sees.language
    if family is None:
        raise UnsupportedArchitectureError(
            f"{path} is a {architecture} model, which is not supported. "
            f"Supported: {', '.join((*_FAMILIES, *_VISION_FAMILIES))}."
        )
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedQuantizationError(
            f"{path} is quantised with {method}, which cannot be read. "
            "Use the original bf16/fp16/fp32 folder, or a GGUF version of the model."
        )
    if sees is not None:
        raw = _language_part(raw)
    _refuse_unsupported_options(path, raw)
    get = _getter(path, raw)
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    num_heads = get("num_attention_heads", int)
    hidden = get("hidden_size", int)
    head_dim = 128 if family == "qwen3" else hidden // max(num_heads, 1)
    llama_bias = bool(raw.get("attention_bias")) and family == "llama"
    return ModelConfig(
        family=family,
        vocab_size=get("vocab_size", int),
        hidden_size=hidden,
        intermediate_size=get("intermediate_size", int),
        num_layers=get("num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=get("num_key_value_heads", int, num_heads),
        head_dim=get("head_dim", int, head_dim),
        max_position=get("max_position_embeddings", int),
        rope_theta=float(rope.get("rope_theta") or get("rope_theta", float, 10_000.0)),
        rms_norm_eps=get("rms_norm_eps", float, 1e-6),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=family == "qwen2" or bool(raw.get("attention_bias")),
        output_bias=llama_bias or (family == "qwen3" and bool(raw.get("attention_bias"))),
        qk_norm=family == "qwen3",
        rope_scaling=_rope_scaling(path, rope),
        rope_sections=_rope_sections(path, rope, head_dim)
        if sees is not None and sees.family == "qwen2_5_vl"
        else (),
    )


def _language_part(raw: dict[str, Any]) -> dict[str, Any]:
    """Return what a vision-language config.json says of the language model: a part of it, or spread over all of it."""
    text = raw.get("text_config")
    if not isinstance(text, dict):
        return raw
    tied = raw.get("tie_word_embeddings") or (
        raw.get("model_type") == "qwen2_5_vl" and text.get("tie_word_embeddings")
    )
    return text | {"tie_word_embeddings": bool(tied)}


def _rope_sections(path: Path, rope: dict[str, Any], head_dim: int) -> tuple[int, ...]:
    sections = rope.get("mrope_section")
    if not (
        isinstance(sections, list)
        and all(isinstance(size, int) and size > 0 for size in sections)
        and sum(sections) == head_dim // 2
    ):
        raise DamagedCheckpointError(
            f"{path}/config.json: mrope_section is {sections!r}; it must be whole numbers that add up to "
            f"{head_dim // 2}, half a head. Fetch it again."
        )
    return tuple(sections)


def _refuse_unsupported_options(path: Path, raw: dict[str, Any]) -> None:
    layer_types = set(raw.get("layer_types") or ["full_attention"])
    refused = {
        "sliding-window attention": raw.get("use_sliding_window")
        or layer_types != {"full_attention"},
        "mlp_bias": raw.get("mlp_bias"),
        f"activation {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
        "partial rotary embedding": (raw.get("partial_rotary_factor") or 1.0) != 1.0,
    }
    for option, present in refused.items():
        if present:
            raise UnsupportedArchitectureError(
                f"{path}/config.json asks for {option}, which is not supported. Supported: full attention, SiLU-gated "
                "MLP without bias, rotary embedding over the whole head."
            )


def _rope_scaling(path: Path, rope: dict[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind in ("default", "mrope"):  # the latter is of models whose positions have three axes
        return None
    required = {
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }
    if kind not in required:
        raise UnsupportedArchitectureError(
            f"{path}/config.json uses RoPE scaling {kind!r}, which is not supported. "
            "Supported: none, linear and llama3."
        )
    missing = [key for key in required[kind] if key not in rope]
    if missing:
        raise DamagedCheckpointError(
            f"{path}/config.json: RoPE scaling {kind!r} lacks {', '.join(missing)}. Fetch it again."
        )
    return {"rope_type": kind} | {key: rope[key] for key in required[kind]}


def _getter(path: Path, raw: dict[str, Any]) -> Any:
    def get(key: str, kind: type, default: Any = None) -> Any:
        value = raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(
            value, (int, float) if kind is float else kind
        ):
            raise DamagedCheckpointError(
                f"{path}/config.json: {key} is {value!r}, not {kind.__name__}. Fetch it again."
            )
        return kind(value)

    return get


def _read_tokenizer(path: Path, config: dict[str, Any], vocab_size: int) -> TokenizerSource:
    tokenizer_json = path / "tokenizer.json"
    if not tokenizer_json.is_file():
        raise DamagedCheckpointError(
            f"{path} has no tokenizer.json. Fetch it, or write it with "
            "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    settings = _read_optional(path / "tokenizer_config.json")
    generation = _read_optional(path / "generation_config.json")
    template_file = path / "chat_template.jinja"
    template = settings.get("chat_template")
    if template_file.is_file():
        template = template_file.read_text(encoding="utf-8")
    elif isinstance(template, list):  # several named ones
        template = {item["name"]: item["template"] for item in template}.get("default")
    elif template is None:  # where older vision-language checkpoints have it
        template = _read_optional(path / "chat_template.json").get("chat_template")
    return TokenizerSource(
        format="huggingface",
        metadata=settings,
        tokenizer_json=tokenizer_json.read_text(encoding="utf-8"),
        chat_template=template,
        eos_ids=as_ids(generation.get("eos_token_id"))
        + as_ids(config.get("eos_token_id"))
        + as_ids((config.get("text_config") or {}).get("eos_token_id")),
        vocab_size=vocab_size,
    )


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _damaged(path: Path, cause: Exception) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{path} is not a usable safetensors file: {cause}. Delete it and fetch it again."
    )
