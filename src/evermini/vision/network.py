"""Vision towers as `transformers` computes them: in float32, the oracle of `evermini.vision.native`, or bfloat16.

A network is what stands between an image's pixels and rows that a decoder reads. Which modules a family has, under
which names their weights are stored, and what fits together, is said here for both ways to compute it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from evermini.errors import DamagedCheckpointError
from evermini.models.checkpoint import Checkpoint, VisionSource

BeforePiece = Callable[[], None]
"""Called before each piece of the work; ends it by an exception."""
Modules = dict[str, torch.nn.Module]
"""A tower's modules by the first part of their parameters' names (may be empty)."""


class Network(Protocol):
    """What computes a tower. One thread at a time."""

    def rows(self, pixels: Mapping[str, Tensor], before_piece: BeforePiece) -> Tensor:
        """Return the rows of an image, (tokens, hidden_size).

        Args:
            pixels: What the checkpoint's preprocessor made of it.
            before_piece: Called before each piece of the work. What it raises comes through.
        """
        ...


class TorchNetwork(ABC):
    """A tower of modules of `transformers`.

    Args:
        modules: From `build`, without weights.
        read: Returns a parameter by its name.
        device: Where to compute.
        dtype: How precisely.
    """

    output: str
    """Name of the weights whose first dimension is the width of a row."""

    def __init__(
        self,
        modules: Modules,
        read: Callable[[str], Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        for name, tensor in _parameters(modules).items():  # one of them in memory at a time
            tensor.copy_(read(name))
        self._modules, self._device, self._dtype = modules, device, dtype
        self._before_piece: BeforePiece = _nothing
        for module in modules.values():
            module.to(device=device, dtype=dtype).eval()
            for layers in module.modules():
                for layer in layers if isinstance(layers, torch.nn.ModuleList) else ():
                    layer.register_forward_pre_hook(self._before_layer)

    @staticmethod
    @abstractmethod
    def build(config: Any) -> Modules:
        """Return the modules that a checkpoint's configuration calls for, as `transformers` initialises them."""

    def rows(self, pixels: Mapping[str, Tensor], before_piece: BeforePiece) -> Tensor:
        """Return the rows of an image; a piece is a layer. See `Network.rows`."""
        self._before_piece = before_piece
        return self._rows(pixels)

    @abstractmethod
    def _rows(self, pixels: Mapping[str, Tensor]) -> Tensor:
        """Return the rows of an image."""

    def _before_layer(self, module: torch.nn.Module, inputs: object) -> None:
        self._before_piece()


class TorchQwen(TorchNetwork):
    """Qwen2.5-VL's."""

    output = "merger.mlp.2.weight"

    @staticmethod
    def build(config: Any) -> Modules:
        """Return the modules; see `TorchNetwork.build`."""
        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as code

        return {
            "": code.Qwen2_5_VisionTransformerPretrainedModel._from_config(config.vision_config)
        }

    def _rows(self, pixels: Mapping[str, Tensor]) -> Tensor:
        values = pixels["pixel_values"].to(self._device, self._dtype)
        grid = pixels["image_grid_thw"].to(self._device)
        rows: Tensor = self._modules[""](values, grid_thw=grid).pooler_output
        return rows


class TorchIdefics(TorchNetwork):
    """Idefics3's and SmolVLM's, which differ in the names of their classes."""

    output = "connector.modality_projection.proj.weight"

    @staticmethod
    def build(config: Any) -> Modules:
        """Return the modules; see `TorchNetwork.build`."""
        _, vision, connector = idefics_classes(config)
        return {
            "vision_model.": vision._from_config(config.vision_config),
            "connector.": connector(config),
        }

    def _rows(self, pixels: Mapping[str, Tensor]) -> Tensor:
        values = pixels["pixel_values"].to(self._device, self._dtype)
        vision: Any = self._modules["vision_model."]
        is_seen = seen_patches(pixels, vision.config.patch_size)
        seen = vision(pixel_values=values, patch_attention_mask=is_seen.to(self._device))
        rows: Tensor = self._modules["connector."](seen.last_hidden_state)
        return rows.flatten(0, 1)


def idefics_classes(config: Any) -> tuple[Any, Any, Any]:
    """Return the classes of `transformers`: of the vision embeddings, the vision transformer and the connector.

    Args:
        config: The checkpoint's, of `transformers`.
    """
    if config.model_type == "smolvlm":
        from transformers.models.smolvlm import modeling_smolvlm as smolvlm

        return (
            smolvlm.SmolVLMVisionEmbeddings,
            smolvlm.SmolVLMVisionTransformer,
            smolvlm.SmolVLMConnector,
        )
    from transformers.models.idefics3 import modeling_idefics3 as idefics3

    return (
        idefics3.Idefics3VisionEmbeddings,
        idefics3.Idefics3VisionTransformer,
        idefics3.Idefics3Connector,
    )


def seen_patches(pixels: Mapping[str, Tensor], patch: int) -> Tensor:
    """Return which patches of each of Idefics3's tiles hold some of the image, (tiles, rows, columns) bool."""
    values, mask = pixels["pixel_values"], pixels.get("pixel_attention_mask")
    if mask is None:
        mask = torch.ones(len(values), *values.shape[-2:], dtype=torch.bool)
    cut = mask.unfold(1, patch, patch).unfold(2, patch, patch)
    return cut.sum((-1, -2)) > 0


def check_weights(
    modules: Modules, checkpoint: Checkpoint, source: VisionSource, output: str
) -> None:
    """Check that a checkpoint has the weights that its modules take.

    Args:
        modules: From `TorchNetwork.build`.
        checkpoint: Where the weights come from.
        source: Its vision part.
        output: `TorchNetwork.output`.

    Raises:
        DamagedCheckpointError: It has others.
    """
    wanted = _parameters(modules)
    differing = sorted(wanted.keys() ^ source.shapes.keys()) or [
        name for name, tensor in wanted.items() if tuple(tensor.shape) != source.shapes[name]
    ]
    if source.shapes.get(output, ())[:1] != (checkpoint.config.hidden_size,):
        differing.append(output)
    if differing:
        raise DamagedCheckpointError(
            f"{checkpoint.path}: the weights of its vision tower are not those that config.json calls for, such as "
            f"{differing[0]}. Fetch it again."
        )


def _parameters(modules: Modules) -> dict[str, Tensor]:
    return {
        prefix + name: tensor
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def _nothing() -> None:
    pass
