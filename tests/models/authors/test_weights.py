"""Import of the authors' weights, against their network written here as functions over their names."""

import math

import pytest
import torch
import torch.nn.functional as F

from animediffusion.models.authors.weights import from_authors
from animediffusion.models.diffusion.denoiser import Denoiser
from animediffusion.models.network.unet import UNetConfig

BASE, HEADS = 64, 4


@pytest.fixture
def checkpoint(authors_checkpoint):
    return authors_checkpoint


class TheirNetwork:
    """Their U-Net on a state_dict: x [B, 7, H, W], n [B] or None."""

    def __init__(self, state):
        self.state = state

    def parameters(self, layer):
        return self.state[f"denoise_fn.{layer}.weight"], self.state[f"denoise_fn.{layer}.bias"]

    def convolve(self, x, layer, padding=0):
        return F.conv2d(x, *self.parameters(layer), padding=padding)

    def normalize(self, x, layer):
        return F.group_norm(x, 32, *self.parameters(layer))

    def residual(self, x, embedding, place):
        h = self.convolve(F.silu(self.normalize(x, f"{place}.conv1.0")), f"{place}.conv1.2", 1)
        if embedding is not None:
            h = h + F.linear(F.silu(embedding), *self.parameters(f"{place}.time_emb.1"))[:, :, None, None]
        h = self.convolve(F.silu(self.normalize(h, f"{place}.conv2.0")), f"{place}.conv2.3", 1)
        skips = f"denoise_fn.{place}.skip_connection.weight" in self.state
        return h + (self.convolve(x, f"{place}.skip_connection") if skips else x)

    def attend(self, x):
        place = "bottom_block.1.attention"
        weight, bias = self.parameters(f"{place}.1")
        mixed = F.conv1d(self.normalize(x, f"{place}.0").flatten(2), weight, bias)
        heads = []
        for query, key, value in zip(*(part.chunk(HEADS, 1) for part in mixed.chunk(3, 1)), strict=True):
            scores = query.transpose(1, 2) @ key / math.sqrt(query.shape[1])
            heads.append(value @ scores.softmax(-1).transpose(1, 2))
        return x + torch.cat(heads, 1).reshape(x.shape)

    def __call__(self, x, n):
        embedding = None
        if n is not None:
            angles = n[:, None] * 1000.0 ** (-torch.arange(BASE // 2) / (BASE // 2))
            embedding = F.linear(torch.cat([angles.cos(), angles.sin()], 1), *self.parameters("time_embedding.0"))
            embedding = F.linear(F.silu(embedding), *self.parameters("time_embedding.2"))
        kept = [self.convolve(x, "input.0")]
        for place in range(5):
            is_pool = place == 2
            kept.append(
                F.avg_pool2d(kept[-1], 2) if is_pool else self.residual(kept[-1], embedding, f"encoder_block.{place}")
            )
        h = self.residual(kept[-1], embedding, "bottom_block.0")
        h = self.residual(self.attend(h), embedding, "bottom_block.2")
        for place in ("0", "1", "2.0", "3", "4"):
            h = self.residual(torch.cat([h, kept.pop()], 1), embedding, f"decoder_block.{place}")
            h = F.interpolate(h, scale_factor=2.0, mode="nearest") if place == "2.0" else h
        return self.convolve(F.silu(self.normalize(h, "output.0")), "output.2")


def imported(checkpoint):
    config, weights = from_authors(checkpoint)
    denoiser: Denoiser = config.build()
    denoiser.load_state_dict(weights)
    return denoiser


@pytest.mark.parametrize("n", [0, 1, 640, 999, None])
def test_an_imported_network_says_what_theirs_says(checkpoint, n):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 7, 8, 8, generator=generator)
    times = None if n is None else torch.tensor([n, max(0, n - 3)])
    denoiser = imported(checkpoint)
    with torch.no_grad():
        found = denoiser.network.denoise(
            x[:, :3], None if times is None else times.double() / 1000, denoiser.encode(x[:, 3:4], x[:, 4:])
        )
    torch.testing.assert_close(found, TheirNetwork(checkpoint)(x, times), rtol=1e-4, atol=1e-4)


def test_the_sizes_are_read_off_the_weights(checkpoint):
    config, _ = from_authors(checkpoint)
    assert config.network == UNetConfig(channel_multipliers=(1, 2), head_channels=32)
    assert (config.path.name, config.prediction, config.clamp, config.image_size) == ("linear", "eps", True, 256)
    assert (config.sampler.name, config.sampler.steps, config.sampler.guidance_scale) == ("euler", 10, 1.0)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"model.module.{key}": value for key, value in state.items()}},
        lambda state: {key: value for key, value in state.items() if key.startswith("denoise_fn.")},
        lambda state: {key: value.double() for key, value in state.items()},
    ],
    ids=["DDP's prefix", "state_dict", "model", "no tables", "float64"],
)
def test_wrappers_are_taken_off(checkpoint, wrap):
    _, plain = from_authors(checkpoint)
    _, found = from_authors(wrap(checkpoint))
    assert plain.keys() == found.keys()
    assert all(torch.equal(plain[name], found[name]) for name in plain)


def without(state, *names):
    return {key: value for key, value in state.items() if key not in names}


BROKEN = [
    (lambda _: [1, 2], "holds a list, not a state_dict"),
    (lambda _: {"epoch": 3, "lr": 0.1}, "holds a mapping with 'epoch', 'lr', not a state_dict"),
    (lambda _: {"optim_dict": {}}, "holds the state of an optimizer; the model is in ep_N.model.pth"),
    (lambda _: {"weight": torch.zeros(1)}, r"no weights named denoise_fn\.\*, but 'weight'"),
    (lambda state: without(state, "denoise_fn.output.2.bias"), r"^lacks 'denoise_fn\.output\.2\.bias'$"),
    (lambda state: without(state, "denoise_fn.input.0.weight"), r"lacks denoise_fn\.input\.0\.weight"),
    (
        lambda state: {**state, "denoise_fn.decoder_block.3.attention.0.fc.weight": torch.zeros(1)},
        r"^has unknown weights 'denoise_fn\.decoder_block\.3\.attention\.0\.fc\.weight'$",
    ),
    (
        lambda state: {**state, "denoise_fn.output.2.weight": torch.zeros(4, 64, 1, 1)},
        r"denoise_fn\.output\.2\.weight is \[4, 64, 1, 1\], which does not fit",
    ),
    (
        lambda state: {**state, "denoise_fn.input.0.weight": torch.zeros(64, 6, 1, 1)},
        r"input\.0\.weight is \[64, 6, 1, 1\], not \[channels, 7, 1, 1\]",
    ),
    (lambda state: {**state, "denoise_fn.input.0.weight": torch.zeros(48, 7, 1, 1)}, "on 48 channels"),
    (
        lambda state: {**state, "gammas": torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000), 0)},
        r"another noise schedule \(1000 steps, least gamma 0\.00004\)",
    ),
    (
        lambda state: {**state, "denoise_fn.encoder_block.0.conv2.3.weight": torch.tensor(1.0)},
        r"has levels \[\[",
    ),
    (lambda state: {**state, "gammas": state["gammas"][0]}, r"another noise schedule \(1 steps"),
    (lambda state: {**state, "gammas": state["gammas"][:100]}, r"another noise schedule \(100 steps"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_another_checkpoint_raises_value_error_that_says_what_differs(checkpoint, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        from_authors(change(checkpoint))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_many_missing_names_are_counted(checkpoint):
    decoder = [key for key in checkpoint if "decoder_block.4" in key]
    with pytest.raises(ValueError, match=r"^lacks 'denoise_fn\.decoder_block\.4\.[\w.]+', .* and 9 more$"):
        from_authors(without(checkpoint, *decoder))
