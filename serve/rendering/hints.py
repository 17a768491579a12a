"""Hints: points or strokes in a drawing with the exact color that the region under them gets.

    hints = read_hints('[{"x": 120, "y": 88, "color": "#e0b080"}]', width=512, height=512)
    colored = apply_hints(coloring, hints)

A hint replaces the color of a region and keeps its shading; this needs no network, so it is exact and immediate.
serve/web/scripts/picture.js does the same in the page, level by level. A learned hint has changed the network's picture
before: all that looks alike has its color (models/hint_spread.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from animediffusion.platform.errors import ConfigError, ImageError
from animediffusion.platform.images.codec import decode_rgba
from animediffusion.serve.rendering.coloring import Coloring, Region
from animediffusion.serve.rendering.morphology import joined
from animediffusion.serve.rendering.palette import Color
from animediffusion.serve.rendering.sketch import Pixels

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ANY_SIZE = 1_000_000
"""A side that no drawing exceeds."""
MAX_HINTS = 500
MAX_STROKE_COLORS = 256
"""An image with more colors is a painting or a photograph, not a layer of strokes."""
MIN_STROKE_PX = 4
"""A smaller spot of one color is where two antialiased strokes mix."""
STROKE_CELL_PX = 3
"""A stroke keeps one point in each cell of this size."""
STROKE_SHARE = 0.05
"""A stroke colors the regions that contain at least this share of it: it may slip over a line."""
SOLID = 128
"""Pixels with less alpha are the soft edge of a stroke."""

_FORM = 'give [{"x": 120, "y": 88, "color": "#e0b080"}] or a transparent PNG of strokes'
_COLOR = re.compile(r"#[0-9a-fA-F]{6}")
_KEYS = ("x", "y", "color", "learned", "scope")

Scope = Literal["piece", "whole", "color"]
"""What a hint colors: the `piece` under it, which is one region of a coloring; the `whole` region of the drawing, of
which a coloring makes several pieces where it has shadows or lights; or the regions of this `color` in all the drawing.
The shadows and lights of a whole region, or of a color, stay darker and lighter than the new color."""
SHADE = 98
"""Two colors are shades of one color if the cosine of the angle between them is at least SHADE / 100, black being the
origin. A shadow on anime skin or hair has 0.986 to 0.999 to its light, two colors of one character rarely more than
0.98."""


@dataclass(frozen=True)
class Hint:
    """A point, or a stroke of points, and the color of the region under it."""

    x: int
    """Column in the drawing's pixels, from 0."""
    y: int
    """Row in the drawing's pixels, from 0."""
    color: Color
    learned: bool = False
    """Whether other parts of the drawing that look alike get the color, too, see models/hint_spread.py."""
    scope: Scope = "piece"
    stroke: tuple[tuple[int, int], ...] = ()
    """Points (x, y) of a stroke, which include (x, y); empty for a single point."""


def read_hints(data: str | bytes, *, width: int, height: int, thing: str = "hints") -> tuple[Hint, ...]:
    """Return the hints in JSON, `[{"x", "y", "color": "#RRGGBB", "learned": false}]`, or in a PNG of strokes.

    Args:
        data: the text, or the bytes of a file.
        width: width of the drawing in pixels.
        height: height of the drawing in pixels.
        thing: name of the hints in error messages.

    Raises:
        ConfigError: the hints are not as described, are outside of the drawing, or are none or too many.
        ImageError: the PNG cannot be decoded.
    """
    if isinstance(data, bytes) and data.startswith(PNG_SIGNATURE):
        hints = _read_strokes(data, width, height, thing)
    else:
        hints = _read_json(data, width, height, thing)
    if not hints:
        raise ConfigError(thing, "contains no hint", f"{_FORM}, or omit it")
    if len(hints) > MAX_HINTS:
        raise ConfigError(thing, f"contains {len(hints):,} hints", f"at most {MAX_HINTS} are allowed")
    return hints


def points_for_network(hints: Sequence[Hint]) -> list[tuple[int, int, Color]]:
    """Return the points (x, y, color) of the learned hints, those of strokes included."""
    return [(x, y, hint.color) for hint in hints if hint.learned for x, y in (hint.stroke or ((hint.x, hint.y),))]


def check_hints(data: str | bytes, *, thing: str = "hints") -> None:
    """Raise ConfigError if the hints would be wrong for every drawing. Strokes are checked only with a drawing."""
    if not (isinstance(data, bytes) and data.startswith(PNG_SIGNATURE)):
        read_hints(data, width=ANY_SIZE, height=ANY_SIZE, thing=thing)


def wholes_of(coloring: Coloring, undivided: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the region of the drawing of which each region of a coloring is a piece, [N + 1], by id.

    Args:
        coloring: a coloring with the regions 1 to N.
        undivided: ids [H, W] of the drawing's regions.
    """
    wholes = np.zeros(len(coloring.regions) + 1, np.int32)
    wholes[coloring.labels] = undivided
    return wholes


def apply_hints(coloring: Coloring, hints: Sequence[Hint], wholes: NDArray[np.int32] | None = None) -> Coloring:
    """Return the coloring with the colors of the hints; if several hints are in one region, the last one counts.

    Args:
        coloring: the coloring.
        hints: the hints.
        wholes: from wholes_of(); without it, each region is a whole one.
    """
    if wholes is None:
        wholes = np.arange(len(coloring.regions) + 1, dtype=np.int32)
    colors: dict[int, Color] = {}
    for hint in hints:
        for piece in _regions_under(hint, coloring.labels):
            colors.update(_colored(coloring.regions, piece, hint, wholes))
    regions = tuple(replace(region, color=colors.get(region.id, region.color)) for region in coloring.regions)
    return replace(coloring, regions=regions)


def _colored(
    regions: Sequence[Region], piece: int, hint: Hint, wholes: NDArray[np.int32]
) -> Iterator[tuple[int, Color]]:
    """Yield the regions that a hint on a piece colors, with their colors."""
    if hint.scope == "piece":
        yield piece, hint.color
        return
    old = regions[piece - 1].color
    alike = [region for region in regions if region.color == old] if hint.scope == "color" else [regions[piece - 1]]
    reached = {int(wholes[region.id]) for region in alike}
    for region in regions:
        if int(wholes[region.id]) not in reached:
            continue
        if region.color == old:
            yield region.id, hint.color
        elif is_shade(region.color, old):
            yield region.id, shaded_like(hint.color, region.color, old)
        elif hint.scope == "whole":
            yield region.id, hint.color


def is_shade(one: Color, other: Color) -> bool:
    """Return whether one color is a shadow or a light of another."""
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return product**2 * 100**2 >= SHADE**2 * sum(a * a for a in one) * sum(b * b for b in other)


def shaded_like(color: Color, shade: Color, base: Color) -> Color:
    """Return what `color` is where `base` is `shade`: multiplied or screened, whichever changes it less.

    Multiplying alone would make black of a color where a shadow on a dark base is black, and screening alone would make
    white of it where a light on a pale base is white.
    """
    new, old = sum(shade), sum(base)
    nearest = max if new < old else min
    red, green, blue = (
        nearest(_scaled(level, new, old), 255 - _scaled(255 - level, 765 - new, 765 - old)) for level in color
    )
    return red, green, blue


def _scaled(level: int, new: int, old: int) -> int:
    if old == 0:
        return 255 if new else level
    return min(255, (2 * level * new + old) // (2 * old))


def _regions_under(hint: Hint, labels: NDArray[np.int32]) -> list[int]:
    """Return the ids of the regions that contain the hint, or a fair share of its stroke."""
    if not hint.stroke:
        return [int(labels[hint.y, hint.x])]
    x, y = np.array(hint.stroke).T
    ids, counts = np.unique(labels[y, x], return_counts=True)
    return [int(region) for region in ids[counts >= min(STROKE_SHARE * len(x), counts.max())]]


def _read_json(data: str | bytes, width: int, height: int, thing: str) -> tuple[Hint, ...]:
    try:
        entries = json.loads(data)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors.
        found = "is not JSON" if isinstance(data, str) else "is neither JSON nor a PNG"
        raise ConfigError(thing, found if data else "is empty", _FORM) from error
    if not isinstance(entries, list):
        raise ConfigError(thing, f"is {_shown(entries)}, not a list", _FORM)
    return tuple(_read_entry(entry, f"hint {n}", width, height, thing) for n, entry in enumerate(entries, start=1))


def _read_entry(entry: Any, name: str, width: int, height: int, thing: str) -> Hint:
    if not isinstance(entry, dict):
        raise ConfigError(thing, f"{name} is {_shown(entry)}", _FORM)
    for key in entry:
        if key not in _KEYS:
            raise ConfigError(thing, f"{name} has the unknown key {_shown(key)}", f"allowed are {', '.join(_KEYS)}")
    for key in ("x", "y", "color"):
        if key not in entry:
            raise ConfigError(thing, f"{name} lacks {key}", _FORM)
    color, learned = entry["color"], entry.get("learned", False)
    if not isinstance(color, str) or not _COLOR.fullmatch(color):
        raise ConfigError(thing, f"{name} has the color {_shown(color)}", "a color is #RRGGBB, for example #e0b080")
    if not isinstance(learned, bool):
        raise ConfigError(thing, f"{name} has learned {_shown(learned)}", "learned is true or false")
    scope = entry.get("scope", "piece")
    if scope not in get_args(Scope):
        raise ConfigError(thing, f"{name} has scope {_shown(scope)}", "scope is piece, whole or color")
    place = [entry["x"], entry["y"]]
    for axis, value in zip("xy", place, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(thing, f"{name} has {axis} {_shown(value)}", f"{axis} is a number of pixels")
    x, y = (math.floor(value) for value in place)
    if not (0 <= x < width and 0 <= y < height):
        found = f"{name} at {_shown(place[0])}, {_shown(place[1])} is outside of the drawing"
        raise ConfigError(thing, found, f"x is from 0 to {width - 1}, y from 0 to {height - 1}")
    red, green, blue = bytes.fromhex(color[1:])
    return Hint(x, y, (red, green, blue), learned, scope)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _read_strokes(data: bytes, width: int, height: int, thing: str) -> tuple[Hint, ...]:
    """Return a hint for each connected stroke of one color, the largest last, so that it wins in a shared region."""
    size = f"a PNG of strokes has the size of the drawing, {width:,} x {height:,}"
    try:
        pixels = decode_rgba(data, thing=thing, max_pixels=width * height, formats=("PNG",))
    except ImageError as error:
        if error.reason == "too_large":
            raise ConfigError(thing, error.found, size) from error
        raise
    if pixels.shape[:2] != (height, width):
        raise ConfigError(thing, f"is {pixels.shape[1]:,} x {pixels.shape[0]:,} pixels", size)
    if pixels[..., 3].min() >= SOLID:
        raise ConfigError(thing, "has no transparent part", "leave everything but the strokes transparent")
    strokes = sorted(_strokes(pixels, thing), key=len)
    return tuple(_stroke_hint(stroke, pixels) for stroke in strokes)


def _stroke_hint(points: NDArray[np.intp], pixels: Pixels) -> Hint:
    """Return the hint of a stroke [N, 2] of (y, x); its place is the point of the stroke nearest to the mean."""
    cells = np.unique(points // STROKE_CELL_PX, axis=0, return_index=True)[1]
    points = points[cells]
    y, x = points[np.square(points - points.mean(axis=0)).sum(axis=1).argmin()].tolist()
    red, green, blue = pixels[y, x, :3].tolist()
    return Hint(x, y, (red, green, blue), stroke=tuple((column, row) for row, column in points.tolist()))


def _strokes(pixels: Pixels, thing: str) -> Iterator[NDArray[np.intp]]:
    """Yield the pixels [N, 2] as (y, x) of each connected stroke of one color."""
    solid = pixels[..., 3] >= SOLID
    places, colors = np.argwhere(solid), pixels[solid].astype(np.int32)
    codes = colors[:, 0] << 16 | colors[:, 1] << 8 | colors[:, 2]
    values, counts = np.unique(codes, return_counts=True)
    if (counts >= MIN_STROKE_PX).sum() > MAX_STROKE_COLORS:
        found = f"has {len(values):,} colors"
        raise ConfigError(thing, found, f"strokes have at most {MAX_STROKE_COLORS} plain colors, without shading")
    labels = _components(places, codes, pixels.shape[1])
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    yield from (stroke for stroke in np.split(places[order], starts[1:]) if len(stroke) >= MIN_STROKE_PX)


def _components(places: NDArray[np.intp], codes: NDArray[np.int32], width: int) -> NDArray[np.intp]:
    """Return the component of each pixel, [N]: 8-connected pixels of the same code have the same number.

    A number is the index of the first pixel of the component.

    Args:
        places: pixels [N, 2] as (y, x), in row order.
        codes: color of each pixel, [N].
        width: width of the picture.
    """
    x, flat = places[:, 1], places @ np.array([width, 1])
    edges = []
    for down, right in ((0, 1), (1, -1), (1, 0), (1, 1)):
        wanted = flat + down * width + right
        near = np.minimum(np.searchsorted(flat, wanted), len(flat) - 1)
        same = (flat[near] == wanted) & (codes[near] == codes) & (x + right >= 0) & (x + right < width)
        edges.append(np.stack([np.flatnonzero(same), near[same]]))
    one, other = np.concatenate(edges, axis=1)
    return joined(len(flat), one, other)
