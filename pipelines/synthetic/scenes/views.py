"""Draw the two views of a varied row: the same characters or objects, with another geometry.

A row chooses which factors it varies, then a subject and a look; both views share them. The sketch of the first view
has its own manner of lines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from animediffusion.pipelines.synthetic.canvas import Canvas, FlatRegions
from animediffusion.pipelines.synthetic.linework import Manner, random_manner
from animediffusion.pipelines.synthetic.palette import Tone
from animediffusion.pipelines.synthetic.scenes.cast import Cast, draw_cast, random_cast, random_geometries
from animediffusion.pipelines.synthetic.scenes.shapes import Scene, draw_scene, random_scene
from animediffusion.pipelines.synthetic.shading import Shading, random_shading
from animediffusion.pipelines.synthetic.variety import Variety

Rng = np.random.Generator
_STREAM = 1
"""Number of the random generator of all that is varied, so that other factors keep the usual faces as they are."""


class Views(NamedTuple):
    """The pictures of a varied row before its reference is warped."""

    target: NDArray[np.uint8]
    sketch: NDArray[np.uint8]
    cross_reference: NDArray[np.uint8]


def draw_views(seed: int, index: int, size: int, variety: Variety) -> tuple[Views, Rng]:
    """Draw row `index`, and return also the random generator of the rest of the row."""
    (first, second), _, rng = _canvases(seed, index, size, variety)
    target, sketch = first.finish()
    return Views(target, sketch, second.finish()[0]), rng


def draw_view_regions(seed: int, index: int, size: int, variety: Variety) -> tuple[FlatRegions, FlatRegions]:
    """Return the exact regions of the target and of the cross reference of row `index`."""
    (first, second), tones, _ = _canvases(seed, index, size, variety, keep_fills=True)
    return first.regions(tones), second.regions(tones)


def draw_view_canvas(
    seed: int, index: int, size: int, variety: Variety, recolor: Callable[[Scene | Cast], Scene | Cast]
) -> Canvas:
    """Return the canvas of the target of row `index`, with the colors of `recolor`, before its lines are drawn."""
    (first, _), _, _ = _canvases(seed, index, size, variety, recolor=recolor)
    return first


def _canvases(
    seed: int,
    index: int,
    size: int,
    variety: Variety,
    *,
    keep_fills: bool = False,
    recolor: Callable[[Scene | Cast], Scene | Cast] | None = None,
) -> tuple[tuple[Canvas, Canvas], list[Tone], Rng]:
    rng, extra = np.random.default_rng([seed, index]), np.random.default_rng([seed, index, _STREAM])
    varied = variety.choose(extra)
    shading = random_shading(extra) if "shading" in varied else Shading()
    manner = random_manner(extra) if "lines" in varied else None
    lines = np.random.default_rng(extra.integers(1 << 63))
    subject: Scene | Cast
    if "shapes" in varied:
        subject = random_scene(extra, shading.shadow)
    else:
        subject = random_cast(rng, extra, varied, shading.shadow)
    if recolor:
        subject = recolor(subject)

    def view(manner: Manner | None) -> Canvas:
        ground = subject.ground.base if isinstance(subject, Scene) else subject.ground
        canvas = Canvas(size, ground, shading, manner, lines, keep_fills=keep_fills)
        if isinstance(subject, Scene):
            draw_scene(canvas, subject, extra)
        else:
            draw_cast(canvas, subject, random_geometries(subject, rng, extra), extra)
        return canvas

    return (view(manner), view(None)), _tones(subject), rng


def _tones(subject: Scene | Cast) -> list[Tone]:
    """Return the materials of a subject."""
    if isinstance(subject, Scene):
        return [subject.ground, *subject.tones]
    tones: list[Tone] = []
    for member in subject.members:
        tones += member.character.palette[:6]
        if member.outfit:
            tones += [member.outfit.bottom, member.outfit.socks, member.outfit.shoes]
    for thing in subject.props:
        tones += thing.tones
    return tones + _tones(subject.setting) if subject.setting else tones
