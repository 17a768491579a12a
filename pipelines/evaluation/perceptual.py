"""LPIPS and FID: what papers report, from networks that others have trained.

Neither the networks' code nor their weights come with us: the code is the extra `perceptual`, the weights are files in
a folder of yours, as their authors publish them. Nothing is downloaded.
Not here: measures without foreign weights, see pipelines/evaluation/metrics.py.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from animediffusion.pipelines.evaluation.metrics import Images
from animediffusion.platform.errors import ConfigError

NEEDS = ("torchvision", "torch_fidelity")
ALEXNET = "alexnet-owt-7be5be79.pth"
"""Of torchvision: https://download.pytorch.org/models/"""
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
"""Of torch-fidelity: https://github.com/toshas/torch-fidelity/releases; it is unpickled, so take it from there only."""
CHUNK = 32


def perceptual(result: Images, truth: Images, weights: Path) -> dict[str, float]:
    """Mean LPIPS (AlexNet; 0 is equal) and FID (2,048 features; 0 is the same distribution) of results and truths.

    FID of few images is far too high; compare it at equal numbers only.

    Args:
        result: uint8 [B, S, S, 3].
        truth: the same.
        weights: a folder with the files ALEXNET and INCEPTION.

    Raises:
        ConfigError: the extra is not installed, or a file is missing.
    """
    require(weights)
    pairs = [
        [torch.from_numpy(x[start : start + CHUNK]).permute(0, 3, 1, 2) for x in (result, truth)]
        for start in range(0, len(result), CHUNK)
    ]
    return {"lpips": _lpips(pairs, weights / ALEXNET), "fid": _fid(pairs, weights / INCEPTION)}


def require(weights: Path) -> None:
    """Find out before hours of training, not after.

    Raises:
        ConfigError: the extra is not installed, or a file is missing.
    """
    if any(importlib.util.find_spec(name) is None for name in NEEDS):
        raise ConfigError("LPIPS and FID", "need packages that are missing", "pip install animediffusion[perceptual]")
    for name in (ALEXNET, INCEPTION):
        if not (weights / name).is_file():
            raise ConfigError(
                str(weights), f"has no {name}", "get the file from where pipelines/evaluation/perceptual.py says"
            )


def _lpips(pairs: list[list[torch.Tensor]], file: Path) -> float:
    from torchmetrics.functional.image.lpips import _LPIPS
    from torchvision.models import alexnet

    # The package brings the small heads; the trunk is random until the file's weights are in. Its layers are
    # torchvision's, cut into slices that keep their numbers.
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
