"""Draw half and whole figures: torso, arms, hands, legs and clothes below the head of pipelines/synthetic/faces.py.

Coordinates are those of the head: the shoulders are near y = 1.1, the hips near y = 2.8, and the feet near y = 5.8.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from animediffusion.pipelines.synthetic.canvas import Frame, Pen, Points, blob, curve, join, mirror, shifted
from animediffusion.pipelines.synthetic.palette import CharacterPalette, Tone

Rng = np.random.Generator

BOTTOMS = ("skirt", "long skirt", "trousers", "shorts", "robe")
_FINGERS = 0.13
"""Scale of a figure below which its hands have no fingers."""
SLEEVES = (0.0, 0.35, 0.6, 1.0)
"""Covered share of the arm."""


class Outfit(NamedTuple):
    """What a figure wears below the shoulders; all drawings of a character share it."""

    bottom_kind: str
    sleeve: float
    bottom: Tone
    socks: Tone
    sock_height: float
    """Covered share of the leg."""
    shoes: Tone
    belt: bool
    gloves: bool


class Pose(NamedTuple):
    """The joints of a figure. Angles are in radians: 0 points down, positive away from the body."""

    arms: tuple[tuple[float, float], tuple[float, float]]
    """Angles of upper arm and forearm, left and right."""
    legs: tuple[tuple[float, float], tuple[float, float]]
    tall: float
    """Factor on the lengths below the shoulders."""
    slim: float
    """Factor on the widths."""
    lean: float
    fingers: tuple[float, float]
    """How far the fingers are spread, left and right."""


def random_outfit(rng: Rng, tones: list[Tone]) -> Outfit:
    """Choose clothes in three of the colors."""
    return Outfit(
        bottom_kind=BOTTOMS[int(rng.integers(len(BOTTOMS)))],
        sleeve=SLEEVES[int(rng.integers(len(SLEEVES)))],
        bottom=tones[0],
        socks=tones[1],
        sock_height=float(rng.choice((0.0, 0.25, 0.5, 0.72))),
        shoes=tones[2],
        belt=bool(rng.random() < 0.4),
        gloves=bool(rng.random() < 0.15),
    )


def random_pose(rng: Rng) -> Pose:
    """Choose a pose: arms down, raised, bent or before the body; legs together, apart or bent."""

    def arm() -> tuple[float, float]:
        upper = float(rng.choice((0.2, 0.5, 1.0, 1.7, 2.3)) + rng.uniform(-0.25, 0.25))
        return upper, upper + float(rng.choice((-1.6, -0.4, 0.1, 0.9, 1.6)) + rng.uniform(-0.3, 0.3))

    def leg() -> tuple[float, float]:
        thigh = float(rng.uniform(-0.05, 0.35))
        return thigh, thigh + float(rng.uniform(-0.5, 0.15))

    return Pose(
        arms=(arm(), arm()),
        legs=(leg(), leg()),
        tall=float(rng.uniform(0.55, 1.2)),
        slim=float(rng.uniform(0.8, 1.15)),
        lean=float(rng.uniform(-0.12, 0.12)),
        fingers=(float(rng.random()), float(rng.random())),
    )


def draw_body(pen: Pen, palette: CharacterPalette, outfit: Outfit, pose: Pose, *, bare: bool) -> None:
    """Draw legs, bottom, torso and those arms that hang beside or behind the body; neck and collar come later.

    Args:
        pen: a pen in the coordinates of the head, upright.
        palette: colors of skin and top.
        outfit: the clothes below the shoulders.
        pose: the joints.
        bare: whether the top has no sleeves.
    """
    hips = float(pen.frame([(0.0, 1.0 + 1.3 * pose.tall)])[0, 1])
    if hips < 1.05:  # else they are below the picture
        _lower_body(pen, palette, outfit, pose)
    torso = _torso(pose)
    tone = palette.clothes
    region = pen.region(torso)
    pen.fill(torso, tone.base)
    pen.tint(shifted(torso, 0.62 * pose.slim, 0.1), tone.shade, within=region)
    pen.stroke(torso)
    if outfit.belt:
        y = 1.0 + 1.35 * pose.tall
        band = [
            (-0.75 * pose.slim, y),
            (0.75 * pose.slim, y),
            (0.75 * pose.slim, y + 0.16),
            (-0.75 * pose.slim, y + 0.16),
        ]
        pen.fill_within(band, region, outfit.bottom.deep)
        pen.stroke_within(join(band, band[:1]), region, 1.0)
        pen.stroke(torso)
    for side, angles in zip((-1, 1), pose.arms, strict=True):
        if not _raised(angles):
            _arm(pen, side, angles, palette, outfit, pose, bare=bare)


def _lower_body(pen: Pen, palette: CharacterPalette, outfit: Outfit, pose: Pose) -> None:
    for side, angles in zip((-1, 1), pose.legs, strict=True):
        _leg(pen, side, angles, palette, outfit, pose)
    if outfit.bottom_kind == "robe":
        _skirt(pen, outfit, pose, palette.clothes)
    elif outfit.bottom_kind in ("skirt", "long skirt"):
        _skirt(pen, outfit, pose, outfit.bottom)
    else:
        _hips(pen, outfit, pose)


def draw_raised_arms(pen: Pen, palette: CharacterPalette, outfit: Outfit, pose: Pose, *, bare: bool) -> None:
    """Draw the arms that are before the body or the head."""
    for side, angles in zip((-1, 1), pose.arms, strict=True):
        if _raised(angles):
            _arm(pen, side, angles, palette, outfit, pose, bare=bare)


def hand_positions(pose: Pose) -> list[Points]:
    """Return the centers of the hands, in the coordinates of the head."""
    return [_arm_joints(side, angles, pose)[-1] for side, angles in zip((-1, 1), pose.arms, strict=True)]


def _raised(angles: tuple[float, float]) -> bool:
    return angles[1] < 0 or angles[1] > 1.3


def _torso(pose: Pose) -> Points:
    tall, slim = pose.tall, pose.slim
    waist, hips = 1.0 + 1.1 * tall, 1.0 + 1.7 * tall
    side = [(0.80, 1.16), (0.80, 1.0 + 0.5 * tall), (0.60, waist), (0.70, hips)]
    half = [(0.24, 0.92), (0.50, 1.03), *((slim * x, y) for x, y in side)]
    return blob([*half, *mirror(half)], 5)


def _hips(pen: Pen, outfit: Outfit, pose: Pose) -> None:
    top, low, wide = 1.0 + 1.35 * pose.tall, 1.0 + 2.05 * pose.tall, 0.72 * pose.slim
    hips = [(-0.9 * wide, top), (0.9 * wide, top), (1.05 * wide, low), (0.0, low + 0.1), (-1.05 * wide, low)]
    _piece(pen, hips, outfit.bottom)


def _skirt(pen: Pen, outfit: Outfit, pose: Pose, tone: Tone) -> None:
    top = 1.0 + 1.3 * pose.tall
    long = {"skirt": 1.2, "long skirt": 2.6, "robe": 3.3}[outfit.bottom_kind] * pose.tall
    wide = 0.62 * pose.slim
    flare = wide + 0.36 * long**0.7
    hem = np.linspace(flare, -flare, 9)
    wave = top + long + 0.05 * (-1.0) ** np.arange(9) + 0.1 * (1 - (hem / flare) ** 2)
    outline = join([(-wide, top), (wide, top)], curve(np.stack([hem, wave], 1), 3))
    region = pen.region(outline)
    pen.fill(outline, tone.base)
    pen.tint(shifted(outline, 1.1 * flare, 0), tone.shade, within=region)
    for k in (-2, -1, 0, 1, 2):
        fold = [(0.4 * k * wide, top + 0.3 * long), (0.42 * k * flare, top + 0.98 * long)]
        pen.stroke(np.linspace(fold[0], fold[1], 6), 0.7, taper=(0.0, 0.6))
    if outfit.belt:
        band = [(-2 * flare, top + 0.8 * long), (2 * flare, top + 0.8 * long), (2 * flare, top + 0.88 * long),
                (-2 * flare, top + 0.88 * long)]  # fmt: skip
        pen.fill_within(band, region, outfit.socks.base)
        pen.stroke_within(join(band, band[:1]), region, 0.8)
    pen.stroke(join(outline, outline[:1]))


def _leg(
    pen: Pen, side: int, angles: tuple[float, float], palette: CharacterPalette, outfit: Outfit, pose: Pose
) -> None:
    long = 1.5 * pose.tall
    hip = np.array((side * 0.34 * pose.slim, 1.0 + 1.9 * pose.tall))
    knee = hip + long * np.array((side * np.sin(angles[0]), np.cos(angles[0])))
    ankle = knee + long * np.array((side * np.sin(angles[1]), np.cos(angles[1])))
    shoe = blob(
        np.array([(-0.13, -0.12), (0.14, -0.12), (0.2, 0.08), (0.34, 0.2), (0.1, 0.26), (-0.16, 0.24)]) * (side, 1)
        + ankle,
        5,
    )
    joints, widths = np.stack([hip, knee, ankle]), np.array((0.30, 0.21, 0.14)) * pose.slim
    _limb(pen, joints, widths, palette.skin, 0.0, 1.0)
    if outfit.bottom_kind == "trousers":
        _limb(pen, joints, widths + 0.06, outfit.bottom, 0.0, 0.95)
    elif outfit.sock_height:
        _limb(pen, joints, widths + 0.015, outfit.socks, 1 - outfit.sock_height, 1.0)
    if outfit.bottom_kind == "shorts":
        _limb(pen, joints, widths + 0.08, outfit.bottom, 0.0, 0.38)
    _piece(pen, shoe, outfit.shoes)


def _arm_joints(side: int, angles: tuple[float, float], pose: Pose) -> Points:
    long = 0.55 + 0.6 * pose.tall
    shoulder = np.array((side * 0.70 * pose.slim, 1.28))
    elbow = shoulder + long * np.array((side * np.sin(angles[0]), np.cos(angles[0])))
    wrist = elbow + 0.9 * long * np.array((side * np.sin(angles[1]), np.cos(angles[1])))
    return np.stack([shoulder, elbow, wrist])


def _arm(
    pen: Pen,
    side: int,
    angles: tuple[float, float],
    palette: CharacterPalette,
    outfit: Outfit,
    pose: Pose,
    *,
    bare: bool,
) -> None:
    joints, widths = _arm_joints(side, angles, pose), np.array((0.19, 0.15, 0.105)) * (0.4 + 0.6 * pose.slim)
    _limb(pen, joints, widths, palette.skin, 0.0, 1.0)
    sleeve = 0.0 if bare else outfit.sleeve
    skin = outfit.socks if outfit.gloves else palette.skin
    _hand(pen, side, joints, pose.fingers[(side + 1) // 2], skin)
    if sleeve:
        _limb(pen, joints, widths + np.array((0.06, 0.07, 0.09)), palette.clothes, 0.0, sleeve)


def _limb(pen: Pen, joints: Points, widths: Points, tone: Tone, start: float, end: float) -> None:
    """Draw the part of an arm or a leg between two shares of its length."""
    path = curve(np.column_stack([joints, widths]), 7)
    first, last = round(start * (len(path) - 1)), round(end * (len(path) - 1))
    path = path[first : last + 1]
    step = np.gradient(path[:, :2], axis=0)
    across = np.stack([-step[:, 1], step[:, 0]], 1) * (path[:, 2:] / (np.linalg.norm(step, axis=1)[:, None] + 1e-9))
    one, other = path[:, :2] + across, path[:, :2] - across
    outline = join(one, other[::-1])
    pen.fill(outline, tone.base)
    right, left = (one, other) if one[:, 0].sum() > other[:, 0].sum() else (other, one)
    pen.tint(join(right, (right + 0.3 * (left - right))[::-1]), tone.shade)
    pen.stroke(one)
    pen.stroke(other)
    if end < 1 or start > 0:
        pen.stroke(np.linspace(one[-1 if end < 1 else 0], other[-1 if end < 1 else 0], 5))


def _hand(pen: Pen, side: int, joints: Points, spread: float, tone: Tone) -> None:
    """Draw a palm, four fingers and a thumb, or a fist if the fingers are not spread."""
    direction = joints[2] - joints[1]
    angle = float(np.arctan2(direction[0], direction[1]))
    x, y = pen.frame(joints[2:3])[0].tolist()
    frame = Frame(pen.frame.scale * 0.34, x, y, pen.frame.angle - angle, stretch=side)
    hand = Pen(pen.canvas, frame)
    if spread < 0.25 or pen.frame.scale < _FINGERS:
        _piece(hand, blob([(-0.3, -0.1), (0.3, -0.1), (0.42, 0.3), (0.2, 0.65), (-0.25, 0.62), (-0.4, 0.25)], 5), tone)
        for x in (-0.12, 0.08, 0.26) if pen.frame.scale >= _FINGERS else ():
            hand.stroke([(x, 0.3), (x, 0.45), (x - 0.02, 0.6)], 0.6)
        return
    fan = 0.12 + 0.28 * spread
    for reach, bend in ((0.92, -1.5), (1.08, -0.5), (1.04, 0.5), (0.85, 1.5)):
        base = np.array((0.17 * bend, 0.38))
        tip = base + (reach - 0.38) * np.array((np.sin(fan * bend), np.cos(fan * bend)))
        across = 0.085 * np.array((np.cos(fan * bend), -np.sin(fan * bend)))
        outline = [base - across, tip - across, tip + 0.09 * (tip - base), tip + across, base + across]
        finger = blob(np.stack(outline), 3)
        _piece(hand, finger, tone, 0.8)
    thumb = blob([(-0.3, 0.0), (-0.62, 0.25), (-0.66, 0.48), (-0.5, 0.46), (-0.26, 0.3)], 4)
    _piece(hand, thumb, tone, 0.8)
    palm = blob([(-0.26, -0.12), (0.26, -0.12), (0.34, 0.3), (0.27, 0.48), (-0.27, 0.48), (-0.35, 0.25)], 4)
    hand.fill(palm, tone.base)
    hand.stroke(join(palm[14:], palm[:6]), 0.8)


def _piece(pen: Pen, outline: object, tone: Tone, width: float = 1.0) -> None:
    points = np.asarray(outline, np.float64)
    pen.fill(points, tone.base)
    pen.stroke(join(points, points[:1]), width)
