"""Check that our strict mode computes the same numbers as the authors' code, from the same imported weights.

    git clone https://github.com/xq-meng/AnimeDiffusion PATH_OF_CLONE
    python benchmarks/authors.py --authors PATH_OF_CLONE

The weights are converted as by `models import`. The authors' classes run unmodified; while they run, torch.randn_like
is replaced by a queue of the noise that our side gets as an argument. The exit code is 1 if a difference exceeds the
limit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from animediffusion.models.authors import strict as authors
from animediffusion.models.authors.weights import from_authors
from animediffusion.models.diffusion.denoiser import Denoiser

LIMIT = 1e-4
TIMES = (0, 1, 101, 500, 901, 999)


class Check(NamedTuple):
    """One comparison: the largest difference, relative to the largest absolute value of the authors' result."""

    what: str
    error: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit; NaN is not."""
        return self.error <= LIMIT


def their_model(clone: str, *, seed: int = 0) -> Any:
    """Build the authors' GaussianDiffusion as configured in config/anime.json, with noise added to all weights.

    The noise ensures that no weight is zero.
    """
    sys.path.insert(0, clone)
    from models.diffusion import GaussianDiffusion  # type: ignore[import-not-found]

    torch.manual_seed(seed)
    network = {"channel_in": 7, "channel_out": 3, "channel_mult": [1, 2, 4, 8], "attention_head": 4, "cbam": False}
    model: nn.Module = GaussianDiffusion(1000, {"linear_start": 1e-6, "linear_end": 1e-2}, network)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def our_model(state: dict[str, Tensor]) -> Denoiser:
    """Build our network with weights converted from the authors' state_dict."""
    config, weights = from_authors(state)
    denoiser = config.build()
    denoiser.load_state_dict(weights)
    return denoiser


@contextmanager
def given_noise(noises: list[Tensor]) -> Iterator[None]:
    """Make torch.randn_like return these tensors, one after the other."""
    queue = iter(noises)
    with patch("torch.randn_like", lambda _like: next(queue)):
        yield


def compare(clone: str, size: int, rows: int) -> list[Check]:
    """Run all comparisons."""
    theirs = their_model(clone)
    ours = our_model(theirs.state_dict())
    generator = torch.Generator().manual_seed(1)
    target, sketch, reference = (torch.rand(rows, c, size, size, generator=generator) * 2 - 1 for c in (3, 1, 3))
    noises = [torch.randn(rows, 3, size, size, generator=generator) for _ in range(1 + authors.NUM_STEPS)]
    together = torch.cat([sketch, reference], 1)
    gamma = authors.gammas(authors.require_fit(ours))
    predict = authors.noise_predictor(ours, ours.encode(sketch, reference))

    checks = [Check("table of gammas", _error(gamma, theirs.gammas))]
    for n in (*TIMES, None):
        times = None if n is None else torch.full((rows,), n)
        with torch.no_grad():
            output = theirs.denoise_fn(torch.cat([noises[0], together], 1), times)
            checks.append(Check(f"network, n = {n}", _error(predict(noises[0], times), output)))
    times = torch.randint(0, 1000, (rows,), generator=generator)
    with given_noise(noises[:1]):
        loss = theirs(target, times, together)
    own = authors.strict_loss(predict, gamma, target, noises[0], times).sum()
    checks += [Check("phase 1, loss", _error(own, loss)), _gradients("phase 1, gradients", theirs, loss, ours, own)]
    with torch.no_grad(), given_noise(noises[1:]):
        image = theirs.inference_ddim(noises[0], x_cond=together)[-1]
    with torch.no_grad():
        predict = authors.noise_predictor(ours, ours.encode(sketch, reference))
        checks.append(Check("sampler, 10 steps", _error(authors.strict_sample(predict, gamma, *_split(noises)), image)))
    return [*checks, *_phase2(theirs, ours, gamma, target, sketch, reference, noises)]


def _phase2(
    theirs: Any, ours: Denoiser, gamma: Tensor, target: Tensor, sketch: Tensor, reference: Tensor, noises: list[Tensor]
) -> list[Check]:
    together = torch.cat([sketch, reference], 1)
    with given_noise(noises):
        start = theirs.fix_forward(target, x_cond=together)
        loss = F.mse_loss(theirs.inference_ddim(start, x_cond=together)[-1], target)
    predict = authors.noise_predictor(ours, ours.encode(sketch, reference))
    own_start = authors.fix_forward(predict, gamma, target, noises[0])
    own = authors.strict_reconstruction(predict, gamma, target, *_split(noises)).mean()
    return [
        Check("phase 2, fix_forward", _error(own_start, start)),
        Check("phase 2, loss", _error(own, loss)),
        _gradients("phase 2, gradients", theirs, loss, ours, own),
    ]


def _split(noises: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    return noises[0], noises[1:]


def _gradients(what: str, theirs: Any, their_loss: Tensor, ours: Denoiser, our_loss: Tensor) -> Check:
    """Compare all gradients as one vector; the authors' gradients are converted like their weights."""
    for model, loss in ((theirs, their_loss), (ours, our_loss)):
        model.zero_grad()
        loss.backward()
    named = {f"denoise_fn.{name}": p.grad for name, p in theirs.denoise_fn.named_parameters() if p.grad is not None}
    _, translated = from_authors(named)
    own = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    names = [name for name in own if name != "network.null_reference"]
    return Check(what, _error(*(torch.cat([side[name].flatten() for name in names]) for side in (own, translated))))


def _error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.detach() - theirs.detach()).abs().max() / theirs.detach().abs().max())


def main() -> None:
    """Print the table; exit with 1 if any difference exceeds the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--authors", required=True, help="clone of the authors' repository")
    parser.add_argument("--size", type=int, default=32, help="side in pixels, a multiple of 8")
    parser.add_argument("--batch", type=int, default=2)
    args = parser.parse_args()
    checks = compare(args.authors, args.size, args.batch)
    print(f"torch {torch.__version__}, float32, {args.size} px, batch {args.batch}\n")
    print("| what | max relative error | limit | ok |\n|---|---|---|---|")
    for check in checks:
        print(f"| {check.what} | {check.error:.1e} | {LIMIT:.0e} | {'yes' if check.passed else 'NO'} |")
    sys.exit(0 if all(check.passed for check in checks) else 1)


if __name__ == "__main__":
    main()
