"""Draw a row again in colors that tell which part of a character each pixel shows.

The drawings are those of dataset.make_row(), so the parts are exact labels for it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from animediffusion.pipelines.synthetic.canvas import Canvas
from animediffusion.pipelines.synthetic.faces import Character, draw_canvas, random_character, random_geometry
from animediffusion.pipelines.synthetic.palette import MOUTH, TONGUE, WHITE, CharacterPalette, Color, Tone
from animediffusion.pipelines.synthetic.scenes.cast import Cast
from animediffusion.pipelines.synthetic.scenes.shapes import Scene
from animediffusion.pipelines.synthetic.scenes.things import Thing
from animediffusion.pipelines.synthetic.scenes.views import draw_view_canvas
from animediffusion.pipelines.synthetic.variety import FACES, Variety
from animediffusion.platform.images.character_parts import PARTS

_CODES: tuple[Color, ...] = ((128, 0, 0), (0, 200, 0), (250, 200, 180), (0, 0, 255), (0, 120, 120), (120, 120, 0))
"""The color of each part; skin is near the usual one, because cheeks are a blend with it."""
_FIXED: tuple[tuple[Color, str], ...] = ((WHITE, "eyes"), (MOUTH, "other"), (TONGUE, "other"))
"""Colors that no palette changes."""


def draw_parts(seed: int, index: int, size: int, variety: Variety = FACES) -> NDArray[np.uint8]:
    """Return the part of each pixel of the target of make_row() for the same arguments, [size, size], as in PARTS.

    Pixels under lines show what is below the line.
    """
    if variety == FACES:
        rng = np.random.default_rng([seed, index])
        character = _coded_character(random_character(rng))
        canvas = draw_canvas(character, random_geometry(rng), size)
    else:
        canvas = draw_view_canvas(seed, index, size, variety, _coded)
    return _labels(canvas)


def _coded(subject: Scene | Cast) -> Scene | Cast:
    """Return the subject in the colors of the parts."""
    if isinstance(subject, Scene):
        return _coded_scene(subject, "other", "other")
    members = []
    for member in subject.members:
        outfit = member.outfit
        if outfit:
            cloth = _tone("clothes")
            outfit = outfit._replace(bottom=cloth, socks=cloth, shoes=cloth)
        members.append(member._replace(character=_coded_character(member.character), outfit=outfit))
    setting = _coded_scene(subject.setting, "background", "background") if subject.setting else None
    return replace(
        subject,
        members=tuple(members),
        props=tuple(_coded_thing(thing, "other") for thing in subject.props),
        setting=setting,
    )


def _coded_character(character: Character) -> Character:
    hair, skin, eyes, clothes, other = map(_tone, ("hair", "skin", "eyes", "clothes", "other"))
    ground = _tone("background").base
    palette = CharacterPalette(hair, skin, eyes, clothes, clothes, other, ground, ground)
    return replace(character, palette=palette)


def _coded_scene(scene: Scene, pattern: str, objects: str) -> Scene:
    return scene._replace(
        ground=_tone("background"),
        tones=tuple(_tone(pattern) for _ in scene.tones),
        things=tuple(_coded_thing(thing, objects) for thing in scene.things),
    )


def _coded_thing(thing: Thing, part: str) -> Thing:
    return thing._replace(tones=tuple(_tone(part) for _ in thing.tones))


def _tone(part: str) -> Tone:
    code = _CODES[PARTS.index(part)]
    return Tone(code, code, code, code)


def _labels(canvas: Canvas) -> NDArray[np.uint8]:
    """Return the part whose color is nearest to that of each pixel."""
    middle = slice(canvas.oversampling // 2, None, canvas.oversampling)
    pixels = np.asarray(canvas.color)[middle, middle].astype(np.int32)
    codes = np.array([*_CODES, *(color for color, _ in _FIXED)])
    numbers = np.array([*range(len(PARTS)), *(PARTS.index(part) for _, part in _FIXED)], np.uint8)
    values, places = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    nearest = np.square(values[:, None] - codes).sum(axis=2).argmin(axis=1)
    labels: NDArray[np.uint8] = numbers[nearest][places.ravel()].reshape(canvas.size, canvas.size)
    return labels
