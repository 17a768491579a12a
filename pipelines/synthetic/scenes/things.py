"""Draw objects of random shapes: one family and one number give the same object in every drawing.

All objects lie about within -1..1 in their own coordinates. None has a meaning: what counts is that their parts can be
told apart by their lines and recognized in another drawing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from animediffusion.pipelines.synthetic.canvas import (
    Pen,
    Points,
    PointsLike,
    blob,
    curve,
    ellipse,
    join,
    shifted,
    straight,
)
from animediffusion.pipelines.synthetic.palette import Tone

Rng = np.random.Generator
Tones = Sequence[Tone]


class Thing(NamedTuple):
    """An object: its family, the number that its shape follows from, and its colors."""

    family: str
    number: int
    tones: tuple[Tone, ...]
    """At least TONES colors."""


_VISIBLE = 1.0
"""Width in pixels that a shadow must have to be drawn."""
TONES = 4
"""Colors that an object may have."""


def random_thing(rng: Rng, tones: Tones) -> Thing:
    """Choose an object with some of these colors, in random order."""
    family = FAMILIES[int(rng.integers(len(FAMILIES)))]
    order = rng.permutation(len(tones))[:TONES]
    chosen = [tones[i] for i in order]
    while len(chosen) < TONES:
        chosen.append(chosen[int(rng.integers(len(chosen)))])
    return Thing(family, int(rng.integers(1 << 31)), tuple(chosen))


def draw_thing(pen: Pen, thing: Thing) -> None:
    """Draw an object at the origin of a pen."""
    _FAMILIES[thing.family](pen, np.random.default_rng(thing.number), thing.tones)


def piece(pen: Pen, outline: PointsLike, tone: Tone, shade: float = 0.16, width: float = 1.0) -> None:
    """Draw a closed shape with an outline, with a shadow on its lower right side of width `shade`."""
    points = np.asarray(outline, np.float64)
    if shade * pen.frame.scale * pen.canvas.size > _VISIBLE:
        pen.fill(points, tone.base)
        pen.tint(points, tone.shade)
        pen.tint(shifted(points, -shade, -shade), tone.base, within=pen.region(points))
    else:
        pen.fill(points, tone.base)
    closed = join(points, points[:1])
    pen.stroke(straight(closed) if len(closed) < 10 else closed, width)


def _round(rng: Rng, count: int, low: float, high: float = 1.0, samples: int = 5) -> Points:
    """Return a random closed curve around the origin whose radius is between `low` and `high`."""
    angle = np.arange(count) * (2 * np.pi / count) + rng.uniform(-0.3, 0.3, count) * (2 / count)
    radius = rng.uniform(low, high, count)
    return blob(np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1), samples)


def _band(path: PointsLike, widths: PointsLike | Sequence[float]) -> Points:
    """Return the outline of a band along a smooth path, with a half width at each of its points."""
    points = np.column_stack([np.asarray(path, np.float64), np.asarray(widths, np.float64)])
    smooth = curve(points, 5)
    step = np.gradient(smooth[:, :2], axis=0)
    across = np.stack([-step[:, 1], step[:, 0]], 1) * (smooth[:, 2:] / (np.linalg.norm(step, axis=1)[:, None] + 1e-9))
    return join(smooth[:, :2] + across, (smooth[:, :2] - across)[::-1])


def _pebble(pen: Pen, rng: Rng, tones: Tones) -> None:
    """A round shape with bands, spots or a core."""
    outline = _round(rng, int(rng.integers(4, 9)), 0.55)
    piece(pen, outline, tones[0])
    region = pen.region(outline)
    kind = int(rng.integers(4))
    if kind == 0:
        for start in np.arange(-0.7, 0.8, float(rng.uniform(0.35, 0.7))):
            edge = [(start, -1.1), (start + 0.2, 0.0), (start - 0.05, 1.1)]
            stripe = _band(edge, [0.12, 0.12, 0.12])
            pen.fill_within(stripe, region, tones[1].base)
            pen.stroke_within(join(stripe, stripe[:1]), region, 0.8)
    elif kind == 1:
        for x, y, r in rng.uniform((-0.6, -0.6, 0.1), (0.6, 0.6, 0.24), (int(rng.integers(2, 6)), 3)):
            pen.fill_within(ellipse(x, y, r, r, 16), region, tones[2].base)
            pen.stroke_within(ellipse(x, y, r, r, 16), region, 0.8)
    elif kind == 2:
        piece(pen, 0.55 * outline, tones[1])
        piece(pen, 0.22 * outline, tones[2], 0.0)
    pen.stroke(outline)


def _star(pen: Pen, rng: Rng, tones: Tones) -> None:
    """A star or a polygon, perhaps with facets."""
    count = int(rng.integers(3, 9))
    inner = float(rng.uniform(0.35, 1.0))
    angle = np.arange(2 * count) * (np.pi / count) - np.pi / 2
    radius = np.where(np.arange(2 * count) % 2 == 0, 1.0, inner)
    corners = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
    piece(pen, corners, tones[0])
    if rng.random() < 0.4:
        center = rng.uniform(-0.15, 0.15, (1, 2))
        for k in range(count):
            facet = join(corners[2 * k : 2 * k + 1], corners[2 * k + 1 : 2 * k + 2], center)
            piece(pen, facet, tones[k % 2], 0.0, 0.8)
    elif rng.random() < 0.7:
        piece(pen, float(rng.uniform(0.35, 0.7)) * corners, tones[1], 0.08)


def _box(pen: Pen, rng: Rng, tones: Tones) -> None:
    """A box with three faces, a label and a lid."""
    w, h, d, s = rng.uniform((0.45, 0.4, 0.2, 0.1), (0.8, 0.8, 0.5, 0.3)).tolist()
    piece(pen, [(w, -h), (w + d * 0.7, -h - s), (w + d * 0.7, h - s), (w, h)], tones[int(rng.integers(2))], 0.0)
    piece(pen, [(-w, -h), (-w + d * 0.7, -h - s), (w + d * 0.7, -h - s), (w, -h)], tones[2], 0.0)
    piece(pen, [(-w, -h), (w, -h), (w, h), (-w, h)], tones[0], 0.1)
    x, y = 0.6 * w * float(rng.uniform(0.3, 1)), 0.6 * h * float(rng.uniform(0.3, 1))
    if rng.random() < 0.5:
        piece(pen, [(-x, -y), (x, -y), (x, y), (-x, y)], tones[1], 0.0)
    else:
        piece(pen, [(-0.12, -h), (0.12, -h), (0.12, h), (-0.12, h)], tones[3], 0.0)


def _lathe(pen: Pen, rng: Rng, tones: Tones) -> None:
    """A vase, a bottle, a cup, a tower: a symmetric profile with bands and a rim."""
    count = int(rng.integers(3, 7))
    ys = np.linspace(0.95, -0.95, count)
    xs = rng.uniform(0.18, 0.7, count)
    right = curve(np.stack([xs, ys], 1), 5)
    piece(pen, join(right, (right * (-1, 1))[::-1]), tones[0], 0.22)
    levels = np.sort(rng.uniform(-0.75, 0.75, int(rng.integers(1, 4))))
    for number, level in enumerate(levels):
        half = 0.06 + 0.1 * float(rng.random())
        y = np.linspace(level - half, level + half, 4)
        x = np.interp(-y, -right[:, 1], right[:, 0])
        sag = 0.06 * float(rng.uniform(0, 1))
        lower = curve([(x[3], y[3]), (0, y[3] + sag), (-x[3], y[3])])
        upper = curve([(-x[0], y[0]), (0, y[0] + sag), (x[0], y[0])])
        piece(pen, join(lower, upper), tones[1 + number % 2], 0.0, 0.8)
    rim = float(xs[-1])
    if rng.random() < 0.5:
        piece(pen, ellipse(0, -0.95, rim, 0.16), tones[3], 0.0)
    else:
        piece(pen, _round(rng, 6, 0.18, 0.3) * (1, 1.3) + (0, -1.1), tones[3], 0.08)
    if rng.random() < 0.35:
        handle = curve([(0.5, -0.35), (0.95, -0.4), (0.95, 0.3), (0.45, 0.35)])
        pen.rim(handle, tones[2].base, 2.4)


def _flower(pen: Pen, rng: Rng, tones: Tones) -> None:
    """A flower with a stem and leaves."""
    if rng.random() < 0.7:
        bow = float(rng.uniform(-0.25, 0.25))
        stem = _band([(0, -0.2), (bow, 0.4), (0, 1.1)], [0.05, 0.05, 0.06])
        piece(pen, stem, tones[3], 0.0)
        for side in (-1, 1):
            leaf = [(bow, 0.6), (side * 0.3, 0.35), (side * 0.62, 0.4), (side * 0.35, 0.62)]
            piece(pen, blob(leaf, 5), tones[3], 0.06)
    count = int(rng.integers(4, 10))
    long, wide, center = rng.uniform((0.35, 0.14, 0.12), (0.55, 0.3, 0.28)).tolist()
    petal = blob([(center * 0.6, 0), (long * 0.6, -wide), (long + 0.12, 0), (long * 0.6, wide)], 5)
    for k in range(count):
        cos, sin = np.cos(k * 2 * np.pi / count), np.sin(k * 2 * np.pi / count)
        turned = petal @ np.array([[cos, sin], [-sin, cos]]) + (0, -0.3)
        piece(pen, turned, tones[0] if k % 2 or rng.random() < 0.6 else tones[2], 0.05, 0.9)
    piece(pen, ellipse(0, -0.3, center, center, 18), tones[1], 0.05)


def _critter(pen: Pen, rng: Rng, tones: Tones) -> None:
    """An animal or a toy: body, belly, head, ears, eyes, legs, tail."""
    fat, head, ears, legs, tail = rng.uniform((0.4, 0.3, 0.2, 0.12, 0.3), (0.62, 0.5, 0.6, 0.4, 0.9)).tolist()
    x, y = float(rng.uniform(-0.45, 0.1)), float(rng.uniform(-0.75, -0.45))
    waving = [(fat * 0.7, 0.35), (fat + 0.3, 0.1), (fat + 0.2 + 0.3 * tail, -0.4)]
    piece(pen, _band(waving, [0.1, 0.12, 0.04]), tones[int(rng.integers(2))], 0.0)
    for place in (-0.55, -0.15, 0.25, 0.6):
        foot = [(place * fat * 1.3 - 0.1, 0.4), (place * fat * 1.3 + 0.1, 0.4), (place * fat * 1.3 + 0.12, 0.62 + legs),
                (place * fat * 1.3 - 0.14, 0.62 + legs)]  # fmt: skip
        piece(pen, blob(foot, 4), tones[0], 0.05)
    piece(pen, ellipse(0, 0.2, fat * 1.25, fat, 24), tones[0], 0.14)
    piece(pen, ellipse(-0.05, 0.3, fat * 0.7, fat * 0.6, 20), tones[1], 0.0, 0.8)
    pointed = rng.random() < 0.5
    for side in (-1, 1):
        base = x + side * head * 0.55
        if pointed:
            ear = [(base - 0.14, y - 0.1), (base + side * 0.12, y - head * 0.7 - ears), (base + 0.16, y - 0.1)]
            piece(pen, ear, tones[0], 0.05)
        else:
            piece(pen, ellipse(base + side * 0.05, y - head * 0.7 - ears * 0.35, 0.13, ears * 0.6, 18), tones[2], 0.05)
    piece(pen, ellipse(x, y, head * 1.1, head, 24), tones[0], 0.12)
    piece(pen, ellipse(x, y + head * 0.45, head * 0.5, head * 0.36, 18), tones[1], 0.0, 0.8)
    for side in (-1, 1):
        piece(pen, ellipse(x + side * head * 0.45, y - 0.05, 0.09, 0.12, 14), tones[3], 0.0, 0.8)
    piece(pen, ellipse(x, y + head * 0.28, 0.07, 0.05, 10), tones[3], 0.0, 0.7)


def _house(pen: Pen, rng: Rng, tones: Tones) -> None:
    """A house with a roof, a door and windows."""
    w, top, roof, over = rng.uniform((0.5, -0.3, 0.4, 0.05), (0.85, 0.1, 0.75, 0.2)).tolist()
    piece(pen, [(-w, top), (w, top), (w, 0.95), (-w, 0.95)], tones[0], 0.14)
    ridge = float(rng.uniform(0.0, 0.5))
    piece(pen, [(-w - over, top), (-w * ridge, top - roof), (w * ridge, top - roof), (w + over, top)], tones[1], 0.1)
    x = float(rng.uniform(-0.5, 0.5)) * w
    piece(pen, [(x - 0.13, 0.95), (x - 0.13, 0.5), (x + 0.13, 0.5), (x + 0.13, 0.95)], tones[2], 0.0)
    for place in (-0.62, -0.05, 0.55):
        if rng.random() < 0.7:
            cx, cy, r = place * w, top + 0.25, 0.11
            if rng.random() < 0.4:
                piece(pen, ellipse(cx, cy, r, r, 16), tones[3], 0.0)
            else:
                piece(pen, [(cx - r, cy - r), (cx + r, cy - r), (cx + r, cy + r), (cx - r, cy + r)], tones[3], 0.0)
                pen.stroke([(cx, cy - r), (cx, cy + r)], 0.7)


def _tree(pen: Pen, rng: Rng, tones: Tones) -> None:
    """A tree: a trunk and a crown of clouds, of cones, or a round one with fruit."""
    piece(pen, _band([(0.05, 1.0), (0, 0.4), (0, -0.1)], [0.17, 0.1, 0.09]), tones[1], 0.0)
    kind = int(rng.integers(3))
    if kind == 0:
        for x, y in ((-0.4, 0.1), (0.4, 0.1), (0.0, -0.15), (-0.2, -0.5), (0.25, -0.5)):
            piece(pen, _round(rng, 7, 0.34, 0.5) + np.array((x, y)), tones[0], 0.12)
    elif kind == 1:
        for level in (0.35, -0.05, -0.45):
            wide = 0.42 + 0.4 * (level + 0.45)
            piece(pen, [(-wide, level), (0, level - 0.65), (wide, level)], tones[0 if level else 2], 0.12)
    else:
        piece(pen, _round(rng, 8, 0.6, 0.8) + np.array((0, -0.3)), tones[0], 0.18)
        for x, y in rng.uniform(-0.4, 0.4, (4, 2)):
            piece(pen, ellipse(x, y - 0.3, 0.1, 0.1, 14), tones[3], 0.0, 0.8)


def _robot(pen: Pen, rng: Rng, tones: Tones) -> None:
    """A jointed doll of bands and plates."""
    for side in (-1, 1):
        elbow, hand, knee = rng.uniform((0.5, -0.3, 0.15), (0.8, 0.6, 0.4)).tolist()
        arm = [(side * 0.3, -0.2), (side * elbow, 0.05), (side * (elbow + 0.1), hand)]
        piece(pen, _band(arm, [0.1, 0.09, 0.08]), tones[1], 0.0)
        piece(pen, ellipse(side * (elbow + 0.1), hand, 0.13, 0.13, 16), tones[2], 0.0)
        piece(
            pen, _band([(side * 0.18, 0.4), (side * knee, 0.7), (side * 0.25, 1.0)], [0.12, 0.1, 0.09]), tones[1], 0.0
        )
        piece(pen, ellipse(side * 0.3, 1.0, 0.2, 0.1, 16), tones[2], 0.0)
    w, h = rng.uniform((0.25, 0.35), (0.42, 0.45)).tolist()
    piece(pen, [(-w, -0.35), (w, -0.35), (w * 0.8, h), (-w * 0.8, h)], tones[0], 0.12)
    piece(pen, [(-w * 0.6, -0.2), (w * 0.6, -0.2), (w * 0.5, 0.1), (-w * 0.5, 0.1)], tones[3], 0.0, 0.8)
    head = _round(rng, int(rng.integers(4, 8)), 0.3, 0.42) + np.array((0, -0.72))
    piece(pen, head, tones[0], 0.1)
    piece(pen, blob([(-0.2, -0.82), (0.2, -0.82), (0.18, -0.64), (-0.18, -0.64)], 4), tones[3], 0.0, 0.8)


def _ribbon(pen: Pen, rng: Rng, tones: Tones) -> None:
    """A ribbon, a snake, a scarf: a broad band along a path, in sections."""
    count = int(rng.integers(4, 7))
    path = np.stack([np.linspace(-1, 1, count), rng.uniform(-0.7, 0.7, count)], 1)
    widths = rng.uniform(0.1, 0.24, count)
    outline = _band(path, widths)
    piece(pen, outline, tones[0], 0.07)
    half = len(outline) // 2
    step = int(rng.integers(3, 7))
    for number, start in enumerate(range(step, half - step, 2 * step)):
        section = join(outline[start : start + step + 1], outline[::-1][start : start + step + 1][::-1])
        piece(pen, section, tones[1 + number % 2], 0.0, 0.8)


def _wheel(pen: Pen, rng: Rng, tones: Tones) -> None:
    """A ball, a wheel, an umbrella: sectors of a circle or of a half circle, and a hub."""
    whole = rng.random() < 0.6
    count = int(rng.integers(3, 9))
    span = 2 * np.pi if whole else np.pi
    squeeze = (1.0, float(rng.uniform(0.7, 1.0)))
    if not whole:
        pen.rim([(0, 0), (0, 0.8)], tones[3].base, 2.0)
    for k in range(count):
        arc = -np.pi + span * (k + np.linspace(0, 1, 8)) / count
        edge = np.stack([np.cos(arc), np.sin(arc)], 1) * squeeze
        piece(pen, join([(0, 0)], edge), tones[k % (2 if count % 2 == 0 else 3)], 0.0)
    if whole:
        radius = float(rng.uniform(0.12, 0.5))
        piece(pen, ellipse(0, 0, radius, radius * squeeze[1], 20), tones[3], 0.06)


def _quilt(pen: Pen, rng: Rng, tones: Tones) -> None:
    """A bent grid of cells in different colors."""
    columns, rows = (int(n) for n in rng.integers(2, 5, 2))
    x, y = np.meshgrid(np.linspace(-0.9, 0.9, columns + 1), np.linspace(-0.9, 0.9, rows + 1))
    nodes = np.stack([x, y], -1) + rng.uniform(-0.5, 0.5, (rows + 1, columns + 1, 2)) / max(columns, rows)
    bulge = rng.uniform(-0.12, 0.12, (2, rows + 1, columns + 1, 2))
    colors = rng.integers(0, TONES, (rows, columns))
    for i in range(rows):
        for j in range(columns):
            a, b, c, d = nodes[i, j], nodes[i, j + 1], nodes[i + 1, j + 1], nodes[i + 1, j]
            top, bottom = (a + b) / 2 + bulge[0, i, j], (c + d) / 2 + bulge[0, i + 1, j]
            right, left = (b + c) / 2 + bulge[1, i, j + 1], (a + d) / 2 + bulge[1, i, j]
            outline = join(
                curve([a, top, b], 4), curve([b, right, c], 4), curve([c, bottom, d], 4), curve([d, left, a], 4)
            )
            piece(pen, outline, tones[int(colors[i, j])], 0.0)


def _leaf(pen: Pen, rng: Rng, tones: Tones) -> None:
    """A leaf, a feather, a fish, a blade: a long shape cut along its middle, with a tail."""
    wide, peak = rng.uniform((0.15, -0.5), (0.5, 0.3)).tolist()
    upper = curve([(-0.9, 0), (peak, -wide), (0.95, 0)], 6)
    lower = curve([(0.95, 0), (peak, wide * float(rng.uniform(0.4, 1.2))), (-0.9, 0)], 6)
    if rng.random() < 0.6:
        fin = float(rng.uniform(0.2, 0.5))
        piece(pen, [(0.7, 0), (1.15, -fin), (1.05, 0), (1.15, fin)], tones[2], 0.0)
    piece(pen, join(upper, lower), tones[0], 0.0)
    middle = curve([(0.95, 0), (peak, 0.12 * wide), (-0.9, 0)], 6)
    piece(pen, join(upper, middle), tones[1], 0.0, 0.8)
    if rng.random() < 0.5:
        piece(pen, ellipse(-0.5, -0.02, 0.08, 0.08, 12), tones[3], 0.0, 0.8)


def _wand(pen: Pen, rng: Rng, tones: Tones) -> None:
    """A wand, a sword, a brush, a lollipop: a rod with a grip, a guard and a head."""
    thick, grip = rng.uniform((0.04, 0.2), (0.12, 0.5)).tolist()
    piece(pen, [(-thick, 1 - grip), (-thick, -0.4), (thick, -0.4), (thick, 1 - grip)], tones[0], 0.0)
    piece(
        pen, [(-thick - 0.03, 1), (-thick - 0.03, 1 - grip), (thick + 0.03, 1 - grip), (thick + 0.03, 1)], tones[1], 0.0
    )
    guard = float(rng.uniform(0.1, 0.35))
    piece(pen, blob([(-guard, 1 - grip), (0, 0.93 - grip), (guard, 1 - grip), (0, 1.07 - grip)], 4), tones[2], 0.0)
    kind = int(rng.integers(3))
    if kind == 0:
        piece(pen, _round(rng, 6, 0.25, 0.5) + np.array((0, -0.6)), tones[3], 0.1)
    elif kind == 1:
        corners = [(0, -1.1), (0.14, -0.72), (0.5, -0.66), (0.22, -0.46), (0.3, -0.1), (0, -0.3), (-0.3, -0.1),
                   (-0.22, -0.46), (-0.5, -0.66), (-0.14, -0.72)]  # fmt: skip
        piece(pen, corners, tones[3], 0.08)
    else:
        piece(pen, [(-thick - 0.1, -0.35), (0, -1.1), (thick + 0.1, -0.35)], tones[3], 0.0)


def _cloud(pen: Pen, rng: Rng, tones: Tones) -> None:
    """A cloud, a bush, smoke: bumps around a flat shape."""
    count = int(rng.integers(5, 10))
    angle = np.arange(count) * (2 * np.pi / count)
    bumps = []
    for k in range(count):
        a = angle[k] + np.linspace(-0.55, 0.55, 6) * (2 * np.pi / count)
        swell = 0.62 + 0.3 * np.cos(np.linspace(-1.3, 1.3, 6)) * float(rng.uniform(0.6, 1.2))
        bumps.append(np.stack([swell * np.cos(a), 0.7 * swell * np.sin(a)], 1))
    piece(pen, join(*bumps), tones[0], 0.14)


def _dish(pen: Pen, rng: Rng, tones: Tones) -> None:
    """A plate, a cake, a hat: stacked ellipses, and something on top."""
    width, level = 0.95, 0.75
    for number in range(int(rng.integers(2, 5))):
        tall, narrow = rng.uniform((0.12, 0.65), (0.4, 0.95)).tolist()
        bottom = ellipse(0, level, width, 0.22 * width, 24)[:12]
        piece(
            pen,
            join(bottom, [(-width, level - tall)], ellipse(0, level - tall, width, 0.22 * width, 24)[12:]),
            tones[number % 3],
            0.1,
        )
        level -= tall
        piece(pen, ellipse(0, level, width, 0.22 * width, 24), tones[(number + 1) % 3], 0.0)
        width *= narrow
    piece(pen, _round(rng, 6, 0.12, 0.22) + np.array((0, level - 0.1)), tones[3], 0.05)


def _mask(pen: Pen, rng: Rng, tones: Tones) -> None:
    """A mask or a vehicle: a symmetric plate with symmetric pieces on it."""
    half = [(0.3, -0.95)]
    xs, ys = rng.uniform(0.5, 1.0, 4), np.linspace(-0.7, 0.75, 4)
    half += [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]
    outline = blob([*half, (0, 0.95), *((-x, y) for x, y in half[::-1])], 5)
    piece(pen, outline, tones[0], 0.14)
    for number in range(int(rng.integers(2, 4))):
        x, y, r, q = rng.uniform((0.2, -0.5, 0.08, 0.08), (0.5, 0.5, 0.22, 0.26)).tolist()
        shape = _round(rng, int(rng.integers(3, 7)), 0.6) * (r, q)
        for side in (-1, 1):
            piece(pen, (shape + np.array((x, y))) * (side, 1), tones[1 + number % 3], 0.0, 0.8)


_FAMILIES: dict[str, Callable[[Pen, Rng, Tones], None]] = {
    "pebble": _pebble,
    "star": _star,
    "box": _box,
    "lathe": _lathe,
    "flower": _flower,
    "critter": _critter,
    "house": _house,
    "tree": _tree,
    "robot": _robot,
    "ribbon": _ribbon,
    "wheel": _wheel,
    "quilt": _quilt,
    "leaf": _leaf,
    "wand": _wand,
    "cloud": _cloud,
    "dish": _dish,
    "mask": _mask,
}
FAMILIES = tuple(_FAMILIES)
