"""Draw the clothes and accessories of a face, in the head coordinates of pipelines/synthetic/hair.py."""

from __future__ import annotations

from collections.abc import Callable

from animediffusion.pipelines.synthetic.canvas import (
    Pen,
    Points,
    PointsLike,
    blob,
    curve,
    ellipse,
    join,
    mirror,
    shifted,
    straight,
)
from animediffusion.pipelines.synthetic.palette import CharacterPalette, Color, Tone

CLOTHES = ("sailor", "hoodie", "blazer", "kimono", "straps", "turtleneck", "shirt", "cape")
ACCESSORIES = ("none", "bow", "glasses", "headband", "clips", "flower", "beret", "cat ears", "headphones")

_SHOULDER = [(0.24, 0.92), (0.50, 1.03), (0.86, 1.16), (1.06, 1.42), (1.12, 2.0)]


def draw_clothes(pen: Pen, kind: str, palette: CharacterPalette) -> None:
    """Draw the shoulders and the clothes over them; the neck must already be drawn."""
    if kind == "hoodie":
        _hood(pen, palette)
    torso = join(curve(mirror(_SHOULDER)), curve(_SHOULDER))
    if kind != "straps":
        region = pen.region()
        pen.fill(torso, palette.clothes.base, region=region)
        pen.tint([(0.30, 0.9), (0.62, 1.3), (0.66, 2), (1.3, 2), (1.3, 0.9)], palette.clothes.shade, within=region)
        pen.stroke(torso)
        for side in (-1, 1):
            pen.stroke(curve([(side * 0.72, 1.62), (side * 0.70, 1.42), (side * 0.78, 1.28)]), 0.8, taper=(1, 0))
    _DETAILS[kind](pen, palette)


def draw_collar(pen: Pen, kind: str, palette: CharacterPalette) -> None:
    """Draw what distinguishes the clothes over a torso that is already drawn."""
    if kind != "straps":  # they draw shoulders of their own
        _DETAILS[kind](pen, palette)


def draw_accessory(pen: Pen, kind: str, palette: CharacterPalette, side: int) -> None:
    """Draw the accessory that is worn over the hair; `side` is -1 (left) or 1 (right).

    Glasses and cat ears have their own functions.
    """
    if kind == "bow":
        _bow(pen.moved(side * 0.56, -0.86), palette.accent, 0.34)
    elif kind == "headband":
        upper = curve([(-0.86, -0.22), (-0.70, -0.68), (0, -0.98), (0.70, -0.68), (0.86, -0.22)])
        lower = curve([(0.84, -0.06), (0.66, -0.52), (0, -0.80), (-0.66, -0.52), (-0.84, -0.06)])
        _piece(pen, join(upper, lower), palette.accent.base)
    elif kind == "clips":
        for y in (-0.34, -0.20):
            _piece(pen, ellipse(side * 0.52, y, 0.16, 0.055), palette.accent.base)
    elif kind == "flower":
        _flower(pen.moved(side * 0.62, -0.52), palette)
    elif kind == "beret":
        _beret(pen, palette, side)
    elif kind == "headphones":
        _headphones(pen, palette)


def draw_cat_ears(pen: Pen, palette: CharacterPalette) -> None:
    """Draw cat ears; the hair on the crown is drawn over them later."""
    for side in (-1, 1):
        outer = join(
            curve([(side * 0.22, -0.98), (side * 0.46, -1.24), (side * 0.74, -1.42)], 5),
            curve([(side * 0.74, -1.42), (side * 0.86, -1.0), (side * 0.82, -0.5)], 5),
        )
        pen.fill(outer, palette.hair.base if side < 0 else palette.hair.shade)
        pen.stroke(outer)
        inner = [(side * 0.42, -0.98), (side * 0.70, -1.28), (side * 0.75, -0.7)]
        _piece(pen, blob(inner, 5), palette.accent.light, 0.7)


def draw_glasses(pen: Pen, palette: CharacterPalette, spacing: float) -> None:
    """Draw glasses with clear lenses and frames in the accent's deep color; `spacing` is half the eyes' distance."""
    for side in (-1, 1):
        rim = blob(
            [
                (side * (spacing + dx), y)
                for dx, y in ((-0.23, 0.0), (0.0, -0.16), (0.26, -0.05), (0.22, 0.26), (0.0, 0.36), (-0.2, 0.26))
            ]
        )
        pen.rim(rim, palette.accent.deep, 1.5)
        pen.rim(curve([(side * (spacing + 0.26), 0.0), (side * 0.68, -0.03)]), palette.accent.deep, 1.3)
    pen.rim(curve([(-spacing + 0.23, 0.02), (0, -0.04), (spacing - 0.23, 0.02)]), palette.accent.deep, 1.3)


def _piece(pen: Pen, outline: PointsLike, color: Color, width: float = 1.0) -> None:
    """Draw a closed shape in one color with an ink outline."""
    pen.fill(outline, color)
    closed = join(outline, outline[:1])
    pen.stroke(straight(closed) if len(closed) < 9 else closed, width)


def _sailor(pen: Pen, palette: CharacterPalette) -> None:
    pen.fill([(-0.34, 0.92), (0, 1.44), (0.34, 0.92), (0.2, 0.86), (-0.2, 0.86)], palette.skin.base)
    for side in (-1, 1):
        flap = [(side * 0.22, 0.84), (side * 0.46, 0.98), (side * 0.66, 1.26), (side * 0.30, 1.40), (side * 0.02, 1.46)]
        _piece(pen, join(flap, [(side * 0.13, 1.12)]), palette.trim.base)
        stripe = [(side * 0.58, 1.24), (side * 0.30, 1.33), (side * 0.09, 1.38)]
        pen.stroke(stripe, 0.8)
    _bow(pen.moved(0, 1.42), palette.accent, 0.26)


def _hood(pen: Pen, palette: CharacterPalette) -> None:
    hood = blob([(-0.62, 0.62), (-0.86, 1.0), (-0.5, 1.3), (0.5, 1.3), (0.86, 1.0), (0.62, 0.62), (0, 0.5)])
    _piece(pen, hood, palette.clothes.shade)
    _piece(pen, blob([(-0.5, 0.76), (-0.56, 1.1), (0.56, 1.1), (0.5, 0.76)]), palette.clothes.deep, 0.8)


def _hoodie(pen: Pen, palette: CharacterPalette) -> None:
    _piece(
        pen,
        join(curve([(-0.34, 0.95), (-0.2, 1.22), (0, 1.32), (0.2, 1.22), (0.34, 0.95)]), [(0, 0.98)]),
        palette.trim.base,
    )
    _piece(pen, curve([(-0.25, 0.9), (-0.16, 1.06), (0, 1.12), (0.16, 1.06), (0.25, 0.9)]), palette.skin.shade)
    for side in (-1, 1):
        edge = join(
            curve([(side * 0.30, 0.88), (side * 0.34, 1.1), (side * 0.04, 1.38)]),
            curve([(side * 0.10, 1.44), (side * 0.48, 1.2), (side * 0.58, 0.98)]),
        )
        _piece(pen, edge, palette.clothes.base if side < 0 else palette.clothes.shade)
        cord = curve([(side * 0.16, 1.30), (side * 0.19, 1.45), (side * 0.17, 1.6)])
        pen.rim(cord, palette.accent.base, 1.6)


def _blazer(pen: Pen, palette: CharacterPalette) -> None:
    _piece(pen, [(-0.28, 0.92), (-0.1, 1.7), (0.1, 1.7), (0.28, 0.92)], palette.trim.base)
    for side in (-1, 1):
        collar = [(side * 0.22, 0.82), (side * 0.02, 1.08), (side * 0.20, 1.22), (side * 0.34, 0.94)]
        _piece(pen, collar, palette.trim.base)
        lapel = [
            (side * 0.30, 0.92),
            (side * 0.50, 1.02),
            (side * 0.52, 1.24),
            (side * 0.12, 1.72),
            (side * 0.22, 1.24),
        ]
        _piece(pen, lapel, palette.clothes.shade)
    _piece(pen, [(-0.08, 1.07), (0.08, 1.07), (0.06, 1.18), (-0.06, 1.18)], palette.accent.base)
    _piece(pen, [(-0.06, 1.18), (0.06, 1.18), (0.11, 1.7), (-0.11, 1.7)], palette.accent.base)


def _kimono(pen: Pen, palette: CharacterPalette) -> None:
    pen.fill([(-0.34, 0.92), (0, 1.34), (0.34, 0.92), (0.2, 0.86), (-0.2, 0.86)], palette.skin.base)
    for side in (1, -1):  # a kimono is worn left side over right, so the left side is drawn last
        for shift, color in ((0.0, palette.trim.base), (0.13, palette.accent.base)):
            a, b = side * (0.22 + shift), -side * (0.20 - shift)
            band = [(a, 0.84), (b, 1.56), (b + side * 0.15, 1.62), (a + side * 0.15, 0.92)]
            _piece(pen, band, color)


def _straps(pen: Pen, palette: CharacterPalette) -> None:
    region = pen.region()
    pen.fill(join(curve(mirror(_SHOULDER)), curve(_SHOULDER)), palette.skin.base, region=region)
    pen.tint([(0.62, 0.9), (0.8, 1.3), (0.8, 2), (1.3, 2), (1.3, 0.9)], palette.skin.shade, within=region)
    pen.stroke(join(curve(mirror(_SHOULDER))[:-4]))
    pen.stroke(curve(_SHOULDER)[4:])
    for side in (-1, 1):
        pen.stroke(curve([(side * 0.10, 1.06), (side * 0.30, 1.08), (side * 0.52, 1.05)]), 0.7, taper=(0.6, 0))
    top = curve([(-0.92, 1.36), (-0.5, 1.30), (-0.22, 1.30), (0, 1.36), (0.22, 1.30), (0.5, 1.30), (0.92, 1.36)])
    _piece(pen, join(top, [(1, 2), (-1, 2)]), palette.clothes.base)
    for side in (-1, 1):
        strap = [(side * 0.40, 1.00), (side * 0.48, 1.02), (side * 0.58, 1.34), (side * 0.46, 1.34)]
        _piece(pen, strap, palette.trim.base)
    _bow(pen.moved(0, 1.40), palette.accent, 0.18)


def _turtleneck(pen: Pen, palette: CharacterPalette) -> None:
    collar = join(curve([(-0.27, 0.74), (0, 0.84), (0.27, 0.74)]), curve([(0.34, 1.02), (0, 1.14), (-0.34, 1.02)]))
    _piece(pen, collar, palette.trim.base)
    pen.stroke(curve([(-0.1, 0.9), (-0.11, 1.04)]), 0.7)
    pen.stroke(curve([(0.1, 0.9), (0.11, 1.04)]), 0.7)


def _shirt(pen: Pen, palette: CharacterPalette) -> None:
    pen.fill([(-0.34, 0.92), (0, 1.30), (0.34, 0.92), (0.2, 0.86), (-0.2, 0.86)], palette.skin.base)
    for side in (-1, 1):
        _piece(
            pen, [(side * 0.24, 0.80), (side * 0.02, 1.24), (side * 0.30, 1.34), (side * 0.44, 0.98)], palette.trim.base
        )
    pen.stroke([(0.0, 1.26), (0.0, 2.0)])
    _piece(pen, ellipse(0.0, 1.40, 0.05, 0.05), palette.accent.base, 0.8)


def _cape(pen: Pen, palette: CharacterPalette) -> None:
    for side in (-1, 1):
        edge = curve([(side * 0.02, 1.26), (side * 0.12, 1.5), (side * 0.16, 2.0)])
        lining = join(edge, [(side * 0.02, 2.0)])
        _piece(pen, lining, palette.trim.base)
        collar = [
            (side * 0.24, 0.70),
            (side * 0.56, 0.76),
            (side * 0.52, 1.16),
            (side * 0.03, 1.28),
            (side * 0.20, 1.0),
        ]
        _piece(pen, collar, palette.trim.base)
    brooch = ellipse(0, 1.27, 0.12, 0.12)
    _piece(pen, brooch, palette.accent.base)
    pen.tint(ellipse(-0.03, 1.24, 0.05, 0.05), palette.accent.light)


def _bow(pen: Pen, tone: Tone, reach: float) -> None:
    for side in (-1, 1):
        end = [(0, 0), (side * 0.34 * reach, 1.15 * reach), (side * 0.74 * reach, 0.92 * reach)]
        _piece(pen, end, tone.shade)
        loop = blob(
            [
                (0, -0.06 * reach),
                (side * 0.7 * reach, -0.62 * reach),
                (side * 1.1 * reach, -0.4 * reach),
                (side * 1.05 * reach, 0.42 * reach),
                (side * 0.6 * reach, 0.5 * reach),
                (0, 0.1 * reach),
            ]
        )
        _piece(pen, loop, tone.base)
        pen.tint(
            blob([(side * 0.1 * reach, 0), (side * 0.55 * reach, -0.16 * reach), (side * 0.5 * reach, 0.2 * reach)]),
            tone.deep,
        )
    _piece(pen, ellipse(0, 0, 0.24 * reach, 0.27 * reach), tone.base)


def _flower(pen: Pen, palette: CharacterPalette) -> None:
    for dx, dy in ((0, -0.15), (0.145, -0.045), (0.09, 0.125), (-0.09, 0.125), (-0.145, -0.045)):
        _piece(pen, ellipse(dx, dy, 0.115, 0.115), palette.accent.light, 0.9)
    _piece(pen, ellipse(0, 0, 0.075, 0.075), palette.accent.deep, 0.9)


def _beret(pen: Pen, palette: CharacterPalette, side: int) -> None:
    shape = blob(
        [
            (-0.86 * side, -0.62),
            (-0.94 * side, -0.98),
            (-0.4 * side, -1.34),
            (0.4 * side, -1.28),
            (0.86 * side, -0.94),
            (0.74 * side, -0.70),
            (0, -0.80),
        ]
    )
    region = pen.region()
    pen.fill(shape, palette.accent.base, region=region)
    pen.tint(shifted(shape, 0.34, 0.2), palette.accent.shade, within=region)
    pen.stroke(shape)
    band = join(
        curve([(-0.84 * side, -0.56), (0, -0.80), (0.76 * side, -0.64)]),
        curve([(0.76 * side, -0.54), (0, -0.68), (-0.84 * side, -0.46)]),
    )
    _piece(pen, band, palette.accent.deep)
    pen.stroke(curve([(0.05 * side, -1.33), (0.08 * side, -1.42), (0.14 * side, -1.46)]), 1.8)


def _headphones(pen: Pen, palette: CharacterPalette) -> None:
    upper = curve([(-0.92, -0.05), (-0.82, -0.72), (0, -1.24), (0.82, -0.72), (0.92, -0.05)])
    lower: Points = curve([(0.82, -0.05), (0.74, -0.66), (0, -1.12), (-0.74, -0.66), (-0.82, -0.05)])
    _piece(pen, join(upper, lower), palette.accent.deep)
    for side in (-1, 1):
        _piece(pen, ellipse(side * 0.86, 0.08, 0.15, 0.27), palette.accent.base)
        pen.stroke(ellipse(side * 0.88, 0.08, 0.08, 0.18), 0.8)


_DETAILS: dict[str, Callable[[Pen, CharacterPalette], None]] = {
    "sailor": _sailor,
    "hoodie": _hoodie,
    "blazer": _blazer,
    "kimono": _kimono,
    "straps": _straps,
    "turtleneck": _turtleneck,
    "shirt": _shirt,
    "cape": _cape,
}
