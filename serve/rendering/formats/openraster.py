"""Writer of OpenRaster files (.ora), which Krita, GIMP, MyPaint and others open.

The format is a zip archive of PNGs and stack.xml (https://www.openraster.org, baseline of version 0.0.5).
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from xml.etree import ElementTree

from PIL import Image

from animediffusion.platform.images.codec import encode_png
from animediffusion.serve.rendering.layers import Layer, LayerGroup
from animediffusion.serve.rendering.sketch import Pixels

MEDIA_TYPE = "image/openraster"
VERSION = "0.0.5"
"""The first version with the attribute `isolation` of all our readers."""
THUMBNAIL_PX = 256
COMPRESSION = 3
"""PNG compression level: low, because a client waits for the file."""


def write_openraster(picture: Pixels, layers: Sequence[Layer | LayerGroup]) -> bytes:
    """Return the file; equal layers give equal bytes.

    Args:
        picture: the flattened layers, [H, W, 3], for programs that only show the file.
        layers: the layers, the uppermost first.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        _add(archive, "mimetype", MEDIA_TYPE.encode())
        height, width = picture.shape[:2]
        root = ElementTree.Element("image", version=VERSION, w=str(width), h=str(height))
        stack = ElementTree.SubElement(root, "stack")
        for entry in layers:
            _add_entry(archive, stack, entry)
        ElementTree.indent(root)
        xml = ElementTree.tostring(root, "UTF-8", xml_declaration=True)
        _add(archive, "stack.xml", xml, zipfile.ZIP_DEFLATED)
        _add(archive, "mergedimage.png", encode_png(picture, COMPRESSION))
        _add(archive, "Thumbnails/thumbnail.png", _thumbnail(picture))
    return buffer.getvalue()


def _add_entry(archive: zipfile.ZipFile, stack: ElementTree.Element, entry: Layer | LayerGroup) -> None:
    if isinstance(entry, Layer):
        _add_layer(archive, stack, entry)
        return
    group = ElementTree.SubElement(stack, "stack", name=entry.name, isolation="isolate")
    for layer in entry.layers:
        _add_entry(archive, group, layer)


def _add_layer(archive: zipfile.ZipFile, stack: ElementTree.Element, layer: Layer) -> None:
    file = f"data/layer{sum(name.startswith('data/') for name in archive.namelist())}.png"
    _add(archive, file, encode_png(layer.draw(), COMPRESSION))
    attributes = {"name": layer.name, "src": file, "x": str(layer.box[0]), "y": str(layer.box[1])}
    if layer.blend != "normal":
        attributes["composite-op"] = f"svg:{layer.blend}"
    if layer.hidden:
        attributes["visibility"] = "hidden"
    ElementTree.SubElement(stack, "layer", attributes)


def _add(archive: zipfile.ZipFile, name: str, data: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """Add a file; ZipInfo's date is always the same."""
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o644 << 16
    archive.writestr(info, data, compression)


def _thumbnail(picture: Pixels) -> bytes:
    image = Image.fromarray(picture)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
