"""Doubt: a map of where a model is likely to be wrong, and a hint therefore helps most.

The matcher estimates the image from the reference before the first step (`Condition.guess`). Where the finished image
differs from this estimate, the network has overruled it: the reference shows no clear counterpart there.
The map is smoothed, because a hint colors an area.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from animediffusion.models.network.condition import Condition

WINDOW = 5
"""Side in pixels of the square over which the map is averaged: a hint colors an area, not a pixel."""


def doubt_map(condition: Condition, image: Tensor) -> Tensor | None:
    """Return the doubt about each pixel of images [B, 3, S, S] in [-1, 1], [B, S, S] in 0..1; None without a matcher.

    1 means that matcher and image have opposite colors; typical values are below 0.2.
    """
    if not condition.guess.numel():
        return None
    difference = (condition.guess.float().clamp(-1, 1) - image.clamp(-1, 1)).abs().mean(1, keepdim=True) / 2
    return F.avg_pool2d(difference, WINDOW, 1, WINDOW // 2, count_include_pad=False)[:, 0]
