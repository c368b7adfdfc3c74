"""What a file is, by its bytes; names and MIME types are not believed."""

from __future__ import annotations

import io
import zipfile
from typing import Literal

Kind = Literal["pdf", "docx", "pptx", "html", "image", "archive", "text"]

_IMAGES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a")
_ZIP = b"PK\x03\x04"
_OFFICE: dict[str, Kind] = {"word/document.xml": "docx", "ppt/presentation.xml": "pptx"}
_HEAD = 1024


def kind_of(data: bytes) -> Kind:
    """Return what a file, or its beginning, is; what is nothing else is ``text``, readable or not."""
    if is_image(data):
        return "image"
    if is_pdf(data):
        return "pdf"
    if data.startswith(_ZIP):
        return _office(data)
    head = data[:_HEAD].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return "html" if head.startswith((b"<!doctype html", b"<html")) else "text"


def is_image(data: bytes) -> bool:
    """Tell whether it is a PNG, JPEG, GIF or WebP file."""
    return data.startswith(_IMAGES) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def is_pdf(data: bytes) -> bool:
    """Tell whether a file, or its beginning, is a PDF's."""
    return data[:_HEAD].lstrip().startswith(b"%PDF-")


def _office(data: bytes) -> Kind:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = set(archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return "archive"
    return next((kind for name, kind in _OFFICE.items() if name in names), "archive")
