"""Opens image files that strangers send: PNG, JPEG, WebP, GIF (its first frame), within bounds, upright, as RGB."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evermini.errors import InvalidRequestError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 50_000_000
"""A page of A4 at 600 dots per inch has 35 million."""
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_CODE = "invalid_image_format"
_ORIENTATION = 0x0112
"""The EXIF tag that says how a photo lies."""


@dataclass(frozen=True)
class Picture:
    """An image, upright.

    Attributes:
        image: In RGB; what was transparent is white.
        format: Of its file, such as ``"JPEG"``.
        mode: Its pixels' in the file, such as ``"RGBA"``.
        is_turned: It lay on its side or was mirrored in the file.
    """

    image: Image
    format: str
    mode: str
    is_turned: bool

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.image.size


def open_image(data: bytes) -> Picture:
    """Decode an image file.

    Raises:
        InvalidRequestError: It is none that is taken, is damaged, or has too many pixels.
    """
    from PIL import Image, ImageOps

    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large("The image") from error
    except Exception as error:  # decoders fail in many ways on what is no image
        raise InvalidRequestError(
            "You uploaded an unsupported image. Please make sure your image is valid and has one of the following "
            "formats: ['png', 'jpeg', 'gif', 'webp'].",
            code=_CODE,
        ) from error
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise _too_large(f"The image of {image.width} x {image.height}")
        kind, mode = image.format or "", image.mode
        try:
            image.load()
            is_turned = image.getexif().get(_ORIENTATION, 1) != 1
            return Picture(_as_rgb(ImageOps.exif_transpose(image)), kind, mode, is_turned)
        except Exception as error:
            raise InvalidRequestError(
                f"The image is damaged: {str(error)[:200] or type(error).__name__}. Save it anew.",
                code=_CODE,
            ) from error


def shrunk(image: Image, longest: int) -> Image:
    """Return the image with its longer side at most so many pixels."""
    factor = longest / max(image.size)
    if factor >= 1:
        return image
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height))


def as_png(image: Image) -> bytes:
    """Return an image as a file that every engine opens."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def stretched(image: Image) -> Image:
    """Return the image in grey with full contrast: dim photos of text get readable."""
    from PIL import ImageOps

    return ImageOps.autocontrast(image.convert("L"), cutoff=2).convert("RGB")


def _as_rgb(image: Image) -> Image:
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":  # more than 8 bits of grey
        low, high = image.getextrema()
        assert isinstance(low, int | float), "one band"
        assert isinstance(high, int | float), "one band"
        span = max(1, high - low)
        image = image.convert("F").point(lambda value: (value - low) * (255 / span)).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")


def _too_large(image: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{image} has more than {MAX_PIXELS:,} pixels. Send a smaller one.", code=_CODE
    )
