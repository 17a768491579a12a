"""Fixtures: a network of 0.2 M parameters at 16 px with every kind of layer, and rows for it."""

import pytest
import torch
from hypothesis import settings

from animediffusion.models.augmentation.augment import Batch
from animediffusion.models.diffusion.denoiser import Denoiser
from animediffusion.models.diffusion.path import PathConfig
from animediffusion.models.network.unet import UNetConfig

SIZE = 16

settings.register_profile("models", deadline=None, max_examples=20, database=None, derandomize=True)
settings.load_profile("models")


@pytest.fixture(scope="session")
def network():
    return UNetConfig(
        base_channels=32,
        channel_multipliers=(1,),
        num_res_blocks=1,
        patch_size=2,
        attention_levels=(0,),
        head_channels=32,
        reference_channels=32,
        match_channels=32,
        detail_channels=4,
    )


@pytest.fixture
def new_denoiser(network):
    """A function that makes the network with nonzero weights that depend on a seed."""

    def make(path="flow", prediction="x0", seed=0):
        torch.manual_seed(seed)
        denoiser = Denoiser(network, PathConfig(name=path), prediction)
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return denoiser

    return make


@pytest.fixture
def new_batch():
    """A function that makes a batch of random images from a seed."""

    def make(rows=4, seed=0):
        generator = torch.Generator().manual_seed(seed)
        target, reference = (torch.rand(rows, 3, SIZE, SIZE, generator=generator) * 2 - 1 for _ in range(2))
        sketch = torch.rand(rows, 1, SIZE, SIZE, generator=generator) * 2 - 1
        return Batch(target, sketch, reference)

    return make


@pytest.fixture
def new_rows():
    """A function that makes decoded rows from a seed: uint8 images, either all four or only the target."""

    def make(rows=4, seed=0, complete=True):
        generator = torch.Generator().manual_seed(seed)

        def images(*shape):
            return torch.randint(0, 256, (rows, SIZE, SIZE, *shape), dtype=torch.uint8, generator=generator)

        there = torch.full((rows,), complete)
        values = {"target": images(3), "sketch": images(), "reference": images(3), "cross_reference": images(3)}
        return {**values, "has_sketch": there, "has_reference": there, "has_cross": there}

    return make
