"""Choose the colors of a drawn character: harmonious, but varied independently for each region.

Colors are chosen in OKLCH (lightness 0..1, chroma 0..0.2, hue in degrees; Ottosson 2020), where equal distances look
equal, so any two hues of the same lightness look good together. One rule derives shadows and lights from the base
color.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Color = tuple[int, int, int]

INK: Color = (58, 40, 52)
MOUTH: Color = (190, 84, 92)
TONGUE: Color = (236, 138, 138)
WHITE: Color = (255, 255, 255)


class Tone(NamedTuple):
    """The colors of one material in flat cel shading, with light from the upper left."""

    base: Color
    shade: Color
    deep: Color
    light: Color


class CharacterPalette(NamedTuple):
    """All colors of a character; drawings with the same palette have the same colors."""

    hair: Tone
    skin: Tone
    eyes: Tone
    clothes: Tone
    trim: Tone
    accent: Tone
    upper: Color
    """First background color."""
    lower: Color
    """Second background color, for patterns."""


def random_palette(rng: np.random.Generator) -> CharacterPalette:
    """Return a random palette whose regions vary independently but remain distinguishable."""
    skin = _random_skin(rng)
    hair = _far_from([skin], 0.13, lambda: _random_hair(rng))
    upper = _far_from([hair, skin], 0.12, lambda: _random_background(rng))
    lower = _similar(rng, upper)
    clothes = _far_from([skin, upper], 0.13, lambda: _random_cloth(rng))
    trim = _far_from([clothes, skin], 0.22, lambda: _random_trim(rng))
    accent = _far_from([clothes, trim, hair], 0.12, lambda: _between(rng, (0.52, 0.11, 0), (0.78, 0.19, 360)))
    eyes = _between(rng, (0.50, 0.08, 0), (0.68, 0.19, 360))
    return CharacterPalette(
        hair=_tone(hair),
        skin=_tone(skin),
        eyes=_tone(eyes),
        clothes=_tone(clothes),
        trim=_tone(trim),
        accent=_tone(accent),
        upper=_rgb(*upper),
        lower=_rgb(*lower),
    )


_Lch = tuple[float, float, float]

_HAIR: tuple[tuple[float, _Lch, _Lch], ...] = (
    (0.10, (0.28, 0.01, 0), (0.36, 0.03, 360)),  # black
    (0.14, (0.40, 0.05, 40), (0.56, 0.10, 65)),  # brown
    (0.14, (0.78, 0.07, 75), (0.88, 0.13, 98)),  # blond
    (0.12, (0.80, 0.00, 0), (0.92, 0.03, 360)),  # silver
    (0.08, (0.52, 0.12, 25), (0.66, 0.17, 50)),  # red
    (0.42, (0.50, 0.07, 0), (0.82, 0.15, 360)),  # any color
)
_BACKGROUNDS: tuple[tuple[float, _Lch, _Lch], ...] = (
    (0.62, (0.86, 0.02, 0), (0.95, 0.07, 360)),  # pastel
    (0.24, (0.66, 0.05, 0), (0.82, 0.11, 360)),  # strong
    (0.14, (0.32, 0.03, 0), (0.46, 0.08, 360)),  # night
)


def _random_hair(rng: np.random.Generator) -> _Lch:
    return _choose(rng, _HAIR)


def _random_background(rng: np.random.Generator) -> _Lch:
    return _choose(rng, _BACKGROUNDS)


def _random_skin(rng: np.random.Generator) -> _Lch:
    depth = float(rng.random()) ** 3.0  # 0 = fair, 1 = dark; most are fair, as in the genre
    chroma = 0.032 + 0.045 * min(1.0, depth * 1.6)
    return 0.93 - 0.42 * depth, chroma, float(rng.uniform(46, 64))


def _random_cloth(rng: np.random.Generator) -> _Lch:
    return _between(rng, (0.30, 0.02, 0), (0.92, 0.14, 360))


def _random_trim(rng: np.random.Generator) -> _Lch:
    if rng.random() < 0.4:
        return _between(rng, (0.93, 0.0, 0), (0.98, 0.02, 360))
    return _between(rng, (0.30, 0.03, 0), (0.88, 0.13, 360))


def _choose(rng: np.random.Generator, table: tuple[tuple[float, _Lch, _Lch], ...]) -> _Lch:
    row = int(rng.choice(len(table), p=[weight for weight, _, _ in table]))
    return _between(rng, table[row][1], table[row][2])


def _between(rng: np.random.Generator, low: _Lch, high: _Lch) -> _Lch:
    lightness, chroma, hue = (float(rng.uniform(a, b)) for a, b in zip(low, high, strict=True))
    if 85 < hue < 135 and chroma > 0.04:
        lightness = max(lightness, 0.80)  # dark yellow looks dirty
    return lightness, chroma, hue


def _similar(rng: np.random.Generator, color: _Lch) -> _Lch:
    """Return a second background color with a hue within 70 degrees and a small step in lightness."""
    step = float(rng.uniform(0.06, 0.11)) * (-1 if color[0] > 0.62 else 1)
    return color[0] + step, color[1] + 0.03, color[2] + float(rng.uniform(-70, 70))


def _far_from(others: list[_Lch], distance: float, pick: Callable[[], _Lch]) -> _Lch:
    """Pick a color at a distance of at least `distance` in OKLab from `others`; after 30 tries, return the farthest."""
    best, best_distance = (0.0, 0.0, 0.0), -1.0
    places = [_lab(*other) for other in others]
    for _ in range(30):
        color = pick()
        place = _lab(*color)
        nearest = min(math.dist(place, other) for other in places)
        if nearest >= distance:
            return color
        if nearest > best_distance:
            best, best_distance = color, nearest
    return best


def _tone(color: _Lch) -> Tone:
    lightness, chroma, hue = color
    cool = hue + 14 * math.sin(math.radians(285 - hue))  # shadows shift toward violet, lights in the opposite direction
    warm = hue - 8 * math.sin(math.radians(285 - hue))
    shade = _rgb(lightness * 0.88 - 0.012, chroma * 1.08 + 0.008, cool)
    deep = _rgb(lightness * 0.74 - 0.02, chroma * 1.08 + 0.012, cool)
    light = _rgb(min(0.98, lightness + 0.10 + 0.05 * (1 - lightness)), chroma * 0.85, warm)
    return Tone(_rgb(*color), shade, deep, light)


def _lab(lightness: float, chroma: float, hue: float) -> tuple[float, float, float]:
    angle = math.radians(hue)
    return lightness, chroma * math.cos(angle), chroma * math.sin(angle)


def _rgb(lightness: float, chroma: float, hue: float) -> Color:
    """Convert an OKLCH color to 8-bit sRGB; chroma is lowered until the color is in the sRGB gamut."""
    while True:
        linear = _linear(*_lab(lightness, chroma, hue))
        if chroma < 0.004 or all(-0.003 <= value <= 1.003 for value in linear):
            red, green, blue = (round(255 * _gamma(min(1.0, max(0.0, value)))) for value in linear)
            return red, green, blue
        chroma *= 0.94


def _linear(lightness: float, a: float, b: float) -> tuple[float, float, float]:
    """Convert OKLab to linear sRGB, as in https://bottosson.github.io/posts/oklab/."""
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )


def _gamma(value: float) -> float:
    return 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055


def varied_palette(rng: np.random.Generator) -> CharacterPalette:
    """Return a palette of one of many moods.

    Natural colors in colored light, any colors at all, pale, dark, loud or gray colors, or colors of nearly one hue.
    """
    mood = str(rng.choice(_MOODS, p=_MOOD_SHARES))
    if mood == "tinted":
        return _lit(random_palette(rng), rng.uniform(0.45, 1.05, 3))
    pick = _mood(rng, mood)
    chosen: list[_Lch] = []
    for _ in range(7):
        chosen.append(_far_from(chosen[-3:], 0.10, pick) if chosen else pick())
    hair, skin, upper, clothes, trim, accent, eyes = chosen
    if rng.random() < 0.4:
        skin = _random_skin(rng)
    if rng.random() < 0.3:
        upper = (0.99, 0.005, 90.0)
    tones = [_tone(color) for color in (hair, skin, eyes, clothes, trim, accent)]
    background = [_rgb(*upper), _rgb(*_similar(rng, upper))]
    return _palette(tones, background)


def free_tones(rng: np.random.Generator, count: int, *, paper: bool) -> list[Tone]:
    """Return `count` colors of one mood; neighbors in the list differ. With `paper`, the first is nearly white."""
    pick = _mood(rng, str(rng.choice(_MOODS[1:])))
    chosen = [_between(rng, (0.95, 0.0, 0), (1.0, 0.02, 360)) if paper else pick()]
    for _ in range(count - 1):
        chosen.append(_far_from([chosen[0], *chosen[-3:]], 0.11, pick))
    return [_tone(color) for color in chosen]


def with_shadows(palette: CharacterPalette, amount: float) -> CharacterPalette:
    """Return the palette with its shadows and lights moved toward the base colors (amount below 1) or away."""
    return _palette([_shadowed(tone, amount) for tone in palette[:6]], palette[6:])


def shadowed(tones: Sequence[Tone], amount: float) -> list[Tone]:
    """Do for single colors what with_shadows() does for a palette."""
    if amount == 1.0:
        return list(tones)
    return [_shadowed(tone, amount) for tone in tones]


def _palette(tones: Sequence[Tone], background: Sequence[Color]) -> CharacterPalette:
    hair, skin, eyes, clothes, trim, accent = tones
    upper, lower = background
    return CharacterPalette(hair, skin, eyes, clothes, trim, accent, upper, lower)


_MOODS = ("tinted", "any", "any", "pale", "dark", "loud", "gray", "one hue")
_MOOD_SHARES = (0.25, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.1)


def _mood(rng: np.random.Generator, mood: str) -> Callable[[], _Lch]:
    """Return a function that picks a color of a mood."""
    hue = float(rng.uniform(0, 360))
    low, high = {
        "pale": ((0.72, 0.01, 0), (0.97, 0.09, 360)),
        "dark": ((0.24, 0.01, 0), (0.58, 0.12, 360)),
        "loud": ((0.4, 0.12, 0), (0.85, 0.26, 360)),
        "gray": ((0.15, 0.0, 0), (0.98, 0.02, 360)),
        "one hue": ((0.2, 0.02, hue - 25), (0.97, 0.16, hue + 25)),
    }.get(mood, ((0.2, 0.0, 0), (0.98, 0.2, 360)))

    def pick() -> _Lch:
        lightness, chroma, angle = (float(rng.uniform(a, b)) for a, b in zip(low, high, strict=True))
        return lightness, chroma, angle

    return pick


def _lit(palette: CharacterPalette, light: NDArray[np.float64]) -> CharacterPalette:
    """Return the palette under colored light."""

    def dim(color: Color) -> Color:
        red, green, blue = (
            min(255, round(value * factor)) for value, factor in zip(color, light.tolist(), strict=True)
        )
        return red, green, blue

    return _palette([Tone(*map(dim, tone)) for tone in palette[:6]], [dim(color) for color in palette[6:]])


def _shadowed(tone: Tone, amount: float) -> Tone:
    def moved(color: Color) -> Color:
        red, green, blue = (
            min(255, max(0, round(base + amount * (value - base))))
            for base, value in zip(tone.base, color, strict=True)
        )
        return red, green, blue

    return Tone(tone.base, moved(tone.shade), moved(tone.deep), moved(tone.light))
