"""Each kind of image file decodes to the pixels it shows, or to one line that says what is wrong."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cupel.data.decode import decode, measure, quiet_pillow
from cupel.errors import DataError

RED, WHITE = [255, 0, 0], [255, 255, 255]


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", (255, 0, 0), RED),
        ("L", 77, [77, 77, 77]),
        ("1", 1, WHITE),
        ("RGBA", (255, 0, 0, 255), RED),
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("LA", (0, 0), WHITE),
        ("LA", (10, 255), [10, 10, 10]),
    ],
)
def test_modes(mode: str, colour: object, expected: list[int]) -> None:
    made = decode(encoded(Image.new(mode, (3, 2), colour)), "x")
    assert made.shape == (2, 3, 3)
    assert made.dtype == np.uint8
    assert made.reshape(-1, 3).tolist() == [expected] * 6


def test_half_transparent_lies_on_white() -> None:
    assert abs(int(decode(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 128))), "x")[0, 0, 0]) - 127) <= 1


def test_palette_with_a_transparent_colour() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    assert decode(encoded(image), "x").tolist() == [[RED, [0, 255, 0]]]
    assert decode(encoded(image, transparency=1), "x").tolist() == [[RED, WHITE]]


def test_cmyk_jpeg() -> None:
    made = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), "x")
    assert np.abs(made.astype(int) - RED).max() < 12


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data, "x")[0, 0].tolist() == RED


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    """The eight orientations of EXIF, written out: how the stored array becomes the shown one."""
    shown = np.zeros((4, 6, 3), dtype=np.uint8)
    shown[0, 0], shown[0, 1], shown[3, 5] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    turned = {
        1: shown,
        2: shown[:, ::-1],
        3: shown[::-1, ::-1],
        4: shown[::-1],
        5: shown.transpose(1, 0, 2),
        6: np.rot90(shown, 1),
        7: shown[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(shown, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(turned)), exif=exif)
    assert (decode(data, "x") == shown).all()
    assert measure(data, "x") == (4, 6)


def test_damaged_exif_does_not_matter() -> None:
    data = encoded(Image.new("RGB", (8, 8), "white"), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\0\0")
    with quiet_pillow():
        assert decode(data, "x")[0, 0].tolist() == WHITE


def test_size_is_bilinear_whatever_the_aspect() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8))
    expected = np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR))
    assert (decode(encoded(image), "x", 8) == expected).all()
    assert decode(encoded(Image.new("RGB", (2000, 2))), "x", 4).shape == (4, 4, 3)
    assert decode(encoded(Image.new("RGB", (1, 1), "red")), "x", 4)[3, 3].tolist() == RED


@pytest.mark.parametrize("shape", ["I;16", "I", "F"])
def test_more_than_eight_bits_are_refused(shape: str) -> None:
    """Pillow alone would clamp a 16-bit picture to white."""
    data = encoded(Image.new(shape, (4, 4)), "TIFF")
    with pytest.raises(DataError, match=r"^x: has more than 8 bits per pixel .*; convert it to 8 bits$"):
        decode(data, "x")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>404</html>", "is an HTML or XML page"),
        (b"  <html><body>", "is an HTML or XML page"),
        (b"hello", "is no image that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image that can be read"),
        (encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")[:1500], "is cut off or damaged"),
        (encoded(Image.effect_noise((64, 64), 90).convert("RGB"))[:2000], "is cut off or damaged"),
        (png_header(20_000, 20_000), "claims to be a huge image"),
        (png_header(12_000, 8_000), "huge image|too many"),
        (png_header(64, 64), "is cut off or damaged"),
    ],
)
def test_bad_bytes(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught, quiet_pillow():
        decode(data, "a\nb.png")
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith("a b.png: ")
    assert "\n" not in str(caught.value)


def test_limit_holds_where_pillow_only_warns() -> None:
    with pytest.raises(DataError, match=r"huge|too many"):
        decode(png_header(12_000, 8_000), "x")
