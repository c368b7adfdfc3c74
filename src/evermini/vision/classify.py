"""What a photo may show: EfficientNet-Lite2 over ImageNet's 1,000 kinds of animals, plants, food and things."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from evermini.models.pull import ensure_file
from evermini.vision.weights import CLASSIFIER

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

SIDE = 260
"""Pixels, of a square, that the network looks at."""
_BORDER = 32
"""What an image is larger than that before its middle is cut out."""
_STRIDES = (1, 2, 2, 2, 1, 2, 1)
"""Of each stage's first block; the others have a stride of 1."""
_DEPTHS = (1, 3, 3, 4, 4, 5, 1)
_EPSILON = 1e-3


class Classifier:
    """Names what an image may show; loads (and fetches) its weights at the first one.

    Args:
        home: Evermini's home folder.
        weights_dir: Folder with weights files already at hand.
    """

    def __init__(self, home: Path, weights_dir: Path | None = None) -> None:
        self._home, self._weights_dir = home, weights_dir
        self._loading = threading.Lock()

    def classify(self, image: Image, top: int = 5) -> list[tuple[str, float]]:
        """Return the likeliest names with their probabilities, the best first.

        Args:
            image: In RGB.
            top: How many.

        Raises:
            DownloadError: The weights could not be fetched.
        """
        import torch

        with self._loading:
            network = self._network
        views = torch.stack([_pixels(_middle(image)), _pixels(image.resize((SIDE, SIDE)))])
        with torch.inference_mode():
            scores = network.logits(views).softmax(-1).mean(0)
        best = scores.topk(top)
        return [
            (self._names[index], value)
            for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    @cached_property
    def _network(self) -> _Network:
        import torch

        path = ensure_file(CLASSIFIER, home=self._home, weights_dir=self._weights_dir)
        return _Network(torch.load(path, weights_only=True, map_location="cpu"))

    @cached_property
    def _names(self) -> list[str]:
        """Each kind's first two names; the same name may mean two things (a crane)."""
        lines = (files(__package__) / "classes.txt").read_text(encoding="utf-8").splitlines()
        return [", ".join(line.split(", ")[:2]) for line in lines]


class _Network:
    """EfficientNet-Lite: no squeeze-and-excitation, ReLU6, and padding as in TensorFlow.

    Batch norms are folded into the convolutions before them.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self._folded: dict[str, tuple[Tensor, Tensor]] = {}
        self._fold("_conv_stem", "_bn0")
        for number in range(sum(_DEPTHS)):
            block = f"_blocks.{number}."
            if f"{block}_expand_conv.weight" in weights:
                self._fold(f"{block}_expand_conv", f"{block}_bn0")
            self._fold(f"{block}_depthwise_conv", f"{block}_bn1")
            self._fold(f"{block}_project_conv", f"{block}_bn2")
        self._fold("_conv_head", "_bn1")

    def logits(self, x: Tensor) -> Tensor:
        """Return the scores of pixels from -1 to 1; (B, 3, H, W) -> (B, 1000)."""
        import torch

        x = self._convolve("_conv_stem", x, 2).clamp(0, 6)
        number = 0
        for stride, depth in zip(_STRIDES, _DEPTHS, strict=True):
            for position in range(depth):
                x = self._block(f"_blocks.{number}.", x, stride if position == 0 else 1)
                number += 1
        x = self._convolve("_conv_head", x, 1).clamp(0, 6).mean((2, 3))
        return torch.nn.functional.linear(x, self._weights["_fc.weight"], self._weights["_fc.bias"])

    def _block(self, name: str, x: Tensor, stride: int) -> Tensor:
        y = x
        if f"{name}_expand_conv" in self._folded:
            y = self._convolve(f"{name}_expand_conv", y, 1).clamp(0, 6)
        y = self._convolve(f"{name}_depthwise_conv", y, stride).clamp(0, 6)
        y = self._convolve(f"{name}_project_conv", y, 1)
        return x + y if stride == 1 and x.shape == y.shape else y

    def _convolve(self, name: str, x: Tensor, stride: int) -> Tensor:
        import torch

        weight, bias = self._folded[name]
        pads: list[int] = []
        for size, kernel in ((x.shape[3], weight.shape[3]), (x.shape[2], weight.shape[2])):
            needed = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [needed // 2, needed - needed // 2]
        groups = x.shape[1] if weight.shape[1] == 1 else 1
        x = torch.nn.functional.pad(x, pads)
        return torch.nn.functional.conv2d(x, weight, bias, stride, groups=groups)

    def _fold(self, convolution: str, norm: str) -> None:
        weight = self._weights[f"{convolution}.weight"]
        scale = (
            self._weights[f"{norm}.weight"]
            / (self._weights[f"{norm}.running_var"] + _EPSILON).sqrt()
        )
        bias = self._weights[f"{norm}.bias"] - self._weights[f"{norm}.running_mean"] * scale
        self._folded[convolution] = (weight * scale[:, None, None, None], bias)


def _middle(image: Image) -> Image:
    """Return the middle of the image, as the network was trained to look at it."""
    side = min(image.size) * SIDE / (SIDE + _BORDER)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((SIDE, SIDE), box=(left, top, left + side, top + side))


def _pixels(image: Image) -> Tensor:
    import numpy as np
    import torch

    values = (np.asarray(image, dtype=np.float32) - 127.0) / 128.0
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()
