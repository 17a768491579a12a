"""Recognize picture files by their names, with the same rules for training data and for drawings to color."""

from __future__ import annotations

import re

UPLOADED_SUFFIXES = frozenset({".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".pjpeg", ".pjp", ".webp"})
"""Suffixes of PNG, JPEG and WebP in lower case, the formats allowed for a drawing or a reference."""
DECODED_SUFFIXES = UPLOADED_SUFFIXES | {".bmp", ".dib", ".gif", ".tif", ".tiff"}
"""Suffixes of all formats that training data may have."""
_OTHERS = """ai arw avif clip cr2 cr3 csp dds dng eps exr hdr heic heif ico j2k jp2 jpx jxl kra mdp nef ora pbm pcx pdf
    pgm ppm procreate psb psd qoi raw sai sai2 svg tga xcf"""
PICTURES = DECODED_SUFFIXES | {f".{name}" for name in _OTHERS.split()}
"""Suffixes of all kinds of pictures, including formats that cannot be read."""
_JUNK_NAMES = (
    r"thumbs\.db", r"ehthumbs\.db", r"desktop\.ini", "__macosx", "icon\r", "@eadir", "[#@]recycle",
    r"\$recycle\.bin", "system volume information", r"lost\+found",
)  # fmt: skip
_JUNK = re.compile(rf"(?:^|/)(?:\.|(?:{'|'.join(_JUNK_NAMES)})(?:/|$))", re.I)


def is_junk(path: str) -> bool:
    """Whether a path is hidden or belongs to the files that desktops, cameras and file servers leave behind."""
    return _JUNK.search(path) is not None
