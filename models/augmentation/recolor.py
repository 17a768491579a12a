"""Changes of color as functions of the color alone: pixels of one color stay of one color, in every picture of a row.

So a target and its reference, recolored by one map, stay an exact pair.
Not here: what is drawn at random, see models/augmentation/augment.py. Images are [B, 3, H, W] in [-1, 1].
"""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

from animediffusion.models.tensors import onto

NUM_ORDERS = 6
"""Orders of three channels; 0 leaves them as they are."""
CLUSTER_ROUNDS = 8
CLUSTER_PIXELS = 64
"""Clusters are sought on at most this many pixels a side."""
SOFTNESS = 0.05
"""How far a region's map reaches beside its border in color, in units of cluster_space()."""


def turn_matrix(hue: Tensor, saturation: Tensor, gain: Tensor) -> Tensor:
    """[B, 3, 3] on RGB: a turn about the gray axis, then away from or toward gray, then a gain; arguments are [B].

    Linear in RGB, so that interpolating and recoloring commute.
    """
    cos, sin = hue.cos(), hue.sin()
    third = torch.full_like(hue, 1 / 3)
    diagonal = third + cos * 2 / 3
    plus = third * (1 - cos) + sin / 3**0.5
    minus = third * (1 - cos) - sin / 3**0.5
    rows = [diagonal, minus, plus, plus, diagonal, minus, minus, plus, diagonal]
    turn = torch.stack(rows, -1).reshape(-1, 3, 3)
    gray = torch.full_like(turn, 1 / 3)
    toward = gray + saturation[:, None, None] * (torch.eye(3, device=hue.device) - gray)
    return gain[:, None, None] * toward @ turn


def order_matrix(order: Tensor) -> Tensor:
    """[B, 3, 3] that puts the channels into another order; int64 [B] in 0..NUM_ORDERS - 1."""
    table = torch.tensor(list(permutations(range(3))), device=order.device)
    return torch.eye(3, device=order.device)[table[order]]


def apply_matrix(images: Tensor, matrix: Tensor) -> Tensor:
    """The images with their RGB in 0..1 multiplied by each row's [3, 3]."""
    return (torch.einsum("bij,bjhw->bihw", onto(matrix, images), (images + 1) / 2) * 2 - 1).clamp(-1, 1)


def apply_gamma(images: Tensor, gamma: Tensor) -> Tensor:
    """The images with each channel in 0..1 raised to its own power, [B, 3]: black and white stay."""
    return ((images + 1) / 2).clamp(0, 1) ** onto(gamma, images)[:, :, None, None] * 2 - 1


def apply_regions(images: Tensor, centers: Tensor, matrices: Tensor) -> Tensor:
    """The images with every color region changed by its own matrix, softly where two regions touch in color.

    Args:
        images: to change; all pictures that shall match get the same centers and matrices.
        centers: [B, K, 3] of find_regions().
        matrices: [B, K, 3, 3] on RGB in 0..1.
    """
    color = ((images + 1) / 2).flatten(2).transpose(1, 2)
    nearness = -(torch.cdist(cluster_space(color), centers) ** 2) / (2 * SOFTNESS**2)
    weights = nearness.softmax(-1)
    mixed = torch.zeros_like(color)
    for k in range(centers.shape[1]):  # one region at a time: all at once would take K times the memory
        mixed += weights[..., k : k + 1] * (color @ matrices[:, k].mT)
    return (mixed.transpose(1, 2).reshape(images.shape) * 2 - 1).clamp(-1, 1)


def find_regions(images: Tensor, num: int) -> Tensor:
    """[B, num, 3]: centers of the images' colors in cluster_space(), by k-means (Lloyd 1982); nothing random.

    It begins with the mean color and goes on with the color farthest from those it has, so that small areas such as
    eyes get a region of their own.
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
    """RGB in 0..1, [..., 3], as half the gray and two chroma axes: light and shadow of a thing stay together."""
    axes = [[0.289, 0.289, 0.289], [0.707, -0.707, 0.0], [0.408, 0.408, -0.816]]
    return color @ onto(torch.tensor(axes, dtype=color.dtype), color).T
