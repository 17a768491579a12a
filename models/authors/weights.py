"""Convert the authors' weights: their GaussianDiffusion.state_dict() becomes the state_dict of a Denoiser.

Their names are those of models/network/unet.py and models/components/ in their repository; `_MODULES` and `_LAYERS` map
names that differ. pipelines/release/import_weights.py reads the file and writes the bundle.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from animediffusion.models.bundle import BundleConfig, SamplerDefaults
from animediffusion.models.diffusion.path import LinearPath, PathConfig
from animediffusion.models.network.unet import GROUPS, UNetConfig

NETWORK = "denoise_fn."
"""Prefix of the network's weights in their GaussianDiffusion."""
BUFFERS = (
    *("gammas", "sqrt_reciprocal_gammas", "sqrt_reciprocal_gammas_m1", "posterior_variance"),
    *("posterior_log_variance", "posterior_mean_coef1", "posterior_mean_coef2"),
)
"""Tables that follow from the betas; a checkpoint may omit them."""
IMAGE_SIZE = 256
"""Their training size in pixels (config/anime.json); it cannot be read from the weights."""
NUM_HEADS = 4
"""Heads of their attention (config/anime.json); the number cannot be read from the weights."""


def from_authors(checkpoint: object) -> tuple[BundleConfig, dict[str, Tensor]]:
    """Return the bundle configuration and the Denoiser's weights for the result of `torch.load`.

    Args:
        checkpoint: their state_dict, at the top level or under `state_dict` or `model`, with or without a wrapper's
            prefix such as `module.`.

    Raises:
        ValueError: if this is not their checkpoint; the message names missing, unused or misshapen keys.
    """
    state = _state_dict(checkpoint)
    config = BundleConfig(
        network=_network_config(state),
        path=PathConfig(name="linear"),
        prediction="eps",
        clamp=True,
        image_size=IMAGE_SIZE,
        sampler=SamplerDefaults(name="euler", steps=10),
        provenance={"recipe": "animediffusion", "source": "the authors' code"},
    )
    _check_schedule(state, config.path)
    return config, _converted(state, config)


def _state_dict(checkpoint: object) -> dict[str, Tensor]:
    """Return the tensors by name, with the prefixes of wrappers removed."""
    if isinstance(checkpoint, Mapping) and "optim_dict" in checkpoint:
        raise ValueError("holds the state of an optimizer; the model is in ep_N.model.pth")
    for name in ("state_dict", "model"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(name), Mapping):
            checkpoint = checkpoint[name]
    if not isinstance(checkpoint, Mapping) or not all(isinstance(v, Tensor) for v in checkpoint.values()):
        raise ValueError(f"holds {_describe(checkpoint)}, not a state_dict of tensors")
    named = {str(key): value for key, value in checkpoint.items()}
    inside = [key for key in named if NETWORK in key]
    if not inside:
        raise ValueError(f"has no weights named {NETWORK}*, but {_some(named)}: another model")
    prefix = inside[0].partition(NETWORK)[0]
    return {key.removeprefix(prefix): value for key, value in named.items()}


def _network_config(state: Mapping[str, Tensor]) -> UNetConfig:
    """Infer the network's sizes from the shapes of its weights."""
    first = state.get(f"{NETWORK}input.0.weight")
    if first is None or first.ndim != 4:
        raise ValueError(f"lacks {NETWORK}input.0.weight, the first convolution")
    if first.shape[1:] != (7, 1, 1):
        raise ValueError(f"{NETWORK}input.0.weight is {list(first.shape)}, not [channels, 7, 1, 1]: another input")
    base = len(first)
    widths: list[list[int]] = [[]]
    for block in range(len(state)):
        weight = state.get(f"{NETWORK}encoder_block.{block}.conv2.3.weight")
        if weight is not None and weight.ndim == 4:
            widths[-1].append(len(weight))
        elif f"{NETWORK}encoder_block.{block + 1}.conv2.3.weight" in state:
            widths.append([])  # A block without weights is the pooling between two levels.
        else:
            break
    levels = [level[-1] if level else 0 for level in widths]
    # With fewer than 64 channels, our normalization would have fewer groups than theirs.
    if base % (2 * GROUPS) or any(width % base for width in levels) or len({len(level) for level in widths}) > 1:
        raise ValueError(f"has levels {widths} on {base} channels, which this kind of network does not have")
    return UNetConfig(
        base_channels=base,
        channel_multipliers=tuple(width // base for width in levels),
        num_res_blocks=len(widths[0]),
        head_channels=max(1, levels[-1] // NUM_HEADS),
    )


def _check_schedule(state: Mapping[str, Tensor], config: PathConfig) -> None:
    ours = LinearPath(config).table.square()
    table = state.get("gammas", ours).double().cpu().flatten()
    if table.shape != ours.shape or not torch.allclose(table, ours, rtol=1e-3):
        raise ValueError(
            f"was trained on another noise schedule ({len(table)} steps, least gamma {float(table.min()):.5f}), "
            f"not on {len(ours)} steps down to {float(ours[-1]):.5f}"
        )


def _converted(state: Mapping[str, Tensor], config: BundleConfig) -> dict[str, Tensor]:
    """Return the weights under our names.

    Raises:
        ValueError: if one of our weights has no counterpart, one of theirs is unused, or a shape does not fit.
    """
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in config.build().state_dict().items()}
    null = wanted.pop("network.null_reference")  # Their network has no counterpart.
    used = {name: NETWORK + _their_name(name, config.network) for name in wanted}
    missing = [key for key in used.values() if key not in state]
    left_over = sorted(state.keys() - set(used.values()) - set(BUFFERS))
    if missing or left_over:
        found = [f"lacks {_some(missing)}"] if missing else []
        found += [f"has unknown weights {_some(left_over)}"] if left_over else []
        raise ValueError(" and ".join(found))
    weights = {name: _ours(name, state[key]) for name, key in used.items()}
    for name, shape in wanted.items():
        if weights[name].shape != shape:
            raise ValueError(f"{used[name]} is {list(state[used[name]].shape)}, which does not fit the other weights")
    return {**weights, "network.null_reference": torch.zeros(null)}


def _their_name(name: str, config: UNetConfig) -> str:
    """Return their name, inside the network, of one of our parameters.

    Our input and condition_input are slices of one of their weights.
    """
    name = name.removeprefix("network.")
    for pattern, replacement in _MODULES:
        name, found = re.subn(pattern, replacement, name)
        if found:
            break
    parts = name.split(".")
    if parts[0] == "decoder_block" and (int(parts[1]) + 1) % (config.num_res_blocks + 1) == 0:
        parts.insert(2, "0")  # This block is followed by the upsampling.
    parts[-2] = _LAYERS.get(parts[-2], parts[-2])
    return ".".join(parts)


_MODULES = (
    (r"^(condition_)?input\.", "input.0."),
    (r"^output_norm\.", "output.0."),
    (r"^output\.", "output.2."),
    (r"^bottom\.layers\.1\.norm\.", "bottom_block.1.attention.0."),
    (r"^bottom\.layers\.1\.qkv\.", "bottom_block.1.attention.1."),
    (r"^bottom\.layers\.", "bottom_block."),
    (r"^(encoder|decoder)\.(\d+)\.layers\.0\.", r"\1_block.\2."),
)
_LAYERS = {
    **{"norm1": "conv1.0", "conv1": "conv1.2", "embedding": "time_emb.1"},
    **{"norm2": "conv2.0", "conv2": "conv2.3", "skip": "skip_connection"},
}


def _ours(name: str, value: Tensor) -> Tensor:
    """Convert one of their tensors to our layout."""
    value = value.detach().float()
    if name == "network.input.weight":
        value = value[:, :3]  # Channels of the noisy image; the others belong to condition_input, which has no bias.
    elif name == "network.condition_input.weight":
        value = value[:, 3:]  # Channels of the sketch, then of the reference.
    elif name.endswith("qkv.weight"):
        value = value.squeeze(-1)  # A Conv1d of size 1, ordered by q, k, v and then by head, as in AttentionBlock.
    return value.contiguous()


def _describe(value: object) -> str:
    if isinstance(value, Mapping):
        other: list[Any] = [key for key, inner in value.items() if not isinstance(inner, Tensor)]
        return f"a mapping with {_some(other)}"
    return f"a {type(value).__name__}"


def _some(names: Any) -> str:
    listed = [repr(str(name)) for name in names]
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more
