"""Read drawings with layers: the composite and the line layer of PSD, OpenRaster and Krita files become a pair.

    target = decode_composite(data, "a.kra")              # [H, W, 3]
    sketch = decode_lines(data, "a.kra")                  # [H, W], black on white

The line layer is the layer, or the group of layers, that is named so: "line art", "ink", "線画" and others. Several are
put on top of each other. PSD files need the package psd-tools; OpenRaster and Krita files are ZIP archives.
"""

from __future__ import annotations

import importlib.util
import io
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from animediffusion.platform.errors import ImageError
from animediffusion.platform.images.codec import MAX_PIXELS, decode_rgb, decode_rgba

Pixels = NDArray[np.uint8]

SUFFIXES = (".psd", ".ora", ".kra")
LINES = "#lines"
"""Suffix of the path that stands for the line layer of a file."""
_LINE_NAME = re.compile(
    r"\b(line|lines|linework|line[ _-]?art|ink|inks|inking|inked|outline|outlines|contour|contours|lineart)\b"
    r"|線画|主線|線|线稿|线条|线|선화",
    re.I,
)
_MAX_PART_BYTES = 256 * 2**20
"""Largest part of an OpenRaster or Krita file after unpacking: a layer of MAX_PIXELS in RGBA."""
_MAX_PARTS = 10_000
_MAX_XML_BYTES = 2**22
_MAX_LAYERS = 100
_TILE_PX = 64


def is_layered(path: str) -> bool:
    """Whether a path names a file with layers, or the line layer of one."""
    return PurePosixPath(path.removesuffix(LINES)).suffix.lower() in SUFFIXES


def decode_composite(data: bytes, thing: str) -> Pixels:
    """Return the flattened drawing [H, W, 3], on white.

    Raises:
        ImageError: if the file is damaged, too large, or psd-tools is missing.
    """
    with _explained(thing):
        return _composite(data, thing)


def decode_lines(data: bytes, thing: str) -> Pixels:
    """Return the line layer as luma [H, W], on white.

    Raises:
        ImageError: as decode_composite(), or if no layer has the name of a line layer.
    """
    with _explained(thing):
        return _lines(data, thing)


@contextmanager
def _explained(thing: str) -> Iterator[None]:
    """Convert what parsers raise for damaged files, which none of them documents, to an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        found = " ".join(str(error).split())[:100] or type(error).__name__
        raise ImageError(thing, f"is damaged ({found})", "save it again") from error


def _composite(data: bytes, thing: str) -> Pixels:
    if data.startswith(b"8BPS"):
        image = _psd(data, thing).topil()
        if image is None:
            raise ImageError(thing, "has no composite picture", "save it with maximized compatibility")
        return _on_white(np.asarray(image.convert("RGBA")))
    with _archive(data, thing) as archive:
        return decode_rgb(_part(archive, "mergedimage.png", thing), thing=thing)


def _lines(data: bytes, thing: str) -> Pixels:
    if data.startswith(b"8BPS"):
        document = _psd(data, thing)
        canvas = _Canvas(document.height, document.width)
        for layer in _psd_lines(document):
            picture = layer.topil()
            if picture is not None:
                canvas.add(np.asarray(picture.convert("RGBA")), layer.left, layer.top, layer.opacity / 255)
    else:
        with _archive(data, thing) as archive:
            canvas = _krita_lines(archive, thing) if "maindoc.xml" in archive.NameToInfo else _ora_lines(archive, thing)
    if not canvas.num_layers:
        found = "has no layer named line, line art, ink or so"
        raise ImageError(thing, found, "name the layer with the lines `line art`")
    return to_luma(_on_white(np.asarray(canvas.image)))


def to_luma(picture: Pixels) -> Pixels:
    """Return the luma [H, W] of a picture [H, W, 3]."""
    return np.asarray(Image.fromarray(picture).convert("L"))


class _Canvas:
    """Layers that are put on top of each other, the lowest first."""

    def __init__(self, height: int, width: int) -> None:
        self.image = Image.new("RGBA", (width, height))
        self.num_layers = 0

    def add(self, layer: Pixels, left: int, top: int, opacity: float) -> None:
        """Put a layer [h, w, 4] at a place, which may be partly outside of the canvas."""
        if opacity < 1:
            layer = np.dstack([layer[..., :3], (layer[..., 3] * opacity).astype(np.uint8)])
        whole = Image.new("RGBA", self.image.size)
        whole.paste(Image.fromarray(layer), (left, top))
        self.image.alpha_composite(whole)
        self.num_layers += 1


def _on_white(layer: Pixels) -> Pixels:
    image = Image.fromarray(layer)
    return np.array(Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB"))


def _check_pixels(thing: str, width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS or min(width, height) < 1:
        found = f"is {width:,} x {height:,} pixels"
        raise ImageError(thing, found, f"at most {MAX_PIXELS:,} pixels are allowed", reason="too_large")


def _psd(data: bytes, thing: str) -> Any:
    if len(data) < 26:
        raise ImageError(thing, "is cut off before its end", "give the whole file", reason="truncated")
    height, width = struct.unpack_from(">II", data, 14)
    _check_pixels(thing, width, height)
    if importlib.util.find_spec("psd_tools") is None:
        raise ImageError(thing, "is a PSD file, which needs psd-tools", "pip install 'animediffusion[psd]'")
    from psd_tools import PSDImage

    try:
        return PSDImage.open(io.BytesIO(data))
    except Exception as error:  # psd-tools does not document what its parsers raise for damaged files
        raise ImageError(thing, "is a damaged PSD file", "save it again") from error


def _psd_lines(group: Any, inside: bool = False) -> Iterator[Any]:
    """Yield the layers of pixels whose name, or whose group's name, is that of lines, the lowest first."""
    for layer in group:
        found = inside or _LINE_NAME.search(layer.name) is not None
        if layer.is_group():
            yield from _psd_lines(layer, found)
        elif found and layer.width * layer.height:
            _check_pixels(layer.name, layer.width, layer.height)
            yield layer


def _archive(data: bytes, thing: str) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except (zipfile.BadZipFile, ValueError) as error:
        found = "is cut off or not a ZIP archive, which OpenRaster and Krita files are"
        raise ImageError(thing, found, "save it again", reason="truncated") from error
    if len(archive.infolist()) > _MAX_PARTS:
        raise ImageError(thing, f"has {len(archive.infolist()):,} parts", f"at most {_MAX_PARTS:,}", reason="too_large")
    return archive


def _part(archive: zipfile.ZipFile, name: str, thing: str, limit: int = _MAX_PART_BYTES) -> bytes:
    info = archive.NameToInfo.get(name)
    if info is None:
        raise ImageError(thing, f"has no part {name}", "save it again")
    if info.file_size > limit:
        found = f"its part {name} has {info.file_size:,} bytes"
        raise ImageError(thing, found, f"at most {limit:,}", reason="too_large")
    try:
        return archive.read(info)
    except Exception as error:  # of zipfile and zlib, for damaged and encrypted parts
        raise ImageError(thing, f"its part {name} is damaged", "save it again") from error


def _xml(archive: zipfile.ZipFile, name: str, thing: str) -> ElementTree.Element:
    text = _part(archive, name, thing, _MAX_XML_BYTES)
    # Entities can grow a small text to gigabytes. Krita declares a DTD without any.
    if b"<!ENTITY" in text:
        raise ImageError(thing, f"its part {name} declares entities", "save it again")
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ImageError(thing, f"its part {name} is damaged", "save it again") from error


def _lines_of(layers: Iterable[ElementTree.Element], inside: bool = False) -> Iterator[ElementTree.Element]:
    """Yield the layers of an XML tree that are, or are in, what is named as lines; the tree lists the upmost first."""
    for layer in reversed(list(layers)):
        found = inside or _LINE_NAME.search(layer.get("name", "")) is not None
        inner = [one for child in layer for one in _layers(child)]
        if inner:
            yield from _lines_of(inner, found)
        elif found:
            yield layer


def _layers(element: ElementTree.Element) -> list[ElementTree.Element]:
    """Return the element itself if it is a layer or a group, or what Krita's element `layers` holds."""
    return list(element) if _tag(element) == "layers" else [element] * (_tag(element) in ("layer", "stack"))


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _number(element: ElementTree.Element, name: str, thing: str, default: str = "0") -> int:
    try:
        return int(float(element.get(name, default)))
    except (ValueError, OverflowError) as error:
        raise ImageError(thing, f"its {name} is {element.get(name)!r}", "save it again") from error


def _ora_lines(archive: zipfile.ZipFile, thing: str) -> _Canvas:
    root = _xml(archive, "stack.xml", thing)
    canvas = _sized(root, "w", "h", thing)
    for stack in (one for one in root if _tag(one) == "stack"):
        for layer in _first(_lines_of(stack), thing):
            pixels = decode_rgba(_part(archive, layer.get("src", ""), thing), thing=thing)
            opacity = float(layer.get("opacity") or 1)
            canvas.add(pixels, _number(layer, "x", thing), _number(layer, "y", thing), opacity)
    return canvas


def _sized(root: ElementTree.Element, width: str, height: str, thing: str) -> _Canvas:
    size = _number(root, width, thing), _number(root, height, thing)
    _check_pixels(thing, *size)
    return _Canvas(size[1], size[0])


def _first(layers: Iterator[Any], thing: str) -> Iterator[Any]:
    for number, layer in enumerate(layers):
        if number >= _MAX_LAYERS:
            raise ImageError(thing, f"has more than {_MAX_LAYERS} line layers", "merge them", reason="too_large")
        yield layer


def _krita_lines(archive: zipfile.ZipFile, thing: str) -> _Canvas:
    """Read the line layers of a Krita file: maindoc.xml, and for each layer NAME/layers/FILE with tiles."""
    root = _xml(archive, "maindoc.xml", thing)
    document = next((one for one in root.iter() if _tag(one) == "IMAGE"), root)
    canvas = _sized(document, "width", "height", thing)
    tree = [layer for child in document for layer in _layers(child)]
    for layer in _first(_lines_of(tree), thing):
        if layer.get("nodetype", "paintlayer") != "paintlayer":
            continue
        if layer.get("colorspacename", "RGBA") != "RGBA":
            found = f"its line layer has the color space {layer.get('colorspacename')}"
            raise ImageError(thing, found, "convert it to RGBA with 8 bits")
        data = _part(archive, f"{document.get('name', '')}/layers/{layer.get('filename', '')}", thing)
        opacity = _number(layer, "opacity", thing, "255") / 255
        pixels = read_tiles(data, canvas.image.height, canvas.image.width, thing)
        canvas.add(pixels, _number(layer, "x", thing), _number(layer, "y", thing), opacity)
    return canvas


def read_tiles(data: bytes, height: int, width: int, thing: str) -> Pixels:
    """Return the pixels [H, W, 4] of a layer of a Krita file.

    A layer is four lines of text, then for each tile `x,y,LZF,bytes` and the tile: one byte that is 1 if the rest is
    compressed, and the planes B, G, R and A of 64 x 64 pixels (libs/image/tiles3 of Krita).

    Raises:
        ImageError: if the layer is damaged or has other tiles.
    """
    pixels = np.zeros((height, width, 4), np.uint8)
    stream = io.BytesIO(data)
    try:
        header = dict(stream.readline(64).decode("ascii").split() for _ in range(5))
        kind = header["VERSION"], int(header["TILEWIDTH"]), int(header["TILEHEIGHT"]), int(header["PIXELSIZE"])
        if kind != ("2", _TILE_PX, _TILE_PX, 4):
            raise ImageError(thing, f"its line layer has tiles of the kind {kind}", "save it again with 8 bits")
        for _ in range(int(header["DATA"])):
            left, top, _, num_bytes = stream.readline(64).decode("ascii").strip().split(",")
            tile = stream.read(int(num_bytes))
            planes = unpack_lzf(tile[1:], 4 * _TILE_PX**2) if tile[0] == 1 else tile[1:]
            blue, green, red, alpha = np.frombuffer(planes, np.uint8).reshape(4, _TILE_PX, _TILE_PX)
            _paste(pixels, np.dstack([red, green, blue, alpha]), int(left), int(top))
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise ImageError(thing, "its line layer is damaged", "save it again") from error
    return pixels


def _paste(pixels: Pixels, tile: Pixels, left: int, top: int) -> None:
    height, width = pixels.shape[:2]
    x0, y0, x1, y1 = max(0, left), max(0, top), min(width, left + _TILE_PX), min(height, top + _TILE_PX)
    if x0 < x1 and y0 < y1:
        pixels[y0:y1, x0:x1] = tile[y0 - top : y1 - top, x0 - left : x1 - left]


def unpack_lzf(data: bytes, size: int) -> bytes:
    """Unpack LZF (liblzf): a byte below 32 precedes that many literals and one; others repeat earlier bytes.

    Raises:
        ValueError: if the data is damaged or does not give `size` bytes.
        IndexError: if it is cut off.
    """
    out, at = bytearray(), 0
    while at < len(data) and len(out) <= size:
        control = data[at]
        at += 1
        if control < 32:
            out += data[at : at + control + 1]
            at += control + 1
            continue
        length = control >> 5
        if length == 7:
            length += data[at]
            at += 1
        start = len(out) - ((control & 31) << 8) - data[at] - 1
        at += 1
        if start < 0:
            raise ValueError("a reference before the first byte")
        length += 2
        while length:
            piece = out[start : start + length]
            out += piece
            start += len(piece)
            length -= len(piece)
    if len(out) != size:
        raise ValueError(f"{len(out)} bytes instead of {size}")
    return bytes(out)
