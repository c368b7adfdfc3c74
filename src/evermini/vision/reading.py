"""Text recognition: where lines of text are in an image, and what they say (PP-OCRv6, by way of RapidOCR)."""

from __future__ import annotations

import threading
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
        """Return the lines of text in an RGB image, in no particular order."""
        lines: list[Line] = []
        for top, slab in _slabs(image):
            lines += self._read_slab(slab, top)
        return lines

    def _read_slab(self, image: Image, top: int) -> list[Line]:
        import numpy as np

        pixels = np.ascontiguousarray(np.asarray(_with_margins(image))[:, :, ::-1])  # as BGR
        with self._turn:
            found = self._ready()(pixels)
        if found.boxes is None:
            return []
        return [
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
