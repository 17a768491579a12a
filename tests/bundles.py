"""Untrained bundles of the smallest network, and evaluations in the format of `evaluate`."""

import uuid

import torch

from animediffusion.models.bundle import BundleConfig, SamplerDefaults, save_bundle
from animediffusion.models.network.unet import UNetConfig
from animediffusion.platform.config import Settings

SIZES = {"base_channels": 32, "num_res_blocks": 1, "head_channels": 32, "reference_channels": 32}
NETWORK = UNetConfig(channel_multipliers=(1, 1), **SIZES)


def evaluation(psnr=20.0, ciede2000=8.0, data_hash="a" * 64):
    return {
        "data": "data/real",
        "data_hash": data_hash,
        "split": "val",
        "num_images": 20,
        "image_size": 16,
        "tracks": {"same": {"psnr": psnr, "ciede2000": 7.0}, "cross": {"psnr": psnr - 1, "ciede2000": ciede2000}},
    }


def write_bundle(folder, seed=0, metrics=None, image_size=16, sampler_steps=4, **provenance):
    """Write a bundle whose weights depend on the seed, and return its folder."""
    torch.manual_seed(seed)
    config = BundleConfig(
        network=NETWORK,
        image_size=image_size,
        sampler=SamplerDefaults(steps=sampler_steps),
        provenance={"recipe": "demo", **provenance},
    )
    save_bundle(folder, config.build(), config, metrics=metrics)
    return folder


def new_model(workspace):
    """Return settings with a new model name: tests share a database, because creating one takes seconds."""
    return Settings.from_environment(workspace=workspace, model_name=f"model-{uuid.uuid4().hex[:8]}")
