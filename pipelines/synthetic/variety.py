"""How varied the drawings are: for each factor, the share of the drawings in which it is varied.

    Variety.parse("diverse")                 # a preset
    Variety.parse("diverse,shapes=0.2")      # a preset with changes
    Variety.parse("lines=1,palettes=0.5")    # faces with changes

The shares are part of a dataset's record: a folder keeps them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace

import numpy as np

from animediffusion.platform.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Variety:
    """Shares from 0 (never) to 1 (in every drawing); a drawing draws its own amount of each factor that it varies."""

    shapes: float = 0.0
    """Scenes without faces: shapes and objects, which the cross reference shows moved, rotated and bent."""
    heads: float = 0.0
    """Other proportions of head and face, other eyes, noses, ears and brows."""
    hair: float = 0.0
    """Other hair: irregular locks, more styles, other outlines."""
    figures: float = 0.0
    """Half and whole figures with arms, hands and legs in place of a face, and faces anywhere in the picture."""
    crowds: float = 0.0
    """Two or three characters."""
    props: float = 0.0
    """Objects beside or in front of a character."""
    backgrounds: float = 0.0
    """Blank paper, and backgrounds with objects."""
    palettes: float = 0.0
    """Colors beyond the natural: any skin, few colors, pale, dark or loud pictures."""
    shading: float = 0.0
    """Flat, soft and strong shadows, gradients of light, rim light, thin or colored lines in the picture."""
    lines: float = 0.0
    """Lines of the sketch: width, taper, jitter, gaps, overshoot, hatching, rough pencil, filled blacks, paper."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value <= 1:
                raise ConfigError(f"variety {name}", str(value), "a share from 0 to 1")

    @classmethod
    def parse(cls, text: str) -> Variety:
        """Return the variety that a text describes: presets and NAME=SHARE, separated by commas; the last one counts.

        Raises:
            ConfigError: if a preset or a factor is unknown, or a share is not a number from 0 to 1.
        """
        variety = cls()
        for part in text.split(","):
            name, separator, value = (piece.strip() for piece in part.partition("="))
            if not separator and name in PRESETS:
                variety = PRESETS[name]
            elif separator and name in FACTORS:
                variety = replace(variety, **{name: _number(name, value)})
            else:
                allowed = f"{' or '.join(PRESETS)}, or NAME=SHARE with one of {', '.join(FACTORS)}"
                raise ConfigError("variety", part.strip(), allowed)
        return variety

    @property
    def record(self) -> dict[str, float]:
        """The shares that are not 0, by name."""
        return {name: value for name, value in asdict(self).items() if value}

    def choose(self, rng: np.random.Generator) -> frozenset[str]:
        """Choose which factors one drawing varies."""
        draws = rng.random(len(FACTORS))
        return frozenset(name for name, draw in zip(FACTORS, draws, strict=True) if draw < getattr(self, name))


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"variety {name}", value, "a share from 0 to 1") from None


FACTORS = tuple(field.name for field in fields(Variety))
FACES = Variety()
"""The usual faces: nothing is varied."""
PRESETS = {
    "faces": FACES,
    "diverse": Variety(
        shapes=0.4,
        heads=0.7,
        hair=0.6,
        figures=0.4,
        crowds=0.15,
        props=0.3,
        backgrounds=0.5,
        palettes=0.5,
        shading=0.6,
        lines=0.7,
    ),
}
"""faces: one natural face a drawing, always drawn the same way. diverse: everything varied."""
