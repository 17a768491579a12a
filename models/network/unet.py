"""The network: a U-Net with inputs x_t, sketch, references and hints.

One class implements the authors' network (52.3 M parameters: patch_size 1, no reference tokens) and ours
(pixel-unshuffled input, reference tokens in every attention, full-resolution last layers). Unlike in a usual U-Net,
`encode` computes everything that does not depend on t, and `denoise` computes the rest.

Shapes: B rows, C channels, H/W pixels, h/w positions of a level, N reference tokens, D token channels, E embedding
channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from animediffusion.models.network.attention import attention
from animediffusion.models.network.condition import Condition, Reference, join_references
from animediffusion.models.network.hints import HINT_PLANES
from animediffusion.models.sampler_options import MAX_REFERENCES

GROUPS = 32


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Sizes of a network; the defaults are the authors' (models/network/unet.py, config/anime.json of their code)."""

    base_channels: int = 64
    """Width of the first level; a multiple of 32 (GroupNorm groups)."""
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 8)
    """Width of each level in units of base_channels; each further level halves the side."""
    num_res_blocks: int = 2
    """Residual blocks per level on the way down; on the way up, every level but the first has one more."""
    patch_size: int = 1
    """Side of the pixel blocks that are folded into channels before the first convolution."""
    io_kernel_size: int = 1
    """Kernel size of the first and the last convolution."""
    scale_shift: bool = False
    """If true, the embedding scales and shifts the output of the second normalization. If false, it is added before
    that normalization, as the authors do; a normalization over few channels then removes much of it."""
    attention_levels: tuple[int, ...] = ()
    """Levels with an attention block after each residual block; the bottleneck always has one."""
    head_channels: int = 128
    """Channels of an attention head."""
    reference_channels: int = 0
    """Width of the reference encoder, whose tokens are input of every attention; 0 leaves the encoder out."""
    reference_stride: int = 4
    """Pixels per side of a reference token."""
    match_channels: int = 0
    """Width of the matcher, which searches the reference for each position of the sketch before the first step; 0
    leaves it out. It requires reference_channels."""
    detail_channels: int = 0
    """Width of the last layers, which get the sketch at full resolution; 0 leaves them out."""
    hints: bool = False
    """Whether the network sees hints. The weights of these inputs start at zero, so a trained network without hints
    can be continued as a network with hints."""

    def __post_init__(self) -> None:
        for name in ("base_channels", "num_res_blocks", "patch_size", "head_channels", "reference_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.io_kernel_size < 1 or self.io_kernel_size % 2 == 0:
            raise ValueError(f"io_kernel_size must be odd, got {self.io_kernel_size}")
        if min(self.reference_channels, self.match_channels, self.detail_channels) < 0:
            raise ValueError("reference_channels, match_channels and detail_channels must not be negative")
        if self.match_channels and (not self.reference_channels or self.match_channels % self.head_channels):
            raise ValueError(
                "match_channels needs reference_channels, and must be a multiple of head_channels "
                f"{self.head_channels}, got {self.match_channels}"
            )
        if self.base_channels % GROUPS:
            raise ValueError(f"base_channels must be a multiple of {GROUPS}, got {self.base_channels}")
        if self.reference_channels % GROUPS:
            raise ValueError(f"reference_channels must be a multiple of {GROUPS}, got {self.reference_channels}")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(f"channel_multipliers must be positive, got {self.channel_multipliers}")
        if any(not 0 <= level < len(self.channel_multipliers) for level in self.attention_levels):
            raise ValueError(f"attention_levels must name levels below {len(self.channel_multipliers)}")
        for level in {*self.attention_levels, len(self.channel_multipliers) - 1}:
            width = self.base_channels * self.channel_multipliers[level]
            if width % self.head_channels:
                raise ValueError(f"head_channels must divide {width} (level {level}), got {self.head_channels}")

    @property
    def size_multiple(self) -> int:
        """The number of pixels that image sides must be multiples of."""
        network = self.patch_size << (len(self.channel_multipliers) - 1)
        return math.lcm(network, self.reference_stride) if self.reference_channels else network


class UNet(nn.Module):
    """The network inside a `Denoiser`: it maps (x_t, t, condition) to an output [B, 3, H, W]."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        base, patch, kernel = config.base_channels, config.patch_size**2, config.io_kernel_size
        self.embedding_channels = 4 * base
        self.time_embedding = nn.Sequential(
            nn.Linear(base, 4 * base), nn.SiLU(), nn.Linear(4 * base, self.embedding_channels)
        )
        self.input = nn.Conv2d(3 * patch, base, kernel, padding=kernel // 2)
        self.condition_input = nn.Conv2d(4 * patch, base, kernel, padding=kernel // 2, bias=False)
        self.hint_input = _zero_convolution(HINT_PLANES * patch, base, kernel) if config.hints else None
        self.null_reference = nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.reference_encoder = (
            ReferenceEncoder(config, self.embedding_channels) if config.reference_channels else None
        )
        self.matcher = Matcher(config) if config.match_channels else None
        self._build_levels(config)
        self.output_norm = nn.GroupNorm(GROUPS, base)
        out = config.detail_channels or 3
        self.output = nn.Conv2d(base, out * patch, kernel, padding=kernel // 2)
        self.detail = DetailLayers(config.detail_channels) if config.detail_channels else None

    def _build_levels(self, config: UNetConfig) -> None:
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        width, skips = config.base_channels, [config.base_channels]
        for level, level_width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.encoder.append(self._block(level, width, level_width))
                width = level_width
                skips.append(width)
            if level < len(widths) - 1:
                self.encoder.append(Stage([], nn.AvgPool2d(2)))
                skips.append(width)
        self.bottom = Stage([self._residual(width, width), self._attention(width), self._residual(width, width)])
        for level, level_width in reversed(list(enumerate(widths))):
            for _ in range(config.num_res_blocks):
                self.decoder.append(self._block(level, width + skips.pop(), level_width))
                width = level_width
            if level:
                upsample = nn.Upsample(scale_factor=2, mode="nearest")
                self.decoder.append(Stage([self._residual(width + skips.pop(), level_width)], upsample))

    def hidden_weights(self) -> list[nn.Parameter]:
        """Return the matrices and kernels between the first and the last layers, which Muon can train."""
        found = [self.encoder, self.bottom, self.decoder, self.reference_encoder, self.matcher]
        named = (pair for module in found if module is not None for pair in module.named_parameters())
        ends = ("input.", "hint_input.", "colors.")
        return [weight for name, weight in named if weight.ndim > 1 and not name.startswith(ends)]

    def _residual(self, width_in: int, width_out: int) -> ResidualBlock:
        return ResidualBlock(width_in, width_out, self.embedding_channels, self.config.scale_shift)

    def _attention(self, width: int) -> AttentionBlock:
        config = self.config
        # The authors' attention has no output projection; attention with reference tokens needs one.
        return AttentionBlock(width, width // config.head_channels, config.reference_channels)

    def _block(self, level: int, width_in: int, width_out: int) -> Stage:
        layers: list[nn.Module] = [self._residual(width_in, width_out)]
        if level in self.config.attention_levels:
            layers.append(self._attention(width_out))
        return Stage(layers)

    def check_count(self, references: int) -> None:
        """Raise ValueError if the network cannot use this number of references; more than one need tokens."""
        most = MAX_REFERENCES if self.reference_encoder is not None else 1
        if not 1 <= references <= most:
            raise ValueError(f"this model takes 1 to {most} references, got {references}")

    def encode(
        self,
        sketch: Tensor,
        reference: Tensor | Sequence[Tensor],
        keep_reference: Tensor | None = None,
        hints: Tensor | None = None,
    ) -> Condition:
        """Compute everything that depends on sketch, references and hints alone.

        Args:
            sketch: [B, 1, H, W] in [-1, 1].
            reference: [B, 3, H, W] in [-1, 1], or several such references, see join_references().
            keep_reference: bool [B]; rows with False get the learned null reference instead of all their own.
            hints: [B, 4, H, W] from hint_planes(). A network without `config.hints` ignores them.

        Raises:
            ValueError: if the sides are not multiples of `config.size_multiple`, or the network cannot use as many
                references.
        """
        if keep_reference is None:
            keep_reference = torch.ones(len(sketch), dtype=torch.bool, device=sketch.device)
        references = [reference] if isinstance(reference, Tensor) else reference
        self.check_count(len(references))
        encoded = [self.encode_reference(one, keep_reference) for one in references]
        return self.combine(sketch, join_references(encoded), hints)

    def encode_reference(self, reference: Tensor, keep_reference: Tensor) -> Reference:
        """Compute the part of `encode` that needs no sketch; arguments and errors are those of `encode`."""
        self._check_sides(reference)
        # torch.where keeps every parameter in the graph of every step, as DDP expects; indexing would not.
        picture = torch.where(keep_reference[:, None, None, None], reference, self.null_reference.to(reference.dtype))
        if self.reference_encoder is None:
            rows = len(picture)
            return Reference(picture, picture.new_zeros(rows, 0, 0), picture.new_zeros(rows, 0))
        return Reference(picture, *self.reference_encoder(picture))

    def combine(self, sketch: Tensor, reference: Reference, hints: Tensor | None = None) -> Condition:
        """Compute the rest of `encode` for sketches [B, 1, H, W], encoded references and hints of as many rows."""
        self._check_sides(sketch)
        folded = F.pixel_unshuffle(torch.cat([sketch, reference.picture], 1), self.config.patch_size)
        features = self.condition_input(folded)
        if self.hint_input is not None:
            # Rows without hints get zeros, because DDP expects every parameter in the graph of every step.
            planes = sketch.new_zeros(len(sketch), HINT_PLANES, *sketch.shape[2:]) if hints is None else hints
            hints = F.pixel_unshuffle(planes, self.config.patch_size)
            features = features + self.hint_input(hints)
        if self.matcher is None:
            nothing = features.new_zeros(len(sketch), 3, 0, 0)
            return Condition(features, reference.tokens, reference.palette, sketch, nothing)
        found = self.matcher(sketch, reference.tokens, hints)
        return Condition(features + found, reference.tokens, reference.palette, sketch, self.matcher.guess(found))

    def queries(self, sketch: Tensor) -> Tensor | None:
        """Return the queries [B, C, h, w] of the matcher for sketches [B, 1, H, W]; None for a network without one."""
        if self.matcher is None:
            return None
        queries: Tensor = self.matcher.query(self.matcher.lines(sketch))
        height, width = (side // self.config.patch_size for side in sketch.shape[2:])
        return queries.transpose(1, 2).reshape(len(queries), -1, height, width)

    def _check_sides(self, images: Tensor) -> None:
        height, width = images.shape[-2:]
        if height % self.config.size_multiple or width % self.config.size_multiple:
            raise ValueError(f"sides must be multiples of {self.config.size_multiple}, got {width}x{height}")

    def denoise(self, x_t: Tensor, t: Tensor | None, condition: Condition) -> Tensor:
        """Return the network's output [B, 3, H, W]; the prediction type defines its meaning.

        Args:
            x_t: [B, 3, H, W].
            t: [B] in [0, t_max]; None omits the time, as the authors' fix_forward does (models/authors/strict.py).
            condition: the result of `encode`, B rows.
        """
        embedding = None
        if t is not None:
            embedding = self.time_embedding(sinusoidal(1000 * t, self.config.base_channels).to(x_t.dtype))
            if condition.palette.shape[1]:
                embedding = embedding + condition.palette
        h = self.input(F.pixel_unshuffle(x_t, self.config.patch_size)) + condition.features
        skips = [h]
        for stage in self.encoder:
            h = stage(h, embedding, condition.tokens)
            skips.append(h)
        h = self.bottom(h, embedding, condition.tokens)
        for stage in self.decoder:
            h = stage(torch.cat([h, skips.pop()], 1), embedding, condition.tokens)
        h = self.output(F.silu(self.output_norm(h)))
        h = F.pixel_shuffle(h, self.config.patch_size)
        return h if self.detail is None else self.detail(h, condition.sketch)


class Stage(nn.Module):
    """A sequence of residual and attention blocks, followed by an optional change of resolution."""

    def __init__(self, layers: list[nn.Module], resample: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.resample = resample

    def forward(self, h: Tensor, embedding: Tensor | None, tokens: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(h, tokens if isinstance(layer, AttentionBlock) else embedding)
        return h if self.resample is None else self.resample(h)


class ResidualBlock(nn.Module):
    """Two convolutions with an embedding between them, added or as scale and shift (Dhariwal & Nichol 2021)."""

    def __init__(self, width_in: int, width_out: int, embedding_channels: int, scale_shift: bool = False) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = nn.GroupNorm(GROUPS, width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        embedding_width = 2 * width_out if scale_shift else width_out
        self.embedding = nn.Linear(embedding_channels, embedding_width) if embedding_channels else None
        # A group of one channel would remove the embedding, which is one number per channel.
        self.norm2 = nn.GroupNorm(min(GROUPS, width_out // 2), width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.embedding is None or embedding is None:
            h = self.norm2(h)
        elif self.scale_shift:
            scale, shift = self.embedding(F.silu(embedding))[:, :, None, None].chunk(2, 1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + self.embedding(F.silu(embedding))[:, :, None, None])
        result: Tensor = self.skip(x) + self.conv2(F.silu(h))
        return result


class AttentionBlock(nn.Module):
    """Self-attention over all positions, extended by the reference tokens if the network has them."""

    def __init__(self, width: int, num_heads: int, token_channels: int = 0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(GROUPS, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.token_kv = nn.Linear(token_channels, 2 * width) if token_channels else None
        self.output = nn.Linear(width, width) if token_channels else None

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        batch, width, height, _ = x.shape
        flat = self.norm(x).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(flat).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        if self.token_kv is not None:
            token_key, token_value = self.token_kv(tokens).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
            key, value = torch.cat([key, token_key], 1), torch.cat([value, token_value], 1)
        h = attention(query, key, value).flatten(2)
        if self.output is not None:
            h = self.output(h)
        return x + h.transpose(1, 2).reshape(batch, width, height, -1)


class ReferenceEncoder(nn.Module):
    """Encode the reference as tokens [B, N, D] with position information, and as a palette [B, E]."""

    def __init__(self, config: UNetConfig, embedding_channels: int) -> None:
        super().__init__()
        width = config.reference_channels
        self.stride = config.reference_stride
        self.input = nn.Conv2d(3 * self.stride**2, width, 3, padding=1)
        self.blocks = nn.Sequential(ResidualBlock(width, width, 0), ResidualBlock(width, width, 0))
        self.norm = nn.LayerNorm(width)
        self.palette = nn.Linear(width, embedding_channels)

    def forward(self, reference: Tensor) -> tuple[Tensor, Tensor]:
        h = self.blocks(self.input(F.pixel_unshuffle(reference, self.stride)))
        tokens = self.norm((h + positions(h)).flatten(2).transpose(1, 2))
        return tokens, self.palette(tokens.mean(1))


class Matcher(nn.Module):
    """Match each position of the sketch with the reference: cross-attention from line features to reference tokens.

    This is semantic correspondence as in SCFT (Lee et al. 2020). It does not depend on t, so it is computed once per
    request. The loss of its own estimate of the image, `guess`, trains the matching directly, before the network has
    learned to use it.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width = config.match_channels
        self.stride, self.num_heads = config.patch_size, width // config.head_channels
        self.input = nn.Conv2d(self.stride**2, width, 3, padding=1)
        self.hint_input = _zero_convolution(HINT_PLANES * self.stride**2, width, 3) if config.hints else None
        self.blocks = nn.Sequential(ResidualBlock(width, width, 0), ResidualBlock(width, width, 0))
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(config.reference_channels, 2 * width)
        self.output = nn.Linear(2 * width, config.base_channels)
        self.colors = nn.Conv2d(config.base_channels, 3 * self.stride**2, 1)

    def lines(self, sketch: Tensor, hints: Tensor | None = None) -> Tensor:
        """Return the features of each position of the sketch [B, hw, C]; `hints` are folded planes."""
        h = self.input(F.pixel_unshuffle(sketch, self.stride))
        if self.hint_input is not None and hints is not None:
            h = h + self.hint_input(hints)
        h = self.blocks(h)
        flat: Tensor = self.norm((h + positions(h)).flatten(2).transpose(1, 2))
        return flat

    def forward(self, sketch: Tensor, tokens: Tensor, hints: Tensor | None = None) -> Tensor:
        flat = self.lines(sketch, hints)
        query = self.query(flat).unflatten(-1, (self.num_heads, -1))
        key, value = self.key_value(tokens).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        found = attention(query, key, value).flatten(2)
        result: Tensor = self.output(torch.cat([flat, found], -1)).transpose(1, 2)
        height, width = (side // self.stride for side in sketch.shape[-2:])
        return result.reshape(len(sketch), -1, height, width).contiguous()

    def guess(self, found: Tensor) -> Tensor:
        """Return the image [B, 3, H, W] that the matched features alone give."""
        return F.pixel_shuffle(self.colors(found), self.stride)


class DetailLayers(nn.Module):
    """The last layers: compute the image from unfolded features and the sketch at full resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sketch = nn.Conv2d(1, width, 3, padding=1)
        self.hidden = nn.Conv2d(width, width, 3, padding=1)
        self.output = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, h: Tensor, sketch: Tensor) -> Tensor:
        h = h + self.sketch(sketch)
        h = h + self.hidden(F.silu(h))
        image: Tensor = self.output(F.silu(h))
        return image


def _zero_convolution(channels_in: int, channels_out: int, kernel: int) -> nn.Conv2d:
    """Return a convolution with zero weights; it draws no random numbers, so the other layers start as without it."""
    made: nn.Conv2d = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Conv2d, channels_in, channels_out, kernel, padding=kernel // 2, bias=False
    )
    nn.init.zeros_(made.weight)
    return made


def sinusoidal(value: Tensor, channels: int, max_period: float = 1000.0) -> Tensor:
    """Return cosines and sines of `value` [B] divided by geometric scales from 1 to max_period, [B, channels].

    The authors use max_period 1000.
    """
    half = channels // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=value.device) / half)
    angles = value[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


def positions(h: Tensor) -> Tensor:
    """Return two-dimensional sinusoidal positions [1, C, h, w], relative to the size of a feature map [B, C, h, w]."""
    channels, height, width = h.shape[1:]
    rows = sinusoidal(torch.arange(height, device=h.device) * (64 / height), channels // 2, 64.0)
    columns = sinusoidal(torch.arange(width, device=h.device) * (64 / width), channels // 2, 64.0)
    grid = torch.cat([rows.T[:, :, None].expand(-1, -1, width), columns.T[:, None, :].expand(-1, height, -1)])
    return grid[None].to(h.dtype)
