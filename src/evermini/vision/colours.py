"""The main colours of an image, by name."""

from __future__ import annotations

import colorsys
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

_SAMPLE = 64
"""Pixels of the square that is looked at."""
_HUES = (
    *((0.04, "red"), (0.11, "orange"), (0.19, "yellow"), (0.45, "green"), (0.54, "turquoise")),
    *((0.72, "blue"), (0.83, "purple"), (0.94, "pink"), (1.01, "red")),
)
"""Upper ends, on a colour wheel of length 1."""


def main_colours(image: Image, most: int = 4, least: float = 0.08) -> list[tuple[str, float]]:
    """Return names of colours and their shares of the image, the largest first.

    Args:
        image: In RGB.
        most: How many at most.
        least: Smallest share that counts.
    """
    import numpy as np

    pixels = np.asarray(image.resize((_SAMPLE, _SAMPLE))).reshape(-1, 3)
    counts = Counter(colour_name(*map(int, pixel)) for pixel in pixels)
    total = len(pixels)
    return [(name, n / total) for name, n in counts.most_common(most) if n / total >= least]


def colour_name(red: int, green: int, blue: int) -> str:
    """Return what a colour (0 to 255 each) is called."""
    hue, light, saturation = colorsys.rgb_to_hls(red / 255, green / 255, blue / 255)
    if light < 0.12:
        return "black"
    if light > 0.93 and saturation < 0.6:
        return "white"
    if saturation < 0.13:
        return "dark grey" if light < 0.4 else "grey" if light < 0.7 else "light grey"
    name = next(name for end, name in _HUES if hue < end)
    if name in ("orange", "red") and 0.02 < hue < 0.11 and light < 0.45 and saturation < 0.75:
        return "brown"
    if name in ("orange", "yellow") and light > 0.7 and saturation < 0.6:
        return "beige"
    return f"dark {name}" if light < 0.3 else f"light {name}" if light > 0.75 else name
