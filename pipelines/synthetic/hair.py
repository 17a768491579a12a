"""Draw the hair of a face: the hair behind the head, the locks in front, shadow and shine.

In head coordinates, the face is about 1.25 wide, the eyes are at y = 0.12, the chin is near y = 0.8, and the crown is
near y = -1.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from animediffusion.pipelines.synthetic.canvas import Pen, Points, blob, curve, ellipse, join, mirror, shifted
from animediffusion.pipelines.synthetic.palette import Tone

BACKS = ("long", "wavy", "bob", "short", "spiky", "twin tails", "braids", "buns", "side tail")
FRONTS = ("locks", "blunt", "swept", "parted", "spiky", "curtain")
MORE_BACKS = ("afro", "ponytail", "drills", "waterfall", "none")
MORE_FRONTS = ("wild", "wild", "cover", "slick")

_HALVES: dict[str, list[tuple[float, float]]] = {
    "long": [(0.72, -0.86), (0.90, -0.25), (0.92, 0.4), (1.0, 1.0), (1.04, 2.0)],
    "wavy": [(0.74, -0.86), (0.96, -0.25), (0.90, 0.2), (1.14, 0.62), (1.0, 1.05), (1.2, 1.5), (1.05, 2.0)],
    "bob": [(0.74, -0.86), (0.93, -0.2), (0.98, 0.3), (0.90, 0.72), (0.62, 0.86)],
    "short": [(0.68, -0.86), (0.82, -0.3), (0.78, 0.2), (0.58, 0.52)],
    "afro": [(0.80, -1.30), (1.28, -0.85), (1.36, -0.2), (1.18, 0.4), (0.70, 0.62)],
    "waterfall": [(0.76, -0.9), (1.06, -0.3), (1.20, 0.6), (1.34, 1.6), (1.20, 2.8), (0.8, 3.4)],
}
_BACK_OF_NECK = {"bob": 0.62, "short": 0.4, "afro": 0.5, "waterfall": 3.5}


def draw_behind(pen: Pen, back: str, tone: Tone, volume: float = 1.0, strands: Sequence[float] = ()) -> None:
    """Draw the hair behind the shoulders.

    Args:
        pen: a pen in head coordinates.
        back: a style of BACKS or MORE_BACKS.
        tone: color of the hair.
        volume: factor on its width.
        strands: displacements of the points of the outline, the left half's after the right half's.
    """
    if back == "none":
        return
    if back == "ponytail":
        _ponytail(pen, tone, strands)
    half = _HALVES.get(back, _HALVES["short"])
    low = _BACK_OF_NECK.get(back, 2.0 if back in _HALVES else 0.4)
    top = (0, -1.45) if back == "afro" else (0, -1.08)
    points = np.array([top, *half, (0, low), *mirror(half)])
    if volume != 1.0 or len(strands):
        points[:, 0] *= volume
        free = np.arange(len(points)) % (len(half) + 1) > 1  # not at the crown
        points += np.resize(np.asarray(strands, np.float64), points.shape) * free[:, None] if len(strands) else 0.0
    outline = blob(points)
    pen.fill(outline, tone.shade)
    pen.tint(ellipse(0.0, 0.62, 0.62, 0.62), tone.deep, within=pen.region(outline))
    pen.stroke(outline)
    if back in ("long", "wavy", "bob"):
        for side in (-1, 1):
            strand = [(side * 0.74, 0.35), (side * 0.82, 0.75), (side * 0.80, 1.1 if back != "bob" else 0.78)]
            pen.stroke(curve(strand), 0.7, taper=(0.0, 0.0))


def draw_tails(pen: Pen, back: str, tone: Tone, tie: Tone, jitter: Sequence[float]) -> None:
    """Draw tails, braids or buns over the shoulders; the face is drawn over them later."""
    sides = (-1,) if back == "side tail" and jitter[0] < 0 else (1,) if back == "side tail" else (-1, 1)
    for side in sides:
        if back in ("twin tails", "side tail"):
            _tail(pen, side, tone, 0.12 * jitter[1 + (side > 0)])
            pen.fill(ellipse(side * 0.83, -0.56, 0.11, 0.15), tie.base)
            pen.stroke(ellipse(side * 0.83, -0.56, 0.11, 0.15))
        elif back == "braids":
            _braid(pen, side, tone, tie)
        elif back == "buns":
            _bun(pen, side, tone)
        elif back == "drills":
            _drill(pen, side, tone, 0.1 * jitter[1 + (side > 0)])


def draw_front(
    pen: Pen, front: str, back: str, tone: Tone, jitter: Sequence[float], *, shine: bool, ahoge: bool
) -> None:
    """Draw the hair over the skull, the locks at the sides of the face and the fringe, with shading."""
    if front == "bald":
        return
    region = pen.region()
    cap = _cap(front)
    pen.fill(cap, tone.base, region=region)
    edge = curve([(0.34, -1.2), (0.62, -0.80), (0.75, -0.3), (0.74, 0.2)])
    pen.tint(join(edge, [(1.0, 0.2), (1.0, -1.2)]), tone.shade, within=region)
    pen.stroke(curve(_SKULL))
    if back == "spiky":
        _spikes(pen, tone, jitter, region)
    for side in (-1, 1) if front != "slick" else ():
        _side_lock(pen, side, front, tone, jitter[3 + (side > 0)], region)
    for root, tip, width, bend in fringe(front, jitter):
        _lock(pen, root, tip, width, bend, tone, region)
    if shine:
        for arc in _shine():
            pen.tint(arc, tone.light, within=region)
    if ahoge:
        _lock(pen, (0.02, -1.04), (0.34, -1.36), 0.07, -0.12, tone, region)


def shadow_on_face(front: str, jitter: Sequence[float]) -> list[Points]:
    """Return the shapes of the shadow that the fringe throws on the skin."""
    if front == "bald":
        return []
    shapes = [shifted(_outline(root, tip, width, bend), 0.03, 0.09) for root, tip, width, bend in fringe(front, jitter)]
    return [*shapes, shifted(_cap(front), 0.02, 0.08)]


_SKULL = [(-0.84, -0.3), (-0.71, -0.78), (-0.39, -1.08), (0.0, -1.17), (0.39, -1.08), (0.71, -0.78), (0.84, -0.3)]

Lock = tuple[tuple[float, float], tuple[float, float], float, float]


def fringe(front: str, jitter: Sequence[float]) -> list[Lock]:
    """Return (root, tip, half width, bend) of each lock over the forehead, in drawing order."""
    wave = jitter[5:]
    if front == "blunt":
        return [((0.15 * x, -0.78), (x, -0.04 + 0.02 * wave[i]), 0.17, 0.03 * x) for i, x in _inward(7, 0.60)]
    if front == "parted":
        return _parted(wave, -0.02 + 0.06 * wave[0], (0.62, 0.46, 0.27), (0.32, 0.06, -0.12))
    if front == "curtain":
        return _parted(wave, 0.22 * wave[0], (0.66, 0.56, 0.44), (0.50, 0.30, 0.10))
    if front == "swept":
        side = 1 if wave[0] > 0 else -1
        tips = [(-0.64, 0.18), (-0.42, 0.05), (-0.16, -0.01), (0.12, -0.05), (0.40, -0.06), (0.64, 0.10)]
        return [
            ((side * (-0.30 + 0.13 * i), -0.76), (side * (x + 0.08), y + 0.04 * wave[i]), 0.17, -side * 0.10)
            for i, (x, y) in enumerate(tips)
        ]
    if front == "spiky":
        return [((0.45 * x, -0.66), (x + 0.09 * wave[i], 0.06 - 0.1 * wave[i]), 0.2, 0.05) for i, x in _inward(5, 0.56)]
    if front == "slick":
        return []
    if front == "wild":
        count = 4 + round(2.5 * (wave[0] + 1))
        return [
            (
                (0.4 * x + 0.1 * wave[(i + 1) % 9], -0.76),
                (x + 0.14 * wave[(2 * i + 3) % 9], 0.08 + 0.26 * wave[(i + 4) % 9]),
                0.75 / count + 0.04 * wave[(i + 2) % 9],
                0.16 * wave[(3 * i + 1) % 9],
            )
            for i, x in _inward(count, 0.62)
        ]
    if front == "cover":
        side = 1 if wave[0] > 0 else -1
        tips = [(-0.62, 0.40), (-0.46, 0.52), (-0.27, 0.48), (-0.05, 0.26), (0.25, -0.06), (0.6, 0.05)]
        return [
            ((side * (0.25 - 0.02 * i), -0.78), (side * x, y + 0.05 * wave[i]), 0.16, -side * 0.12)
            for i, (x, y) in enumerate(tips)
        ]
    return [
        ((0.35 * x, -0.74), (x + 0.06 * wave[i], 0.03 + 0.07 * wave[i]), 0.17, 0.06 * x) for i, x in _inward(6, 0.6)
    ]


def _inward(count: int, reach: float) -> list[tuple[int, float]]:
    """Return indices and x positions of locks from the temples inward, so that the middle locks are drawn last."""
    places = np.linspace(-reach, reach, count)
    return sorted(((i, float(x)) for i, x in enumerate(places)), key=lambda pair: -abs(pair[1]))


def _parted(wave: Sequence[float], part: float, xs: Sequence[float], ys: Sequence[float]) -> list[Lock]:
    return [
        ((part + side * (0.12 + 0.05 * i), -0.90), (side * x + 0.4 * part, y + 0.05 * wave[i]), 0.15, side * 0.16)
        for i, (x, y) in enumerate(zip(xs, ys, strict=True))
        for side in (-1, 1)
    ]


def _cap(front: str) -> Points:
    high = {"parted": -0.74, "curtain": -0.74, "slick": -0.72}.get(front, -0.5)
    hairline = [(0.62, -0.1), (0.48, high + 0.22), (0.0, high), (-0.48, high + 0.22), (-0.62, -0.1)]
    return join(curve([(-0.80, 0.1), *_SKULL, (0.80, 0.1)]), curve(hairline))


def _outline(root: tuple[float, float], tip: tuple[float, float], width: float, bend: float) -> Points:
    left, right = _edges(root, tip, width, bend)
    return join(left, right)


def _edges(root: tuple[float, float], tip: tuple[float, float], width: float, bend: float) -> tuple[Points, Points]:
    """Return the left edge of a lock from root to tip, and the right edge from tip to root."""
    middle = (root[0] * 0.45 + tip[0] * 0.55 + bend, root[1] * 0.45 + tip[1] * 0.55)
    left = [(root[0] - width * 0.7, root[1]), (middle[0] - width, middle[1]), tip]
    right = [tip, (middle[0] + width, middle[1]), (root[0] + width * 0.7, root[1])]
    return curve(left, 6), curve(right, 6)


def _lock(
    pen: Pen,
    root: tuple[float, float],
    tip: tuple[float, float],
    width: float,
    bend: float,
    tone: Tone,
    region: Image.Image,
) -> None:
    left, right = _edges(root, tip, width, bend)
    pen.fill(join(left, right), tone.base, region=region)
    middle = (root[0] * 0.4 + tip[0] * 0.6 + bend + 0.4 * width, root[1] * 0.4 + tip[1] * 0.6)
    pen.tint(join(right, curve([(root[0] + width * 0.7, root[1]), middle, tip], 6)), tone.shade)
    pen.stroke(left, taper=(0.0, 0.6))
    pen.stroke(right, taper=(0.6, 0.0))


def _side_lock(pen: Pen, side: int, front: str, tone: Tone, wave: float, region: Image.Image) -> None:
    length = {"blunt": 0.80, "parted": 0.95, "curtain": 0.75, "spiky": 0.36, "swept": 0.52}.get(
        front, 0.62
    ) + 0.12 * wave
    outer = curve([(side * 0.835, -0.34), (side * 0.855, 0.0), (side * 0.80, 0.5 * length), (side * 0.62, length)])
    inner = curve([(side * 0.62, length), (side * 0.56, 0.45 * length), (side * 0.58, 0.0), (side * 0.5, -0.45)])
    pen.fill(join(outer, inner), tone.base if side < 0 else tone.shade, region=region)
    middle = curve([(side * 0.5, -0.45), (side * 0.66, 0.0), (side * 0.66, 0.45 * length), (side * 0.62, length)])
    pen.tint(join(inner, middle) if side < 0 else join(outer, middle[::-1]), tone.shade if side < 0 else tone.base)
    pen.stroke(outer, taper=(1.0, 0.7))
    pen.stroke(inner, taper=(0.7, 0.0))


def _shine() -> list[Points]:
    """Return a bright ring around the crown, as a long and a short arc."""
    return [_arc_of_light(-0.62, 0.16, 0.12), _arc_of_light(0.27, 0.56, 0.10)]


def _arc_of_light(start: float, end: float, thick: float) -> Points:
    x = np.linspace(start, end, 9)
    middle = -0.46 - 0.30 * (1 - (x / 0.8) ** 2)
    swell = thick * np.sin(np.linspace(0.08, np.pi - 0.08, 9)) ** 0.6
    wave = np.where(np.arange(9) % 2 == 0, 1.0, 0.62)
    return join(np.stack([x, middle - 0.4 * swell], 1), curve(np.stack([x, middle + swell * wave], 1), 3)[::-1])


def _spikes(pen: Pen, tone: Tone, jitter: Sequence[float], region: Image.Image) -> None:
    """Draw broad tufts around the head, the lower tufts first."""
    for step in range(5):
        for side in (-1, 1):
            wave = jitter[step if side < 0 else 9 - step]
            _tuft(pen, side, np.radians(20 - 25 * step), 1.20 + 0.10 * wave, 0.12 + 0.14 * jitter[step], tone, region)


def _tuft(pen: Pen, side: int, angle: float, reach: float, droop: float, tone: Tone, region: Image.Image) -> None:
    def at(offset: float, radius: float) -> tuple[float, float]:
        x, y = radius * np.cos(angle + offset), radius * np.sin(angle + offset)
        return float(side * x), float(1.06 * y - 0.18)

    tip = at(droop, reach)
    lower, upper = curve([at(0.44, 0.62), at(0.26, 0.90), tip], 5), curve([tip, at(-0.12, 0.98), at(-0.42, 0.66)], 5)
    pen.fill(join(lower, upper), tone.base, region=region)
    pen.tint(join(lower, curve([tip, at(0.10, 0.95), at(0.20, 0.62)], 5)), tone.shade)
    pen.stroke(lower, taper=(0.0, 0.8))
    pen.stroke(upper, taper=(0.8, 0.0))


def _tail(pen: Pen, side: int, tone: Tone, sway: float) -> None:
    outer = curve(
        [(side * 0.78, -0.62), (side * 1.16, -0.42), (side * (1.34 + sway), 0.3), (side * (1.22 + sway), 1.3)]
    )
    inner = curve([(side * (1.22 + sway), 1.3), (side * (0.98 + sway), 0.7), (side * 0.98, 0.1), (side * 0.80, -0.45)])
    outline = join(outer, inner)
    pen.fill(outline, tone.base)
    middle = curve([(side * 0.80, -0.45), (side * 1.10, 0.0), (side * (1.12 + sway), 0.7), (side * (1.22 + sway), 1.3)])
    pen.tint(join(inner, middle) if side < 0 else join(outer, middle[::-1]), tone.shade)
    pen.stroke(outer)
    pen.stroke(inner)
    pen.stroke(middle[4:-2], 0.7, taper=(0.0, 0.0))


def _braid(pen: Pen, side: int, tone: Tone, tie: Tone) -> None:
    tuft = [(side * 0.80, 1.22), (side * 0.74, 1.6), (side * 1.08, 1.6), (side * 1.0, 1.22)]
    pen.fill(tuft, tone.shade)
    pen.stroke(join(tuft, tuft[:1]))
    for step in range(4, -1, -1):
        x, y = side * (0.80 + 0.025 * step), 0.46 + 0.17 * step
        knot = blob([(x, y - 0.04), (x - 0.16, y - 0.10), (x - 0.15, y + 0.06), (x, y + 0.17), (x + 0.15, y + 0.06),
                     (x + 0.16, y - 0.10)], 5)  # fmt: skip
        pen.fill(knot, tone.base)
        pen.tint(join(knot[10:26], [(x + 0.02, y)]), tone.shade)
        pen.stroke(knot)
    band = [(side * 0.81, 1.24), (side * 1.0, 1.24), (side * 0.98, 1.36), (side * 0.83, 1.36)]
    pen.fill(band, tie.base)
    pen.stroke(join(band, band[:1]))


def _bun(pen: Pen, side: int, tone: Tone) -> None:
    ball = ellipse(side * 0.66, -0.98, 0.34, 0.33)
    region = pen.region()
    pen.fill(ball, tone.base, region=region)
    pen.tint(shifted(ball, 0.16, 0.14), tone.shade, within=region)
    pen.stroke(ball)
    swirl = [(side * 0.50, -0.92), (side * 0.62, -1.12), (side * 0.82, -1.04), (side * 0.76, -0.88)]
    pen.stroke(curve(swirl), 0.8, taper=(0.0, 0.0))


def _ponytail(pen: Pen, tone: Tone, strands: Sequence[float]) -> None:
    """Draw a tail that hangs from the back of the head to one side."""
    side = -1 if len(strands) and strands[0] < 0 else 1
    sway = 2.0 * strands[1] if len(strands) > 1 else 0.0
    outer = curve([(side * 0.2, -1.1), (side * 0.9, -1.35), (side * (1.35 + sway), -0.6), (side * (1.3 + sway), 0.9)])
    inner = curve([(side * (1.3 + sway), 0.9), (side * (1.0 + sway), 0.2), (side * 0.95, -0.5), (side * 0.4, -0.8)])
    outline = join(outer, inner)
    pen.fill(outline, tone.base)
    pen.tint(shifted(outline, 0.14, 0.1), tone.shade, within=pen.region(outline))
    pen.stroke(outer)
    pen.stroke(inner)


def _drill(pen: Pen, side: int, tone: Tone, sway: float) -> None:
    """Draw a curled tail: rolls that get smaller toward the tip."""
    for step in range(5, -1, -1):
        wide, y = 0.30 - 0.035 * step, -0.25 + 0.27 * step
        x = side * (0.95 + 0.02 * step) + sway * step / 5
        roll = blob([(x - wide, y - 0.1), (x, y - 0.2), (x + wide, y - 0.04), (x + 0.9 * wide, y + 0.16), (x, y + 0.2),
                     (x - 0.9 * wide, y + 0.1)], 5)  # fmt: skip
        pen.fill(roll, tone.base)
        pen.tint(shifted(roll, 0.12, 0.08), tone.shade, within=pen.region(roll))
        pen.stroke(roll)
