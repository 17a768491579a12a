"""Averages of a run's weights over other lengths than its own, made when the run is over (post-hoc EMA).

While it trains, a run keeps averages of a few lengths, whose profiles over time are powers t^exponent. Of these, any
length between them is mixed afterwards (after Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
Diffusion Models", section 3; `mix` says what is different).

    averages = read_averages(bundle)
    bundle = averages.use(bundle, 0.07)

A length is the standard deviation of the profile as a share of the run, the paper's sigma_rel. Not here: keeping them
while training, see models/training/loop.py; which length is best, see pipelines/tuning/sampler_search.py.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from animediffusion.models.bundle import AVERAGES, Bundle, SamplerDefaults, save_bundle

Weights = Mapping[str, Tensor]
"""By the denoiser's names."""

LONGEST = 0.28
"""At 1 / sqrt(12) = 0.289 the exponent is 0: the plain mean of the whole run."""
_TRAINED = "trained"


@cache
def exponent(length: float) -> float:
    """Of the profile t^exponent on [0, 1] whose standard deviation is `length`.

    The variance of the density (g + 1) t^g is (g + 1) / ((g + 2)^2 (g + 3)), and falls as g rises.

    Raises:
        ValueError: the length is not in (0, LONGEST].
    """
    if not 0 < length <= LONGEST:
        raise ValueError(f"the length of an average must be above 0 and at most {LONGEST}, got {length}")
    low, high = 0.0, 1 / length
    for _ in range(60):
        middle = (low + high) / 2
        variance = (middle + 1) / ((middle + 2) ** 2 * (middle + 3))
        low, high = (middle, high) if variance > length**2 else (low, middle)
    return low


def mix(kept: Sequence[float], length: float) -> list[float]:
    """How much of each kept average makes one of this length: of the next shorter and the next longer, never below 0.

    The mixed profile's standard deviation is exactly `length`. The paper fits its shape by least squares, which takes
    parts below 0: of a few averages, in a run whose learning rate falls, these bring its first weights back, and the
    result can lie farther from the average that is wanted than the nearest of those that are kept.

    Raises:
        ValueError: the length is not between two of those kept.
    """
    order = sorted(range(len(kept)), key=lambda number: kept[number])
    parts = [0.0] * len(kept)
    for low, high in pairwise([order[0], *order]):  # the first pair is for the shortest itself
        if kept[low] <= length <= kept[high]:
            share = _share(kept[low], kept[high], length)
            parts[low] += 1 - share
            parts[high] += share
            return parts
    raise ValueError(f"the length of an average must be in {min(kept):g} to {max(kept):g}, got {length:g}")


def _share(short: float, long: float, length: float) -> float:
    """How much of the longer profile gives the mixture this standard deviation: the smaller root of a parabola."""
    if short == long:
        return 0.0
    means = [(exponent(one) + 1) / (exponent(one) + 2) for one in (short, long)]
    apart = (means[1] - means[0]) ** 2
    # The variance of a mixture: its parts' own, and that of their means, share (1 - share) apart.
    rise = long**2 - short**2 + apart
    return (rise - math.sqrt(rise**2 - 4 * apart * (length**2 - short**2))) / (2 * apart)


@dataclass(frozen=True)
class Averages:
    """The weights that a bundle's model can have."""

    trained: Weights
    """The average that the run made its bundle of."""
    kept: Mapping[float, Weights]
    """Those beside it, by length; none of a bundle that came without them."""
    length: float | None
    """Of the bundle's own weights; None where they are the trained ones."""

    @property
    def range(self) -> tuple[float, float] | None:
        """The shortest and the longest to choose from; None where there is but the trained one."""
        return (min(self.kept), max(self.kept)) if self.kept else None

    def weights(self, length: float | None) -> Weights:
        """The average over this length, or the trained one."""
        if length is None:
            return self.trained
        mixed = {name: torch.zeros_like(tensor) for name, tensor in self.trained.items()}
        for part, weights in zip(mix(list(self.kept), length), self.kept.values(), strict=True):
            for name, tensor in mixed.items():
                tensor.add_(weights[name], alpha=part)
        return mixed

    def use(self, bundle: Bundle, length: float | None) -> Bundle:
        """The same bundle, its model now with the weights of this length."""
        bundle.denoiser.load_state_dict(self.weights(length))
        return bundle

    def save(self, bundle: Bundle, folder: Path, length: float | None, sampler: SamplerDefaults) -> str:
        """Write the bundle with the weights of this length and these defaults, without metrics; returns its sha256."""
        beside = pack(self.kept)
        if length is not None:
            beside |= {f"{_TRAINED}/{name}": tensor for name, tensor in self.trained.items()}
        made = {key: value for key, value in bundle.config.provenance.items() if key != "ema_length"}
        config = replace(
            bundle.config, sampler=sampler, provenance=made if length is None else {**made, "ema_length": length}
        )
        card = (bundle.folder / "card.md").read_text()
        return save_bundle(folder, self.use(bundle, length).denoiser, config, {}, card, averages=beside)

    def sha256(self) -> str:
        """64 hex digits, equal for equal weights, whichever of them are the bundle's own."""
        digest = hashlib.sha256()
        for length, weights in [(0.0, self.trained), *sorted(self.kept.items())]:
            for name in sorted(weights):
                digest.update(f"{length:g} {name} ".encode())
                digest.update(weights[name].cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def pack(kept: Mapping[float, Weights]) -> dict[str, Tensor]:
    """Averages as the tensors of a bundle's file of them."""
    return {f"{length:g}/{name}": tensor for length, weights in kept.items() for name, tensor in weights.items()}


def read_averages(bundle: Bundle) -> Averages:
    """What a bundle's folder has of them.

    Raises:
        ValueError: the file does not fit the model.
    """
    own = load_file(bundle.folder / "model.safetensors")  # whatever `use` gave the model since
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
                raise ValueError("other tensors")
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} does not fit the model ({error})") from error
    return Averages(trained, kept, None if trained is own else bundle.config.provenance.get("ema_length"))
