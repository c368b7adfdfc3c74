"""What turns images into text for models that read only text: text recognition, a classifier, sizes and colours.

    perception = Perception(home, threads=2)
    text, size = perception.describe(data, "auto")

`images.py` opens what strangers send, `reading.py` recognises text, `layout.py` puts it in order, `classify.py` says
what a photo may show, `colours.py` which colours it has, `weights.py` where the classifier's weights come from,
`cache.py` keeps results, `perception.py` writes it all down. They need the extra ``vision``; see `is_installed`.

Models that see have a vision tower instead: `tower.py`, which needs the extra ``vlm``.
"""

from __future__ import annotations

from importlib.util import find_spec

from evermini.vision.perception import Perception

__all__ = ["Perception", "is_installed"]


def is_installed() -> bool:
    """Tell whether the packages of the extra ``vision`` are there."""
    return all(find_spec(name) is not None for name in ("PIL", "rapidocr", "onnxruntime"))
