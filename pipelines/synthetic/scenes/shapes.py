"""Scenes without faces: objects and patterns that a second view shows moved, rotated, bent and in another order.

    scene = random_scene(rng)
    draw_scene(canvas, scene, rng)          # another view of the same scene with every call

Regions of the same color are counterparts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from animediffusion.pipelines.synthetic.canvas import Canvas, Frame, Pen, curve, ellipse, join
from animediffusion.pipelines.synthetic.palette import Tone, free_tones, shadowed
from animediffusion.pipelines.synthetic.scenes.things import Thing, draw_thing, piece, random_thing

Rng = np.random.Generator


class Scene(NamedTuple):
    """What all views of a scene share."""

    kind: str
    ground: Tone
    tones: tuple[Tone, ...]
    things: tuple[Thing, ...]
    scales: tuple[float, ...]
    """Size of each thing, as a fraction of the picture."""
    number: int
    """The number that the shape of the background follows from."""


KINDS = ("pile", "pile", "pile", "single", "landscape", "room", "cells", "rows")
"""Kinds to choose from; a kind that appears twice is chosen twice as often."""


def random_scene(rng: Rng, shadow: float = 1.0) -> Scene:
    """Choose a scene; `shadow` is a factor on the strength of all shadows."""
    kind = KINDS[int(rng.integers(len(KINDS)))]
    ground, *tones = shadowed(free_tones(rng, int(rng.integers(5, 11)), paper=bool(rng.random() < 0.35)), shadow)
    count = {"single": 1, "cells": int(rng.integers(0, 2)), "rows": int(rng.integers(2, 5))}.get(
        kind, int(rng.integers(2, 7))
    )
    things = tuple(random_thing(rng, tones) for _ in range(count))
    size = 0.36 if kind == "single" else 0.34 / max(count, 1) ** 0.4
    scales = tuple(float(size * value) for value in rng.uniform(0.75, 1.25, count))
    return Scene(kind, ground, tuple(tones), things, scales, int(rng.integers(1 << 31)))


def draw_scene(canvas: Canvas, scene: Scene, rng: Rng) -> None:
    """Draw a view of a scene on a canvas whose ground is `scene.ground.base`."""
    _BACKGROUNDS.get(scene.kind, _blank)(canvas, scene, rng)
    canvas.begin_figures()
    _draw_things(canvas, scene, rng)


def draw_setting(canvas: Canvas, scene: Scene, rng: Rng) -> None:
    """Draw a view of a scene as the background of something else."""
    _BACKGROUNDS.get(scene.kind, _blank)(canvas, scene, rng)
    _draw_things(canvas, scene, rng)


def _draw_things(canvas: Canvas, scene: Scene, rng: Rng) -> None:
    count = len(scene.things)
    if scene.kind == "rows":
        _draw_rows(canvas, scene, rng)
        return
    columns = max(1, round(count**0.5))
    order = rng.permutation(count) if rng.random() < 0.6 else np.arange(count)
    for place, number in enumerate(order.tolist()):
        row, column = divmod(place, columns)
        in_row = min(columns, count - row * columns)
        rows = -(-count // columns)
        x, y = (column + 0.5) / in_row, (row + 0.5) / rows
        spread = 0.24 / max(columns, rows)
        x, y = x + float(rng.uniform(-spread, spread)), y + float(rng.uniform(-spread, spread))
        if scene.kind in ("landscape", "room"):
            y = 0.45 + 0.45 * y
        _place(canvas, scene.things[number], scene.scales[number], x, y, rng)


def _place(canvas: Canvas, thing: Thing, scale: float, x: float, y: float, rng: Rng) -> None:
    u = rng.random(6).tolist()
    scale *= 0.8 + 0.4 * u[0]
    angle = (u[1] - 0.5) * (6.28 if u[2] < 0.2 else 0.9)
    bend = (0.10 * u[3], 1.5 + 1.5 * u[4], 6.28 * u[5]) if u[3] > 0.3 else None
    stretch = float(rng.uniform(0.8, 1.2)) * (-1 if u[4] < 0.35 else 1)
    draw_thing(Pen(canvas, Frame(scale, x, y, angle, bend, stretch)), thing)


def _draw_rows(canvas: Canvas, scene: Scene, rng: Rng) -> None:
    """Repeat the things over the picture, as on wallpaper."""
    number, count = int(rng.integers(len(scene.things))), int(rng.integers(2, 4))
    angle = float(rng.normal(0, 0.2))
    for row in range(count):
        for column in range(count):
            thing = scene.things[(row + column + number) % len(scene.things)]
            x, y = (column + 0.5 + 0.3 * (row % 2) - 0.15) / count, (row + 0.5) / count
            draw_thing(Pen(canvas, Frame(0.40 / count, x, y, angle)), thing)


def _whole(canvas: Canvas) -> Pen:
    return Pen(canvas, Frame(1.0, 0.0, 0.0))


def _blank(canvas: Canvas, scene: Scene, rng: Rng) -> None:
    """Draw nothing, a table's edge or a disc."""
    shape = np.random.default_rng(scene.number)
    kind, level = int(shape.integers(4)), float(shape.uniform(0.5, 0.75)) + float(rng.uniform(-0.08, 0.08))
    pen = _whole(canvas)
    if kind == 1:
        piece(
            pen,
            [(-0.1, level), (1.1, level + float(rng.uniform(-0.1, 0.1))), (1.1, 1.2), (-0.1, 1.2)],
            scene.tones[0],
            0.0,
        )
    elif kind == 2:
        radius = float(shape.uniform(0.25, 0.45))
        x, y = rng.uniform(0.4, 0.6, 2).tolist()
        piece(pen, ellipse(x, y, radius, radius, 40), scene.tones[0], 0.0)


def _landscape(canvas: Canvas, scene: Scene, rng: Rng) -> None:
    """Draw a sky with a sun or a moon, clouds, and hills in layers."""
    pen, tones = _whole(canvas), scene.tones
    x, y = rng.uniform((0.15, 0.1), (0.85, 0.3)).tolist()
    piece(pen, ellipse(x, y, 0.09, 0.09, 24), tones[0], 0.0)
    level = float(rng.uniform(0.3, 0.5))
    for number in range(3):
        heights = level + rng.uniform(-0.07, 0.07, 5)
        hills = curve(np.stack([np.linspace(-0.1, 1.1, 5), heights], 1), 6)
        piece(pen, join(hills, [(1.1, 1.2), (-0.1, 1.2)]), tones[1 + number], 0.0)
        level += float(rng.uniform(0.14, 0.22))


def _room(canvas: Canvas, scene: Scene, rng: Rng) -> None:
    """Draw a wall with a window and a picture, and a floor."""
    pen, tones = _whole(canvas), scene.tones
    level = float(rng.uniform(0.55, 0.72))
    x, y, w, h = rng.uniform((0.1, 0.08, 0.22, 0.2), (0.6, 0.2, 0.35, 0.35)).tolist()
    piece(pen, [(x, y), (x + w, y), (x + w, y + h), (x, y + h)], tones[0], 0.0)
    piece(pen, [(x + 0.03, y + 0.03), (x + w - 0.03, y + 0.03), (x + w - 0.03, y + h - 0.03), (x + 0.03, y + h - 0.03)],
          tones[1], 0.0)  # fmt: skip
    pen.stroke([(x + w / 2, y), (x + w / 2, y + h)])
    piece(pen, [(-0.1, level), (1.1, level), (1.1, 1.2), (-0.1, 1.2)], tones[2], 0.0)
    piece(pen, [(-0.1, level - 0.04), (1.1, level - 0.04), (1.1, level), (-0.1, level)], tones[3], 0.0)


def _cells(canvas: Canvas, scene: Scene, rng: Rng) -> None:
    """Draw the whole picture as stained glass: a bent grid of cells, which keep their colors and neighbors."""
    pen, shape = _whole(canvas), np.random.default_rng(scene.number)
    columns, rows = (int(n) for n in shape.integers(2, 5, 2))
    colors = shape.integers(0, len(scene.tones), (rows, columns))
    x, y = np.meshgrid(np.linspace(-0.08, 1.08, columns + 1), np.linspace(-0.08, 1.08, rows + 1))
    nodes = np.stack([x, y], -1)
    nodes += shape.uniform(-0.3, 0.3, nodes.shape) / (columns, rows) + rng.uniform(-0.14, 0.14, nodes.shape) / (
        columns,
        rows,
    )
    bulge = 0.25 * shape.uniform(-1, 1, (2, rows + 1, columns + 1, 2)) / (columns, rows)
    for i in range(rows):
        for j in range(columns):
            a, b, c, d = nodes[i, j], nodes[i, j + 1], nodes[i + 1, j + 1], nodes[i + 1, j]
            top, bottom = (a + b) / 2 + bulge[0, i, j], (c + d) / 2 + bulge[0, i + 1, j]
            right, left = (b + c) / 2 + bulge[1, i, j + 1], (a + d) / 2 + bulge[1, i, j]
            edges = [
                curve([start, middle, end], 5)
                for start, middle, end in ((a, top, b), (b, right, c), (c, bottom, d), (d, left, a))
            ]
            piece(pen, join(*edges), scene.tones[int(colors[i, j])], 0.0)


_BACKGROUNDS = {"landscape": _landscape, "room": _room, "cells": _cells}
