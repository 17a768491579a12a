"""PNG files built chunk by chunk, with depths, checksums and metadata that no library writes."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

GRAY, RGB, GRAY_ALPHA, RGB_ALPHA = 0, 2, 4, 6


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def inserted(png: bytes, *chunks: bytes) -> bytes:
    """Insert chunks after the header of a PNG file."""
    return png[:33] + b"".join(chunks) + png[33:]


def deep(samples: np.ndarray, color: int, *chunks: bytes, depth: int = 16) -> bytes:
    """Encode samples [H, W] or [H, W, C] of 16 bits, or of fewer bits if those of a row fill whole bytes."""
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in samples]
    else:
        bits = [np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - depth :] for row in samples]
        rows = [np.packbits(row.ravel()).tobytes() for row in bits]
    height, width = samples.shape[:2]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + data + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def fixed(*values: float) -> bytes:
    """Encode numbers as ICC profiles store them (s15Fixed16)."""
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(space: bytes, colors: tuple[tuple[float, float, float], ...], gamma: float) -> bytes:
    """Return a small ICC profile: `RGB ` with three primaries (XYZ, D50), or `GRAY`."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = []
    if space == b"GRAY":
        tags.append((b"kTRC", curve))
    for name, color in zip(b"rgb", colors, strict=False):
        tags += [(bytes([name]) + b"XYZ", b"XYZ \0\0\0\0" + fixed(*color)), (bytes([name]) + b"TRC", curve)]
    return whole_profile(b"mntr" + space + b"XYZ ", tags)


def ink_profile() -> bytes:
    """Return a CMYK profile whose table gives Lab: paper is white, all inks together are dark, cyan is blue-green."""
    corners = np.indices((2, 2, 2, 2)).reshape(4, -1).T
    lab = [(100 - 20 * sum(ink[:3]) - 35 * ink[3], 30 * (ink[1] - ink[0]), 40 * (ink[2] - ink[0])) for ink in corners]
    table = bytes(round(value) for light, a, b in lab for value in (light * 2.55, 128 + a, 128 + b))
    ramp = bytes(range(256))
    shape = bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return whole_profile(b"prtrCMYKLab ", [(b"A2B0", b"mft1\0\0\0\0" + shape + 4 * ramp + table + 3 * ramp)])


def whole_profile(kind: bytes, tags: list[tuple[bytes, bytes]]) -> bytes:
    """Return an ICC profile (version 2) with these tags; `kind` is device class, color space and connection space."""
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(79)
    white = b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)
    tags = [(b"desc", text), (b"cprt", b"text\0\0\0\0none\0\0\0\0"), (b"wtpt", white), *tags]
    table, data, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, body in tags:
        table += name + struct.pack(">II", start + len(data), len(body))
        data += body + bytes(-len(body) % 4)
    head = struct.pack(">I", start + len(data)) + b"\0\0\0\0\x02\x10\0\0" + kind + bytes(12) + b"acsp"
    return head + bytes(28) + fixed(0.9642, 1, 0.8249) + bytes(48) + table + data


WIDE = profile(b"RGB ", ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)), 2.2)
"""A profile with a gamut as wide as Adobe RGB's."""
LINEAR_GRAY = profile(b"GRAY", (), 1.0)
