"""The authors' warp makes a reference from the target: a thin-plate spline with two control points on one diagonal.

Source: utils/image/wrap.py and utils/image/thinplate/ of their repository, after Bookstein 1989. Strict mode uses it;
models/augmentation/augment.py has a warp that models learn more from. The authors warp 8-bit files before downscaling;
this module warps the image at its training size.

Shapes: B rows, S pixels per side; positions are in 0..1 of the side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from animediffusion.models.tensors import onto

CORNERS = ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0))
NUM_DRAWS = 4
"""Number of draws to choose from. The authors draw again while the two points coincide, about once in 40 draws; four
coinciding draws in a row are too rare for a loop."""


def draw_points(rows: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw the points' positions on the diagonal before and after the warp, each [B, 2], in steps of 0.01.

    Positions before the warp are in 0.3..0.7; the warp moves a point by at most 0.25.
    """
    unit = torch.rand(rows, NUM_DRAWS, 2, 2, generator=generator, device=device, dtype=torch.float64)
    hundredths = torch.stack([30 + 40 * unit[..., 0], 50 * unit[..., 1] - 25]).round()
    before, after = hundredths[0], hundredths.sum(0)
    apart = after[..., 0] != after[..., 1]
    # argmax finds the first draw whose points differ; if all draws coincide, one point is moved by a hundredth.
    chosen = apart.int().argmax(1)[:, None, None].expand(-1, 1, 2)
    before, after = before.gather(1, chosen)[:, 0], after.gather(1, chosen)[:, 0]
    after[:, 1] += after[:, 0] == after[:, 1]
    return before / 100, after / 100


def warp_diagonal(images: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Warp images [B, 3, S, S] so that the points `before` [B, 2] of the main diagonal move to `after`.

    Positions outside the image are black.
    """
    height, width = images.shape[-2:]
    corners = torch.tensor(CORNERS, dtype=torch.float64, device=before.device).expand(len(images), -1, -1)
    source, centers = (torch.cat([corners, p.double()[..., None].expand(-1, -1, 2)], 1) for p in (before, after))
    ys, xs = (torch.linspace(0, 1, n, device=images.device, dtype=torch.float64) for n in (height, width))
    grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1).reshape(1, -1, 2).expand(len(images), -1, -1)
    read = grid + _spline(centers, source - centers, grid)
    # The authors multiply by S although the last pixel is S - 1, so positions are slightly too large and the image
    # ends in a black line.
    size = onto(torch.tensor([width, height], dtype=read.dtype), read)
    relative = 2 * (read * size) / (size - 1) - 1
    pixels = relative.reshape(len(images), height, width, 2).to(images.dtype)
    # grid_sample reads 0 outside the image, which would be gray in [-1, 1].
    moved = F.grid_sample(images + 1, pixels, mode="bicubic", padding_mode="zeros", align_corners=True) - 1
    return moved.clamp(-1, 1)


def _spline(centers: Tensor, values: Tensor, points: Tensor) -> Tensor:
    """Evaluate at `points` [B, N, 2] the thin-plate spline that has `values` [B, P, 2] at `centers` [B, P, 2]."""
    affine = torch.cat([torch.ones_like(centers[..., :1]), centers], -1)
    zeros = centers.new_zeros(len(centers), 3, 3)
    top = torch.cat([_kernel(centers, centers), affine], 2)
    system = torch.cat([top, torch.cat([affine.transpose(1, 2), zeros], 2)], 1)
    right = torch.cat([values, values.new_zeros(len(values), 3, 2)], 1)
    solved, centers = (onto(small, points) for small in (torch.linalg.solve(system, right), centers))
    basis = torch.cat([_kernel(points, centers), torch.ones_like(points[..., :1]), points], -1)
    spline: Tensor = basis @ solved
    return spline


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """Return r^2 log(r + 1e-6) for all distances r, [B, N, P]; the 1e-6 is the authors'."""
    distance: Tensor = torch.cdist(a, b)
    return distance.square() * (distance + 1e-6).log()
