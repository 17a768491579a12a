"""Choose and draw varied characters: other heads and hair, figures, several characters, objects, backgrounds.

    cast = random_cast(rng, extra, varied)
    geometries = random_geometries(cast, rng, extra)        # other ones for every view
    draw_cast(canvas, cast, geometries, extra)

The drawings of a cast have the same colors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from animediffusion.pipelines.synthetic import faces, hair
from animediffusion.pipelines.synthetic.background import draw_background
from animediffusion.pipelines.synthetic.canvas import Canvas, Frame, Pen
from animediffusion.pipelines.synthetic.faces import Build, Character, Geometry, random_character, random_geometry
from animediffusion.pipelines.synthetic.figures import Outfit, random_outfit, random_pose
from animediffusion.pipelines.synthetic.palette import free_tones, shadowed, varied_palette, with_shadows
from animediffusion.pipelines.synthetic.scenes.shapes import Scene, draw_setting, random_scene
from animediffusion.pipelines.synthetic.scenes.things import Thing, draw_thing, random_thing

Rng = np.random.Generator


_BEHIND = 3
"""Largest number of objects in a background."""


class Member(NamedTuple):
    """A character of a cast, with what it wears below the shoulders."""

    character: Character
    outfit: Outfit | None
    framing: str
    """face: as usual; anywhere: a face of any size at any place; half, whole: a figure."""
    bald: bool
    """Whether no drawing shows hair; otherwise all do, so that its color is known."""


@dataclass(frozen=True)
class Cast:
    """What all views of a drawing with characters share."""

    members: tuple[Member, ...]
    varied: frozenset[str]
    props: tuple[Thing, ...] = ()
    setting: Scene | None = None
    """A background with objects, in place of the first character's background."""

    @property
    def ground(self) -> tuple[int, int, int]:
        """First color of the background."""
        return self.setting.ground.base if self.setting else self.members[0].character.palette.upper


def random_cast(rng: Rng, extra: Rng, varied: frozenset[str], shadow: float = 1.0) -> Cast:
    """Choose the characters, objects and background of a row.

    Args:
        rng: random generator of the usual faces; the first character draws the same numbers as without variety.
        extra: random generator of all that is varied.
        varied: the factors to vary.
        shadow: factor on the strength of all shadows.
    """
    count = 1 + int("crowds" in varied) * (1 + int(extra.random() < 0.4))
    figures = ("anywhere", "half", "half", "whole", "whole", "whole")
    framing = figures[int(extra.integers(len(figures)))] if "figures" in varied else "face"
    backdrop = ("paper" if extra.random() < 0.4 else "objects") if "backgrounds" in varied else "usual"
    members = []
    for number in range(count):
        character = random_character(rng if number == 0 else extra)
        palette = varied_palette(extra) if "palettes" in varied else character.palette
        character = replace(character, palette=palette if shadow == 1.0 else with_shadows(palette, shadow))
        if backdrop == "paper":
            character = _on_paper(character, extra)
        outfit = None
        if framing != "face":
            outfit = random_outfit(extra, shadowed(free_tones(extra, 3, paper=False), shadow))
        members.append(Member(character, outfit, framing, bool("hair" in varied and extra.random() < 0.06)))
    props: tuple[Thing, ...] = ()
    if "props" in varied:
        tones = shadowed(free_tones(extra, 5, paper=False), shadow)
        props = tuple(random_thing(extra, tones) for _ in range(int(extra.integers(1, 4))))
    setting = None
    if backdrop == "objects":
        scene = random_scene(extra, shadow)
        setting = scene._replace(things=scene.things[:_BEHIND], scales=scene.scales[:_BEHIND])
    return Cast(tuple(members), varied, props, setting)


def random_geometries(cast: Cast, rng: Rng, extra: Rng) -> list[Geometry]:
    """Choose the geometry of every member for one view."""
    count = len(cast.members)
    places = extra.permutation(count)
    found = []
    for number, member in enumerate(cast.members):
        geometry = random_geometry(rng if number == 0 else extra)
        if "heads" in cast.varied:
            geometry = _other_head(geometry, extra)
        if "hair" in cast.varied:
            geometry = _other_hair(geometry, extra, bald=member.bald)
        geometry = _framed(geometry, member.framing, extra)
        if count > 1:
            slot = (float(places[number]) + 0.5) / count
            smaller = {2: 0.72, 3: 0.56}[count]
            geometry = replace(
                geometry,
                x=slot + 0.3 * (geometry.x - 0.5),
                scale=geometry.scale * smaller,
                y=geometry.y + float(extra.uniform(-0.06, 0.12)),
            )
            if member.framing == "face":  # shoulders end below the picture
                geometry = replace(geometry, y=max(geometry.y, 1.03 - 2.0 * geometry.scale))
        found.append(geometry)
    return found


def draw_cast(canvas: Canvas, cast: Cast, geometries: list[Geometry], extra: Rng) -> None:
    """Draw one view on a canvas whose ground is `cast.ground`."""
    first = cast.members[0].character
    if cast.setting:
        draw_setting(canvas, cast.setting, extra)
    else:
        g = geometries[0]
        draw_background(canvas, first.background, first.palette, (g.x, g.y), g.jitter[-1])
    canvas.begin_figures()
    num_behind = int(extra.integers(len(cast.props) + 1))
    for thing in cast.props[:num_behind]:
        _draw_prop(canvas, thing, geometries, extra)
    for number in np.argsort([g.scale for g in geometries], kind="stable").tolist():
        member = cast.members[number]
        faces.draw_character(canvas, member.character, geometries[number], member.outfit)
    for thing in cast.props[num_behind:]:
        _draw_prop(canvas, thing, geometries, extra)


def _draw_prop(canvas: Canvas, thing: Thing, geometries: list[Geometry], extra: Rng) -> None:
    """Draw an object at the side of a character, where it does not hide the face."""
    g = geometries[int(extra.integers(len(geometries)))]
    u = extra.random(5).tolist()
    side = -1 if u[0] < 0.5 else 1
    x = g.x + side * (0.20 + 0.25 * u[1])
    y = 0.35 + 0.6 * u[2] if g.scale < 0.28 else 0.7 + 0.25 * u[2]
    draw_thing(Pen(canvas, Frame(0.08 + 0.1 * u[3], x, y, 1.2 * (u[4] - 0.5))), thing)


def _on_paper(character: Character, extra: Rng) -> Character:
    """Return the character before white or nearly white paper."""
    light = int(extra.integers(236, 256))
    return replace(character, palette=character.palette._replace(upper=(255, 255, light)), background="flat")


def _one_of(rng: Rng, names: tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]


def _framed(geometry: Geometry, framing: str, extra: Rng) -> Geometry:
    if framing == "face":
        return geometry
    u = extra.random(4).tolist()
    pose = random_pose(extra)
    if framing == "anywhere":
        scale = 0.16 + 0.34 * u[0]
        return replace(
            geometry, scale=scale, x=0.25 + 0.5 * u[1], y=0.35 + 0.35 * u[2], tilt=0.8 * (u[3] - 0.5), pose=pose
        )
    if framing == "half":
        scale = 0.17 + 0.08 * u[0]
        return replace(geometry, scale=scale, x=0.4 + 0.2 * u[1], y=1.35 * scale + 0.03 * u[2], pose=pose)
    tall = 1.5 + 1.0 + 5.0 * pose.tall
    scale = (0.9 + 0.12 * u[0]) / tall
    return replace(geometry, scale=scale, x=0.4 + 0.2 * u[1], y=1.4 * scale + 0.02 * u[2], pose=pose)


def _other_head(geometry: Geometry, rng: Rng) -> Geometry:
    """Return the geometry with another head: proportions, eyes, nose, mouth, ears."""
    u = rng.random(24).tolist()
    between = rng.uniform
    lids = tuple(float(value) for value in rng.normal(0, 0.16, 16)) if u[0] < 0.7 else ()
    build = Build(
        stretch=float(between(0.86, 1.14)),
        bend=(0.05 * u[1], 1.0 + 2.0 * u[2], 6.28 * u[3]) if u[4] < 0.6 else None,
        width=float(between(0.88, 1.08)),
        cheeks=float(between(0.86, 1.06)),
        spacing=float(between(0.86, 1.16)),
        eye_y=float(between(-0.07, 0.1)),
        eye_width=float(between(0.65, 1.25)),
        eye_height=float(between(0.5, 1.3)),
        lids=lids,
        iris=float(between(0.65, 1.15)),
        pupil=_one_of(rng, faces.PUPILS),
        glints=int(3 * u[5]),
        lash=0.5 + u[6],
        brow=0.0 if u[7] < 0.15 else 0.4 + 1.6 * u[8],
        mouth_y=0.08 * (u[9] - 0.5),
        mouth_width=0.6 + 0.8 * u[10],
        nose=_one_of(rng, faces.NOSES),
        ears=_one_of(rng, faces.EARS),
        blush=u[11] < 0.5,
        marks=int(u[12] < 0.1) * (1 + int(2 * u[13])),
    )
    return replace(
        geometry,
        build=build,
        jaw=1.0 + 0.3 * (u[14] - 0.5),
        chin=0.80 + 0.24 * (u[15] - 0.5),
        eyes=_one_of(rng, faces.MORE_EYES) if u[16] < 0.25 else geometry.eyes,
        mouth=_one_of(rng, faces.MORE_MOUTHS) if u[17] < 0.4 else geometry.mouth,
        tilt=geometry.tilt + 0.5 * (u[18] - 0.5),
        yaw=1.8 * geometry.yaw,
    )


def _other_hair(geometry: Geometry, rng: Rng, *, bald: bool) -> Geometry:
    u = rng.random(4).tolist()
    build = geometry.build._replace(
        volume=0.88 + 0.5 * u[0] ** 2, strands=tuple(float(value) for value in rng.normal(0, 0.07, 14))
    )
    front = _one_of(rng, hair.MORE_FRONTS) if u[1] < 0.5 else geometry.front
    back = _one_of(rng, hair.MORE_BACKS) if u[2] < 0.4 else geometry.back
    if bald:
        front, back = "bald", "none"
    return replace(geometry, build=build, front=front, back=back)
