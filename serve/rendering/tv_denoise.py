"""Total variation: takes the grain out of a picture and leaves its edges.

scikit-image has it, too; an exported model has numpy alone.
"""

from __future__ import annotations

import numpy as np

from animediffusion.serve.rendering.sketch import Floats

MAX_TURNS = 200
SETTLED = 2e-4
"""Stop when a turn changes the energy by less than this part of it at the start."""
STEP = 0.25
"""Of the dual variable; the largest that converges in two dimensions."""


def without_grain(image: Floats, strength: float) -> Floats:
    """The u near `image` that minimizes |u - image|^2 / 2 + strength TV(u), each channel of [H, W, C] by itself.

    Chambolle, "An Algorithm for Total Variation Minimization and Applications", JMIV 2004, with its step (9) on both
    axes' duals together.

    Args:
        image: in [0, 1].
        strength: contrasts of about this size are grain.
    """
    across, down = np.zeros_like(image), np.zeros_like(image)
    first = before = None
    for _ in range(MAX_TURNS):
        change = _divergence(across, down)
        right, below = _gradient(image + change)
        length = np.sqrt(right**2 + below**2)
        energy = float((change**2).sum() + strength * length.sum())
        if first is None:
            first = energy
        elif before is not None and abs(before - energy) < SETTLED * first:
            break
        before = energy
        shrink = 1 + STEP / strength * length
        across, down = (across + STEP * right) / shrink, (down + STEP * below) / shrink
    return image + _divergence(across, down)


def _gradient(image: Floats) -> tuple[Floats, Floats]:
    """Differences to the right and to the lower neighbor; 0 at the last ones."""
    right, below = np.zeros_like(image), np.zeros_like(image)
    right[:, :-1] = np.diff(image, axis=1)
    below[:-1] = np.diff(image, axis=0)
    return right, below


def _divergence(across: Floats, down: Floats) -> Floats:
    """What _gradient's transpose makes, with the other sign."""
    divergence = across + down
    divergence[:, 1:] -= across[:, :-1]
    divergence[1:] -= down[:-1]
    return divergence
