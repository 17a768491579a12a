"""Color maps that depend on the color alone: pixels of equal color get equal colors, in every image of a row.

A target and its reference that are recolored by the same map therefore stay an exact pair. The random numbers are drawn
in models/augmentation/augment.py. Images are [B, 3, H, W] in [-1, 1].
"""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

from animediffusion.models.tensors import onto

NUM_ORDERS = 6
"""Number of permutations of three channels; permutation 0 is the identity."""
CLUSTER_ROUNDS = 8
CLUSTER_PIXELS = 64
"""The image is subsampled to about this many pixels per side before clustering."""
SOFTNESS = 0.05
"""Width of the transition between the maps of two color regions, in units of cluster_space()."""


def hue_matrix(hue: Tensor, saturation: Tensor, gain: Tensor) -> Tensor:
    """Return [B, 3, 3] on RGB: a rotation about the gray axis, then a saturation change, then a gain.

    The map is linear in RGB, so interpolation and recoloring commute.

    Args:
        hue: angle of the rotation in radians, [B].
        saturation: distance from the gray axis is multiplied by this, [B].
        gain: RGB is multiplied by this, [B].
    """
    cos, sin = hue.cos(), hue.sin()
    third = torch.full_like(hue, 1 / 3)
    diagonal = third + cos * 2 / 3
    plus = third * (1 - cos) + sin / 3**0.5
    minus = third * (1 - cos) - sin / 3**0.5
    rows = [diagonal, minus, plus, plus, diagonal, minus, minus, plus, diagonal]
    rotation = torch.stack(rows, -1).reshape(-1, 3, 3)
    gray = torch.full_like(rotation, 1 / 3)
    toward = gray + saturation[:, None, None] * (torch.eye(3, device=hue.device) - gray)
    return gain[:, None, None] * toward @ rotation


def order_matrix(order: Tensor) -> Tensor:
    """Return [B, 3, 3] that permutes the channels; `order` is int64 [B] in 0..NUM_ORDERS - 1."""
    table = torch.tensor(list(permutations(range(3))), device=order.device)
    return torch.eye(3, device=order.device)[table[order]]


def apply_matrix(images: Tensor, matrix: Tensor) -> Tensor:
    """Multiply the images' RGB, taken in 0..1, by each row's matrix [3, 3]; the result is clamped to [-1, 1]."""
    return (torch.einsum("bij,bjhw->bihw", onto(matrix, images), (images + 1) / 2) * 2 - 1).clamp(-1, 1)


def apply_gamma(images: Tensor, gamma: Tensor) -> Tensor:
    """Raise each channel, taken in 0..1, to its own power, [B, 3]; black and white stay as they are."""
    return ((images + 1) / 2).clamp(0, 1) ** onto(gamma, images)[:, :, None, None] * 2 - 1


def apply_regions(images: Tensor, centers: Tensor, matrices: Tensor) -> Tensor:
    """Change every color region by its own matrix, with soft transitions between regions of similar color.

    Args:
        images: images to change; images that should match need the same centers and matrices.
        centers: [B, K, 3] from find_regions().
        matrices: [B, K, 3, 3] on RGB in 0..1.
    """
    color = ((images + 1) / 2).flatten(2).transpose(1, 2)
    nearness = -(torch.cdist(cluster_space(color), centers) ** 2) / (2 * SOFTNESS**2)
    weights = nearness.softmax(-1)
    mixed = torch.zeros_like(color)
    for k in range(centers.shape[1]):  # All regions together would take K times the memory.
        mixed += weights[..., k : k + 1] * (color @ matrices[:, k].mT)
    return (mixed.transpose(1, 2).reshape(images.shape) * 2 - 1).clamp(-1, 1)


def find_regions(images: Tensor, num: int) -> Tensor:
    """Return [B, num, 3]: centers of the images' colors in cluster_space(), by deterministic k-means (Lloyd 1982).

    The first center is the mean color, and each further one is the color farthest from the centers so far, so small
    areas such as eyes get their own region.
    """
    step = max(1, images.shape[-1] // CLUSTER_PIXELS)
    color = cluster_space(((images[..., ::step, ::step] + 1) / 2).flatten(2).transpose(1, 2))
    centers = color.mean(1, keepdim=True)
    for _ in range(num - 1):
        farthest = torch.cdist(color, centers).amin(2).argmax(1)
        centers = torch.cat([centers, color[torch.arange(len(color)), farthest][:, None]], 1)
    for _ in range(CLUSTER_ROUNDS):
        member = torch.nn.functional.one_hot(torch.cdist(color, centers).argmin(2), num).to(color.dtype)
        count = member.sum(1)[..., None]
        means = member.transpose(1, 2) @ color / count.clamp_min(1)
        centers = torch.where(count > 0, means, centers)
    return centers


def cluster_space(color: Tensor) -> Tensor:
    """Convert RGB in 0..1, [..., 3], to half the gray value and two chroma axes.

    Gray has half its weight, so that light and shadow of one object fall into one cluster.
    """
    axes = [[0.289, 0.289, 0.289], [0.707, -0.707, 0.0], [0.408, 0.408, -0.816]]
    return color @ onto(torch.tensor(axes, dtype=color.dtype), color).T
