"""Draw the background of a face: a flat color, or a pattern whose edges are light lines."""

from __future__ import annotations

import numpy as np

from animediffusion.pipelines.synthetic.canvas import Canvas, Frame, Pen, curve, ellipse
from animediffusion.pipelines.synthetic.palette import CharacterPalette, Color

BACKGROUNDS = ("flat", "gradient", "gradient", "disc", "disc", "horizon", "stripes", "rays", "dots", "frame")
"""Kinds to choose from; a kind that appears twice is chosen twice as often."""

_LIGHT_LINE = 0.25


def draw_background(
    canvas: Canvas, kind: str, palette: CharacterPalette, center: tuple[float, float], variation: float
) -> None:
    """Draw the background on a canvas.

    Args:
        canvas: a canvas whose ground is `palette.upper`.
        kind: one of BACKGROUNDS.
        palette: gives the two background colors: `lower` for the pattern, `upper` for the rest.
        center: center of the head, in fractions of the picture.
        variation: variation of the pattern, -1..1.
    """
    pen = Pen(canvas, Frame(1.0, 0.0, 0.0))
    x, y = center
    if kind == "gradient":
        pen.gradient([(0, 0), (1, 0), (1, 1), (0, 1)], palette.upper, palette.lower)
    elif kind == "disc":
        _piece(pen, ellipse(x + 0.1 * variation, y - 0.06, 0.42, 0.42, 60), palette.lower)
    elif kind == "horizon":
        level = 0.55 + 0.12 * variation
        hills = curve([(-0.1, level), (0.2, level - 0.07), (0.5, level + 0.03), (0.8, level - 0.05), (1.1, level)])
        _piece(pen, [*hills, (1.1, 1.1), (-0.1, 1.1)], palette.lower)
    elif kind == "stripes":
        for start in np.arange(-1.0, 1.2, 0.26) + 0.06 * variation:
            _piece(
                pen, [(start, 1.02), (start + 1.04, -0.02), (start + 1.12, -0.02), (start + 0.08, 1.02)], palette.lower
            )
    elif kind == "rays":
        for angle in np.arange(12) * (2 * np.pi / 12) + 0.2 * variation:
            edges = [(x + 1.5 * np.cos(angle + d), y + 1.5 * np.sin(angle + d)) for d in (-0.09, 0.09)]
            _piece(pen, [(x, y), *edges], palette.lower)
    elif kind == "dots":
        for row in range(5):
            for column in range(5):
                center = ((column + 0.5 * (row % 2)) * 0.27 + 0.05 * variation - 0.06, row * 0.24 + 0.06)
                _piece(pen, ellipse(*center, 0.055, 0.055, 24), palette.lower)
    elif kind == "frame":
        pen.fill([(0, 0), (1, 0), (1, 1), (0, 1)], palette.lower)
        _piece(pen, [(0.07, 0.07), (0.93, 0.07), (0.93, 1.1), (0.07, 1.1)], palette.upper)


def _piece(pen: Pen, outline: object, color: Color) -> None:
    points = np.asarray(outline, np.float64)
    pen.fill(points, color)
    pen.stroke(np.concatenate([points, points[:1]]), 0.8, _LIGHT_LINE)
