"""The vision towers of vision-language checkpoints: images to rows that a decoder reads in the place of tokens.

    tower = load_tower(checkpoint, device="cpu")
    image = tower.prepare(picture)      # resized, cut and normalised as the checkpoint's preprocessor says
    tower.encode(image)                 # (tokens, hidden_size)

The towers and the preprocessors are those of `transformers`, with the checkpoint's weights; the language model is not
loaded there. Qwen2.5-VL gives one row for each 28 x 28 pixels of a resized image, in a grid. Idefics3 and SmolVLM cut
an image into tiles and give the same number of rows for each, and for the whole image shrunk to one tile.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evermini.errors import (
    ConfigError,
    DamagedCheckpointError,
    EngineStoppedError,
    InvalidRequestError,
)
from evermini.models.checkpoint import Checkpoint, VisionSource

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

MIN_TRANSFORMERS = "5.23"


@dataclass(frozen=True)
class TowerInput:
    """An image as a tower takes it.

    Attributes:
        pixels: What the checkpoint's preprocessor made of it.
        segments: What stands in the prompt in its place: texts, special tokens among them, and, for each row of
            `VisionTower.encode`, the id of the image token.
        grid: Rows and columns of the tokens' positions, for models whose positions have three axes (M-RoPE).
    """

    pixels: dict[str, Tensor]
    segments: tuple[str | int, ...]
    grid: tuple[int, int] | None = None

    @property
    def num_bytes(self) -> int:
        """Memory of the pixels."""
        return sum(tensor.nbytes for tensor in self.pixels.values())


class VisionTower(ABC):
    """A vision tower. `prepare` and `encode` block; `encode` is for one thread at a time.

    Args:
        source: The checkpoint's vision part.
        checkpoint: Where the weights come from.
        device: Where to compute: float32 on the CPU, bfloat16 on CUDA.
    """

    output: str
    """Name of the weights whose first dimension is the width of what `encode` returns."""

    def __init__(self, source: VisionSource, checkpoint: Checkpoint, device: torch.device) -> None:
        from transformers import AutoConfig, AutoImageProcessor

        self.image_token_id = source.image_token_id
        self._device = device
        self._dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        try:
            self._config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
            # Not torchvision's, which rounds otherwise: what a model sees must not depend on what is installed.
            self._processor: Any = AutoImageProcessor.from_pretrained(
                checkpoint.path, local_files_only=True, backend="pil"
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DamagedCheckpointError(
                f"{checkpoint.path}: transformers cannot read its image settings ({error}). A vision-language "
                "checkpoint needs config.json and preprocessor_config.json as they were published; fetch them again."
            ) from error
        from transformers.initialization import no_init_weights

        with no_init_weights():
            self._modules = self._build()
        _load(self._modules, checkpoint, source, self.output)
        for module in self._modules.values():
            module.to(device=device, dtype=self._dtype).eval()
        self._is_abandoned: Callable[[], bool] = _never
        for module in self._modules.values():
            for layers in module.modules():
                for layer in layers if isinstance(layers, torch.nn.ModuleList) else ():
                    layer.register_forward_pre_hook(self._before_layer)
        parameters = sum(p.numel() for m in self._modules.values() for p in m.parameters())
        log.info(
            "%s sees images: a vision tower of %.1f million parameters in %s on %s",
            *(
                checkpoint.path.name,
                parameters / 1e6,
                str(self._dtype).removeprefix("torch."),
                device,
            ),
        )

    @abstractmethod
    def _build(self) -> dict[str, torch.nn.Module]:
        """Return the modules without weights, by the first part of their parameters' names (may be empty)."""

    @abstractmethod
    def prepare(self, image: Image) -> TowerInput:
        """Return an RGB image as the tower takes it.

        Raises:
            InvalidRequestError: It is of a shape that the checkpoint's preprocessor refuses.
        """

    @torch.inference_mode()
    def encode(self, image: TowerInput, is_abandoned: Callable[[], bool] | None = None) -> Tensor:
        """Return the rows of an image, (tokens, hidden_size) float32 on the CPU.

        Args:
            image: From `prepare`.
            is_abandoned: Asked before each layer (of 12 to 32) whether nobody waits any more.

        Raises:
            EngineStoppedError: Nobody did.
        """
        self._is_abandoned = is_abandoned or _never
        return self._rows(image).float().cpu()

    @abstractmethod
    def _rows(self, image: TowerInput) -> Tensor:
        """Return the rows of an image, (tokens, hidden_size)."""

    def _before_layer(self, module: torch.nn.Module, inputs: object) -> None:
        if self._is_abandoned():
            raise EngineStoppedError("The image is not needed any more: its request ended.")

    def _processed(self, image: Image, **options: Any) -> Any:
        try:
            return self._processor(images=image, return_tensors="pt", **options)
        except ValueError as error:
            raise InvalidRequestError(
                f"The model cannot look at this image of {image.width} x {image.height} pixels: {error}.",
                code="invalid_image_format",
            ) from error


class QwenTower(VisionTower):
    """Qwen2.5-VL's."""

    output = "merger.mlp.2.weight"

    def _build(self) -> dict[str, torch.nn.Module]:
        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as code

        config = self._config.vision_config
        return {"": code.Qwen2_5_VisionTransformerPretrainedModel._from_config(config)}

    def prepare(self, image: Image) -> TowerInput:
        """Return an RGB image as the tower takes it; see `VisionTower.prepare`."""
        found = self._processed(image)
        _, rows, columns = found["image_grid_thw"][0].tolist()
        merge = self._config.vision_config.spatial_merge_size
        grid = rows // merge, columns // merge
        pixels = {name: found[name] for name in ("pixel_values", "image_grid_thw")}
        return TowerInput(pixels, (self.image_token_id,) * (grid[0] * grid[1]), grid)

    def _rows(self, image: TowerInput) -> Tensor:
        pixels = image.pixels["pixel_values"].to(self._device, self._dtype)
        grid = image.pixels["image_grid_thw"].to(self._device)
        rows: Tensor = self._modules[""](pixels, grid_thw=grid).pooler_output
        return rows


class IdeficsTower(VisionTower):
    """Idefics3's and SmolVLM's, which differ in the names of their classes."""

    output = "connector.modality_projection.proj.weight"

    def _build(self) -> dict[str, torch.nn.Module]:
        config = self._config
        if config.model_type == "smolvlm":
            from transformers.models.smolvlm import modeling_smolvlm

            vision = modeling_smolvlm.SmolVLMVisionTransformer
            connector = modeling_smolvlm.SmolVLMConnector
        else:
            from transformers.models.idefics3 import modeling_idefics3

            vision = modeling_idefics3.Idefics3VisionTransformer
            connector = modeling_idefics3.Idefics3Connector
        return {
            "vision_model.": vision._from_config(config.vision_config),
            "connector.": connector(config),
        }

    def prepare(self, image: Image) -> TowerInput:
        """Return an RGB image as the tower takes it; see `VisionTower.prepare`."""
        found = self._processed(image, return_row_col_info=True)
        pixels = {"pixel_values": found["pixel_values"][0]}
        if "pixel_attention_mask" in found:
            pixels["pixel_attention_mask"] = found["pixel_attention_mask"][0]
        height, width = pixels["pixel_values"].shape[-2:]
        patch = self._config.vision_config.patch_size
        tile = (self.image_token_id,) * (
            (height // patch) * (width // patch) // self._config.scale_factor**2
        )
        rows, columns = int(found["rows"][0][0]), int(found["cols"][0][0])
        segments: list[str | int] = []
        around = "<fake_token_around_image>"
        lead = ""
        for row in range(rows):
            for column in range(columns):
                segments += [f"{lead}{around}<row_{row + 1}_col_{column + 1}>", *tile]
                lead = ""
            lead = "\n"
        lead = f"{lead}\n" if rows else ""
        segments += [f"{lead}{around}<global-img>", *tile, around]
        return TowerInput(pixels, tuple(segments))

    def _rows(self, image: TowerInput) -> Tensor:
        pixels = image.pixels["pixel_values"].to(self._device, self._dtype)
        patch = self._config.vision_config.patch_size
        mask = image.pixels.get("pixel_attention_mask")
        if mask is None:
            mask = torch.ones(len(pixels), *pixels.shape[-2:], dtype=torch.bool)
        cut = mask.unfold(1, patch, patch).unfold(2, patch, patch)
        is_seen = (cut.sum((-1, -2)) > 0).to(self._device)
        seen = self._modules["vision_model."](pixel_values=pixels, patch_attention_mask=is_seen)
        rows: Tensor = self._modules["connector."](seen.last_hidden_state)
        return rows.flatten(0, 1)


def _never() -> bool:
    return False


def load_tower(checkpoint: Checkpoint, *, device: torch.device | str = "cpu") -> VisionTower | None:
    """Load a checkpoint's vision tower; ``None``: it has none.

    Raises:
        ConfigError: `transformers` is not installed, or too old.
        DamagedCheckpointError: Image settings or weights are missing, or do not fit together.
    """
    source = checkpoint.vision
    if source is None:
        return None
    if find_spec("transformers") is None or find_spec("PIL") is None:
        raise ConfigError(
            f"{checkpoint.path} is a vision-language checkpoint, which needs the extra 'vlm': "
            "pip install 'evermini[vlm]'.",
            param="models",
        )
    kind = QwenTower if source.family == "qwen2_5_vl" else IdeficsTower
    try:
        return kind(source, checkpoint, torch.device(device))
    except ImportError as error:
        raise ConfigError(
            f"{checkpoint.path} needs a newer version of transformers than is installed ({error}). "
            f"pip install -U 'transformers>={MIN_TRANSFORMERS}'.",
            param="models",
        ) from error


def _load(
    modules: dict[str, torch.nn.Module], checkpoint: Checkpoint, source: VisionSource, output: str
) -> None:
    """Copy the weights, one tensor in memory at a time.

    Raises:
        DamagedCheckpointError: The checkpoint has others than the modules.
    """
    wanted = {
        prefix + name: tensor
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
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
    for name, tensor in wanted.items():
        tensor.copy_(checkpoint.vision_tensor(name))
