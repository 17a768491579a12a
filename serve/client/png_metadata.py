"""What a finished PNG says of how it was made: one line of JSON in the file itself (a tEXt chunk, PNG 3rd ed. 11.3.3).

By it `colorize` knows what need not be done again, and a person where a picture came from; image programs show it among
the properties.
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
"""The signature and IHDR, which is always first and of one length, have this many bytes."""


def stamped(png: bytes, facts: Mapping[str, Any]) -> bytes:
    """The PNG with `facts` in it; its pixels are untouched."""
    body = b"tEXt" + KEYWORD.encode() + b"\0" + json.dumps(facts, sort_keys=True).encode("ascii")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return png[:_HEADER_END] + chunk + png[_HEADER_END:]


def read_stamp(path: Path) -> dict[str, Any] | None:
    """The facts in a file, None if it is missing, no PNG, or has none."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            facts = json.loads(image.info[KEYWORD])
    except Exception:  # whatever else is in the way there is made again
        return None
    return facts if isinstance(facts, dict) else None
