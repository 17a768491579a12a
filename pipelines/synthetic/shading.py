"""How the colored picture is shaded: soft shadows, gradients of light, rim light, and the look of its lines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from animediffusion.pipelines.synthetic.palette import INK, Color

Colors = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Shading:
    """The look of a picture, the same in all drawings of a character. Lengths are fractions of the picture's side."""

    shadow: float = 1.0
    """Distance of shadows and lights from the base color: 0 = none, 1 = as chosen by the palette."""
    softness: float = 0.0
    """Blur of the edges of shadows."""
    light: float = 0.0
    """Strength of a gradient of light over the picture."""
    rim: float = 0.0
    """Width of a band of light along the figures' edges."""
    angle: float = 0.0
    """Direction that the gradient and the rim light come from, in radians."""
    glow: Color = (255, 244, 224)
    """Color of gradient and rim light."""
    ink: Color = INK
    ink_opacity: float = 1.0
    width: float = 1.0
    """Factor on the width of the picture's lines."""

    def apply(self, colors: Colors, figure: Colors | None) -> Colors:
        """Return the colors under this light.

        Args:
            colors: the picture without lines, 0..255, [S, S, 3].
            figure: share of each pixel that figures cover, 0..1, [S, S]; None without rim light.
        """
        side = len(colors)
        glow = np.asarray(self.glow, np.float32)
        if self.light:
            slope = np.linspace(-1, 1, side, dtype=np.float32)
            ramp = np.float32(0.5) + np.float32(0.35) * (
                np.float32(np.cos(self.angle)) * slope + np.float32(np.sin(self.angle)) * slope[:, None]
            )
            amount = np.float32(self.light) * np.clip(ramp, 0, 1)[..., None]
            darker = colors * (1 - np.float32(0.5 * self.light) * (1 - np.clip(ramp, 0, 1)))[..., None]
            colors = darker + amount * 0.5 * (glow - darker)
        if figure is not None:
            reach = self.rim * side
            dx, dy = round(reach * np.cos(self.angle)), round(reach * np.sin(self.angle))
            beyond = np.roll(figure, (-dy, -dx), (0, 1))
            band = 0.75 * np.clip(figure - beyond, 0, 1)[..., None]
            colors = colors + band * (glow - colors)
        return colors


def random_shading(rng: np.random.Generator) -> Shading:
    """Choose a shading: flat, strong or soft shadows, gradients, rim light, and how the lines look."""
    u = rng.random(12).tolist()
    light = np.array((255, 255, 255)) - np.array((0, 40, 90)) * u[10] + np.array((-90, 0, 60)) * max(0.0, u[11] - 0.6)
    glow = tuple(int(value) for value in np.clip(light, 0, 255))
    return Shading(
        shadow=0.0 if u[0] < 0.2 else float(0.4 + 1.4 * u[1]),
        softness=float(0.012 + 0.03 * u[2]) if u[3] < 0.45 else 0.0,
        light=float(0.2 + 0.6 * u[4]) if u[5] < 0.35 else 0.0,
        rim=float(0.018 + 0.03 * u[6]) if u[7] < 0.2 else 0.0,
        angle=float(rng.uniform(0, 2 * np.pi)),
        glow=(glow[0], glow[1], glow[2]),
        ink=_random_ink(rng),
        ink_opacity=float(0.3 + 0.7 * u[8]),
        width=float(0.6 + 0.8 * u[9]),
    )


def _random_ink(rng: np.random.Generator) -> Color:
    if rng.random() < 0.5:
        return INK
    red, green, blue = (int(value) for value in rng.integers(0, 110, 3))
    return red, green, blue
