"""Post-hoc EMA: choose the length of the weights' average after training.

During training, a run keeps averages of a few lengths whose profiles over time are powers t^exponent. Afterwards they
can be mixed into an average of any length between them (after Karras et al. 2024, "Analyzing and Improving the Training
Dynamics of Diffusion Models", section 3; `mix` documents the differences).

    averages = read_averages(bundle)
    bundle = averages.use(bundle, 0.07)

The length of an average is the standard deviation of its profile as a fraction of the run, the paper's sigma_rel.
models/training/loop.py updates the averages; pipelines/tuning/sampler_search.py searches for the best length.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from animediffusion.models.bundle import AVERAGES, Bundle, SamplerDefaults, save_bundle, unusable

Weights = Mapping[str, Tensor]
"""Weights by their names in the denoiser."""

LONGEST = 0.28
"""Largest allowed length. At 1 / sqrt(12) = 0.289 the exponent is 0, which is the plain mean of the whole run."""
_TRAINED = "trained"


@cache
def exponent(length: float) -> float:
    """Return the exponent g of the profile t^g on [0, 1] whose standard deviation is `length`.

    The variance of the density (g + 1) t^g is (g + 1) / ((g + 2)^2 (g + 3)), which falls as g rises. Set equal to
    length^2, it is a cubic equation with one root above -1 (std_to_exp in NVlabs/edm2, training/phema.py).

    Raises:
        ValueError: if the length is not in (0, LONGEST].
    """
    if not 0 < length <= LONGEST:
        raise ValueError(f"the length of an average must be above 0 and at most {LONGEST}, got {length}")
    precision = length**-2
    return float(np.roots([1, 7, 16 - precision, 12 - precision]).real.max())


def mix(kept: Sequence[float], length: float) -> list[float]:
    """Return the coefficients that mix the kept averages into one of this length.

    Only the next shorter and the next longer average have nonzero coefficients, and none is negative. The standard
    deviation of the mixed profile is exactly `length`. The paper instead fits the profile's shape by least squares,
    which gives negative coefficients. With few averages and a falling learning rate, negative coefficients bring back
    the run's first weights, and the result can be farther from the wanted average than the nearest kept average is.

    Args:
        kept: lengths of the kept averages.
        length: the length of the mixture.

    Raises:
        ValueError: if the length is outside the range of the kept ones.
    """
    order = sorted(range(len(kept)), key=lambda number: kept[number])
    parts = [0.0] * len(kept)
    for low, high in pairwise([order[0], *order]):  # The first pair handles the shortest length.
        if kept[low] <= length <= kept[high]:
            share = _share(kept[low], kept[high], length)
            parts[low] += 1 - share
            parts[high] += share
            return parts
    raise ValueError(f"the length of an average must be in {min(kept):g} to {max(kept):g}, got {length:g}")


def _share(short: float, long: float, length: float) -> float:
    """Return the share of the longer profile that gives the mixture this standard deviation.

    It is the smaller root of a quadratic equation.
    """
    if short == long:
        return 0.0
    means = [(exponent(one) + 1) / (exponent(one) + 2) for one in (short, long)]
    apart = (means[1] - means[0]) ** 2
    # The variance of a mixture is the mean variance of its parts, plus share (1 - share) apart from their means.
    rise = long**2 - short**2 + apart
    return (rise - math.sqrt(rise**2 - 4 * apart * (length**2 - short**2))) / (2 * apart)


@dataclass(frozen=True)
class Averages:
    """The averages of weights that a bundle's model can use."""

    trained: Weights
    """The average that the training run put into the bundle."""
    kept: Mapping[float, Weights]
    """The additional averages by length; empty if the bundle has none."""
    length: float | None
    """Length of the average in the bundle's model.safetensors; None if it is the trained one."""

    @property
    def range(self) -> tuple[float, float] | None:
        """The shortest and the longest available length; None if there is only the trained average."""
        return (min(self.kept), max(self.kept)) if self.kept else None

    def weights(self, length: float | None) -> Weights:
        """Return the average of this length, or the trained one if length is None."""
        if length is None:
            return self.trained
        mixed = {name: torch.zeros_like(tensor) for name, tensor in self.trained.items()}
        for part, weights in zip(mix(list(self.kept), length), self.kept.values(), strict=True):
            for name, tensor in mixed.items():
                tensor.add_(weights[name], alpha=part)
        return mixed

    def use(self, bundle: Bundle, length: float | None) -> Bundle:
        """Load the weights of this length into the bundle's model and return the bundle."""
        bundle.denoiser.load_state_dict(self.weights(length))
        return bundle

    def save(self, bundle: Bundle, folder: Path, length: float | None, sampler: SamplerDefaults) -> str:
        """Write the bundle with the weights of this length and these defaults, without metrics; return its identity."""
        averages = pack(self.kept)
        if length is not None:
            averages |= {f"{_TRAINED}/{name}": tensor for name, tensor in self.trained.items()}
        provenance = {key: value for key, value in bundle.config.provenance.items() if key != "ema_length"}
        config = replace(
            bundle.config,
            sampler=sampler,
            provenance=provenance if length is None else {**provenance, "ema_length": length},
        )
        card = (bundle.folder / "card.md").read_text()
        return save_bundle(folder, self.use(bundle, length).denoiser, config, {}, card, averages=averages)

    def sha256(self) -> str:
        """Return 64 hex digits that depend on all averages, but not on which of them the bundle currently uses."""
        digest = hashlib.sha256()
        for length, weights in [(0.0, self.trained), *sorted(self.kept.items())]:
            for name in sorted(weights):
                digest.update(f"{length:g} {name} ".encode())
                digest.update(weights[name].cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def pack(kept: Mapping[float, Weights]) -> dict[str, Tensor]:
    """Return the averages as the tensors of a bundle's averages file, named LENGTH/NAME."""
    return {f"{length:g}/{name}": tensor for length, weights in kept.items() for name, tensor in weights.items()}


def read_averages(bundle: Bundle) -> Averages:
    """Read the averages in a bundle's folder.

    Raises:
        BundleError: if the file does not fit the model.
    """
    own = load_file(bundle.folder / "model.safetensors")  # `use` may have changed the weights of bundle.denoiser.
    path = bundle.folder / AVERAGES
    if not path.is_file():
        return Averages(own, {}, None)
    groups: dict[str, dict[str, Tensor]] = {}
    try:
        for key, tensor in load_file(path).items():
            group, _, name = key.partition("/")
            groups.setdefault(group, {})[name] = tensor
        trained = groups.pop(_TRAINED, own)
        kept = {float(length): weights for length, weights in groups.items()}
        for weights in (trained, *kept.values()):
            if {name: tensor.shape for name, tensor in weights.items()} != {n: t.shape for n, t in own.items()}:
                raise ValueError("names or shapes of tensors differ")
    except (SafetensorError, ValueError) as error:
        raise unusable(str(bundle.folder), f"{AVERAGES} does not fit the model ({error})") from error
    length = bundle.config.provenance.get("ema_length")
    return Averages(trained, kept, None if trained is own or length is None else float(length))
