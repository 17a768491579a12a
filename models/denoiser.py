"""Network + path + prediction type = an estimate of the image x_0.

This is all a sampler ever sees of a model. Shapes: x_t, x_0 [B, 3, H, W]; t [B].
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from animediffusion.models.condition import Condition
from animediffusion.models.path import PathConfig, build_path, spread
from animediffusion.models.unet import UNet, UNetConfig

Prediction = Literal["eps", "x0", "v"]

# Below this share of image in pure noise, x_0 = (x_t - sigma eps) / alpha amplifies errors beyond use.
MIN_ALPHA_FOR_EPS = 0.02


class Denoiser(nn.Module):
    """Estimates x_0 from x_t.

    Args:
        network: what to build.
        path: how x_t was made.
        prediction: what the network returns: `eps` the noise, `x0` the image, `v` the path's
            velocity alpha' x_0 + sigma' eps.
        clamp: keep the estimate in [-1, 1] (the authors' sampler does; it stops gradients there).

    Raises:
        ValueError: for an impossible pair, such as eps on a path that ends in pure noise.
    """

    def __init__(
        self, network: UNetConfig, path: PathConfig, prediction: Prediction = "x0", *, clamp: bool = False
    ) -> None:
        super().__init__()
        if prediction not in get_args(Prediction):
            raise ValueError(f"prediction must be eps, x0 or v, got {prediction!r}")
        self.path = build_path(path)
        alpha_at_noise = float(self.path.alpha(torch.tensor(self.path.t_max, dtype=torch.float64, device="cpu")))
        if prediction == "eps" and alpha_at_noise < MIN_ALPHA_FOR_EPS:
            raise ValueError(
                f"prediction 'eps' cannot start on path {path.name!r}: alpha(t_max) is {alpha_at_noise:.3f}, "
                f"which must be at least {MIN_ALPHA_FOR_EPS}; use x0 or v"
            )
        self.network = UNet(network)
        self.prediction = prediction
        self.clamp = clamp

    def encode(self, sketch: Tensor, reference: Tensor, keep_reference: Tensor | None = None) -> Condition:
        """See UNet.encode."""
        return self.network.encode(sketch, reference, keep_reference)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The estimate of x_0, in float32."""
        return self.to_x0(self.network.denoise(x_t, t, condition).float(), x_t.float(), t)

    def to_x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x_0 from the network's output: solves x_t = alpha x_0 + sigma eps with what is known."""
        t = spread(t)
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        if self.prediction == "eps":
            x_0 = (x_t - sigma * output) / alpha
        elif self.prediction == "v":
            alpha_dot, sigma_dot = self.path.velocity(t)
            x_0 = (sigma_dot * x_t - sigma * output) / (alpha * sigma_dot - alpha_dot * sigma)
        else:
            x_0 = output
        return x_0.clamp(-1, 1) if self.clamp else x_0

    def training_target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should return."""
        if self.prediction == "x0":
            return x_0
        if self.prediction == "eps":
            return noise
        alpha_dot, sigma_dot = self.path.velocity(spread(t))
        return alpha_dot * x_0 + sigma_dot * noise
