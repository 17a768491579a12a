"""Layers of a colored drawing: line art, highlights, shading, flats and region ids.

    flats x shading, screened with the highlights, x line art = the finished picture

All layers have 8 bits, and `picture_of` computes the finished picture from them, so a program that flattens the layers
gets the same picture, except for its own rounding. The modules in formats/ write the layers to files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from animediffusion.serve.rendering.coloring import Coloring, Region
from animediffusion.serve.rendering.sketch import Floats, Pixels
from animediffusion.serve.rendering.upsample import multiplied

Blend = Literal["normal", "multiply", "screen"]
Rect = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels; right and bottom are the first pixels outside."""

MAX_FLAT_LAYERS = 64
"""With more parts or colors, the flats are one layer: nobody wants to search for a color among hundreds of layers."""
MAX_FLAT_PIXELS = 250_000_000
"""With more pixels in their boxes together, the flats are one layer, so that a large drawing does not take minutes."""
ID_STEP = 0x9E3779
"""Odd, so that id x ID_STEP modulo 2^24 is a different color for each id; neighboring ids get very different colors."""
_BAND_PIXELS = 1 << 20
"""Pixels whose shading is computed together, to limit memory."""


@dataclass(frozen=True)
class Layer:
    """One layer of a file."""

    name: str
    box: Rect
    draw: Callable[[], Pixels]
    """Returns the pixels of the box, RGB or RGBA [h, w, C]; only called when the layer is written, to limit memory."""
    blend: Blend = "normal"
    hidden: bool = False


@dataclass(frozen=True)
class LayerGroup:
    """Layers and groups with a common name, which are blended normally."""

    name: str
    layers: tuple[Layer | LayerGroup, ...]
    """The uppermost layer comes first."""


class Shades(NamedTuple):
    """The shading of a picture as two layers above the flats."""

    shading: Pixels
    """[H, W, 3], multiplied: what is darker than its flat."""
    highlights: Pixels | None
    """[H, W, 3], screened: what is lighter than its flat; None if nothing is."""


def shades_of(coloring: Coloring) -> Shades | None:
    """Return the shading as 8-bit layers; None for a picture of flat colors."""
    if coloring.shading is None:
        return None
    flats, factors = coloring.flats, coloring.shading
    shading, highlights = np.empty_like(flats), np.zeros_like(flats)
    band = max(1, _BAND_PIXELS // flats.shape[1])
    for top in range(0, len(flats), band):
        rows = slice(top, top + band)
        factor, flat = factors[rows], flats[rows].astype(np.float32)
        shading[rows] = np.rint(255 * np.clip(factor, 0, 1))
        if (factor > 1).any():
            room = 255 - flat
            lighter = np.minimum(np.maximum(factor - 1, 0) * flat, room)
            highlights[rows] = np.rint(255 * lighter / np.maximum(room, 1))
    return Shades(shading, highlights if highlights.any() else None)


def colors_of(coloring: Coloring, shades: Shades | None) -> Pixels:
    """Return the colors without the lines, [H, W, 3]."""
    colors = coloring.flats
    if shades is None:
        return colors
    colors = multiplied(colors, shades.shading)
    return colors if shades.highlights is None else ~multiplied(~colors, ~shades.highlights)


def picture_of(coloring: Coloring, shades: Shades | None) -> Pixels:
    """Return the finished picture, [H, W, 3]."""
    return multiplied(colors_of(coloring, shades), coloring.drawing.pixels)


def layers_of(coloring: Coloring, shades: Shades | None) -> list[Layer | LayerGroup]:
    """Return the layers of a file, the uppermost first."""
    height, width = coloring.labels.shape
    page = (0, 0, width, height)
    above = [Layer("Line art", page, lambda: coloring.drawing.pixels, "multiply")]
    if shades is not None:
        if shades.highlights is not None:
            highlights = shades.highlights
            above.append(Layer("Highlights", page, lambda: highlights, "screen"))
        shading = shades.shading
        above.append(Layer("Shading", page, lambda: shading, "multiply"))
    ids = Layer("Region ids", page, lambda: id_colors(coloring.labels), hidden=True)
    return [*above, _flats(coloring, page), ids]


def id_colors(labels: NDArray[np.int32]) -> Pixels:
    """Return a color for each region id, [H, W, 3]: no two regions have the same color.

    The color as a number, red x 65536 + green x 256 + blue, is id x ID_STEP modulo 2^24.
    """
    numbers = np.arange(labels.max(initial=0) + 1, dtype=np.int64) * ID_STEP % (1 << 24)
    table = np.stack([numbers >> 16, numbers >> 8 & 255, numbers & 255], axis=1).astype(np.uint8)
    return table[labels]


def _flats(coloring: Coloring, page: Rect) -> Layer | LayerGroup:
    """Return one layer for each color, those of a part of the character in a group; the smallest come first."""
    parts: dict[str, list[Region]] = {}
    for region in coloring.regions:
        has_part = region.name not in ("", f"region {region.id}")
        parts.setdefault(region.name if has_part else hex_of(region.color), []).append(region)
    entries: list[Layer | LayerGroup] = []
    boxes = []
    for name, regions in sorted(parts.items(), key=_area_of):
        colors: dict[str, list[Region]] = {}
        for region in regions:
            colors.setdefault(hex_of(region.color), []).append(region)
        layers = [
            Layer(color if len(colors) > 1 else name, _around(some), partial(_part, coloring, some))
            for color, some in sorted(colors.items(), key=_area_of)
        ]
        boxes += [layer.box for layer in layers]
        entries.append(LayerGroup(name, tuple(layers)) if len(layers) > 1 else layers[0])
    if len(boxes) > MAX_FLAT_LAYERS or sum(map(_area, boxes)) > MAX_FLAT_PIXELS:
        return Layer("Flats", page, lambda: coloring.flats)
    return LayerGroup("Flats", tuple(entries))


def _area_of(named: tuple[str, list[Region]]) -> int:
    return sum(region.area for region in named[1])


def _around(regions: Sequence[Region]) -> Rect:
    left, top, right, bottom = zip(*(region.box for region in regions), strict=True)
    return min(left), min(top), max(right), max(bottom)


def _area(box: Rect) -> int:
    left, top, right, bottom = box
    return (right - left) * (bottom - top)


def _part(coloring: Coloring, regions: Sequence[Region]) -> Pixels:
    """Return the pixels of some regions inside their common box, RGBA; all others are transparent."""
    left, top, right, bottom = _around(regions)
    table = np.zeros((len(coloring.regions) + 1, 4), np.uint8)
    table[:, :3] = regions[0].color  # Planes of one value take no time to compress.
    for region in regions:
        table[region.id] = (*region.color, 255)
    return table[coloring.labels[top:bottom, left:right]]


def hex_of(color: tuple[int, int, int]) -> str:
    """Return a color as #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*color)


def shading_from(colors: Pixels, flats: Pixels) -> Floats:
    """Return the factors [H, W, 3] that make `colors` of `flats`."""
    factors: Floats = np.divide(colors, np.maximum(flats, 1), dtype=np.float32)
    return factors
