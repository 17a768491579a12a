"""Recognize the format of a file by its first bytes: readable and other image formats, and files without an image.

    format_of(data)                      # "PNG", "HEIC", None ...
    raise not_an_image("a.png", data, ("PNG", "JPEG", "WEBP"))

Not here: decoding, see platform/images/codec.py.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from PIL import UnidentifiedImageError

from animediffusion.platform.errors import ImageError

_SIGNATURES = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"8BPS": "PSD",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\1\0": "ICO",
    b"CSFCHUNK": "CLIP STUDIO PAINT",
    b"gimp xcf": "GIMP (XCF)",
    b"v/1\x01": "OpenEXR",
    b"qoif": "QOI",
    b"DDS ": "DDS",
    b"#?RADIANCE": "Radiance HDR",
    b"%!PS": "PostScript",
}
_TGA_BITS = (b"\x08", b"\x0f", b"\x10", b"\x18", b"\x20")
"""Bits of a pixel, at byte 16; a TGA has no signature."""
_BITMAP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)
"""Sizes of the second header of a BMP file, after 14 bytes; they are checked because texts may also begin with "BM"."""
_HEIF_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"crx ": "CR3", b"qt  ": "QuickTime"} | dict.fromkeys(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIC"
)
"""Brands of files whose first box is `ftyp`, the most specific brand first; all other brands count as MP4."""
_NOT_PICTURES = {
    b"version https://git-lfs": ("is a Git LFS pointer, not the picture", "fetch it with `git lfs pull`"),
    b"%PDF": ("is a PDF document", "export the page as PNG"),
    b"\x1f\x8b": ("is compressed with gzip", "unpack it"),
    b"Rar!": ("is a RAR archive", "unpack it"),
    b"7z\xbc\xaf\x27\x1c": ("is a 7z archive", "unpack it"),
    b"data:image/": ("is a data URL, not the picture", "decode what follows its comma from base64"),
    b"iVBORw0KGgo": ("is base64 text", "decode it"),
    b"/9j/": ("is base64 text", "decode it"),
    b"PK\3\4": ("is a ZIP archive", "unpack it, or export the picture in it"),
    b"\0\5\x16\7": ("holds macOS metadata (AppleDouble), not a picture", "give the file without `._` in its name"),
}
_MARKUP = {
    b"<svg": ("is an SVG drawing", "export it as PNG"),
    b"<html": ("is a web page (HTML), not a picture", "download the picture itself"),
    b"<!doctype html": ("is a web page (HTML), not a picture", "download the picture itself"),
    b"<?xml": ("is an XML document, not a picture", "give the picture itself"),
}
"""Marks that are searched in the first 1024 bytes of a text that begins with `<`."""


_ZERO_TAIL_SHARE = 8
"""A lossy WebP whose last 1/8 is zeros counts as truncated; in a large white picture, the last 1/18 is zeros."""


def format_of(data: bytes) -> str | None:
    """Return Pillow's name of a readable format, the usual name of another format, or None for unknown bytes."""
    if data.startswith(b"RIFF") and b"WEBP".startswith(data[8:12]):
        return "WEBP"
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in _BITMAP_HEADERS:
        return "BMP"
    if data.startswith(b"\0\0\2\0") and any(data[4:6]):  # the number of cursors; a TGA has zeros there
        return "CUR"
    if data[:3] in (b"\0\0\2", b"\0\0\3", b"\0\0\n", b"\0\0\v") and data[3:8] == bytes(5) and data[16:17] in _TGA_BITS:
        return "TGA"
    if data[4:8] == b"ftyp":
        brands = [data[start : start + 4] for start in range(8, min(64, len(data)), 4)]
        return next((name for brand, name in _HEIF_BRANDS.items() if brand in brands), "MP4")
    return next((name for start, name in _SIGNATURES.items() if data.startswith(start)), None)


def not_an_image(thing: str, data: bytes, formats: Sequence[str]) -> ImageError:
    """Return the error for bytes whose format is unknown or not allowed."""
    name, names = format_of(data), [name.replace("WEBP", "WebP") for name in formats]
    choice = " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
    if name is not None:
        kind = f"{name} video" if name in ("MP4", "QuickTime") else f"{name} picture"
        found, allowed = f"is {'an' if kind[0] in 'AIMO' else 'a'} {kind}", f"save it as {choice}"
        return ImageError(thing, found, allowed, reason="not_an_image")
    if (known := _not_a_picture(data)) is not None:
        return ImageError(thing, *known, reason="not_an_image")
    if not any(data):
        return ImageError(thing, "holds only zero bytes", "copy or download it again", reason="not_an_image")
    start = repr(data[:12])[1:]
    return ImageError(thing, f"is not an image (starts with {start})", f"give {choice}", reason="not_an_image")


def _not_a_picture(data: bytes) -> tuple[str, str] | None:
    text = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    marks = _MARKUP.items() if text.startswith(b"<") else ()
    found = (known for start, known in _NOT_PICTURES.items() if data.startswith(start))
    return next(found, next((known for mark, known in marks if mark in text), None))


def broken(thing: str, data: bytes, error: BaseException) -> ImageError:
    """Return the error for bytes of an allowed format that cannot be decoded: truncated or damaged."""
    if ends_early(data) or "truncated" in str(error).lower():
        return ImageError(thing, "is cut off before its end", "give the whole file", reason="truncated")
    why = str(error).partition("\n")[0] or type(error).__name__
    is_headless = isinstance(error, UnidentifiedImageError)
    found = "is damaged (its header cannot be read)" if is_headless else f"cannot be decoded ({why})"
    return ImageError(thing, found, "save it again as PNG", reason="unreadable")


def ends_in_zeros(data: bytes) -> bool:
    """Whether the pixels of a lossy WebP end in zero bytes, as a download does that stopped after space was reserved.

    The decoder takes such zeros for pixels. PNG has checksums, JPEG and GIF an end marker; a lossless WebP may end so.
    """
    start = 12
    while data.startswith(b"RIFF") and start + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, start)
        start += 8
        if name == b"ANMF":  # the frames of an animation are chunks, too, after 16 bytes
            size = 16
        elif name == b"VP8 ":
            zeros = max(64, size // _ZERO_TAIL_SHARE)
            return size > zeros and not any(data[start + size - zeros : start + size])
        start += size + size % 2
    return False


def ends_early(data: bytes) -> bool:
    """Whether the file lacks the end marker or the length that its format requires."""
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-64:]
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in data[-64:]
    if data[:4] in (b"II*\0", b"MM\0*") and len(data) >= 8:  # the place of the tags, often the end of the file
        return int.from_bytes(data[4:8], "little" if data[:1] == b"I" else "big") + 2 > len(data)
    if data.startswith(b"RIFF"):
        return len(data) < 12 or len(data) < struct.unpack("<I", data[4:8])[0] + 8
    return len(data) < 64
