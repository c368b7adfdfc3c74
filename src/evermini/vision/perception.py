"""An image in words: what is written on it, what it may show, its size and colours, and how sure that is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evermini.vision.cache import Cache
from evermini.vision.classify import Classifier
from evermini.vision.colours import main_colours
from evermini.vision.images import Picture, open_image, shrunk, stretched
from evermini.vision.layout import COLUMN, lay_out
from evermini.vision.reading import Line, TextReader

if TYPE_CHECKING:
    from PIL.Image import Image

LOW_SIDE = 512
"""Pixels of the longer side that ``detail: low`` looks at."""
CACHE_BYTES = 256 << 20
_VERSION = 3
"""Changes when the same image is read in another way."""
_PAGE_LINES = 8
"""An image with so many lines of text is a page or screenshot: the classifier knows no such things."""
_LIKELY = 0.5
"""From here on a guess stands beside text, too: what is written on an image confuses the classifier."""
_TEXT_CHARS = 20
"""Fewer letters than this are a label, or texture that looks like letters."""
_POSSIBLE = 0.15


class Perception:
    """Describes images for models that read only text. Safe to use from several threads; its methods block.

    Args:
        home: Evermini's home folder, where weights and results are kept.
        threads: CPU threads for text recognition; 0: one per core.
        weights_dir: Folder with weights files already at hand.
    """

    def __init__(self, home: Path, *, threads: int, weights_dir: Path | None = None) -> None:
        self._cache = Cache(home / "vision", CACHE_BYTES)
        self._reader = TextReader(threads)
        self._classifier = Classifier(home, weights_dir)

    def describe(self, data: bytes, detail: str) -> tuple[str, tuple[int, int]]:
        """Return what an image file shows, as text, and its width and height in pixels.

        Args:
            data: The file: PNG, JPEG, WebP or GIF.
            detail: ``low`` looks at it in 512 pixels; everything else in full.

        Raises:
            InvalidRequestError: It is no image that is taken, or damaged.
            DownloadError: The classifier's weights could not be fetched.
        """
        is_low = detail == "low"
        key = f"{_VERSION} image {is_low} {hashlib.sha256(data).hexdigest()}"
        if (known := self._cache.get(key)) is not None:
            return known["text"], (known["width"], known["height"])
        picture = open_image(data)
        seen = shrunk(picture.image, LOW_SIDE) if is_low else picture.image
        lines = self._reader.read(seen) or self._reader.read(stretched(seen))
        guesses = [] if len(lines) >= _PAGE_LINES else self._classifier.classify(seen)
        text = describe(picture, lines, guesses)
        width, height = picture.size
        self._cache.put(key, {"text": text, "width": width, "height": height})
        return text, picture.size

    def read_page(self, image: Image, key: str) -> str:
        """Return the text on a page's image.

        Args:
            image: In RGB.
            key: Which page it is: the same key, the same text.
        """
        key = f"{_VERSION} page {key}"
        if (known := self._cache.get(key)) is not None:
            return str(known["text"])
        text = lay_out(self._reader.read(image))
        self._cache.put(key, {"text": text})
        return text


def describe(picture: Picture, lines: Sequence[Line], guesses: Sequence[tuple[str, float]]) -> str:
    """Return what is known of an image, and what is not.

    Args:
        picture: The image.
        lines: The text that was found on it.
        guesses: What the classifier says it shows, with probabilities, the best first; empty if it was not asked.
    """
    width, height = picture.size
    colours = " and ".join(name for name, _ in main_colours(picture.image)[:2])
    parts = [f"(an image of {width} x {height} pixels{f', mostly {colours}' if colours else ''})"]
    is_text = sum(char.isalnum() for line in lines for char in line.text) >= _TEXT_CHARS
    if guesses and (not is_text or guesses[0][1] >= _LIKELY):
        parts.append(_shown(guesses))
    if lines:
        columns = ' " | " separates columns;' if COLUMN in (text := lay_out(lines)) else ""
        parts.append(f"(text on it, read by text recognition;{columns} it may be misread:)\n{text}")
    else:
        parts.append("(No text was found on it.)")
    return "\n".join(parts)


def _shown(guesses: Sequence[tuple[str, float]]) -> str:
    listed = "; ".join(f"{name} ({value:.0%})" for name, value in guesses)
    best = guesses[0][1]
    if best >= _LIKELY:
        sure = "It very likely shows"
    elif best >= _POSSIBLE:
        sure = "It may show"
    else:
        sure = "What it shows is not known; unlikely guesses are"
    return (
        f"({sure}, by a classifier that knows 1,000 kinds of animals, plants, food and things but no people, places, "
        f"drawings or actions: {listed}. More than this is not known of what it shows.)"
    )
