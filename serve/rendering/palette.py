"""Palettes: lists of exact colors, from a text, from a palette file, or from the reference.

read_palette() reads `#RRGGBB,#RRGGBB,...`, a GIMP palette (.gpl) and an Adobe Swatch Exchange file (.ase).
dominant_colors() finds the colors of a picture, so a studio's model sheet is a palette too.
"""

from __future__ import annotations

import functools
import re
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from animediffusion.platform.errors import ConfigError
from animediffusion.serve.rendering.morphology import NEIGHBORS
from animediffusion.serve.rendering.sketch import Floats, Pixels

Color = tuple[int, int, int]
"""Red, green and blue, each 0..255."""

MAX_COLORS = 256
"""Largest number of different colors of a palette."""
NUM_DOMINANT = 48
"""Largest number of dominant colors of a reference."""
SAMPLES = 512
"""Dominant colors are found in at most SAMPLES x SAMPLES pixels of the reference."""
FLAT = 24.0
"""A pixel whose neighbors differ by more than about this many levels lies on a line or an edge, not in an area."""
APART = 3.0
"""Two dominant colors differ by at least this distance of `perceptual`."""
SMALLEST_SHARE = 5e-4
"""A dominant color covers at least this share of the reference."""

_HEX = re.compile(r"#?([0-9a-fA-F]{6})")
_GIMP_LINE = re.compile(r"\s*(\d{1,3})\s+(\d{1,3})\s+(\d{1,3})(?:\s+(.*))?")
_FORMATS = "#RRGGBB,#RRGGBB,..., a GIMP .gpl file or an Adobe .ase file"
_ASE_COLOR = 0x0001
_ASE_VALUES = {b"RGB ": 3, b"Gray": 1, b"GRAY": 1, b"CMYK": 4, b"LAB ": 3}


@dataclass(frozen=True)
class Palette:
    """Different colors in the order of the file, or, of a reference, by area; each with a name, which may be empty."""

    colors: tuple[Color, ...]
    names: tuple[str, ...]


def read_palette(data: str | bytes, *, thing: str = "palette") -> Palette:
    """Return the palette of a text or of the bytes of a file; the content decides the format.

    Raises:
        ConfigError: there is no color or more than MAX_COLORS, or the data is damaged or in another format.
    """
    return _read_palette(data, thing)


@functools.lru_cache(maxsize=16)  # A request reads its palette to check it and to color, and many have the same one.
def _read_palette(data: str | bytes, thing: str) -> Palette:
    if isinstance(data, bytes) and data[:4] == b"ASEF":
        entries = _read_ase(data, thing)
    else:
        text = data if isinstance(data, str) else _decoded(data, thing)
        is_gimp = text.lstrip("\ufeff").startswith("GIMP Palette")
        entries = _read_gimp(text, thing) if is_gimp else _read_hex(text, thing)
    named: dict[Color, str] = {}
    for color, name in entries:
        named.setdefault(color, name)
    if not named:
        raise ConfigError(thing, "has no color", _FORMATS)
    if len(named) > MAX_COLORS:
        raise ConfigError(thing, f"has {len(named)} colors", f"at most {MAX_COLORS}")
    return Palette(tuple(named), tuple(named.values()))


class Dominant(NamedTuple):
    """The dominant colors of a picture, largest area first."""

    colors: NDArray[np.int32]
    """[K, 3]: 0..255."""
    share: Floats
    """[K]: share of the picture's area that has about this color."""
    flatness: Floats
    """[K]: 1 if the area near this color has exactly this color, but for noise; near 0 in a gradient."""


def dominant_colors(*pictures: Pixels) -> Dominant:
    """Return the dominant colors of pictures [H, W, 3], at most NUM_DOMINANT.

    Each color is a mode of the histogram, so the flat areas of a clean picture give their exact colors, and the noise
    of a JPEG around a color is not a second color. Pixels on lines and edges hardly count.
    """
    steps = (-(-max(picture.shape[:2]) // SAMPLES) for picture in pictures)
    samples = [picture[::step, ::step] for picture, step in zip(pictures, steps, strict=True)]
    return _dominant_colors(*((sample.shape, sample.tobytes()) for sample in samples))


@functools.lru_cache(maxsize=16)  # Many drawings have the same reference.
def _dominant_colors(*pictures: tuple[tuple[int, ...], bytes]) -> Dominant:
    """Return the dominant colors of pictures, each given by its shape and its bytes."""
    samples = [np.frombuffer(data, np.uint8).reshape(shape) for shape, data in pictures]
    codes = [(sample.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)).ravel() for sample in samples]
    joint = np.concatenate(codes)
    found = np.unique(joint)
    where = np.searchsorted(found, joint)  # Faster than np.unique with return_inverse.
    weights = np.concatenate([_inner(sample).ravel() for sample in samples])
    area: NDArray[np.float64] = np.bincount(where, weights).astype(np.float64)
    colors = np.stack([found >> 16, found >> 8 & 255, found & 255], axis=1)
    places, left, histogram = perceptual(colors), area.copy(), _Histogram(colors)
    # A color's support is the area of all colors near it: the peak of a noisy flat is where most of its noise is.
    chosen: list[int] = []
    shares: list[float] = []
    flatness: list[float] = []
    while len(chosen) < NUM_DOMINANT:
        peak = histogram.peak(left)
        distance = ((places - places[peak]) ** 2).sum(axis=1)
        near = distance < APART**2
        share = left[near].sum() / area.sum()
        if not share > SMALLEST_SHARE:
            break
        chosen.append(peak)
        shares.append(share)
        flatness.append(area[distance < (APART / 2) ** 2].sum() / area[near].sum())
        left[near] = 0
    return Dominant(colors[chosen], np.array(shares, np.float32), np.array(flatness, np.float32))


def perceptual(colors: NDArray[Any]) -> Floats:
    """Return sRGB colors [..., 3] of 0..255 in CIELAB with compressed chroma, [..., 3].

    Distances are near those of CIEDE2000, and cheap: CIEDE2000 divides differences of saturated colors by about
    1 + 0.045 C, and the integral of that is this compression.
    """
    light = np.asarray(colors, np.float32) / np.float32(255)
    linear = np.where(light <= 0.04045, light / 12.92, ((light + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _TO_XYZ
    cubes = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    lightness = 116 * cubes[..., 1] - 16
    a, b = 500 * (cubes[..., 0] - cubes[..., 1]), 200 * (cubes[..., 1] - cubes[..., 2])
    chroma = np.hypot(a, b)
    squeeze = np.log1p(0.045 * chroma) / (0.045 * np.maximum(chroma, 1e-6))
    return np.stack([lightness, a * squeeze, b * squeeze], axis=-1).astype(np.float32)


_D50 = np.array([0.9642, 1.0, 0.8251])
_FROM_D50 = np.array(
    [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
)
"""CIE XYZ of the white D50 to linear sRGB (Lindbloom's matrix with the Bradford adaptation)."""
_TO_XYZ = (
    np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
    / np.array([[0.95047], [1.0], [1.08883]])
).T.astype(np.float32)
"""Linear sRGB to CIE XYZ, relative to the white D65."""


def _decoded(data: bytes, thing: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ConfigError(thing, "is not a palette", _FORMATS) from None


def _read_hex(text: str, thing: str) -> list[tuple[Color, str]]:
    """Read `#RRGGBB` colors, which commas, blanks or line ends separate."""
    entries: list[tuple[Color, str]] = []
    for part in text.replace(",", " ").split():
        if not _HEX.fullmatch(part):
            raise ConfigError(thing, f"{part[:40]!r} is not a color", _FORMATS)
        value = int(part[-6:], 16)
        entries.append(((value >> 16, value >> 8 & 255, value & 255), ""))
    return entries


def _read_gimp(text: str, thing: str) -> list[tuple[Color, str]]:
    """Read a GIMP palette: a header, then lines of red, green, blue and a name; `#` starts a comment."""
    entries: list[tuple[Color, str]] = []
    for number, line in enumerate(text.splitlines()[1:], 2):
        if not line.strip() or line.startswith(("#", "Name:", "Columns:")):
            continue
        found = _GIMP_LINE.fullmatch(line)
        if not found or max(map(int, found.groups()[:3])) > 255:
            raise ConfigError(thing, f"line {number} is {line[:40]!r}", "red, green, blue, each 0 to 255, and a name")
        red, green, blue = map(int, found.groups()[:3])
        name = (found[4] or "").strip()
        entries.append(((red, green, blue), "" if name == "Untitled" else name))
    return entries


def _read_ase(data: bytes, thing: str) -> list[tuple[Color, str]]:
    """Read an Adobe Swatch Exchange file; its groups are ignored.

    The file is a signature, a version and a number of blocks; a block is a type, a length and its content. A color's
    content is a name (its length and UTF-16, big-endian), a model of four letters, and a float for each component.
    """
    entries: list[tuple[Color, str]] = []
    try:
        (blocks,) = struct.unpack_from(">I", data, 8)
        start = 12
        for _ in range(blocks):
            kind, length = struct.unpack_from(">HI", data, start)
            start += 6
            if kind == _ASE_COLOR:
                entries.append(_ase_color(data, start, thing))
            start += length
    except struct.error:
        raise ConfigError(thing, "is a truncated .ase file", "a whole file") from None
    return entries


def _ase_color(data: bytes, start: int, thing: str) -> tuple[Color, str]:
    (length,) = struct.unpack_from(">H", data, start)
    (name,) = struct.unpack_from(f">{2 * length}s", data, start + 2)
    (model,) = struct.unpack_from(">4s", data, start + 2 + 2 * length)
    if model not in _ASE_VALUES:
        found = model.decode("latin-1")
        raise ConfigError(thing, f"has a color of the model {found!r}", "RGB, CMYK, Gray or LAB")
    values = np.array(struct.unpack_from(f">{_ASE_VALUES[model]}f", data, start + 6 + 2 * length))
    if not np.isfinite(values).all():
        raise ConfigError(thing, "has a color that is not a number", "finite values")
    if model == b"CMYK":
        values = (1 - values[:3]) * (1 - values[3])
    elif model == b"LAB ":
        values = _lab_to_rgb(values * (100, 1, 1))
    red, green, blue = np.rint(255 * np.clip(np.broadcast_to(values, 3), 0, 1)).astype(int).tolist()
    return (red, green, blue), name.decode("utf-16-be", "replace").rstrip("\0").strip()


def _lab_to_rgb(lab: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convert CIELAB of the white D50, as Adobe's, to sRGB in [0, 1], with the Bradford adaptation to D65."""
    middle = (lab[0] + 16) / 116
    roots = np.array([middle + lab[1] / 500, middle, middle - lab[2] / 200])
    xyz = np.where(roots > 6 / 29, roots**3, (roots - 4 / 29) * 3 * (6 / 29) ** 2) * _D50
    linear = np.clip(_FROM_D50 @ xyz, 0, 1)
    rgb: NDArray[np.float64] = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return rgb


def _inner(sample: Pixels) -> Floats:
    """Return the weight of each pixel, [H, W]: 1 inside of areas, nearly 0 on lines and edges."""
    levels = sample.astype(np.int16)
    edge = np.zeros(sample.shape[:2], np.int16)
    for one, other in NEIGHBORS:
        red, green, blue = np.moveaxis(np.abs(levels[one] - levels[other]), 2, 0)
        change = np.maximum(np.maximum(red, green), blue)
        for side in (one, other):
            np.maximum(edge[side], change, out=edge[side])
    weight: Floats = np.exp(-((edge / FLAT) ** 2)).astype(np.float32)
    return weight


class _Histogram:
    """A histogram of colors [N, 3] in cubes of eight levels."""

    def __init__(self, colors: NDArray[np.int32]) -> None:
        cells = (colors >> 3).astype(np.int32)
        self._keys = cells @ np.array([1 << 10, 1 << 5, 1], np.int32)
        self._order = np.argsort(self._keys, kind="stable")
        self._starts = np.searchsorted(self._keys[self._order], np.arange((1 << 15) + 1))

    def peak(self, area: NDArray[np.float64]) -> int:
        """Return the color with the largest area [N] in the fullest part of the histogram; any if no area is left."""
        grid = np.bincount(self._keys, area, minlength=1 << 15).reshape(32, 32, 32)
        smooth = np.pad(grid, 1)
        smooth = smooth[:-1] + smooth[1:]
        smooth = smooth[:, :-1] + smooth[:, 1:]
        smooth = smooth[:, :, :-1] + smooth[:, :, 1:]
        red, green, blue = np.unravel_index(int(smooth.argmax()), smooth.shape)
        corners = np.array([(red - x, green - y, blue - z) for x in (0, 1) for y in (0, 1) for z in (0, 1)])
        keys = corners[((corners >= 0) & (corners < 32)).all(axis=1)] @ np.array([1 << 10, 1 << 5, 1])
        inside = np.concatenate([self._order[self._starts[key] : self._starts[key + 1]] for key in keys])
        return int(inside[area[inside].argmax()]) if len(inside) else 0
