"""The doubt about a picture as a gray PNG: where the model is likely to be wrong, and a hint helps most."""

from __future__ import annotations

import numpy as np

from animediffusion.platform.images.codec import encode_png, place_in_square, unletterbox
from animediffusion.serve.rendering.sketch import Drawing, Pixels

GAIN = 4
"""The map has values from 0 to 255, and few are above 64."""


def render_doubt(doubt: Pixels, drawing: Drawing, size: str) -> bytes:
    """Return the doubt [S, S] about the network's square as a gray PNG, brighter where the model is less certain.

    Args:
        doubt: the map of the network, as in protocol.Answer.
        drawing: the sketch.
        size: `native`, the size of the sketch, or `model`, the network's square.
    """
    bright = np.minimum(doubt.astype(np.int64) * GAIN, 255).astype(np.uint8)
    if size == "native":
        height, width = drawing.darkness.shape
        bright = unletterbox(bright, place_in_square(height, width, len(doubt)))
    return encode_png(bright)
