"""Reduce a PNG to the chunks that its pixels need (PNG specification, third edition), and read its color profile.

    pixels, profile = without_metadata(data, thing="a.png")

Texts, times and previews in a file can be huge or damaged although its pixels are good, so they are removed before
decoding. Not here: decoding, see platform/images/codec.py.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from animediffusion.platform.errors import ImageError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PROFILE_BYTES = 8 * 2**20
"""Limit of a color profile; the profiles of printers have up to 4 MB."""
_DECODED = (b"tRNS", b"eXIf")
"""Ancillary chunks that affect the pixels, as all critical chunks do."""
_GRAY, _RGB, _PALETTE, GRAY_ALPHA = 0, 2, 3, 4
"""Color types, stored in the byte at offset 25."""


class Chunk(NamedTuple):
    """One chunk: its name, its start and end in the file, and whether the file ends inside it (`cut`)."""

    name: bytes
    start: int
    end: int
    cut: bool = False

    @property
    def is_critical(self) -> bool:
        """Whether the picture cannot be shown without this chunk."""
        return self.name[:1].isupper()

    def body(self, data: bytes) -> bytes:
        """Return the content of the chunk."""
        return data[self.start + 8 : self.end - 4]


def chunks(data: bytes) -> Iterator[Chunk]:
    """Yield the chunks of a PNG up to IEND, or up to the first bytes that are not a chunk."""
    start, end = len(SIGNATURE), len(data)
    while start + 8 <= end:
        length, name = struct.unpack_from(">I4s", data, start)
        if not name.isalpha():
            return
        stop = start + 12 + length
        yield Chunk(name, start, min(stop, end), stop > end)
        if stop > end or name == b"IEND":
            return
        start = stop


def without_metadata(data: bytes, *, thing: str) -> tuple[bytes, bytes]:
    """Return the file without chunks that do not affect its pixels, and its color profile, empty if it has none.

    Only the first frame of an animation is kept. An ancillary chunk with a wrong checksum is removed, as in libpng.

    Raises:
        ImageError: if the checksum of a critical chunk is wrong.
    """
    view, header, profile = memoryview(data), b"", b""
    kept: list[memoryview | bytes] = [view[: len(SIGNATURE)]]
    position = len(SIGNATURE)
    has_pixels = False
    for chunk in chunks(data):
        position = chunk.end
        if chunk.is_critical:
            if not chunk.cut and not _is_intact(chunk, view):
                found = f"is damaged (checksum of {chunk.name.decode()})"
                raise ImageError(thing, found, "save it again as PNG")
            header = header or chunk.body(data)
            has_pixels |= chunk.name == b"IDAT"
            kept.append(view[chunk.start : chunk.end])
        elif chunk.cut:
            position = len(data) if has_pixels else chunk.start
        elif chunk.name == b"iCCP" and _is_intact(chunk, view):
            profile = _profile(chunk.body(data))
        elif chunk.name in _DECODED and _is_intact(chunk, view):
            kept.append(
                _transparency(header, chunk.body(data)) if chunk.name == b"tRNS" else view[chunk.start : chunk.end]
            )
    kept.append(view[position:])
    return b"".join(kept), profile


def _is_intact(chunk: Chunk, view: memoryview) -> bool:
    (stored,) = struct.unpack_from(">I", view, chunk.end - 4)
    return bool(stored == zlib.crc32(view[chunk.start + 4 : chunk.end - 4]))


def _profile(body: bytes) -> bytes:
    """Return the profile in an iCCP chunk; empty if it is damaged or larger than MAX_PROFILE_BYTES."""
    try:
        found = zlib.decompressobj().decompress(body.partition(b"\0")[2][1:], MAX_PROFILE_BYTES + 1)
    except zlib.error:
        return b""
    return found if len(found) <= MAX_PROFILE_BYTES else b""


def _transparency(header: bytes, body: bytes) -> bytes:
    """Convert a tRNS chunk to the levels of the decoded pixels; empty if the color type does not use tRNS.

    Pillow scales gray of 2 and 4 bits to 255 and reduces 16-bit RGB to the high bytes, but it compares these pixels
    with the unscaled levels of tRNS.
    """
    depth, color = header[8:10]
    if color == _PALETTE:
        return chunk_bytes(b"tRNS", body[:256])
    size = {_GRAY: 2, _RGB: 6}.get(color)
    if size is None or len(body) < size:
        return b""
    levels = struct.unpack(f">{size // 2}H", body[:size])
    if color == _GRAY and depth in (2, 4):
        levels = tuple(level * 255 // (2**depth - 1) for level in levels)
    elif color == _RGB and depth == 16:
        levels = tuple(level >> 8 for level in levels)
    return chunk_bytes(b"tRNS", struct.pack(f">{size // 2}H", *levels))


def chunk_bytes(name: bytes, body: bytes) -> bytes:
    """Encode a chunk: length, name, body and checksum."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
