"""Metadata of a finished PNG about its inputs and settings: one line of JSON in a tEXt chunk (PNG 3rd ed. 11.3.3).

With the metadata, `colorize` skips files that exist already, and a person can find out how a picture was made: image
programs show the text among the properties of the file.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

KEYWORD = "animediffusion"
_HEADER_END = 33
"""Number of bytes of the signature and the IHDR chunk, which is always the first chunk and has a fixed length."""


def with_metadata(png: bytes, metadata: Mapping[str, Any]) -> bytes:
    """Return the PNG with `metadata` as metadata; its pixels are unchanged."""
    body = b"tEXt" + KEYWORD.encode() + b"\0" + json.dumps(metadata, sort_keys=True).encode("ascii")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return png[:_HEADER_END] + chunk + png[_HEADER_END:]


def read_metadata(path: Path) -> dict[str, Any] | None:
    """Return the metadata of a file; None if the file is missing, is not a PNG, or has no metadata."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            metadata = json.loads(image.info[KEYWORD])
    except Exception:  # An unreadable file counts as missing, so that it is written again.
        return None
    return metadata if isinstance(metadata, dict) else None
