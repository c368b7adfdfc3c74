"""LoRA adapters on disk, as peft's ``save_pretrained`` writes them: what is trained on top of a frozen decoder.

    lora = read_peft(folder)            # adapter_config.json + adapter_model.safetensors
    lora.check(checkpoint.config)       # does it fit this base?
    adapter = model.load_adapter(lora)  # in the form that a model computes with

For each linear layer that it targets, an adapter adds ``scale * (x A^T) B^T`` to the layer's output, with A (rank,
inputs) and B (outputs, rank). What peft can train beyond that (DoRA, biases, embeddings, whole layers) is refused by
name: leaving a part out would answer with another model than was trained.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evermini.errors import AdapterError
from evermini.models.checkpoint import parameter_shapes
from evermini.models.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

TARGETS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""Linear layers of a decoder layer that an adapter may target."""

_TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>(?:model\.)*layers\.(?P<layer>\d+)\.(?P<target>[a-z_.]+?))"
    r"\.lora_(?P<part>[AB])(?:\.default)?\.weight"
)
_UNSUPPORTED = {
    "use_dora": "DoRA (use_dora)",
    "lora_bias": "biases of its own (lora_bias)",
    "modules_to_save": "layers trained as a whole (modules_to_save)",
    "trainable_token_indices": "embeddings of single tokens (trainable_token_indices)",
    "target_parameters": "targets that are no linear layers (target_parameters)",
    "layer_replication": "repeated layers (layer_replication)",
    "alora_invocation_tokens": "activation by tokens (alora_invocation_tokens)",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "use_qalora": "QALoRA (use_qalora)",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "arrow_config": "routing between adapters (arrow_config)",
    "kasa_config": "KaSA (kasa_config)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
}
"""Fields of peft's configuration that, when set, mean more than ``scale * (x A^T) B^T``."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to initialise that change the base's weights, too, so the adapter alone does not say what was trained."""


@dataclass(frozen=True)
class LoraFactors:
    """What a linear layer gains: ``scale * (x a^T) b^T``, with a (rank, inputs) and b (outputs, rank), float32."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Inner size of the product."""
        return int(self.a.shape[0])

    def delta(self) -> Tensor:
        """Return what it adds to the weight (outputs, inputs), when it is merged."""
        return (self.b @ self.a).mul_(self.scale)


@dataclass(frozen=True)
class LoraWeights:
    """An adapter in memory, of no model's own form.

    Attributes:
        factors: By layer and target, such as ``(0, "self_attn.q_proj")``.
        base_name: The base as the trainer called it; may be a path that exists nowhere else.
    """

    factors: Mapping[tuple[int, str], LoraFactors] = field(repr=False)
    base_name: str | None = None

    @property
    def rank(self) -> int:
        """The largest rank of all targets."""
        return max(factors.rank for factors in self.factors.values())

    def layer(self, index: int) -> dict[str, LoraFactors]:
        """Return the factors of one layer, by target."""
        return {
            target: self.factors[index, target]
            for target in TARGETS
            if (index, target) in self.factors
        }

    def check(self, config: ModelConfig) -> None:
        """Make sure that it fits a base model.

        Raises:
            AdapterError: A layer or a size is another model's; says which.
        """
        shapes = parameter_shapes(config)
        for (index, target), factors in self.factors.items():
            if index >= config.num_layers:
                raise AdapterError(
                    f"The adapter has a layer {index}, its base only {config.num_layers} layers. It was trained on "
                    f"another model{self._of_base()}; choose the tier that it was trained on."
                )
            outputs, inputs = shapes[f"model.layers.{index}.{target}.weight"]
            found = factors.b.shape[0], factors.a.shape[1]
            if found != (outputs, inputs):
                raise AdapterError(
                    f"The adapter's {target} in layer {index} is for a layer of {found[1]} inputs and {found[0]} "
                    f"outputs, the base's has {inputs} and {outputs}. It was trained on another model"
                    f"{self._of_base()}; choose the tier that it was trained on."
                )

    def _of_base(self) -> str:
        return f" ({self.base_name})" if self.base_name else ""


def read_peft(folder: Path) -> LoraWeights:
    """Read what peft's ``save_pretrained`` wrote.

    Args:
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        AdapterError: A file is missing, damaged or inconsistent, or the adapter has a part that is not supported.
    """
    config = read_peft_config(folder)
    parts: dict[tuple[int, str], dict[str, Tensor]] = {}
    names: dict[tuple[int, str], str] = {}
    for name, tensor in _tensors(folder / WEIGHTS_FILE):
        match = _TENSOR.fullmatch(name)
        if match is None or match["target"] not in TARGETS:
            raise AdapterError(
                f"{folder} holds {name}, which is no LoRA factor of a linear layer of the decoder. Supported targets: "
                f"{', '.join(target.partition('.')[2] for target in TARGETS)}. Train it anew with these as "
                "target_modules."
            )
        key = int(match["layer"]), match["target"]
        parts.setdefault(key, {})[match["part"]] = tensor
        names[key] = match["module"]
    if not parts:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE} holds no LoRA factors. Save the adapter again."
        )
    found = {}
    for key in sorted(parts):
        if parts[key].keys() != {"A", "B"}:
            raise AdapterError(
                f"{folder / WEIGHTS_FILE} has only one of the two factors of {names[key]}. Save the adapter again."
            )
        found[key] = _factors(folder, names[key], parts[key]["A"], parts[key]["B"], config)
    base = config.get("base_model_name_or_path")
    return LoraWeights(found, base if isinstance(base, str) and base else None)


def read_peft_config(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json``.

    Raises:
        AdapterError: It is missing or damaged, or describes more than plain LoRA.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{path} cannot be read: {error}. Give the folder that peft's save_pretrained wrote "
            f"({CONFIG_FILE} and {WEIGHTS_FILE})."
        ) from error
    if not isinstance(config, dict) or str(config.get("peft_type", "")).upper() != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise AdapterError(
            f"{path} describes {f'a {kind} adapter' if kind else 'no adapter'}. Supported: peft_type LORA."
        )
    _refuse_unsupported(path, config)
    return config


def _refuse_unsupported(path: Path, config: Mapping[str, Any]) -> None:
    used = [what for name, what in _UNSUPPORTED.items() if config.get(name)]
    if (bias := config.get("bias", "none")) != "none":
        used.append(f"trained biases (bias={bias!r})")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(_CHANGES_BASE):
        used.append(
            f"a base changed by its initialisation (init_lora_weights={config['init_lora_weights']!r}; peft's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...) makes plain LoRA of it)"
        )
    if used:
        raise AdapterError(
            f"{path}: the adapter has {', '.join(used)}, which is not supported here. Supported: LoRA of linear "
            "layers, with ranks and alphas of any pattern and use_rslora. Merge it into its base and serve the merged "
            "model, or train it anew without."
        )


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                tensor: Tensor = handle.get_tensor(name)
                if not tensor.is_floating_point():
                    raise AdapterError(
                        f"{path}: {name} has type {tensor.dtype}, which cannot be read. Save it as float32, float16 "
                        "or bfloat16."
                    )
                yield name, tensor.to(torch.float32, copy=True)
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{path} cannot be read: {error}. Save the adapter again (safe_serialization, which is peft's default)."
        ) from error


def _factors(
    folder: Path, module: str, a: Tensor, b: Tensor, config: Mapping[str, Any]
) -> LoraFactors:
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"{folder}: the factors of {module} have the shapes {tuple(a.shape)} and {tuple(b.shape)}, which do not "
            "fit together. Save the adapter again."
        )
    rank = int(a.shape[0])
    said = _by_pattern(config.get("rank_pattern"), module, config.get("r"))
    if said != rank:
        raise AdapterError(
            f"{folder}: {module} has rank {rank}, by {CONFIG_FILE} it should have {said}. The two files belong to "
            "different adapters; save it again."
        )
    if not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
        raise AdapterError(
            f"{folder}: the factors of {module} hold numbers that are not finite: the training diverged. Train it "
            "anew, with a smaller learning rate."
        )
    alpha = float(_by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha")))
    return LoraFactors(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value whose pattern the module's name ends with, as peft looks it up: the first one."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
