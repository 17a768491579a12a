"""Metrics of the distance between results and truth. All images are uint8 [B, S, S, 3], as a user sees them.

pipelines/evaluation/perceptual.py computes LPIPS and FID, which need third-party weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from animediffusion.models.augmentation.lineart import LUMA, blur, xdog
from animediffusion.models.tensors import to_tensor

Images = NDArray[np.uint8]

MS_SSIM_MIN_SIDE = 176
"""MS-SSIM has five scales with an 11 px window, so a sixteenth of the side must exceed 10 px (Wang et al. 2003)."""

HAARPSI_C, HAARPSI_ALPHA = 30.0, 4.2
"""Constants of the HaarPSI paper, fitted to four databases of human judgments."""
PAPER = 200
"""Gray values above this are paper when colors are compared; the others are lines."""
OFF_LINES_PX = 1.5
"""Pixels nearer to a line than this are not compared, because lines are antialiased."""
_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))
_LINE_SIGMA = 0.4
_INK = 0.5
"""Threshold between black (0) and white (1): darker pixels of a sketch belong to a line."""


@dataclass(frozen=True, slots=True)
class ColorScores:
    """Means over images of the color differences (CIEDE2000) between results and truth at the pixels off the lines."""

    ciede2000: float
    """Mean difference; 0 for equal colors, and 1 is just visible."""
    ciede2000_median: float
    within_3: float
    """Share of the pixels with a difference of at most 3, which is hard to see in a picture."""
    within_6: float


@dataclass(frozen=True, slots=True)
class ImageScores:
    """Means over images of the metrics of results against their truth."""

    psnr: float
    """dB; 100 for equal images."""
    ssim: float
    """1 for equal images."""
    ms_ssim: float | None
    """1 for equal images; None for images smaller than MS_SSIM_MIN_SIDE."""
    ciede2000: float
    """Color difference; 0 for equal colors, and 1 is just visible."""


PerImage = dict[str, NDArray[np.float64]]
"""Values of each image, [B], by the name of the metric."""


def score(result: Images, truth: Images) -> ImageScores:
    """Return the scores of results against their truth."""
    return mean_scores([score_each(result, truth)])


def score_each(result: Images, truth: Images) -> PerImage:
    """Return the metrics of each result, by their names in ImageScores; `ms_ssim` is missing for small images."""
    if result.shape != truth.shape:
        raise ValueError(f"results are {result.shape}, truths {truth.shape}")
    found: PerImage = {
        "psnr": psnr(result, truth),
        "ssim": ssim(result, truth).double().numpy(),
        "ciede2000": ciede2000(result, truth),
    }
    if result.shape[1] >= MS_SSIM_MIN_SIDE:
        # This import takes three seconds of CPU time.
        from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

        measured: Any = multiscale_structural_similarity_index_measure(
            _unit(result), _unit(truth), data_range=1.0, reduction="none"
        )
        found["ms_ssim"] = measured.double().numpy()
    return found


def mean_scores(parts: Sequence[PerImage]) -> ImageScores:
    """Return the means over the images of all parts, rounded."""
    values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    means = {name: float(value.mean()) for name, value in values.items()}
    return ImageScores(
        psnr=round(means["psnr"], 3),
        ssim=round(means["ssim"], 4),
        ms_ssim=round(means["ms_ssim"], 4) if "ms_ssim" in means else None,
        ciede2000=round(means["ciede2000"], 3),
    )


def ssim(result: Images, truth: Images) -> Tensor:
    """Return the structural similarity of each image, [B], with a Gaussian window of 11 px (Wang et al. 2004).

    It is that of torchmetrics, whose import takes three seconds of CPU time.
    """
    window = torch.exp(-((torch.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = (window / window.sum()).expand(3, 1, 1, 11)

    def local(x: Tensor) -> Tensor:
        """Return the weighted mean around each pixel."""
        x = F.pad(x, (5, 5, 5, 5), mode="reflect")
        return F.conv2d(F.conv2d(x, window, groups=3), window.mT, groups=3)

    a, b = _unit(result), _unit(truth)
    mean_a, mean_b = local(a), local(b)
    variances = local(a * a) - mean_a**2 + local(b * b) - mean_b**2
    covariance = local(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similar = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (similar / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))).mean((1, 2, 3))


def _unit(images: Images) -> Tensor:
    """Convert images to [B, 3, S, S] in 0..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def ciede2000(result: Images, truth: Images) -> NDArray[np.float64]:
    """Return the mean CIEDE2000 color difference over the pixels of each image, [B] (Sharma et al. 2005)."""
    # This import takes a second of CPU time, and training workers do not need it.
    from skimage.color import deltaE_ciede2000, rgb2lab

    difference: Any = deltaE_ciede2000  # scikit-image has no type annotations
    values: NDArray[np.float64] = difference(rgb2lab(truth), rgb2lab(result)).mean(axis=(1, 2))
    return values


def color_scores(result: Images, truth: Images, sketch: Images) -> ColorScores:
    """Return how near the colors of results are to those of their truth, off the lines.

    Args:
        result: [B, H, W, 3].
        truth: [B, H, W, 3].
        sketch: [B, H, W, 3], gray.
    """
    return mean_color_scores([color_scores_each(result, truth, sketch)])


def color_scores_each(result: Images, truth: Images, sketch: Images) -> PerImage:
    """Return the scores of color_scores() of each result, by their names in ColorScores."""
    rows = []
    for picture, colors, lines in zip(result, truth, sketch, strict=True):
        difference = color_differences(picture, colors, off_lines(lines[..., 0]))
        rows.append((difference.mean(), np.median(difference), (difference <= 3).mean(), (difference <= 6).mean()))
    columns = np.array(rows, np.float64).T
    return dict(zip(("ciede2000", "ciede2000_median", "within_3", "within_6"), columns, strict=True))


def mean_color_scores(parts: Sequence[PerImage]) -> ColorScores:
    """Return the means over the images of all parts, rounded."""
    means = {name: float(np.mean(np.concatenate([part[name] for part in parts]))) for name in parts[0]}
    return ColorScores(
        ciede2000=round(means["ciede2000"], 3),
        ciede2000_median=round(means["ciede2000_median"], 3),
        within_3=round(means["within_3"], 4),
        within_6=round(means["within_6"], 4),
    )


def off_lines(sketch: Images) -> NDArray[np.bool_]:
    """Return which pixels [H, W] of a gray sketch [H, W] are compared: those off the lines, or all without any."""
    from scipy.ndimage import distance_transform_edt

    far: NDArray[np.bool_] = distance_transform_edt(sketch > PAPER) > OFF_LINES_PX
    return far if far.any() else np.ones_like(far)


def color_differences(result: Images, truth: Images, where: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the CIEDE2000 differences of two pictures [H, W, 3] at the chosen pixels, [N]."""
    from skimage.color import deltaE_ciede2000, rgb2lab

    difference: Any = deltaE_ciede2000  # scikit-image has no type annotations
    differences: NDArray[np.float64] = difference(rgb2lab(truth), rgb2lab(result))[where]
    return differences


def psnr(result: Images, truth: Images) -> NDArray[np.float64]:
    """Return the PSNR of each image, [B], in dB with a peak of 255; equal images get 100 dB, the maximum."""
    error = ((result.astype(np.float64) - truth) ** 2).mean(axis=(1, 2, 3))
    decibels: NDArray[np.float64] = 10 * np.log10(255**2 / np.maximum(error, 255**2 * 1e-10))
    return decibels


def detail(result: Images, truth: Images, sketch: Images) -> dict[str, float]:
    """Return means of metrics that complement PSNR: haarpsi (1 is equal), sharpness (1 is right), edge_f1 (1 is best).

    All images are [B, S, S, 3]; the sketch is gray.
    """
    return {
        "haarpsi": round(float(haarpsi(result, truth).mean()), 4),
        "sharpness": round(float(sharpness(result, truth).mean()), 4),
        "edge_f1": round(float(edge_f1(result, sketch).mean()), 4),
    }


def haarpsi(result: Images, truth: Images) -> NDArray[np.float64]:
    """Return the color Haar wavelet perceptual similarity of each image, [B] in 0..1 (Reisenhofer et al. 2018)."""
    if result.shape != truth.shape:
        raise ValueError(f"results are {result.shape}, truths {truth.shape}")
    (y_a, chroma_a), (y_b, chroma_b) = _halved_yiq(result), _halved_yiq(truth)
    similar, weights = [], []
    for transpose in (False, True):
        fine_a, fine_b = (torch.cat([_haar(y, scale, transpose) for scale in (1, 2)], 1) for y in (y_a, y_b))
        similar.append(_similar(fine_a, fine_b).mean(1))  # Eq. 10: both fine scales, one orientation
        coarse = torch.maximum(_haar(y_a, 3, transpose), _haar(y_b, 3, transpose))
        weights.append(coarse[:, 0])  # Eq. 11: the coarse scale weights the positions
    similar.append(_similar(chroma_a, chroma_b).mean(1))
    weights.append((weights[0] + weights[1]) / 2)
    # All weights of a flat pair are zero; the small constant makes the result a plain mean.
    weight = torch.stack(weights, 1) + 1e-9
    pooled = (weight * torch.sigmoid(HAARPSI_ALPHA * torch.stack(similar, 1))).sum((1, 2, 3)) / weight.sum((1, 2, 3))
    values: NDArray[np.float64] = ((torch.logit(pooled) / HAARPSI_ALPHA) ** 2).numpy()  # Eq. 12
    return values


def _halved_yiq(images: Images) -> tuple[torch.Tensor, torch.Tensor]:
    """Return luma [B, 1, S/2, S/2] and smoothed |I|, |Q| [B, 2, S/2, S/2] of 0..255 images, halved as in the paper."""
    yiq = torch.from_numpy(images @ np.array(_YIQ).T).permute(0, 3, 1, 2)
    halved = F.avg_pool2d(_pad(yiq, 2), 2, 1)[..., ::2, ::2]
    return halved[:, :1], F.avg_pool2d(_pad(halved[:, 1:], 2), 2, 1).abs()


def _haar(y: torch.Tensor, scale: int, transpose: bool) -> torch.Tensor:
    """Return the absolute coefficients of the Haar filter with 2**scale pixels a side, at every pixel."""
    side = 2**scale
    kernel = torch.full((1, 1, side, side), 1 / side, dtype=y.dtype)
    kernel[:, :, : side // 2] *= -1
    return F.conv2d(_pad(y, side), kernel.mT if transpose else kernel).abs()


def _pad(images: torch.Tensor, side: int) -> torch.Tensor:
    """Pad with zeros so that a filter of this side keeps the size; even filters extend right and down, as in Matlab."""
    before, after = (side - 1) // 2, side // 2
    return F.pad(images, (before, after, before, after))


def _similar(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (2 * a * b + HAARPSI_C) / (a**2 + b**2 + HAARPSI_C)


def sharpness(result: Images, truth: Images) -> NDArray[np.float64]:
    """Return the fine detail of each result relative to the truth, [B]: below 1 is blurred, above 1 is noisy or harsh.

    Detail is the mean square of luma minus its Gaussian blur of one pixel. This ratio measures the amount of detail,
    not its position.
    """
    fine_result, fine_truth = _fine(result), _fine(truth)
    values: NDArray[np.float64] = ((fine_result + 1e-6) / (fine_truth + 1e-6)).numpy()
    return values


def _fine(images: Images) -> torch.Tensor:
    luma = torch.from_numpy(images @ np.array(LUMA))[:, None]
    return ((luma - blur(luma, torch.ones(len(luma)))) ** 2).mean((1, 2, 3))


def edge_f1(result: Images, sketch: Images) -> NDArray[np.float64]:
    """Return the F1 score, [B], between the line pixels that XDoG finds in each result and those of its sketch.

    A pixel may be off by one at 64 px and by two at 256 px. The sketch of another face scores 0.6 at 64 px and 0.5 at
    256 px.

    Args:
        result: [B, S, S, 3].
        sketch: [B, S, S, 3], gray; dark pixels are lines.
    """
    found = xdog(to_tensor(torch.from_numpy(result)), torch.full((len(result),), _LINE_SIGMA)) < 0
    drawn = torch.from_numpy(sketch[..., :1] < 255 * _INK).permute(0, 3, 1, 2)
    reach = max(1, round(result.shape[1] / 128))
    precision, recall = _share_near(found, drawn, reach), _share_near(drawn, found, reach)
    values: NDArray[np.float64] = (2 * precision * recall / (precision + recall).clamp_min(1e-9)).numpy()
    return values


def _share_near(pixels: torch.Tensor, others: torch.Tensor, reach: int) -> torch.Tensor:
    """Return the share of `pixels` with one of `others` (both bool [B, 1, S, S]) within reach; 1 without pixels."""
    near = F.max_pool2d(others.double(), 2 * reach + 1, 1, reach) > 0
    count = pixels.sum((1, 2, 3)).double()
    return torch.where(count > 0, (pixels & near).sum((1, 2, 3)) / count.clamp_min(1), 1.0)


def trivial_results(sketch: Images, reference: Images) -> dict[str, Images]:
    """Return the results of trivial baselines without a model, which a model must exceed.

    Args:
        sketch: [B, S, S, 3], gray.
        reference: [B, S, S, 3].
    """
    mean = reference.mean(axis=(1, 2), keepdims=True)
    tinted: Any = (sketch / 255.0 * mean).round().astype(np.uint8)
    return {"copy_reference": reference, "mean_color": tinted, "sketch": sketch}
