"""From the bytes of an image file to uint8 RGB, the same on every machine or one line that says what is wrong.

Pillow alone decodes. torchvision's JPEG decoder gives the same pixels in two thirds of the time, but is deprecated and
prints remarks of its own about damaged files; torch's resizing of uint8 is quicker than Pillow's but rounds otherwise,
by up to 2 of 255 levels. Both together would halve the 1.5 ms that a photograph takes to become 224 pixels.
"""

from __future__ import annotations

import contextlib
import io
import struct
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from cupel.errors import DataError

__all__ = ["IMAGE_SUFFIXES", "REVISION", "decode", "measure", "quiet_pillow", "resized"]

REVISION = 1
"""Goes up when the same bytes decode to other pixels, so that cached results are not mixed up."""

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})
# Only formats that Pillow decodes by itself: some of the others start outside programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MAX_PIXELS = 89_478_485  # Pillow warns from here on and refuses at twice as many; we refuse here
_ORIENTATION = 0x0112  # EXIF tag
_DEEP = ("I", "F")  # modes with more than eight bits per channel: I, I;16, I;16B, F

_quiet = threading.Lock()

Pixels8 = np.ndarray[Any, np.dtype[np.uint8]]


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Pillow's remarks on odd metadata are dropped and its warning of a decompression bomb raises.

    Around a whole loop rather than one image: the filters of `warnings` belong to the process, not to the thread.
    Inside another, also one that a different thread has opened and will close later, it does nothing.
    """
    if not _quiet.acquire(blocking=False):
        yield
        return
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        _quiet.release()


def decode(data: bytes, where: object, size: int | None = None) -> Pixels8:
    """Decode one image, uint8 `[height, width, 3]`.

    Greyscale gets three equal channels; CMYK and palettes are converted; transparent parts are laid on white (our
    choice: most pictures with an alpha channel are drawn for a white page); of an animation the first frame counts;
    the EXIF orientation is applied. Images with more than eight bits in their only channel are refused, since
    Pillow's conversion would clamp them to white.

    Args:
        data: The file.
        where: File or row, for errors.
        size: Resize to `size` by `size` pixels, bilinear with antialiasing, whatever the aspect ratio; None = leave.

    Raises:
        DataError: empty, not an image, cut off, damaged, too large, or 16-bit.
    """
    image = _opened(data, where)
    try:
        made = _to_rgb(image)
    except Exception as error:  # foreign bytes: whatever the decoder trips over means one thing
        raise DataError(where, f"is cut off or damaged ({_first_line(error)})", "repair or remove it") from error
    return np.asarray(made if size is None else resized(made, size))


def measure(data: bytes, where: object) -> tuple[int, int]:
    """Height and width as `decode` would give them, from the header alone.

    Raises:
        DataError: as `decode`, for what the header shows.
    """
    image = _opened(data, where)
    width, height = image.size
    return (width, height) if _orientation(image) >= 5 else (height, width)


def resized(image: Image.Image, size: int) -> Image.Image:
    """Bilinear, antialiased when it shrinks; an image that has the size already is left alone."""
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR)


def _opened(data: bytes, where: object) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(where, "claims to be a huge image (a decompression bomb?)", "shrink or remove it") from error
    except Exception as error:  # as in `decode`
        raise DataError(where, _what_instead(data), "repair or remove it") from error
    if image.width * image.height > _MAX_PIXELS:
        raise DataError(where, f"has {image.width} x {image.height} pixels, too many", "shrink or remove it")
    if image.mode.startswith(_DEEP):
        raise DataError(where, f"has more than 8 bits per pixel (mode {image.mode})", "convert it to 8 bits")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image.convert("RGBA"))
        image = ground
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except (SyntaxError, ValueError, KeyError, TypeError, OSError, struct.error):
        return 1  # unreadable metadata do not make the picture unreadable
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _what_instead(data: bytes) -> str:
    if not data:
        return "is empty"
    head = data[:256].lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is an HTML or XML page, not an image"
    return "is no image that can be read (JPEG, PNG, WebP, BMP, GIF, TIFF and PPM can)"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:80]
