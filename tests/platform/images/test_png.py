"""Metadata never refuses good pixels, and damage to pixels is called damage."""

import os
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from pngs import GRAY, RGB, chunk, deep, inserted, saved

from animediffusion.platform.errors import ImageError
from animediffusion.platform.images.codec import decode_gray, decode_rgb

LINES = Image.fromarray(np.kron(np.random.default_rng(0).integers(0, 2, (9, 9)), np.full((4, 4), 255)).astype(np.uint8))
PLAIN = saved(LINES)


def wrong_checksum(name: bytes, body: bytes) -> bytes:
    return chunk(name, body)[:-4] + b"\0\0\0\0"


METADATA = {
    "large zTXt": lambda: chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b'{"node":1},' * 200_000)),
    "large iTXt": lambda: chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"<x/>" * 500_000)),
    "large tEXt": lambda: chunk(b"tEXt", b"prompt\0" + b"a" * 68_000_000),
    "large iCCP": lambda: chunk(b"iCCP", b"big\0\0" + zlib.compress(os.urandom(1000) + bytes(1_600_000))),
    "bomb in iCCP": lambda: chunk(b"iCCP", b"big\0\0" + zlib.compress(bytes(100_000_000), 9)),
    "iCCP without zlib": lambda: chunk(b"iCCP", b"sRGB\0\0notzlib"),
    "short tRNS": lambda: chunk(b"tRNS", b"\0"),
    "short pHYs": lambda: chunk(b"pHYs", b"\0"),
    "APNG without frames": lambda: chunk(b"acTL", b"\0"),
    "checksum of tEXt": lambda: wrong_checksum(b"tEXt", b"x\0\0abc"),
    "checksum of iCCP": lambda: wrong_checksum(b"iCCP", b"x\0\0abc"),
    "checksum of pHYs": lambda: wrong_checksum(b"pHYs", b"x\0\0abc"),
    "checksum of eXIf": lambda: wrong_checksum(b"eXIf", b"x\0\0abc"),
}
"""Chunks by kind, built by the test that reads them, because the large ones take seconds."""


@pytest.mark.parametrize("kind", METADATA)
def test_metadata_never_refuses_good_pixels(kind: str) -> None:
    data = inserted(PLAIN, METADATA[kind]())
    tracemalloc.start()

    pixels = decode_rgb(data)

    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()
    assert np.array_equal(pixels, decode_rgb(PLAIN))


@pytest.mark.parametrize("end", [b"", b"garbage" * 100, chunk(b"tEXt", b"a\0" + b"b" * 99)[:50]])
def test_what_follows_the_pixels_plays_no_role(end: bytes) -> None:
    assert np.array_equal(decode_rgb(PLAIN[:-12] + end), decode_rgb(PLAIN))


@pytest.mark.parametrize("name", [b"IHDR", b"PLTE", b"IDAT"])
def test_a_wrong_checksum_of_what_pixels_need_is_named(name: bytes) -> None:
    data = bytearray(saved(LINES.convert("P")))
    start = data.index(name)
    data[start + 4 + int.from_bytes(data[start - 4 : start], "big")] ^= 1

    with pytest.raises(ImageError, match=rf"a.png: is damaged \(checksum of {name.decode()}\); ") as caught:
        decode_rgb(bytes(data), thing="a.png")
    assert caught.value.reason == "unreadable"


def test_a_signature_with_changed_line_ends_is_damage() -> None:
    with pytest.raises(ImageError, match="is damaged") as caught:
        decode_rgb(PLAIN.replace(b"\r\n", b"\n", 1))
    assert caught.value.reason == "unreadable"


@pytest.mark.parametrize("depth", [2, 4, 16])
def test_a_transparent_gray_level_is_white_at_every_depth(depth: int) -> None:
    most = 2**depth - 1
    samples = np.where(np.indices((8, 8)).sum(0) % 3, 0, most // 3)

    gray = decode_gray(deep(samples, GRAY, chunk(b"tRNS", bytes(2)), depth=depth))

    assert np.array_equal(gray, np.where(samples == 0, 255, 85))


def test_a_transparent_color_of_16_bits_is_white() -> None:
    samples = np.zeros((4, 4, 3), np.uint16)
    samples[1:] = 0x8080

    rgb = decode_rgb(deep(samples, RGB, chunk(b"tRNS", b"\x80" * 6)))

    assert rgb[0].max() == 0
    assert rgb[1:].min() == 255


def test_the_first_frame_of_an_animation_is_read() -> None:
    data = saved(LINES, save_all=True, append_images=[Image.new("L", LINES.size, 9)], duration=50)

    assert np.array_equal(decode_gray(data), np.asarray(LINES))
