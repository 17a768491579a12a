"""How close results are to the truth. Images are uint8 [B, S, S, 3] on both sides, as a user sees them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.color import deltaE_ciede2000, rgb2lab
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

Images = NDArray[np.uint8]

MS_SSIM_MIN_SIDE = 176
"""Five scales with an 11 px window: a sixteenth of the side must be more than 10 px (Wang et al. 2003)."""


def score(result: Images, truth: Images) -> dict[str, float | None]:
    """Means over images: psnr (dB), ssim, ms_ssim (None for small images), ciede2000 (0 is equal, 1 just visible)."""
    if result.shape != truth.shape:
        raise ValueError(f"results are {result.shape}, truths {truth.shape}")
    a, b = (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 for x in (result, truth))
    ms_ssim = None
    if result.shape[1] >= MS_SSIM_MIN_SIDE:
        ms_ssim = round(_mean(multiscale_structural_similarity_index_measure(a, b, data_range=1.0)), 4)
    return {
        "psnr": round(float(psnr(result, truth).mean()), 3),
        "ssim": round(_mean(structural_similarity_index_measure(a, b, data_range=1.0)), 4),
        "ms_ssim": ms_ssim,
        "ciede2000": round(ciede2000(result, truth), 3),
    }


def ciede2000(result: Images, truth: Images) -> float:
    """Mean color difference over all pixels (Sharma et al. 2005)."""
    difference: Any = deltaE_ciede2000  # scikit-image has no types
    return float(np.mean(difference(rgb2lab(truth), rgb2lab(result))))


def psnr(result: Images, truth: Images) -> NDArray[np.float64]:
    """Of each image, [B], dB at 255; equal images count as 100."""
    error = ((result.astype(np.float64) - truth) ** 2).mean(axis=(1, 2, 3))
    decibels: NDArray[np.float64] = 10 * np.log10(255**2 / np.maximum(error, 255**2 * 1e-10))
    return decibels


def _mean(value: Any) -> float:
    return float(value)


def trivial_results(sketch: Images, reference: Images) -> dict[str, Images]:
    """What anybody could do without a model: the floor that a result must clear.

    Args:
        sketch: [B, S, S, 3], gray.
        reference: [B, S, S, 3].
    """
    mean = reference.mean(axis=(1, 2), keepdims=True)
    tinted: Any = (sketch / 255.0 * mean).round().astype(np.uint8)
    return {"copy_reference": reference, "mean_color": tinted, "sketch": sketch}
