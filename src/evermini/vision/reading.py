"""Text recognition: where lines of text are in an image, and what they say (PP-OCRv6, by way of RapidOCR).

A page may lie on its side or stand on its head, and no EXIF says so. What the recogniser does anyway tells: lines of a
page on its side have tall boxes, and a small classifier turns each line that stands on its head before it is read. If
most of the text is turned, the image is turned upright and read once more: an upright page costs nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SIDE = 2000
"""A longer image is shrunk before text is looked for, or cut if it is a long strip."""
_STRIP = 2.5
"""Longer than so many times its width, an image is a strip: a receipt, a page from a browser."""
_WIDEST = 16
"""Wider than so many times its height, an image gets margins: the recogniser would blow it up otherwise."""
_LONG = 2.0
"""A box whose sides differ by this factor or more is a line of text, and says which way it runs."""
_MIN_LINES = 3
"""So many such lines have to lie as the page does before it is turned."""
_KEPT = 0.8
"""The second reading counts if it has this share of the first one's letters: their boxes differ a little."""
_SURE = 0.9
"""From this probability on, the recogniser itself turns a line that stands on its head."""


@dataclass(frozen=True)
class Line:
    """A run of text.

    Attributes:
        text: What it says.
        score: How sure that is, 0 to 1.
        left: Of its box, in pixels; `top`, `right` and `bottom` likewise.
    """

    text: str
    score: float
    left: float
    top: float
    right: float
    bottom: float

    @property
    def height(self) -> float:
        """Of its box, in pixels."""
        return self.bottom - self.top


@dataclass(frozen=True)
class Lie:
    """How a line of text lies in an image.

    Attributes:
        turn: Degrees, anticlockwise, by which the image must be turned for this line to be upright: 0, 90, 180 or 270.
        length: Of its longer side, in pixels.
    """

    turn: int
    length: float


class TextReader:
    """Recognises text; loads its models at the first image. Threads take turns.

    Args:
        threads: CPU threads for it; 0: one per core.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._engine: Any = None
        self._turn = threading.Lock()

    def read(self, image: Image) -> list[Line]:
        """Return the lines of text in an RGB image, in no particular order; places are in the upright image.

        An image in which most of the text lies on its side or stands on its head is turned and read again.
        """
        lines, lies = self._read_as_it_lies(image)
        turn = needed_turn(lies)
        if turn:
            upright, _ = self._read_as_it_lies(image.rotate(turn, expand=True))
            if _legible(upright) >= _KEPT * _legible(lines):
                return upright
        return lines

    def _read_as_it_lies(self, image: Image) -> tuple[list[Line], list[Lie]]:
        lines: list[Line] = []
        lies: list[Lie] = []
        for top, slab in _slabs(image):
            found, lying = self._read_slab(slab, top)
            lines += found
            lies += lying
        return lines, lies

    def _read_slab(self, image: Image, top: int) -> tuple[list[Line], list[Lie]]:
        import numpy as np

        pixels = np.ascontiguousarray(np.asarray(_with_margins(image))[:, :, ::-1])  # as BGR
        with self._turn:
            engine = self._ready()
            # The steps of `engine(pixels)`, one by one: it does not tell which lines it turned.
            resized, record = engine.preprocess_img(pixels)
            detected, classified, recognised, crops = engine.run_ocr_steps(resized, record)
            lies = _lies(detected.boxes, classified.cls_res)
            found = engine.build_final_output(
                pixels, detected, classified, recognised, crops, record
            )
        if found.boxes is None:
            return [], lies
        lines = [
            Line(
                text,
                float(score),
                float(box[:, 0].min()),
                top + float(box[:, 1].min()),
                float(box[:, 0].max()),
                top + float(box[:, 1].max()),
            )
            for box, text, score in zip(found.boxes, found.txts, found.scores, strict=True)
            if text.strip()
        ]
        return lines, lies

    def _ready(self) -> Any:
        if self._engine is None:
            from rapidocr import RapidOCR

            self._engine = RapidOCR(
                params={
                    "Global.log_level": "error",
                    "Global.max_side_len": MAX_SIDE,
                    "EngineConfig.onnxruntime.intra_op_num_threads": self._threads or -1,
                    "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                }
            )
        return self._engine


def needed_turn(lies: Sequence[Lie]) -> int:
    """Return by how many degrees, anticlockwise, a page must be turned to be upright: as most text lies, by length."""
    by_turn = {turn: [lie for lie in lies if lie.turn == turn] for turn in (0, 90, 180, 270)}
    lengths = {turn: sum(lie.length for lie in found) for turn, found in by_turn.items()}
    best = max(lengths, key=lambda turn: lengths[turn])
    return best if len(by_turn[best]) >= _MIN_LINES else 0


def _lies(boxes: Any, labels: Iterable[tuple[str, float]] | None) -> list[Lie]:
    """Return how the lines among some boxes lie.

    Args:
        boxes: (n, 4, 2) corners, from the upper left one clockwise; ``None`` if nothing was found.
        labels: Of each box, whether its text stood on its head (``"180"``) and how sure that is. Text of a tall box was
            turned by 90 degrees, anticlockwise, before.
    """
    import numpy as np

    found: list[Lie] = []
    if boxes is None or labels is None:
        return found
    for box, (label, score) in zip(boxes, labels, strict=True):
        width, height = np.linalg.norm(box[0] - box[1]), np.linalg.norm(box[0] - box[3])
        if max(width, height) < _LONG * min(width, height):
            continue
        is_on_head = label == "180" and score > _SURE
        found.append(
            Lie((90 if height > width else 0) + 180 * is_on_head, float(max(width, height)))
        )
    return found


def _legible(lines: Iterable[Line]) -> float:
    """Return how many characters were read, each counting as much as it is sure."""
    return sum(line.score * len(line.text) for line in lines)


def _with_margins(image: Image) -> Image:
    from PIL import Image

    width, height = image.size
    least = (-(-height // _WIDEST), -(-width // _WIDEST))
    if width >= least[0] and height >= least[1]:
        return image
    padded = Image.new("RGB", (max(width, least[0]), max(height, least[1])), "white")
    padded.paste(image)  # in the corner, so that places stay
    return padded


def _slabs(image: Image) -> list[tuple[int, Image]]:
    """Cut a long strip, so that it need not be shrunk, where it is emptiest: (first row, slab) each."""
    import numpy as np

    width, height = image.size
    size = max(MAX_SIDE // 2, int(width * 1.5))
    if height <= MAX_SIDE or height <= _STRIP * width:
        return [(0, image)]
    rows = np.asarray(image.convert("L"), dtype=np.float32).std(axis=1)
    cuts = [0]
    while height - cuts[-1] > size * 1.25:
        first, last = cuts[-1] + size * 3 // 4, cuts[-1] + size
        cuts.append(first + int(rows[first:last].argmin()))
    return [
        (top, image.crop((0, top, width, bottom)))
        for top, bottom in zip(cuts, [*cuts[1:], height], strict=True)
    ]
