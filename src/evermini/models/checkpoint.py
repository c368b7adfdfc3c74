"""A checkpoint on disk, whatever its format: shape, tokenizer and weights under Hugging Face parameter names.

    checkpoint = open_checkpoint(Path("model.gguf"))     # or a folder with config.json and *.safetensors
    checkpoint.config                                    # ModelConfig
    checkpoint.tensor("model.layers.0.mlp.up_proj.weight")   # float32, read and dequantised now

Opening reads headers only. Every tensor the model needs is checked for presence and shape when the checkpoint is
opened, so a damaged download fails at once and not in the middle of loading. Weights stay on disk: each call to
`Checkpoint.tensor` reads one tensor and keeps nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evermini.errors import DamagedCheckpointError, ModelError, UnsupportedArchitectureError
from evermini.models.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TokenizerSource:
    """What a checkpoint says about its tokenizer, unparsed; `evermini.text.tokenizer` makes sense of it.

    Attributes:
        format: Where it comes from.
        metadata: GGUF: the ``tokenizer.*`` keys as they are. Hugging Face: ``tokenizer_config.json``.
        tokenizer_json: Text of ``tokenizer.json`` (Hugging Face only).
        chat_template: The Jinja chat template, if the checkpoint has one.
        eos_ids: End-of-generation ids named outside the tokenizer (``config.json``, ``generation_config.json``).
        vocab_size: Rows of the embedding; ids at or above it do not exist.
        takes_parts: The chat template takes a message's content as parts, as those of vision-language models do.
    """

    format: Literal["gguf", "huggingface"]
    metadata: Mapping[str, Any]
    tokenizer_json: str | None
    chat_template: str | None
    eos_ids: tuple[int, ...]
    vocab_size: int
    takes_parts: bool = False


@dataclass(frozen=True)
class VisionSource:
    """What a vision-language checkpoint says about its vision tower; `evermini.vision.tower` makes it.

    Attributes:
        family: Which family's conventions apply.
        image_token_id: Token that stands in a prompt for a row of an image.
        shapes: Name and shape of each parameter, as the family's modules in `transformers` name them.
    """

    family: Literal["qwen2_5_vl", "idefics3"]
    image_token_id: int
    shapes: Mapping[str, Shape]


class Checkpoint(ABC):
    """Weights on disk under Hugging Face parameter names.

    Attributes:
        path: The GGUF file (the first of a split one) or the safetensors folder.
        config: The shape of the model, of a vision-language checkpoint that of the language model.
        shapes: Name and shape of each parameter: exactly those its ``config`` calls for.
        tokenizer: Its tokenizer, unparsed.
        vision: Its vision tower, if it has one.
    """

    path: Path
    config: ModelConfig
    shapes: dict[str, Shape]
    tokenizer: TokenizerSource
    vision: VisionSource | None = None

    def names(self) -> set[str]:
        """Return the names of this model's parameters."""
        return set(self.shapes)

    def tensor(self, name: str) -> Tensor:
        """Read one parameter.

        Args:
            name: One of `names`.

        Returns:
            A new contiguous float32 CPU tensor that shares no memory with the file.

        Raises:
            KeyError: The model has no such parameter.
            DamagedCheckpointError: The file changed or cannot be read any more.
        """
        return self.rows(name, 0, self.shapes[name][0])

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows ``start:stop`` of one parameter, as `tensor` does; keeps the peak low for a large embedding."""

    def vision_tensor(self, name: str) -> Tensor:
        """Read one parameter of the vision tower, as `tensor` does.

        Raises:
            KeyError: There is no such parameter.
            DamagedCheckpointError: The file changed or cannot be read any more.
        """
        raise KeyError(name)

    @abstractmethod
    def weight_files(self) -> list[Path]:
        """Return the files that decide the model's outputs, in a fixed order."""

    @property
    def fingerprint(self) -> str:
        """The weights' identity (64 hex digits), the same wherever the checkpoint lies.

        For one file this is its sha256, as in the catalogue. Read on first use and kept for the process (0.3 s for
        500 MB where the processor has SHA instructions, 1.2 s where not).
        """
        files = self.weight_files()
        digests = [_file_digest(path) for path in files]
        if len(files) == 1:
            return digests[0]
        listing = "".join(
            f"{digest}  {path.name}\n" for digest, path in zip(digests, files, strict=True)
        )
        return hashlib.sha256(listing.encode()).hexdigest()


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file or a folder of safetensors.

    Args:
        path: A ``.gguf`` file (any part of a split one), a ``.safetensors`` file beside its ``config.json``, or a
            folder that holds either.

    Raises:
        ModelError: There is nothing to open at ``path``, or it is no checkpoint.
        UnsupportedArchitectureError: The model is not of a supported family.
        UnsupportedQuantizationError: A tensor's type cannot be read.
        DamagedCheckpointError: A file is truncated or inconsistent, or a tensor is missing.
    """
    from evermini.models.gguf import GgufCheckpoint
    from evermini.models.safetensors import SafetensorsCheckpoint

    path = Path(path).expanduser()
    if not path.exists():
        raise ModelError(
            f"No checkpoint at {path}: the path does not exist. "
            "Give a .gguf file or a folder with config.json and *.safetensors."
        )
    if path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
        if magic == b"GGUF" or path.suffix == ".gguf":
            return GgufCheckpoint(path)
        if path.suffix == ".safetensors":
            return SafetensorsCheckpoint(path.parent)
        raise ModelError(
            f"{path} is neither GGUF nor safetensors. "
            "Convert it to one of them (pickled .bin and .pt files are not opened: they can run code)."
        )
    if (path / "config.json").is_file():
        return SafetensorsCheckpoint(path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1 or (ggufs and all(_SPLIT_NAME.search(file.name) for file in ggufs)):
        return GgufCheckpoint(ggufs[0])
    if ggufs:
        listed = ", ".join(file.name for file in ggufs)
        raise ModelError(f"{path} holds several GGUF files ({listed}); name the one to open.")
    raise ModelError(
        f"{path} holds no checkpoint: neither config.json nor a .gguf file is in it. "
        "Give a .gguf file or a folder with config.json and *.safetensors."
    )


_SPLIT_NAME = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Return the name and shape of every parameter of a model of this shape."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows = config.num_heads * config.head_dim
    kv_rows = config.num_kv_heads * config.head_dim
    layer: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_rows, hidden),
        "self_attn.k_proj.weight": (kv_rows, hidden),
        "self_attn.v_proj.weight": (kv_rows, hidden),
        "self_attn.o_proj.weight": (hidden, q_rows),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.attention_bias:
        layer |= {
            "self_attn.q_proj.bias": (q_rows,),
            "self_attn.k_proj.bias": (kv_rows,),
            "self_attn.v_proj.bias": (kv_rows,),
        }
    if config.output_bias:
        layer["self_attn.o_proj.bias"] = (hidden,)
    if config.qk_norm:
        layer |= {
            "self_attn.q_norm.weight": (config.head_dim,),
            "self_attn.k_norm.weight": (config.head_dim,),
        }
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def check_parameters(
    path: Path, config: ModelConfig, found: Mapping[str, Shape]
) -> dict[str, Shape]:
    """Return the shapes of a model's parameters after checking that a checkpoint holds exactly these.

    Raises:
        DamagedCheckpointError: One is missing or has another shape.
        UnsupportedArchitectureError: There are tensors this family does not use; leaving them out would give wrong
            outputs.
    """
    if config.num_layers > len(
        found
    ):  # before a list of 2**32 layers is made from a damaged number
        raise DamagedCheckpointError(
            f"{path} has {len(found)} tensors, but its metadata calls for {config.num_layers} layers. "
            "Fetch or convert it again."
        )
    wanted = parameter_shapes(config)
    for name, shape in wanted.items():
        if name not in found:
            raise DamagedCheckpointError(
                f"{path} has no tensor for {name}: it is incomplete. Fetch or convert it again."
            )
        if found[name] != shape:
            raise DamagedCheckpointError(
                f"{path}: {name} has shape {found[name]}, but its metadata calls for {shape}. "
                "Fetch or convert it again."
            )
    extra = sorted(set(found) - set(wanted))
    if extra:
        raise UnsupportedArchitectureError(
            f"{path} holds {len(extra)} tensor(s) that the {config.family} family does not have, such as {extra[0]}. "
            "Use a plain dense checkpoint (adapters merged, no mixture of experts)."
        )
    return wanted


def check_config(path: Path, config: ModelConfig) -> None:
    """Check that the sizes in a checkpoint's metadata can describe a model.

    Raises:
        DamagedCheckpointError: A size is not positive, or heads cannot be shared as described.
    """
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position": config.max_position,
    }
    for name, value in sizes.items():
        if value <= 0:
            raise DamagedCheckpointError(
                f"{path}: {name} is {value}, which no model has. Fetch or convert it again."
            )
    if config.num_heads % config.num_kv_heads or config.head_dim % 2:
        raise DamagedCheckpointError(
            f"{path}: {config.num_heads} query heads, {config.num_kv_heads} key/value heads and head_dim "
            f"{config.head_dim} do not fit together. Fetch or convert it again."
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DamagedCheckpointError: The file is absent, unreadable or no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({error}). Fetch it again.") from error
    if not isinstance(value, dict):
        raise DamagedCheckpointError(f"{path} is not a JSON object. Fetch it again.")
    return value


def as_ids(value: Any) -> tuple[int, ...]:
    """Return the token ids in a metadata value that may be absent, one id or a list of them."""
    if value is None:
        return ()
    if isinstance(value, Iterable):
        return tuple(int(item) for item in value)
    return (int(value),)


def _file_digest(path: Path) -> str:
    stat = path.stat()
    return _cached_digest(path.resolve(), stat.st_size, stat.st_mtime_ns)


@functools.cache
def _cached_digest(path: Path, size: int, mtime_ns: int) -> str:
    # size and mtime are only cache keys: a file that changed is read again.
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
