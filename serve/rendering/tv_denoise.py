"""Total variation denoising, which removes grain from a picture and keeps its edges.

scikit-image has a function for this, but an exported model has only numpy.
"""

from __future__ import annotations

import numpy as np

from animediffusion.serve.rendering.sketch import Floats

MAX_ITERATIONS = 200
TOLERANCE = 2e-4
"""The iteration stops when the energy changes by less than this fraction of the initial energy."""
STEP = 0.25
"""Step size of the dual variable: the largest one that converges in two dimensions."""


def without_grain(image: Floats, strength: float) -> Floats:
    """Return the u that minimizes |u - image|^2 / 2 + strength TV(u), separately for each channel of [H, W, C].

    The algorithm is from Chambolle, "An Algorithm for Total Variation Minimization and Applications", JMIV 2004. Its
    step (9) updates the duals of both axes together.

    Args:
        image: values in [0, 1].
        strength: contrasts of about this size count as grain.
    """
    across, down = np.zeros_like(image), np.zeros_like(image)
    first = before = None
    for _ in range(MAX_ITERATIONS):
        change = _divergence(across, down)
        right, below = _gradient(image + change)
        length = np.sqrt(right**2 + below**2)
        energy = float((change**2).sum() + strength * length.sum())
        if first is None:
            first = energy
        elif before is not None and abs(before - energy) < TOLERANCE * first:
            break
        before = energy
        shrink = 1 + STEP / strength * length
        across, down = (across + STEP * right) / shrink, (down + STEP * below) / shrink
    return image + _divergence(across, down)


def _gradient(image: Floats) -> tuple[Floats, Floats]:
    """Return the differences to the right and to the lower neighbor; 0 in the last column and row."""
    right, below = np.zeros_like(image), np.zeros_like(image)
    right[:, :-1] = np.diff(image, axis=1)
    below[:-1] = np.diff(image, axis=0)
    return right, below


def _divergence(across: Floats, down: Floats) -> Floats:
    """Apply the negative transpose of _gradient."""
    divergence = across + down
    divergence[:, 1:] -= across[:, :-1]
    divergence[1:] -= down[:-1]
    return divergence
