"""Writer of Photoshop documents (.psd) with 8-bit RGB layers and groups, which most painting programs open.

The format is Adobe's "Photoshop File Formats Specification". Channels are compressed with PackBits, which all readers
know.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from animediffusion.serve.rendering.layers import Layer, LayerGroup
from animediffusion.serve.rendering.sketch import Pixels

MEDIA_TYPE = "image/vnd.adobe.photoshop"
MAX_SIDE_PX = 30_000
"""Largest width and height of the format."""
_BLEND_KEYS = {"normal": b"norm", "multiply": b"mul ", "screen": b"scrn"}
_RLE = 1
_HIDDEN, _IRRELEVANT = 0x02, 0x18
"""Flags of a layer: hidden; its pixels do not show, as those of a group's records."""
_GROUP_OPEN, _GROUP_END = 1, 3
"""Types of the section divider: the record of a group, and the hidden record below its lowest layer."""
_NONE = (0, 0, 0, 0)
_LONGEST = 128
"""Longest packet of PackBits, in bytes before compression."""
BLOCK_PIXELS = 1 << 20
"""Pixels that are compressed together, to limit memory."""


def write_psd(picture: Pixels, layers: Sequence[Layer | LayerGroup]) -> bytes:
    """Return the file.

    Args:
        picture: the flattened layers, [H, W, 3], for programs that only show the file.
        layers: the layers, the uppermost first.
    """
    height, width = picture.shape[:2]
    file = io.BytesIO()
    file.write(struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, height, width, 8, 3))
    file.write(struct.pack(">II", 0, 0))  # No color table and no image resources.
    information = _layer_information(layers)
    file.write(struct.pack(">I", len(information) + 8))
    file.write(struct.pack(">I", len(information)))
    file.write(information)
    file.write(struct.pack(">I", 0))  # No global mask.
    sizes, data = zip(*(pack_rows(picture[..., channel]) for channel in range(3)), strict=True)
    file.write(struct.pack(">H", _RLE))
    file.writelines(size.astype(">u2").tobytes() for size in sizes)
    file.writelines(data)
    return file.getvalue()


def _layer_information(layers: Sequence[Layer | LayerGroup]) -> bytes:
    """Return the records and the pixels of all layers, the lowest first."""
    records: list[bytes] = []
    pixels: list[bytes] = []
    for entry in reversed(layers):
        _append_entry(records, pixels, entry)
    body = b"".join([struct.pack(">h", len(records)), *records, *pixels])
    return body + bytes(-len(body) % 4)


def _append_entry(records: list[bytes], pixels: list[bytes], entry: Layer | LayerGroup) -> None:
    if isinstance(entry, Layer):
        channels = _channels(entry.draw())
        sizes = [len(channel) for channel in channels]
        flags = _HIDDEN if entry.hidden else 0
        record = _record(entry.name, entry.box, sizes, flags=flags, blend=_BLEND_KEYS[entry.blend])
        _append(records, pixels, record, channels)
        return
    _append(records, pixels, _record("</Layer group>", flags=_IRRELEVANT, divider=_GROUP_END), [])
    for layer in reversed(entry.layers):
        _append_entry(records, pixels, layer)
    _append(records, pixels, _record(entry.name, flags=_IRRELEVANT, divider=_GROUP_OPEN), [])


def _append(records: list[bytes], pixels: list[bytes], record: bytes, channels: Sequence[bytes]) -> None:
    records.append(record)
    pixels += channels or [struct.pack(">H", 0)] * 4


def _record(
    name: str,
    box: tuple[int, int, int, int] = _NONE,
    sizes: Sequence[int] = (2, 2, 2, 2),
    *,
    flags: int,
    blend: bytes = b"norm",
    divider: int | None = None,
) -> bytes:
    """Return the record of a layer; `sizes` are the lengths of its channels: opacity, red, green, blue."""
    left, top, right, bottom = box
    head = struct.pack(">iiiiH", top, left, bottom, right, len(sizes))
    head += b"".join(struct.pack(">hI", number, size) for number, size in enumerate(sizes, -1))
    head += struct.pack(">4s4sBBBx", b"8BIM", blend, 255, 0, flags)
    short = name.encode("ascii", "replace")[:31]
    extra = struct.pack(">II", 0, 0)  # No mask and no blending ranges.
    extra += bytes([len(short)]) + short + bytes(-(len(short) + 1) % 4)
    text = name.encode("utf-16-be")
    extra += _block(b"luni", struct.pack(">I", len(text) // 2) + text)
    if divider is not None:
        extra += _block(b"lsct", struct.pack(">I4s4s", divider, b"8BIM", b"norm"))
    return head + struct.pack(">I", len(extra)) + extra


def _block(key: bytes, data: bytes) -> bytes:
    data += bytes(-len(data) % 4)
    return struct.pack(">4s4sI", b"8BIM", key, len(data)) + data


def _channels(pixels: Pixels) -> list[bytes]:
    """Return the opacity and the colors of RGB or RGBA pixels, each with its own compression."""
    height, width, count = pixels.shape
    opacity = pixels[..., 3] if count == 4 else np.full((height, width), 255, np.uint8)
    packed = []
    for plane in (opacity, *np.moveaxis(pixels[..., :3], 2, 0)):
        sizes, data = pack_rows(plane)
        packed.append(struct.pack(">H", _RLE) + sizes.astype(">u2").tobytes() + data)
    return packed


def pack_rows(plane: Pixels) -> tuple[NDArray[np.int64], bytes]:
    """Compress each row of a plane [H, W] with PackBits; return the length of each compressed row, and all rows.

    A packet is a byte n and its data: for n < 128, n + 1 bytes follow; for n > 128, one byte follows, which is repeated
    257 - n times (Apple's Technical Note TN1023).
    """
    if (plane == plane[0, 0]).all():
        sizes, row = _pack_block(plane[:1])
        return np.repeat(sizes, len(plane)), row * len(plane)
    block = max(1, BLOCK_PIXELS // plane.shape[1])
    parts = [_pack_block(plane[top : top + block]) for top in range(0, len(plane), block)]
    return np.concatenate([sizes for sizes, _ in parts]), b"".join(data for _, data in parts)


def _pack_block(plane: Pixels) -> tuple[NDArray[np.int64], bytes]:
    height, width = plane.shape
    values = np.ascontiguousarray(plane).ravel()
    begins = np.ones((height, width), bool)
    begins[:, 1:] = plane[:, 1:] != plane[:, :-1]
    start, length = _pieces(np.flatnonzero(begins), values.size)
    # One or two equal bytes are cheaper as part of a packet of different bytes. Such packets end at the end of a row.
    is_short = length < 3
    is_loose = np.repeat(is_short, length)
    first = is_loose.reshape(height, width).copy()
    first[:, 1:] &= ~first[:, :-1]
    loose_start = np.flatnonzero(first)
    last = is_loose.reshape(height, width).copy()
    last[:, :-1] &= ~last[:, 1:]
    loose_start, loose_length = _split(loose_start, np.flatnonzero(last) + 1 - loose_start)
    start = np.concatenate([start[~is_short], loose_start])
    length = np.concatenate([length[~is_short], loose_length])
    is_run = np.arange(len(start)) < np.count_nonzero(~is_short)
    order = np.argsort(start)
    start, length, is_run = start[order], length[order], is_run[order]
    size = np.where(is_run, 2, length + 1)
    place = np.cumsum(size) - size
    packed = np.empty(int(size.sum()), np.uint8)
    packed[place] = np.where(is_run, 257 - length, length - 1)
    packed[place[is_run] + 1] = values[start[is_run]]
    loose = ~is_run
    packed[_ranges(place[loose] + 1, length[loose])] = values[is_loose]
    return np.add.reduceat(size, np.searchsorted(start, np.arange(height) * width)), packed.tobytes()


def _pieces(start: NDArray[np.int64], end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return _split(start, np.diff(start, append=end))


def _split(start: NDArray[np.int64], length: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split ranges that are longer than a packet; return the starts and lengths of the pieces."""
    count = -(-length // _LONGEST)
    number = _ranges(np.zeros_like(count), count)
    return (
        np.repeat(start, count) + number * _LONGEST,
        np.minimum(np.repeat(length, count) - number * _LONGEST, _LONGEST),
    )


def _ranges(start: NDArray[np.int64], length: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return start, start + 1, ..., of each range, one range after the other."""
    ends = np.cumsum(length)
    numbers: NDArray[np.int64] = np.arange(ends[-1] if len(ends) else 0)
    numbers += np.repeat(start - (ends - length), length)
    return numbers
