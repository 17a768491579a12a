"""Draw the lines of a sketch in the manner of different people and tools, and put them on paper.

The colored picture keeps its own clean lines; only the sketch is drawn in such a manner.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Path = NDArray[np.complex128]
"""Points of a line in canvas pixels, x + iy."""
Gray = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How lines are drawn. Lengths are fractions of the picture's side."""

    width: float = 1.0
    """Factor on the width of all lines."""
    pressure: tuple[float, float] = (1.0, 1.0)
    """Range of the darkness of a line, 1 = black."""
    taper: float = 0.0
    """How much thinner lines are at their ends."""
    jitter: float = 0.0
    """Standard deviation of the displacement of a whole line."""
    wobble: float = 0.0
    """Standard deviation of the displacement along a line, which varies slowly."""
    gaps: float = 0.0
    """Probability that a line is interrupted."""
    overshoot: float = 0.0
    """Standard deviation of the length by which a line is drawn too far."""
    repeats: int = 1
    """How often each line is drawn, as in a rough sketch."""
    hatching: float = 0.0
    """Distance of the hatching lines in shadows; 0 = no hatching."""
    hatching_angle: float = 0.0
    blacks: float = 0.0
    """Areas darker than this brightness (0..1) are filled with ink."""
    extracted: bool = False
    """Whether the sketch is extracted from the picture by difference of Gaussians, as for pictures without line art."""
    blur: float = 0.0
    """Blur of the scan, in pixels."""
    grain: float = 0.0
    """How unevenly ink or pencil sticks to the paper."""
    ground: float = 0.0
    """Darkness of the paper."""
    unevenness: float = 0.0
    """How much darker one side of the paper is than the other."""
    noise: float = 0.0
    """Standard deviation of the noise of the scanner."""
    threshold: float = 0.0
    """Darkness above which pixels become black and below which they become white; 0 keeps grays."""

    def lines(self, path: Path, side: int, rng: np.random.Generator) -> Iterator[tuple[Path, float]]:
        """Yield the lines to draw for a line of a drawing, each with its darkness, 0..1."""
        low, high = self.pressure
        along = _along(len(path))
        for _ in range(self.repeats):
            x, y, wave_x, wave_y = rng.standard_normal(4).tolist()
            turn, phase, cut, place = rng.random(4).tolist()
            wave = np.sin((3 + 8 * turn) * along + 6.3 * phase) * (side * self.wobble * complex(wave_x, wave_y))
            moved = path + (wave + side * self.jitter * complex(x, y))
            if self.overshoot:
                moved = _longer(moved, side * self.overshoot * np.abs(rng.standard_normal(2)))
            darkness = low + (high - low) * place
            if cut < self.gaps and len(moved) > 7:
                at = 2 + int(place * (len(moved) - 5))
                yield moved[:at], darkness
                yield moved[at + 1 :], darkness
            else:
                yield moved, darkness

    def hatch(self, side: int) -> Image.Image:
        """Return parallel lines over the whole canvas, 0 or 255."""
        lines = Image.new("L", (side, side))
        brush = ImageDraw.Draw(lines)
        direction = np.exp(1j * self.hatching_angle)
        for offset in np.arange(-0.75, 0.75, max(0.012, self.hatching)) * side:
            center = (0.5 + 0.5j) * side + offset * direction * 1j
            ends = [center - direction * side, center + direction * side]
            brush.line([(end.real, end.imag) for end in ends], fill=255, width=max(1, round(0.004 * self.width * side)))
        return lines

    def scan(self, ink: Gray, picture: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        """Return the sketch, dark on white.

        Args:
            ink: darkness of the lines in 0..1, [S, S].
            picture: the colored picture with lines, [S, S, 3].
            rng: random generator of grain, unevenness and noise.
        """
        side = len(ink)
        if self.extracted:
            ink = _kept(ink, _difference_of_gaussians(picture, *rng.uniform((0.35, 6.0), (0.6, 14.0)).tolist()))
        if self.blur:
            blurred = Image.fromarray((255 * ink).astype(np.uint8)).filter(ImageFilter.GaussianBlur(self.blur))
            ink = np.asarray(blurred, np.float32) / np.float32(255)
        if self.grain:
            ink = ink * (1 - np.float32(self.grain) * rng.random((side, side), np.float32))
        if self.threshold:
            ink = (ink > self.threshold).astype(np.float32)
        paper: Gray = np.full_like(ink, 1 - self.ground)
        if self.unevenness:
            slope = np.linspace(-0.5, 0.5, side, dtype=np.float32)
            x, y = rng.uniform(-1, 1, 2).astype(np.float32)
            paper = paper - np.float32(self.unevenness) * np.abs(x * slope + y * slope[:, None])
        if self.noise:
            paper = paper + np.float32(self.noise) * rng.standard_normal((side, side), np.float32)
        return np.asarray(np.round(255 * np.clip(paper * (1 - ink), 0, 1)), np.uint8)


def random_manner(rng: np.random.Generator) -> Manner:
    """Choose how the lines of a sketch are drawn: with ink, a pencil, roughly, by extraction; on clean or old paper."""
    tool = str(rng.choice(_TOOLS, p=_SHARES))
    u = rng.random(16).tolist()
    width = 0.5 * 3.6 ** u[0]
    scanned = u[1] < 0.35
    paper = {
        "blur": 0.9 * u[2] if u[3] < 0.4 else 0.0,
        "ground": 0.18 * u[4] ** 2 if scanned else 0.0,
        "unevenness": 0.3 * u[5] ** 2 if scanned else 0.0,
        "noise": 0.04 * u[6] if scanned else 0.0,
    }
    if tool == "extracted":
        return Manner(extracted=True, blur=paper["blur"] if u[7] < 0.3 else 0.0)
    free = {
        "width": width,
        "taper": float(u[7]),
        "gaps": 0.5 * u[8] ** 2,
        "overshoot": 0.012 * u[9] ** 2,
        "wobble": 0.006 * u[10] ** 2,
        "jitter": 0.004 * u[11] ** 2,
        "hatching": 0.018 + 0.03 * u[12] if u[13] < 0.2 else 0.0,
        "hatching_angle": 3.1416 * u[14],
    }
    if tool == "ink":
        blacks = 0.25 + 0.2 * u[2] if u[15] < 0.3 else 0.0
        return Manner(**{**free, **paper}, blacks=blacks, threshold=0.22 if u[15] > 0.85 and width > 0.8 else 0.0)
    if tool == "pencil":
        low = 0.3 + 0.3 * u[15]
        return Manner(**{**free, **paper, "width": 0.8 + 0.5 * width}, pressure=(low, low + 0.35), grain=0.5 * u[2])
    return Manner(  # rough
        **{**free, **paper, "width": 0.5 * width + 0.2, "jitter": 0.004 + 0.007 * u[11], "overshoot": 0.02 * u[9]},
        pressure=(0.3, 0.9),
        repeats=2 + int(u[15] > 0.5),
        grain=0.4 * u[2],
    )


_TOOLS = ("ink", "pencil", "rough", "extracted")
_SHARES = (0.42, 0.22, 0.16, 0.2)


_ENOUGH = 0.6


@functools.lru_cache
def _along(count: int) -> NDArray[np.float64]:
    return np.linspace(0.0, 1.0, count)


def _longer(path: Path, lengths: NDArray[np.float64]) -> Path:
    """Extend both ends of a line along its direction."""
    start, end = path[0] - path[1], path[-1] - path[-2]
    before = path[0] + lengths[0] * start / (abs(start) + 1e-9)
    after = path[-1] + lengths[1] * end / (abs(end) + 1e-9)
    return np.concatenate([[before], path, [after]])


def _kept(drawn: Gray, extracted: Gray) -> Gray:
    """Return the extracted lines; the drawn lines if extraction finds too little, as in pictures of little contrast."""
    return extracted if extracted.sum() > _ENOUGH * drawn.sum() else drawn


def _difference_of_gaussians(picture: NDArray[np.uint8], sigma: float, strength: float) -> Gray:
    """Return the darkness of lines extracted from a picture, 0..1, [S, S]; dark areas are filled, as XDoG does."""
    gray = Image.fromarray(picture).convert("L")
    small, large = (
        np.asarray(gray.filter(ImageFilter.GaussianBlur(s)), np.float32) / 255 for s in (sigma, 3.5 * sigma)
    )
    response = np.asarray(gray, np.float32) / 255 * ((1 + strength) * small - strength * large)
    return (response < 0.01).astype(np.float32)
