"""Draw anime faces from a character and a geometry: the colored picture and its line art.

    character = random_character(rng)                     # colors, clothes, accessory, background
    target, sketch = draw(character, random_geometry(rng), size=256)
    reference, _ = draw(character, random_geometry(rng), size=256)     # same colors, different geometry

Shading follows fixed rules (light from the upper left). So a second drawing of the same character determines the colors
of the first drawing, and the sketch determines its shapes. pipelines/synthetic/dataset.py writes datasets of faces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from animediffusion.pipelines.synthetic import clothes, hair
from animediffusion.pipelines.synthetic.background import BACKGROUNDS, draw_background
from animediffusion.pipelines.synthetic.canvas import (
    Canvas,
    FlatRegions,
    Frame,
    Pen,
    Points,
    blob,
    curve,
    ellipse,
    join,
    mirror,
    shifted,
    straight,
)
from animediffusion.pipelines.synthetic.figures import Outfit, Pose, draw_body, draw_raised_arms
from animediffusion.pipelines.synthetic.palette import MOUTH, TONGUE, WHITE, CharacterPalette, Color, random_palette

EYES = ("round", "tall", "sharp", "droopy", "calm")
MOUTHS = ("smile", "open", "cat", "small", "line", "grin")


MORE_EYES = ("dots", "closed", "plain")
MORE_MOUTHS = ("frown", "fang", "tongue", "shout")
PUPILS = ("round", "slit", "none", "ring")
EARS = ("round", "round", "round", "pointed", "long", "none")
NOSES = ("hook", "dot", "shadow", "long", "none")


class Build(NamedTuple):
    """Proportions and kinds of the parts of a head; the defaults are the usual face."""

    stretch: float = 1.0
    """Width of the head."""
    bend: tuple[float, float, float] | None = None
    width: float = 1.0
    """Width of the face below the hair."""
    cheeks: float = 1.0
    spacing: float = 1.0
    """Distance of the eyes."""
    eye_y: float = 0.0
    eye_width: float = 1.0
    eye_height: float = 1.0
    lids: tuple[float, ...] = ()
    """Displacements of the lids' points (x, y, x, y, ...), in half sizes of the eye."""
    iris: float = 1.0
    pupil: str = "round"
    glints: int = 2
    lash: float = 1.0
    brow: float = 1.0
    """Width of the brows; 0 = none."""
    mouth_y: float = 0.0
    mouth_width: float = 1.0
    nose: str = "hook"
    ears: str = "round"
    blush: bool = True
    marks: int = 0
    """Number of marks on each cheek."""
    volume: float = 1.0
    """Width of the hair behind the head."""
    strands: tuple[float, ...] = ()
    """Displacements of the outline of the hair and of its locks."""


_USUAL = Build()
_DETAILS = 0.19
"""Scale of a head below which eyes are simple and hair throws no shadow."""


@dataclass(frozen=True)
class Character:
    """The properties that all drawings of a character share."""

    palette: CharacterPalette
    clothes: str
    accessory: str
    background: str
    shine: bool
    """Whether the hair has a bright ring."""


@dataclass(frozen=True)
class Geometry:
    """The properties of one drawing: pose, shape of the face, expression, hair style."""

    x: float
    y: float
    scale: float
    """Position (x, y) and size of the head, in fractions of the picture."""
    tilt: float
    """Tilt of the head in radians, clockwise."""
    yaw: float
    pitch: float
    """Direction of the head (yaw, pitch): -1 (left, up) to 1 (right, down)."""
    jaw: float
    chin: float
    eyes: str
    eye_size: float
    gaze: float
    wink: bool
    brow: float
    mouth: str
    front: str
    back: str
    ahoge: bool
    side: int
    """Side of an accessory or a wink: -1 (left) or 1 (right)."""
    jitter: tuple[float, ...]
    """Small variations of hair locks and background, each -1..1."""
    build: Build = _USUAL
    pose: Pose | None = None
    """Pose of the body; None draws only the shoulders."""


def random_character(rng: np.random.Generator) -> Character:
    """Choose a random palette, clothes, accessory and background."""
    return Character(
        palette=random_palette(rng),
        clothes=_one_of(rng, clothes.CLOTHES),
        accessory=_one_of(rng, clothes.ACCESSORIES),
        background=_one_of(rng, BACKGROUNDS),
        shine=bool(rng.random() < 0.75),
    )


def random_geometry(rng: np.random.Generator) -> Geometry:
    """Choose a random pose, face, expression and hair style."""
    return Geometry(
        x=0.5 + 0.035 * _unit(rng),
        y=0.495 + 0.02 * _unit(rng),
        scale=0.345 + 0.025 * _unit(rng),
        tilt=0.13 * _unit(rng),
        yaw=_unit(rng),
        pitch=_unit(rng),
        jaw=1.0 + 0.07 * _unit(rng),
        chin=0.80 + 0.05 * _unit(rng),
        eyes=_one_of(rng, EYES),
        eye_size=1.0 + 0.12 * _unit(rng),
        gaze=_unit(rng),
        wink=bool(rng.random() < 0.07),
        brow=_unit(rng),
        mouth=_one_of(rng, MOUTHS),
        front=_one_of(rng, hair.FRONTS),
        back=_one_of(rng, hair.BACKS),
        ahoge=bool(rng.random() < 0.25),
        side=1 if rng.random() < 0.5 else -1,
        jitter=tuple(_unit(rng) for _ in range(14)),
    )


def _one_of(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]


def _unit(rng: np.random.Generator) -> float:
    return float(rng.uniform(-1, 1))


def draw(character: Character, geometry: Geometry, size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the colored picture [size, size, 3] and its line art [size, size], dark on white."""
    return draw_canvas(character, geometry, size).finish()


def draw_regions(character: Character, geometry: Geometry, size: int) -> FlatRegions:
    """Return the exact regions of the picture that draw() returns for the same arguments."""
    palette = character.palette
    canvas = _drawn(character, geometry, Canvas(size, palette.upper, keep_fills=True))
    return canvas.regions((palette.hair, palette.skin, palette.eyes, palette.clothes, palette.trim, palette.accent))


def draw_canvas(character: Character, geometry: Geometry, size: int) -> Canvas:
    """Return the canvas of draw() for the same arguments, before its colors and lines are joined."""
    return _drawn(character, geometry, Canvas(size, character.palette.upper))


def _drawn(character: Character, geometry: Geometry, canvas: Canvas) -> Canvas:
    """Draw the character on an empty canvas, and return the canvas."""
    draw_background(canvas, character.background, character.palette, (geometry.x, geometry.y), geometry.jitter[-1])
    draw_character(canvas, character, geometry)
    return canvas


def draw_character(canvas: Canvas, character: Character, geometry: Geometry, outfit: Outfit | None = None) -> None:
    """Draw a character over what is on the canvas: head and shoulders, or a figure if it has a pose and an outfit."""
    g, palette = geometry, character.palette
    head = Pen(canvas, Frame(g.scale, g.x, g.y, g.tilt, g.build.bend, g.build.stretch))
    body = Pen(canvas, Frame(g.scale, g.x - 0.6 * g.tilt * g.scale, g.y))
    hidden = g.back == "buns" and character.accessory in ("beret", "cat ears")
    back = "bob" if hidden else g.back  # all drawings of a character must show the accent color
    ahoge = g.ahoge and character.accessory not in ("beret", "headband", "headphones")
    far, skull, features = (head.moved(depth * g.yaw, 0.6 * depth * g.pitch) for depth in (-0.05, 0.04, 0.13))
    if character.accessory == "cat ears":
        clothes.draw_cat_ears(far, palette)
    hair.draw_behind(far, back, palette.hair, g.build.volume, g.build.strands)
    bare = character.clothes == "straps"
    figure = (palette, outfit, g.pose) if outfit and g.pose else None
    if figure:
        draw_body(body, *figure, bare=bare)
        _neck(body, head, g, palette, short=True)
        clothes.draw_collar(body, character.clothes, palette)
    else:
        _neck(body, head, g, palette)
        clothes.draw_clothes(body, character.clothes, palette)
    hair.draw_tails(far, back, palette.hair, palette.trim, g.jitter)
    _face(head, skull, features, g, palette)
    _eyes(features, g, palette)
    hair.draw_front(skull, g.front, back, palette.hair, g.jitter, shine=character.shine, ahoge=ahoge)
    _brows(features, g)
    if character.accessory == "glasses":
        clothes.draw_glasses(features, palette, 0.31)
    else:
        clothes.draw_accessory(skull, character.accessory, palette, g.side)
    if figure:
        draw_raised_arms(body, *figure, bare=bare)


def _outline(g: Geometry) -> Points:
    wide, cheeks = g.build.width, g.build.width * g.build.cheeks
    half = [
        (0.46, -0.86),
        (0.63, -0.45),
        (0.66 * wide, -0.05),
        (0.625 * cheeks, 0.24),
        (0.50 * g.jaw * cheeks, 0.50),
        (0.27 * g.jaw * wide, g.chin - 0.09),
    ]
    points = blob([(0, -1.0), *half, (0, g.chin), *mirror(half)])
    lean = 0.075 * g.yaw * np.clip(points[:, 1:] + 0.5, 0, None)  # the chin moves most when the head turns
    return np.asarray(points + lean * (1.0, 0.0), np.float64)


def _neck(body: Pen, head: Pen, g: Geometry, palette: CharacterPalette, *, short: bool = False) -> None:
    half = [(0.19, 0.4), (0.19, 0.80), (0.24, 0.93), *([(0.1, 1.1)] if short else [(0.50, 1.06), (0.6, 1.4)])]
    neck = join(curve(half), curve(mirror(half)))
    body.fill(neck, palette.skin.base)
    region = body.region(neck)
    head.tint(shifted(_outline(g), 0.02, 0.13), palette.skin.shade, within=region)
    for side in (-1, 1):
        body.stroke(curve([(side * 0.19, 0.5), (side * 0.19, 0.80), (side * 0.25, 0.94)]))


def _face(head: Pen, skull: Pen, features: Pen, g: Geometry, palette: CharacterPalette) -> None:
    skin = palette.skin
    for side in (-1, 1):
        if g.build.ears == "none":
            break
        ear = blob([(side * 0.60, 0.0), (side * 0.74, -0.02), (side * 0.76, 0.16), (side * 0.64, 0.32)])
        if g.build.ears != "round":
            reach, rise = (0.98, -0.22) if g.build.ears == "pointed" else (1.3, -0.06)
            ear = blob(
                [
                    (side * 0.58, 0.0),
                    (side * 0.76, -0.08),
                    (side * reach, rise),
                    (side * 0.78, 0.22),
                    (side * 0.62, 0.3),
                ]
            )
        head.fill(ear, skin.base)
        head.tint(ellipse(side * 0.67, 0.12, 0.05, 0.1), skin.shade)
        head.stroke(ear)
    outline = _outline(g)
    region = head.region(outline)
    head.fill(outline, skin.base)
    for shape in hair.shadow_on_face(g.front, g.jitter) if g.scale >= _DETAILS else ():
        skull.tint(shape, skin.shade, within=region)
    for side in (-1, 1):
        if g.build.blush and g.scale >= _DETAILS:
            features.tint(ellipse(side * 0.40, 0.42, 0.15, 0.085), TONGUE, within=region, opacity=0.36)
        for number in range(g.build.marks):
            mark = [(side * 0.34, 0.40 + 0.09 * number), (side * 0.54, 0.37 + 0.11 * number)]
            features.stroke(straight(mark), 0.9, taper=(0.3, 0.3))
    head.stroke(outline)
    _nose(features, g.build.nose, skin.shade)
    _mouth(features.moved(0, g.build.mouth_y) if g.build.mouth_y else features, g)


def _nose(pen: Pen, kind: str, shade: Color) -> None:
    if kind == "hook":
        pen.stroke(curve([(-0.01, 0.35), (0.025, 0.385), (-0.015, 0.40)], 5), 0.9, taper=(0.2, 0.5))
    elif kind == "dot":
        pen.stroke(curve([(0.0, 0.36), (0.015, 0.375), (0.0, 0.39)], 5), 1.4)
    elif kind == "shadow":
        pen.tint([(0.0, 0.27), (0.07, 0.40), (-0.03, 0.40)], shade)
    elif kind == "long":
        pen.stroke(curve([(0.05, 0.0), (0.03, 0.2), (0.09, 0.37), (-0.03, 0.40)], 5), 0.9, taper=(0.0, 0.6))


def _mouth(pen: Pen, g: Geometry) -> None:
    y, w = 0.56 + 0.3 * (g.chin - 0.8), g.build.mouth_width
    if g.mouth in ("open", "grin", "tongue", "shout"):
        wide, deep = {"open": (0.13, 0.15), "grin": (0.18, 0.11), "tongue": (0.1, 0.09)}.get(g.mouth, (0.2, 0.17))
        wide *= w
        lips = join(
            curve([(-wide, y - 0.02), (0, y + 0.005), (wide, y - 0.02)]),
            curve([(wide * 0.8, y + deep * 0.7), (0, y + deep), (-wide * 0.8, y + deep * 0.7)]),
        )
        pen.fill(lips, MOUTH)
        pen.tint(ellipse(0, y + deep, wide * 0.62, deep * 0.5), TONGUE, within=pen.region(lips))
        pen.stroke(join(lips, lips[:2]))
        if g.mouth == "shout":
            teeth = [(-0.14 * w, y), (0.14 * w, y), (0.11 * w, y + 0.045), (-0.11 * w, y + 0.045)]
            pen.fill(teeth, WHITE)
            pen.stroke(straight([*teeth, teeth[0]]), 0.7)
    elif g.mouth == "cat":
        points = np.array([(-0.13, y - 0.01), (-0.07, y + 0.04), (0, y), (0.07, y + 0.04), (0.13, y - 0.01)])
        pen.stroke(curve(points * (w, 1)), 1.1)
    elif g.mouth == "small":
        dot = ellipse(0, y + 0.02, 0.05, 0.06)
        pen.fill(dot, MOUTH)
        pen.stroke(dot)
    else:
        sag = {"smile": 0.05, "frown": -0.05, "fang": 0.04}.get(g.mouth, 0.008)
        pen.stroke(curve([(-0.13 * w, y), (0, y + sag), (0.13 * w, y)]), 1.1, taper=(0.5, 0.5))
        if g.mouth == "fang":
            tooth = [(0.03, y + 0.03), (0.055, y + 0.09), (0.085, y + 0.02)]
            pen.fill(tooth, WHITE)
            pen.stroke(straight(tooth), 0.7)


def _brows(pen: Pen, g: Geometry) -> None:
    for side in (-1, 1):
        if not g.build.brow:
            break
        arch = [(side * 0.17, -0.22 + 0.03 * g.brow), (side * 0.32, -0.265), (side * 0.46, -0.21 - 0.02 * g.brow)]
        pen.stroke(curve(arch), 1.5 * g.build.brow, taper=(0.8, 0.1))


# Points of the upper and the lower lid of each kind of eye: (outward, down) in half sizes of the eye.
_LIDS = {
    "round": (
        [(-1, 0.25), (-0.7, -0.62), (0, -1.0), (0.7, -0.72), (1.0, 0.0)],
        [(0.78, 0.74), (0.1, 1.0), (-0.6, 0.84)],
    ),
    "tall": (
        [(-0.86, 0.2), (-0.62, -0.78), (0, -1.16), (0.62, -0.85), (0.9, 0.0)],
        [(0.7, 0.8), (0.1, 1.08), (-0.52, 0.9)],
    ),
    "sharp": (
        [(-1, 0.35), (-0.62, -0.40), (0.1, -0.86), (0.74, -0.80), (1.12, -0.36)],
        [(0.78, 0.60), (0.1, 0.84), (-0.6, 0.72)],
    ),
    "droopy": (
        [(-1, -0.05), (-0.7, -0.74), (0, -0.92), (0.72, -0.56), (1.08, 0.30)],
        [(0.8, 0.80), (0.1, 0.92), (-0.6, 0.72)],
    ),
    "calm": (
        [(-1, 0.05), (-0.66, -0.42), (0, -0.56), (0.7, -0.44), (1.06, 0.04)],
        [(0.78, 0.68), (0.1, 0.90), (-0.6, 0.74)],
    ),
}


_PUPILS = {
    "round": ((0.27, 0.42, "deep"),),
    "slit": ((0.10, 0.55, "deep"),),
    "none": (),
    "ring": ((0.42, 0.60, "deep"), (0.26, 0.36, "light")),
}


def _eyes(pen: Pen, g: Geometry, palette: CharacterPalette) -> None:
    build = g.build
    for side in (-1, 1):
        width = 0.195 * g.eye_size * (1 - 0.16 * g.yaw * side) * build.eye_width
        center = (side * 0.31 * (1 - 0.06 * g.yaw * side) * build.spacing, 0.13 + build.eye_y)
        at = pen.moved(*center)
        scale = np.array((side * width, 0.215 * g.eye_size * build.eye_height))
        if g.eyes == "closed":
            lid = curve(np.array([(-0.95, 0.25), (0, -0.35), (0.95, 0.25)]) * scale)
            at.stroke(lid, 2.2, taper=(0.4, 0.6))
        elif g.eyes == "dots":
            dot = ellipse(0, 0, 0.4 * width, 0.55 * scale[1], 16)
            at.fill(dot, palette.eyes.deep)
            at.stroke(dot, 1.2)
            at.fill(ellipse(-0.1 * width, -0.2 * scale[1], 0.14 * width, 0.16 * scale[1], 10), WHITE)
        elif g.wink and side == g.side:
            at.stroke(curve(np.array([(-0.9, 0.1), (0, 0.62), (0.9, 0.1)]) * scale), 2.2, taper=(0.4, 0.6))
        else:
            _eye(at, g, scale, palette)


def _eye(pen: Pen, g: Geometry, scale: NDArray[np.float64], palette: CharacterPalette) -> None:
    upper_lid, lower_lid = _LIDS.get(g.eyes, _LIDS["round"])
    if g.build.lids:
        moved = np.array([*upper_lid, *lower_lid]) + np.reshape(g.build.lids, (-1, 2))
        points = [(float(x), float(y)) for x, y in moved]
        upper_lid, lower_lid = points[: len(upper_lid)], points[len(upper_lid) :]
    upper = curve(np.array(upper_lid) * scale)
    lower = curve(np.array([upper_lid[-1], *lower_lid, upper_lid[0]]) * scale)
    opening = join(upper, lower)
    region = pen.region(opening)
    width, height = abs(scale[0]), scale[1]
    pen.fill(opening, WHITE)
    if g.scale < _DETAILS:
        pen.fill_within(ellipse(0.0, 0.0, 0.66 * width, 0.92 * height, 14), region, palette.eyes.base)
        pen.stroke(upper, 2.6, taper=(0.35, 0.8))
        return
    pen.tint(shifted(opening, 0, -1.55 * height), palette.skin.shade, within=region)
    x, y = 0.16 * g.gaze * width, 0.08 * height
    size = g.build.iris
    iris = ellipse(x, y, 0.66 * width * size, 0.92 * height * size)
    if g.eyes == "plain":
        pen.fill_within(iris, region, palette.eyes.base)
    else:
        pen.gradient(iris, palette.eyes.deep, palette.eyes.light, within=region)
    for dx, dy, color in _PUPILS[g.build.pupil]:
        tone = palette.eyes.deep if color == "deep" else palette.eyes.light
        pen.tint(ellipse(x, y - 0.04 * height, dx * width * size, dy * height * size), tone, within=region)
    if g.eyes != "plain":
        pen.tint(ellipse(x, y + 0.58 * height, 0.36 * width, 0.20 * height), palette.eyes.light, within=region)
    pen.stroke_within(iris, region, 0.8)
    for dx, dy, radius in ((-0.26, -0.40, 0.25), (0.26, 0.40, 0.12))[: g.build.glints]:
        glint = ellipse(x + dx * width, y + dy * height, radius * width, radius * height)
        pen.tint(glint, WHITE)  # light on the iris, not a region of its own
        pen.erase(glint)
    pen.stroke(upper, 2.6 * g.build.lash, taper=(0.35, 0.8))
    flick = np.array([upper_lid[-2], upper_lid[-1], (upper_lid[-1][0] + 0.22, upper_lid[-1][1] - 0.16)]) * scale
    pen.stroke(curve(flick), 2.0 * g.build.lash, taper=(0.8, 0.0))
    pen.stroke(lower[2 : len(lower) // 2 + 4], 1.0, taper=(1.0, 0.0))
    crease = np.array([(x * 0.92, y - 0.26) for x, y in upper_lid[1:4]]) * scale
    pen.stroke(curve(crease), 0.7, taper=(0.0, 0.2))
