"""The vision towers of vision-language checkpoints: images to rows that a decoder reads in the place of tokens.

    tower = load_tower(checkpoint, device="cpu")
    image = tower.prepare(picture)      # resized, cut and normalised as the checkpoint's preprocessor says
    tower.encode(image)                 # (tokens, hidden_size)

The preprocessors are those of `transformers`. What computes is our own int8 kernels on a CPU (`native.py`), or the
modules of `transformers` with the checkpoint's weights (`network.py`). Qwen2.5-VL gives one row for each 28 x 28
pixels of a resized image, in a grid. Idefics3 and SmolVLM cut an image into tiles and give the same number of rows for
each, and for the whole image shrunk to one tile.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evermini.errors import (
    ConfigError,
    DamagedCheckpointError,
    EngineStoppedError,
    InvalidRequestError,
)
from evermini.models import encoder
from evermini.models.checkpoint import Checkpoint, VisionSource
from evermini.models.load import Precision
from evermini.models.packed import open_part
from evermini.vision.native import NativeIdefics, NativeNetwork, NativeQwen
from evermini.vision.network import (
    Network,
    TorchIdefics,
    TorchNetwork,
    TorchQwen,
    check_weights,
)

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

MIN_TRANSFORMERS = "5.23"
_PACKED = "vision-int8-v1"
"""Part of the file's name that has the packed weights: their precision, and the version of their format."""


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
        device: Where to compute.
        precision: How precisely; see `load_tower`.
        home: Folder of all caches.
    """

    torch_network: type[TorchNetwork]
    native_network: type[NativeNetwork]

    def __init__(
        self,
        source: VisionSource,
        checkpoint: Checkpoint,
        device: torch.device,
        precision: Precision,
        home: Path | None,
    ) -> None:
        from transformers import AutoConfig, AutoImageProcessor

        self.image_token_id = source.image_token_id
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
        with torch.device("meta"):
            modules = self.torch_network.build(self._config)
        check_weights(modules, checkpoint, source, self.torch_network.output)
        self._network: Network
        if self._is_native(checkpoint, device, precision):
            kind = "int8"
            self._network = self._native(checkpoint, home)
        else:
            is_wide = device.type == "cpu" or precision == "fp32"
            kind = "float32" if is_wide else "bfloat16"
            self._network = self._torch(checkpoint, device, getattr(torch, kind))
        parameters = sum(math.prod(shape) for shape in source.shapes.values())
        log.info(
            "%s sees images: a vision tower of %.1f million parameters in %s on %s",
            *(checkpoint.path.name, parameters / 1e6, kind, device),
        )

    def _is_native(
        self, checkpoint: Checkpoint, device: torch.device, precision: Precision
    ) -> bool:
        if device.type != "cpu" or precision in ("fp32", "bf16") or not encoder.is_available():
            return False
        if not self.native_network.is_supported(self._config):
            log.warning(
                "%s: the native kernels have no %r: its vision tower falls back to slower PyTorch operations",
                *(checkpoint.path.name, self._config.vision_config.hidden_act),
            )
            return False
        return True

    def _native(self, checkpoint: Checkpoint, home: Path | None) -> Network:
        weights = open_part(
            checkpoint,
            _PACKED,
            lambda: self.native_network.pack(self._config, checkpoint.vision_tensor),
            home,
        )
        return self.native_network(self._config, weights)

    def _torch(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Network:
        from transformers.initialization import no_init_weights

        with no_init_weights():
            modules = self.torch_network.build(self._config)
        return self.torch_network(modules, checkpoint.vision_tensor, device, dtype)

    @abstractmethod
    def prepare(self, image: Image, *, is_low: bool = False) -> TowerInput:
        """Return an RGB image as the tower takes it.

        Args:
            image: Any size.
            is_low: It was shrunk to be looked at quickly: where an image is cut into tiles, take the whole in one.

        Raises:
            InvalidRequestError: It is of a shape that the checkpoint's preprocessor refuses.
        """

    @torch.inference_mode()
    def encode(self, image: TowerInput, is_abandoned: Callable[[], bool] | None = None) -> Tensor:
        """Return the rows of an image, (tokens, hidden_size) float32 on the CPU.

        Args:
            image: From `prepare`.
            is_abandoned: Asked before each piece of the work (int8: some tens of milliseconds; else one of 12 to 32
                layers) whether nobody waits any more.

        Raises:
            EngineStoppedError: Nobody did.
        """

        def before_piece() -> None:
            if is_abandoned is not None and is_abandoned():
                raise EngineStoppedError("The image is not needed any more: its request ended.")

        return self._network.rows(image.pixels, before_piece).float().cpu()

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

    torch_network = TorchQwen
    native_network = NativeQwen

    def prepare(self, image: Image, *, is_low: bool = False) -> TowerInput:
        """Return an RGB image as the tower takes it; see `VisionTower.prepare`."""
        found = self._processed(image)
        _, rows, columns = found["image_grid_thw"][0].tolist()
        merge = self._config.vision_config.spatial_merge_size
        grid = rows // merge, columns // merge
        pixels = {name: found[name] for name in ("pixel_values", "image_grid_thw")}
        return TowerInput(pixels, (self.image_token_id,) * (grid[0] * grid[1]), grid)


class IdeficsTower(VisionTower):
    """Idefics3's and SmolVLM's, which differ in the names of their classes."""

    torch_network = TorchIdefics
    native_network = NativeIdefics

    def prepare(self, image: Image, *, is_low: bool = False) -> TowerInput:
        """Return an RGB image as the tower takes it; see `VisionTower.prepare`."""
        whole = {"do_image_splitting": False} if is_low else {}
        found = self._processed(image, return_row_col_info=True, **whole)
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


def load_tower(
    checkpoint: Checkpoint,
    *,
    device: torch.device | str = "cpu",
    precision: Precision = "auto",
    home: Path | None = None,
) -> VisionTower | None:
    """Load a checkpoint's vision tower; ``None``: it has none.

    Args:
        checkpoint: An open checkpoint.
        device: Where to compute.
        precision: As for `evermini.models.load.load_model`: ``auto`` is int8 on a CPU and bfloat16 on CUDA. All
            integer precisions mean int8 here. ``bf16`` means float32 on a CPU, as does a machine without the kernels.
        home: Folder of all caches, where the packed weights are kept; by default `evermini.config.default_home`.

    Raises:
        ConfigError: `transformers` is not installed, or too old.
        DamagedCheckpointError: Image settings or weights are missing, or do not fit together.
        DiskSpaceError: The packed weights do not fit on the disk.
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
        return kind(source, checkpoint, torch.device(device), precision, home)
    except ImportError as error:
        raise ConfigError(
            f"{checkpoint.path} needs a newer version of transformers than is installed ({error}). "
            f"pip install -U 'transformers>={MIN_TRANSFORMERS}'.",
            param="models",
        ) from error
