"""PDFs to text and images with PDFium, run as a program of its own by `evermini.documents.pdf`.

    python -P pdfium.py SECONDS BYTES text < FILE.pdf
    python -P pdfium.py SECONDS BYTES image INDEX DPI SIDE < FILE.pdf

A few kilobytes of PDF can ask for gigabytes of memory and hours of time. So this process limits itself before it looks
at the first byte, and whoever started it outlives it. It imports nothing of Evermini, to start quickly.

Output, as lines of JSON: ``["page", text]`` for each page or ``["image", width, height, RGB in base64]``; or, at last,
``["locked", ""]`` or ``["damaged", why]``.
"""

from __future__ import annotations

import base64
import json
import sys
from typing import Any


def main() -> None:
    """Limit this process, then read a PDF from standard input."""
    seconds, num_bytes, what, *rest = sys.argv[1:]
    _limit(int(seconds), int(num_bytes))
    import pypdfium2

    data = sys.stdin.buffer.read()
    try:
        pdf = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        is_locked = error.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD
        _say("locked" if is_locked else "damaged", "" if is_locked else str(error))
        return
    if what == "image":
        index, dpi, side = map(int, rest)
        page = pdf[index]
        if next(page.get_objects(max_depth=1), None) is not None:  # else it is blank
            _say_image(page, dpi, side)
        return
    for index in range(len(pdf)):
        try:
            page = pdf[index]
            textpage = page.get_textpage()
        except pypdfium2.PdfiumError as error:
            _say("damaged", f"page {index + 1}: {error}")
            return
        _say("page", str(textpage.get_text_bounded()))
        textpage.close()
        page.close()


def _say_image(page: Any, dpi: int, side: int) -> None:
    longest = max(1.0, *page.get_size())  # in points of 1/72 inch, whatever the page says
    image = page.render(scale=min(dpi / 72, side / longest)).to_pil().convert("RGB")
    _say("image", image.width, image.height, base64.b64encode(image.tobytes()).decode())


def _limit(seconds: int, num_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # Windows: only the other side's clock ends it
        return
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _say(*parts: object) -> None:
    sys.stdout.write(json.dumps(parts) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
