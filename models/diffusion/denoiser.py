"""A denoiser combines network, path and prediction type into an estimate of the image x_0.

Samplers access a model only through its denoiser. Shapes: x_t, x_0 [B, 3, H, W]; t [B].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from animediffusion.models.diffusion.path import PathConfig, build_path, per_image
from animediffusion.models.network.condition import Condition, Reference
from animediffusion.models.network.unet import UNet, UNetConfig

Prediction = Literal["eps", "x0", "v", "edm"]

SIGMA_DATA = 0.5
"""Standard deviation of the data assumed by EDM's preconditioning (Karras et al. 2022, Table 1)."""

# If alpha(t_max) is smaller, x_0 = (x_t - sigma eps) / alpha amplifies errors too much.
MIN_ALPHA_FOR_EPS = 0.02


class Denoiser(nn.Module):
    """Estimate x_0 from x_t.

    Args:
        network: sizes of the network to build.
        path: the noise path that x_t comes from.
        prediction: the meaning of the network's output: `eps` is the noise, `x0` the image, `v` the path's
            velocity alpha' x_0 + sigma' eps, `edm` F of Karras et al. 2022, Eq. 7.
        clamp: clamp the estimate to [-1, 1], as the authors' sampler does; clamped values have no gradient.

    Raises:
        ValueError: if prediction and path do not fit together, such as eps on a path that ends in pure noise.
    """

    def __init__(
        self, network: UNetConfig, path: PathConfig, prediction: Prediction = "x0", *, clamp: bool = False
    ) -> None:
        super().__init__()
        if prediction not in get_args(Prediction):
            raise ValueError(f"prediction must be eps, x0, v or edm, got {prediction!r}")
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

    def encode(
        self,
        sketch: Tensor,
        reference: Tensor | Sequence[Tensor],
        keep_reference: Tensor | None = None,
        hints: Tensor | None = None,
    ) -> Condition:
        """See UNet.encode."""
        references = [reference] if isinstance(reference, Tensor) else reference
        narrow = [self._narrow(one) for one in references]
        return self.network.encode(self._narrow(sketch), narrow, keep_reference, self._narrow_hints(hints))

    def encode_reference(self, reference: Tensor, keep_reference: Tensor) -> Reference:
        """See UNet.encode_reference."""
        return self.network.encode_reference(self._narrow(reference), keep_reference)

    def combine(self, sketch: Tensor, reference: Reference, hints: Tensor | None = None) -> Condition:
        """See UNet.combine."""
        return self.network.combine(self._narrow(sketch), reference, self._narrow_hints(hints))

    def queries(self, sketch: Tensor) -> Tensor | None:
        """See UNet.queries."""
        return self.network.queries(self._narrow(sketch))

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Load the weights of a network that is equal but may lack hints; the weights of hints then stay zero.

        Raises:
            RuntimeError: if the weights are those of another network.
        """
        new = {name: tensor for name, tensor in self.state_dict().items() if "hint_input." in name}
        self.load_state_dict({**new, **weights})

    def _narrow(self, images: Tensor) -> Tensor:
        """Convert images to the weights' type if that has 16 bits (bfloat16); else return them unchanged."""
        dtype = self.network.condition_input.weight.dtype
        return images.to(dtype) if dtype.itemsize == 2 else images

    def _narrow_hints(self, hints: Tensor | None) -> Tensor | None:
        return None if hints is None else self._narrow(hints)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the estimate of x_0 in float32."""
        return self.to_x0(self.output(x_t, t, condition), x_t.float(), t)

    def output(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the network's output in float32; the prediction type defines its meaning."""
        if self.prediction == "edm":
            x_t = x_t / self._scale(per_image(t))
        return self.network.denoise(self._narrow(x_t), t, condition).float()

    def to_x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Compute x_0 from the network's output by solving x_t = alpha x_0 + sigma eps."""
        x_0 = self._to_x0(output, x_t, t)
        return x_0.clamp(-1, 1) if self.clamp else x_0

    def _to_x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        t = per_image(t)
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        if self.prediction == "eps":
            return (x_t - sigma * output) / alpha
        if self.prediction == "v":
            alpha_dot, sigma_dot = self.path.velocity(t)
            return (sigma_dot * x_t - sigma * output) / (alpha * sigma_dot - alpha_dot * sigma)
        if self.prediction == "edm":
            # c_skip and c_out of Table 1 for the noise level sigma / alpha and the image x_t / alpha.
            scale = self._scale(t)
            return SIGMA_DATA**2 * alpha / scale**2 * x_t + SIGMA_DATA * sigma / scale * output
        return output

    def training_target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the value that the network's output should have."""
        if self.prediction == "x0":
            return x_0
        if self.prediction == "eps":
            return noise
        t = per_image(t)
        if self.prediction == "edm":
            # This is (x_0 - c_skip x_t) / c_out, with sigma canceled from numerator and denominator.
            alpha, sigma = self.path.alpha(t), self.path.sigma(t)
            return (sigma * x_0 - SIGMA_DATA**2 * alpha * noise) / (SIGMA_DATA * self._scale(t))
        alpha_dot, sigma_dot = self.path.velocity(t)
        return alpha_dot * x_0 + sigma_dot * noise

    def loss_pair(self, x_0: Tensor, noise: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Return (prediction, target) that the phase 1 loss compares.

        For `edm` these are images, because SSIMBaD's loss is the unweighted error of D_x; comparing the output F would
        imply the weight of Karras et al. 2022, Table 1. For all other types they are the network's output and its
        target.
        """
        x_t = self.path.add_noise(x_0, noise, t)
        output = self.output(x_t, t, condition)
        if self.prediction == "edm":
            return self._to_x0(output, x_t, t), x_0
        return output, self.training_target(x_0, noise, t)

    def snr_weight(self, t: Tensor, most: float) -> Tensor:
        """Return weights [B] that turn the squared error of loss_pair() into min(SNR, most) times that of x_0.

        SNR is (alpha / sigma)^2. This is min-SNR (Hang et al. 2023) for any path and prediction: their Eq. 8 for x0,
        and the equivalent weights for the other predictions.
        """
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        snr = (alpha / sigma).square()
        if self.prediction == "eps":
            return (most / snr).clamp(max=1)
        if self.prediction == "v":
            alpha_dot, sigma_dot = self.path.velocity(t)
            return snr.clamp(max=most) * (sigma / (alpha * sigma_dot - alpha_dot * sigma)).square()
        return snr.clamp(max=most)

    def _scale(self, t: Tensor) -> Tensor:
        """Return the standard deviation of x_t, [B, 1, 1, 1], for images with SIGMA_DATA.

        It is alpha / c_in, because EDM's input is x_t / alpha.
        """
        return (self.path.sigma(t) ** 2 + (SIGMA_DATA * self.path.alpha(t)) ** 2).sqrt()
