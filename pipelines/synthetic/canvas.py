"""A canvas with two layers drawn from the same curves: flat colors below, ink lines above.

    canvas = Canvas(64, ground=(240, 230, 220))
    pen = Pen(canvas, Frame(scale=0.3, x=0.5, y=0.5))      # units: fractions of the picture
    face = blob([(-1, 0), (0, -1), (1, 0), (0, 1)])
    pen.fill(face, skin)                                   # hides color *and* lines below
    pen.stroke(face)                                       # draws an ink line
    target, sketch = canvas.finish()

Everything is drawn at 4 times the size (2 times above 256 px) and averaged down, so edges are smooth. A canvas that
keeps its fills also returns the exact regions of the drawing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from skimage.measure import label
from skimage.segmentation import expand_labels

from animediffusion.pipelines.synthetic.linework import Manner
from animediffusion.pipelines.synthetic.palette import INK, Color, Tone
from animediffusion.pipelines.synthetic.shading import Shading

Points = NDArray[np.float64]
PointsLike = Points | Sequence[Sequence[float]]

SMALLEST_REGION = 4
"""A flat area of fewer pixels, for example between two lines that nearly touch, belongs to the region next to it."""


def curve(points: PointsLike, samples: int = 7) -> Points:
    """Return a smooth open curve through the points (Catmull-Rom), [N, 2]."""
    p = np.asarray(points, np.float64)
    return _spline(len(p), samples, False) @ p


def blob(points: PointsLike, samples: int = 7) -> Points:
    """Return a smooth closed curve through the points, [N, 2]; the last point equals the first."""
    p = np.asarray(points, np.float64)
    return _spline(len(p), samples, True) @ p


def ellipse(x: float, y: float, rx: float, ry: float, samples: int = 28) -> Points:
    """Return a closed ellipse, [N, 2]."""
    return _circle(samples) * (rx, ry) + (x, y)


def mirror(points: PointsLike) -> Points:
    """Return the points with x negated and in reverse order, so that a right half continues as a left half."""
    return (np.asarray(points, np.float64) * (-1, 1))[::-1]


def straight(corners: PointsLike, samples: int = 6) -> Points:
    """Return a polyline with extra points along its edges, so that a stroke keeps its width up to the corners."""
    p = np.asarray(corners, np.float64)
    t = np.arange(samples)[:, None] / samples
    edges: Points = (p[:-1, None] * (1 - t) + p[1:, None] * t).reshape(-1, 2)
    return np.concatenate([edges, p[-1:]])


def shifted(points: PointsLike, dx: float, dy: float) -> Points:
    """Return the points moved by (dx, dy)."""
    moved: Points = np.asarray(points, np.float64) + np.array((dx, dy))
    return moved


def join(*parts: PointsLike) -> Points:
    """Concatenate several curves to one outline, [N, 2]."""
    return np.concatenate([np.asarray(part, np.float64) for part in parts])


@functools.lru_cache
def _circle(samples: int) -> Points:
    angle = np.linspace(0, 2 * np.pi, samples)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


@functools.lru_cache
def _spline(count: int, samples: int, closed: bool) -> Points:
    """Return weights [M, count] that map `count` points to a Catmull-Rom curve, which is linear in its points."""
    p = np.eye(count)
    padded = (
        np.concatenate([p[-1:], p, p[:2]]) if closed else np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    )
    t = np.arange(samples)[:, None] / samples
    powers = np.concatenate([t**0, t, t**2, t**3], axis=1)
    basis = powers @ (np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]]) / 2)
    spans = np.stack([padded[:-3], padded[1:-2], padded[2:-1], padded[3:]], axis=1)
    return np.concatenate([np.matmul(basis, spans).reshape(-1, count), padded[-2:-1]])


@functools.lru_cache
def _bulge(count: int, start: float, end: float) -> Points:
    """Return the relative width of a stroke at `count` points along it, 1 in the middle."""
    along = np.linspace(0, 1, count)
    return np.minimum(1, np.minimum(start + 2.2 * along, end + 2.2 * (1 - along)))


@dataclass(frozen=True)
class Frame:
    """Transform from local coordinates to the picture: bend, stretch, rotate by `angle`, scale, and move to (x, y)."""

    scale: float
    x: float
    y: float
    angle: float = 0.0
    bend: tuple[float, float, float] | None = None
    """Amplitude, frequency and phase of waves along both axes."""
    stretch: float = 1.0
    """Factor on the width; negative mirrors."""

    @functools.cached_property
    def _turn(self) -> Points:
        cos, sin = math.cos(self.angle) * self.scale, math.sin(self.angle) * self.scale
        return np.array([[cos * self.stretch, sin * self.stretch], [-sin, cos]])

    @functools.cached_property
    def _origin(self) -> Points:
        return np.array([self.x, self.y])

    def moved(self, dx: float, dy: float) -> Frame:
        """Return the frame shifted by (dx, dy) in local units."""
        (x, y), *_ = self([(dx, dy)])
        return replace(self, x=float(x), y=float(y))

    def __call__(self, points: PointsLike) -> Points:
        if self.bend:
            amplitude, frequency, phase = self.bend
            p = np.asarray(points, np.float64)
            points = p + amplitude * np.sin(frequency * p[:, ::-1] + phase)
        return np.asarray(points, np.float64) @ self._turn + self._origin


class FlatRegions(NamedTuple):
    """The regions of a drawing: flat areas, each bounded by lines and by areas of another flat color."""

    labels: NDArray[np.int32]
    """[size, size]: 1..N; every pixel, those under lines included, belongs to one region."""
    colors: NDArray[np.uint8]
    """[N, 3]: the flat color of region 1..N, without shadows and lights, or the mean of its gradient. In two drawings
    of a character, regions of the same color are counterparts."""

    def counterparts(self, other: FlatRegions) -> NDArray[np.bool_]:
        """Return which regions of another drawing show the same part, [N, M]: row i - 1 is region i of this drawing."""
        same: NDArray[np.bool_] = (self.colors[:, None] == other.colors[None]).all(axis=-1)
        return same


class Canvas:
    """Two layers of one drawing: `color`, and `ink` (0 = none, 255 = full line).

    Args:
        size: side of the picture in pixels.
        ground: first color of the background.
        shading: look of the picture; by default hard shadows and full lines.
        manner: how the lines of the sketch are drawn; by default the sketch has the lines of the picture.
        rng: random generator of the sketch's lines, needed with `manner`.
        keep_fills: whether to remember which fill each pixel comes from; regions() needs it.
    """

    def __init__(
        self,
        size: int,
        ground: Color,
        shading: Shading | None = None,
        manner: Manner | None = None,
        rng: np.random.Generator | None = None,
        *,
        keep_fills: bool = False,
    ) -> None:
        self.size = size
        self.oversampling = 4 if size <= 256 else 2
        self.side = size * self.oversampling
        self.color = Image.new("RGB", (self.side, self.side), ground)
        self.ink = Image.new("L", (self.side, self.side))
        self.brush = ImageDraw.Draw(self.color)
        self.nib = ImageDraw.Draw(self.ink)
        self.fills = Image.new("I", (self.side, self.side)) if keep_fills else None
        self.flat_colors = [ground]
        self.shading = shading or Shading()
        self.draft = _Draft(self.side, manner, rng) if manner and rng else None
        self._figure: Image.Image | None = None
        self._outline: ImageDraw.ImageDraw | None = None
        # Line width grows slower than the picture: 0.8 pixels at 64 px, 1.9 at 256 px.
        self.line = 0.067 * size**0.6 / size

    def begin_figures(self) -> None:
        """Say that all that is drawn from now on belongs to figures, which get rim light."""
        if self.shading.rim and self._figure is None:
            self._figure = Image.new("L", (self.side, self.side))
            self._outline = ImageDraw.Draw(self._figure)

    def fill(self, flat: list[float], color: Color) -> None:
        """Fill a polygon, given in canvas pixels, with a color and erase the lines in it."""
        self.brush.polygon(flat, fill=color)
        self.nib.polygon(flat, fill=0)
        if self.draft:
            self.draft.fill(flat, color)
        if self._outline:
            self._outline.polygon(flat, fill=255)
        if self.fills is not None:
            ImageDraw.Draw(self.fills).polygon(flat, fill=self._number(color))

    def finish(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Return the picture [size, size, 3] with its lines, and the lines alone [size, size], dark on white."""
        if self.shading == _PLAIN:
            self.color.paste(INK, (0, 0), self.ink)
            target = np.array(self.color.reduce(self.oversampling))
        else:
            target = self._shaded()
        if self.draft:
            return target, self.draft.finish(self.oversampling, target)
        return target, np.array(ImageChops.invert(self.ink).reduce(self.oversampling))

    def _shaded(self) -> NDArray[np.uint8]:
        figure = None if self._figure is None else self._share(self._figure)
        colors = self.shading.apply(np.asarray(self.color.reduce(self.oversampling), np.float32), figure)
        ink = self.shading.ink_opacity * self._share(self.ink)[..., None]
        return np.asarray(np.round(colors + ink * (np.asarray(self.shading.ink, np.float32) - colors)), np.uint8)

    def _share(self, layer: Image.Image) -> NDArray[np.float32]:
        return np.asarray(layer.reduce(self.oversampling), np.float32) / np.float32(255)

    def fill_mask(self, mask: Image.Image, box: tuple[int, int, int, int], color: Color) -> None:
        """Fill a box, in canvas pixels, with a color where the mask is white, and erase the lines there."""
        self.color.paste(color, box, mask)
        self.ink.paste(0, box, mask)
        if self.draft:
            self.draft.ink.paste(0, box, mask)
        if self.fills is not None:
            self.fills.paste(self._number(color), box, mask)

    def gradient(self, box: tuple[int, int, int, int], top: Color, bottom: Color, mask: Image.Image) -> None:
        """Color a box, in canvas pixels, with a vertical gradient where the mask is white."""
        ramp = Image.linear_gradient("L").resize(mask.size)
        blend = Image.composite(Image.new("RGB", mask.size, bottom), Image.new("RGB", mask.size, top), ramp)
        self.color.paste(blend, box, mask)
        if self.fills is not None:
            red, green, blue = ((high + low) // 2 for high, low in zip(top, bottom, strict=True))
            self.fills.paste(self._number((red, green, blue)), box, mask)

    def regions(self, tones: Sequence[Tone]) -> FlatRegions:
        """Return the regions of what has been drawn.

        Tints belong to the region that they lie in, and so do fills in another color of the same tone unless a line is
        between.

        Raises:
            ValueError: the canvas did not keep its fills.
        """
        if self.fills is None:
            raise ValueError("the canvas did not keep its fills")
        material = {color: number for number, tone in enumerate(tones) for color in tone}
        others = {color: number for number, color in enumerate(self.flat_colors, len(tones))}
        materials = np.array([material.get(color, others[color]) for color in self.flat_colors])
        fills, ink = np.array(self.fills), np.array(self.ink)
        areas = label(  # type: ignore[no-untyped-call]
            np.where(ink > 0, 0, materials[fills] + 1), background=0, connectivity=1
        )
        middle = slice(self.oversampling // 2, None, self.oversampling)
        fills, areas = fills[middle, middle], areas[middle, middle]
        areas[np.bincount(areas.ravel())[areas] < SMALLEST_REGION] = 0
        found, numbers = np.unique(areas, return_inverse=True)
        if found[0]:
            numbers += 1  # no pixel is on a line
        numbers = numbers.reshape(areas.shape)
        votes = np.bincount((numbers * len(materials) + fills).ravel(), minlength=(numbers.max() + 1) * len(materials))
        flats = votes.reshape(-1, len(materials))[1:].argmax(axis=1)
        labels = expand_labels(numbers, distance=2 * self.size)  # type: ignore[no-untyped-call]
        return FlatRegions(labels.astype(np.int32), np.array(self.flat_colors, np.uint8)[flats])

    def _number(self, color: Color) -> int:
        """Return the place of a color in `flat_colors`, to which new colors are appended."""
        if color not in self.flat_colors:
            self.flat_colors.append(color)
        return self.flat_colors.index(color)


_PLAIN = Shading()
_NOWHERE: Points = np.empty((0, 2))
_FULL_LINES = 0.2
"""Scale of a frame below which its lines get thinner, so that small figures keep their colors."""


class _Draft:
    """The lines of a sketch that are drawn in another manner than the picture's."""

    def __init__(self, side: int, manner: Manner, rng: np.random.Generator) -> None:
        self.manner, self.rng = manner, rng
        self.ink = Image.new("L", (side, side))
        self.nib = ImageDraw.Draw(self.ink)
        self.hatch = manner.hatch(side) if manner.hatching else None

    def fill(self, flat: list[float], color: Color) -> None:
        """Erase the lines in a polygon, or fill it with ink if its color is dark and the manner has blacks."""
        self.nib.polygon(flat, fill=255 if max(color) < 255 * self.manner.blacks else 0)

    def shade(self, mask: Image.Image, box: tuple[int, int, int, int]) -> None:
        """Hatch a shadow."""
        if self.hatch:
            self.ink.paste(200, box, ImageChops.multiply(mask, self.hatch.crop(box)))

    def stroke(self, path: NDArray[np.complex128], half: float, strength: float, taper: tuple[float, float]) -> None:
        """Draw a line given in canvas pixels."""
        start, end = (value * (1 - self.manner.taper) for value in taper)
        for line, darkness in self.manner.lines(path, self.ink.width, self.rng):
            outline = _band(line, half * self.manner.width, (start, end))
            self.nib.polygon(outline, fill=round(255 * strength * darkness))

    def finish(self, oversampling: int, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        ink = np.asarray(self.ink.reduce(oversampling), np.float32) / np.float32(255)
        return self.manner.scan(ink, picture, self.rng)


def _band(path: NDArray[np.complex128], half: float, taper: tuple[float, float]) -> list[float]:
    """Return the outline of a line of half width `half`, in canvas pixels."""
    steps = np.empty_like(path)
    np.subtract(path[2:], path[:-2], out=steps[1:-1])
    steps[0], steps[-1] = path[1] - path[0], path[-1] - path[-2]
    across = steps * (half * 1j * _bulge(len(path), *taper) / (np.abs(steps) + 1e-9))
    outline: list[float] = np.concatenate([path + across, (path - across)[::-1]]).view(np.float64).tolist()
    return outline


class Pen:
    """A pen that draws on a canvas in the coordinates of one frame."""

    def __init__(self, canvas: Canvas, frame: Frame) -> None:
        self.canvas = canvas
        self.frame = frame
        self._points: PointsLike = ()
        self._placed = _NOWHERE

    def moved(self, dx: float, dy: float) -> Pen:
        """Return a pen whose origin is shifted by (dx, dy)."""
        return Pen(self.canvas, self.frame.moved(dx, dy))

    def region(self, *shapes: PointsLike) -> Image.Image:
        """Return a mask of these shapes; `fill(..., region=...)` adds more shapes."""
        mask = Image.new("L", self.canvas.color.size)
        brush = ImageDraw.Draw(mask)
        for shape in shapes:
            brush.polygon(self._pixels(shape), fill=255)
        return mask

    def fill(self, points: PointsLike, color: Color, *, region: Image.Image | None = None) -> None:
        """Fill a shape with a color and erase the lines in it; optionally add the shape to a region."""
        flat = self._pixels(points)
        self.canvas.fill(flat, color)
        if region is not None:
            ImageDraw.Draw(region).polygon(flat, fill=255)

    def fill_within(self, points: PointsLike, region: Image.Image, color: Color) -> None:
        """Fill the part of a shape that is inside a region with a color, and erase the lines there."""
        if (local := self._mask(self._pixels(points), region, 1.0)) is not None:
            mask, box = local
            self.canvas.fill_mask(mask, box, color)

    def tint(
        self, points: PointsLike, color: Color, *, within: Image.Image | None = None, opacity: float = 1.0
    ) -> None:
        """Color a shape below the lines; with `within`, only inside that region."""
        flat = self._pixels(points)
        if within is None and opacity == 1.0:
            self.canvas.brush.polygon(flat, fill=color)
        elif (local := self._mask(flat, within, opacity, soft=True)) is not None:
            mask, box = local
            self.canvas.color.paste(color, box, mask)
            if self.canvas.draft:
                self.canvas.draft.shade(mask, box)

    def gradient(self, points: PointsLike, top: Color, bottom: Color, *, within: Image.Image | None = None) -> None:
        """Color a shape with a vertical gradient, below the lines; with `within`, only inside that region."""
        if (local := self._mask(self._pixels(points), within, 1.0)) is not None:
            mask, box = local
            self.canvas.gradient(box, top, bottom, mask)

    def stroke(
        self, points: PointsLike, width: float = 1.0, strength: float = 1.0, taper: tuple[float, float] = (1.0, 1.0)
    ) -> None:
        """Draw an ink line along a curve.

        Args:
            points: the curve, at least two points.
            width: width in the middle, in units of the canvas's line width.
            strength: opacity of the ink; 1 is full ink.
            taper: width at the start and at the end, as a share of `width`.
        """
        path, half = self._path(points), self._half(width)
        self.canvas.nib.polygon(_band(path, half * self.canvas.shading.width, taper), fill=round(255 * strength))
        if self.canvas.draft:
            self.canvas.draft.stroke(path, half, strength, taper)

    def rim(self, points: PointsLike, color: Color, width: float) -> None:
        """Draw a thick colored band with ink edges along a curve, for example a wire or a cord."""
        path = self._path(points)
        flat, edge = (_band(path, self._half(wide), (1.0, 1.0)) for wide in (width, width + 1.2))
        self.canvas.nib.polygon(edge, fill=255)
        if self.canvas.draft:
            self.canvas.draft.nib.polygon(edge, fill=255)
        self.canvas.fill(flat, color)

    def stroke_within(self, points: PointsLike, region: Image.Image, width: float) -> None:
        """Draw an ink line along a curve, only inside a region."""
        local = self._mask(_band(self._path(points), self._half(width), (1.0, 1.0)), region, 1.0)
        if local is not None:
            mask, box = local
            self.canvas.ink.paste(255, box, mask)
            if self.canvas.draft:
                self.canvas.draft.ink.paste(255, box, mask)

    def erase(self, points: PointsLike) -> None:
        """Remove the ink inside a shape; colors stay."""
        self.canvas.nib.polygon(self._pixels(points), fill=0)
        if self.canvas.draft:
            self.canvas.draft.nib.polygon(self._pixels(points), fill=0)

    def _place(self, points: PointsLike) -> Points:
        """Return the points in canvas pixels; most shapes are filled and then outlined, so the last are kept."""
        if points is not self._points:
            self._points, self._placed = points, self.frame(points) * self.canvas.side
        return self._placed

    def _path(self, points: PointsLike) -> NDArray[np.complex128]:
        path: NDArray[np.complex128] = self._place(points).view(np.complex128)[:, 0]
        return path

    def _half(self, width: float) -> float:
        thin = max(0.55, min(1.0, self.frame.scale / _FULL_LINES)) ** 0.6
        half: float = 0.5 * width * thin * self.canvas.line * self.canvas.side
        return half

    def _pixels(self, points: PointsLike) -> list[float]:
        pixels: list[float] = self._place(points).ravel().tolist()
        return pixels

    def _mask(
        self, flat: list[float], within: Image.Image | None, opacity: float, *, soft: bool = False
    ) -> tuple[Image.Image, tuple[int, int, int, int]] | None:
        """Return the shape as a mask of its bounding box, and the box; None if the box is outside the picture."""
        points, side = np.array(flat).reshape(-1, 2), self.canvas.side
        (low_x, low_y), (high_x, high_y) = points.min(0).tolist(), points.max(0).tolist()
        blur = 0.0
        if soft and within is not None and self.canvas.shading.softness:
            blur = min(self.canvas.shading.softness * side, 0.2 * min(high_x - low_x, high_y - low_y))
            low_x, low_y, high_x, high_y = low_x - blur, low_y - blur, high_x + blur, high_y + blur
        left, top = max(0, int(low_x) - 1), max(0, int(low_y) - 1)
        right, bottom = min(side, int(high_x) + 2), min(side, int(high_y) + 2)
        if right <= left or bottom <= top:
            return None
        mask = Image.new("L", (right - left, bottom - top))
        shifted = (points - (left, top)).ravel().tolist()
        ImageDraw.Draw(mask).polygon(shifted, fill=round(255 * opacity))
        if blur >= 1:
            mask = mask.filter(ImageFilter.BoxBlur(blur))
        if within is not None:
            mask = ImageChops.multiply(mask, within.crop((left, top, right, bottom)))
        return mask, (left, top, right, bottom)
