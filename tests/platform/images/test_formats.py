"""What is not read is called by its name."""

import gzip

import numpy as np
import pytest
from PIL import Image
from pngs import saved

from animediffusion.platform.errors import ImageError
from animediffusion.platform.images.codec import decode_gray, decode_rgb

SKETCHES = ("PNG", "JPEG", "WEBP")
IMAGE = Image.new("RGB", (40, 40), (9, 99, 200))
NAMED = {
    "a HEIC picture": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300),
    "an AVIF picture": b"\0\0\0\x1cftypmif1\0\0\0\0avifmiaf" + bytes(200),
    "a JPEG XL picture": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(200),
    "a JPEG 2000 picture": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(200),
    "a PSD picture": b"8BPS\0\1" + bytes(200),
    "a CUR picture": b"\0\0\2\0\1\0" + bytes(200),
    "a TGA picture": saved(IMAGE, "TGA"),
    "compressed with gzip": gzip.compress(b"PNG"),
    "a data URL": b"data:image/png;base64,iVBORw0KGgo=",
    "base64 text": b"iVBORw0KGgoAAAANSUhEUgAA",
    "a RAR archive": b"Rar!\x1a\7\1\0",
    "only zero bytes": bytes(500),
    "an ICO picture": b"\0\0\1\0\1\0" + bytes(200),
    "a TIFF picture": saved(IMAGE, "TIFF"),
    "a GIF picture": saved(IMAGE, "GIF"),
    "a BMP picture": saved(IMAGE, "BMP"),
    "an SVG drawing": b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- made by hand -->\n<svg xmlns="x">' + bytes(90),
    "a PDF document": b"%PDF-1.7\n" + bytes(90),
    r"a web page \(HTML\)": b"\n<!DOCTYPE HTML><html><body>403</body></html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 12345\n",
    "a ZIP archive": b"PK\3\4" + bytes(90),
    r"not an image \(starts with '\\x01\\x02BMW is a t'\)": b"\1\2BMW is a text" * 9,
    r"not an image \(starts with 'BMW is a car'\)": b"BMW is a car, not a bitmap" * 9,
}


@pytest.mark.parametrize("found", NAMED)
def test_bytes_that_are_not_read_are_named(found: str) -> None:
    with pytest.raises(ImageError, match=f"^sketch: (is|holds) {found}") as caught:
        decode_rgb(NAMED[found], thing="sketch", formats=SKETCHES)
    assert caught.value.reason == "not_an_image"
    assert "\\\\" not in str(caught.value)


def test_an_error_lists_the_readable_formats() -> None:
    with pytest.raises(ImageError, match=r"save it as PNG, JPEG or WebP$"):
        decode_rgb(NAMED["a PSD picture"], formats=SKETCHES)


def test_a_file_with_the_start_of_an_image_is_damaged_not_foreign() -> None:
    with pytest.raises(ImageError, match="is damaged") as caught:
        decode_rgb(b"\xff\xd8\xff\xe0" + bytes(500) + b"\xff\xd9")
    assert caught.value.reason == "unreadable"


@pytest.mark.parametrize(("most", "wanted"), [(100, 100), (65_535, 255), (2_000_000_000, 255)])
def test_gray_of_32_bits_is_taken_in_the_smallest_usual_range(most: int, wanted: int) -> None:
    data = saved(Image.fromarray(np.array([[0, most]], np.int32)), "TIFF")

    assert decode_gray(data).tolist() == [[0, wanted]]
