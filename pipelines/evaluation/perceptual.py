"""Compute LPIPS and FID, which papers report, with third-party networks.

This package contains neither the networks' code nor their weights. The extra `perceptual` installs the code; the user
puts the weight files, as their authors publish them, into a folder. Nothing is downloaded.
pipelines/evaluation/metrics.py computes the metrics that need no third-party weights.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from animediffusion.pipelines.evaluation.metrics import Images
from animediffusion.platform.errors import ConfigError

NEEDS = ("torchvision", "torch_fidelity")
ALEXNET = "alexnet-owt-7be5be79.pth"
"""Weight file of torchvision, from https://download.pytorch.org/models/."""
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
"""Weight file of torch-fidelity, from https://github.com/toshas/torch-fidelity/releases.

Use this source only, because the file is unpickled.
"""
CHUNK = 32


def perceptual(result: Images, truth: Images, weights: Path) -> dict[str, float]:
    """Return mean LPIPS (AlexNet; 0 is equal) and FID (2,048 features; 0 is the same distribution).

    FID of few images is much too high; compare FID values only for the same number of images.

    Args:
        result: uint8 [B, S, S, 3].
        truth: uint8 [B, S, S, 3].
        weights: a folder with the files ALEXNET and INCEPTION.

    Raises:
        ConfigError: if the extra is not installed, or a file is missing.
    """
    require(weights)
    pairs = [
        [torch.from_numpy(x[start : start + CHUNK]).permute(0, 3, 1, 2) for x in (result, truth)]
        for start in range(0, len(result), CHUNK)
    ]
    return {"lpips": _lpips(pairs, weights / ALEXNET), "fid": _fid(pairs, weights / INCEPTION)}


def require(weights: Path) -> None:
    """Check that perceptual() can run; call this before hours of training.

    Raises:
        ConfigError: if the extra is not installed, or a file is missing.
    """
    if any(importlib.util.find_spec(name) is None for name in NEEDS):
        raise ConfigError("LPIPS and FID", "need packages that are missing", "pip install animediffusion[perceptual]")
    for name in (ALEXNET, INCEPTION):
        if not (weights / name).is_file():
            raise ConfigError(
                str(weights), f"has no {name}", "download it from the address in pipelines/evaluation/perceptual.py"
            )


def _lpips(pairs: list[list[torch.Tensor]], file: Path) -> float:
    from torchmetrics.functional.image.lpips import _LPIPS
    from torchvision.models import alexnet

    # torchmetrics contains the weights of the small heads; the trunk is random until the file is loaded. The trunk has
    # torchvision's layers in slices, which keep torchvision's layer numbers.
    network = _LPIPS(pretrained=True, net="alex", pnet_rand=True)
    trunk = alexnet(weights=None)
    trunk.load_state_dict(torch.load(file, weights_only=True))
    layers = trunk.features.state_dict()
    network.net.load_state_dict({key: layers[key.partition(".")[2]] for key in network.net.state_dict()})
    network.eval()
    with torch.no_grad():
        values = [network(*(x / 127.5 - 1 for x in pair)).flatten() for pair in pairs]
    return round(float(torch.cat(values).mean()), 4)


def _fid(pairs: list[list[torch.Tensor]], file: Path) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(file))
    for result, truth in pairs:
        metric.update(result, real=False)
        metric.update(truth, real=True)
    return round(float(metric.compute()), 3)
