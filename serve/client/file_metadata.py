"""Metadata of a finished file about its inputs and settings: one line of JSON.

With the metadata, `colorize` skips files that exist already, and a person can find out how a picture was made: image
programs show the text of a PNG or PSD among the properties of the file.

| format | place of the text |
|---|---|
| PNG | a tEXt chunk (PNG 3rd ed. 11.3.3) |
| OpenRaster | the file animediffusion.json in the archive |
| PSD | the description in an XMP packet (ISO 16684-1), image resource 1060 |
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from PIL import Image

KEYWORD = "animediffusion"
_HEADER_END = 33
"""Number of bytes of the signature and the IHDR chunk, which is always the first chunk and has a fixed length."""
_ARCHIVED = "animediffusion.json"
_XMP = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\
<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:xmp="http://ns.adobe.com/xap/1.0/" \
xmp:CreatorTool="AnimeDiffusion"><dc:description><rdf:Alt><rdf:li xml:lang="x-default">{}</rdf:li></rdf:Alt>\
</dc:description></rdf:Description></rdf:RDF></x:xmpmeta>"""
_XMP_TEXT = ".//{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"
_XMP_RESOURCE = 1060
_PSD_RESOURCES = 30
"""Offset of the length of the image resources in a PSD that psd.write_psd() has written, which has no color table."""


def with_metadata(data: bytes, metadata: Mapping[str, Any]) -> bytes:
    """Return a PNG, OpenRaster or PSD file as render() makes it, with `metadata`; its pixels are unchanged."""
    text = json.dumps(metadata, sort_keys=True)
    if data.startswith(b"8BPS"):
        return _psd_with(data, text)
    if data.startswith(b"PK"):
        return _archive_with(data, text)
    body = b"tEXt" + KEYWORD.encode() + b"\0" + text.encode("ascii")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return data[:_HEADER_END] + chunk + data[_HEADER_END:]


def read_metadata(path: Path) -> dict[str, Any] | None:
    """Return the metadata of a file; None if the file is missing, is of another format, or has no metadata."""
    try:
        with path.open("rb") as file:
            return metadata_of(file, path.suffix)
    except OSError:
        return None


def metadata_of(file: IO[bytes], suffix: str) -> dict[str, Any] | None:
    """Return the metadata of an open file with this suffix; None if it is of another format, or has no metadata."""
    try:
        if suffix.lower() == ".ora":
            with zipfile.ZipFile(file) as archive:
                text = archive.read(_ARCHIVED).decode("ascii")
        elif suffix.lower() == ".psd":
            text = _psd_text(file)
        else:
            with Image.open(file, formats=("PNG",)) as image:
                text = image.info[KEYWORD]
        metadata = json.loads(text)
    except Exception:  # An unreadable file counts as missing, so that it is written again.
        return None
    return metadata if isinstance(metadata, dict) else None


def _archive_with(data: bytes, text: str) -> bytes:
    buffer = io.BytesIO(data)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(zipfile.ZipInfo(_ARCHIVED), text)
    return buffer.getvalue()


def _psd_with(data: bytes, text: str) -> bytes:
    packet = _XMP.format(escape(text)).encode("ascii")
    resource = struct.pack(">4sHHI", b"8BIM", _XMP_RESOURCE, 0, len(packet)) + packet + bytes(len(packet) % 2)
    (length,) = struct.unpack_from(">I", data, _PSD_RESOURCES)
    start = _PSD_RESOURCES + 4
    return data[:_PSD_RESOURCES] + struct.pack(">I", length + len(resource)) + resource + data[start:]


def _psd_text(file: IO[bytes]) -> str:
    with Image.open(file, formats=("PSD",)) as image:
        [packet] = [data for number, _, data in image.resources if number == _XMP_RESOURCE]  # type: ignore[attr-defined]
    return ElementTree.fromstring(packet).findtext(_XMP_TEXT) or ""
