"""A Colorizer that colors drawings with a bundle in this process."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from animediffusion.models.bundle import Bundle, load_bundle
from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.platform.config import Settings
from animediffusion.platform.images.codec import decode_rgb, encode_png
from animediffusion.serve.client.colorize_files import OUTPUTS, ColoredDrawing, FileFormat, maker_of
from animediffusion.serve.rendering.render import DEFAULTS, FAST_COMPRESSION, RenderOptions
from animediffusion.serve.rendering.sketch import Pixels
from animediffusion.serve.standalone import Network, network_picture, paint_as, read_inputs, run_network

STARTER_COLORS = "no version was promoted, so the starter model colors"


class BundleColorizer:
    """A colorize_files.Colorizer with a loaded bundle.

    Args:
        bundle: the model, on its device.
        version: name of the version in results and metadata.
        max_concurrent: number of drawings to color concurrently: one runs the network, the others decode and render.
    """

    def __init__(self, bundle: Bundle, version: str, max_concurrent: int) -> None:
        self.bundle, self.version, self.max_concurrent = bundle, version, max_concurrent
        self.maker = maker_of(version, bundle.sha256)
        self._lock = threading.Lock()

    def colorize(
        self,
        sketch: bytes,
        references: Sequence[bytes],
        options: SamplerOptions,
        rendering: RenderOptions = DEFAULTS,
        file_format: FileFormat = "png",
        *,
        name: str,
    ) -> ColoredDrawing:
        """See colorize_files.Colorizer. While one thread runs the network, other threads decode and render."""
        network = functools.partial(self.run_network, options)
        return _as_file(
            file_format, self.bundle.config.image_size, sketch, references, rendering, network, self.maker, name=name
        )

    def network_picture(
        self,
        sketch: bytes,
        references: Sequence[bytes],
        options: SamplerOptions,
        rendering: RenderOptions,
        file_format: FileFormat,
        *,
        name: str,
    ) -> Pixels:
        """Return the network's picture [S, S, 3], for PaintedColorizer; arguments are those of colorize()."""
        inputs = read_inputs(OUTPUTS[file_format], sketch, references, rendering, thing=name)
        return network_picture(inputs, self.bundle.config.image_size, functools.partial(self.run_network, options))

    def run_network(
        self, options: SamplerOptions, lines: Tensor, colors: Sequence[Tensor], hints: Tensor | None
    ) -> Pixels:
        """Return the network's picture, see standalone.Network; one thread at a time runs the network."""
        sampler = options.apply_to(self.bundle.config.sampler)
        with self._lock:
            return run_network(self.bundle, lines, colors, hints, seed=options.seed, sampler=sampler)

    def paint(self, rendering: RenderOptions, sketch: Pixels, reference: Pixels, seed: int) -> Pixels:
        """Return the picture [H, W, 3] of a sketch and a reference that are already decoded."""
        drawing, colors = encode_png(sketch, FAST_COMPRESSION), encode_png(reference, FAST_COMPRESSION)
        made = self.colorize(drawing, [colors], SamplerOptions(seed=seed), rendering, name="sketch")
        return decode_rgb(made.picture)

    def versions(self) -> Collection[str]:
        """See colorize_files.Colorizer."""
        return (self.maker,)


class PaintedColorizer:
    """A colorize_files.Colorizer for drawings of which the network's pictures were painted elsewhere.

    Args:
        pictures: what BundleColorizer.network_picture() returned, by the names of the sketches.
        maker: BundleColorizer.maker of the model that painted them.
    """

    max_concurrent = 1

    def __init__(self, pictures: Mapping[str, Pixels], maker: str) -> None:
        self._pictures, self._maker = pictures, maker

    def colorize(
        self,
        sketch: bytes,
        references: Sequence[bytes],
        options: SamplerOptions,  # noqa: ARG002 - the network has used them
        rendering: RenderOptions = DEFAULTS,
        file_format: FileFormat = "png",
        *,
        name: str,
    ) -> ColoredDrawing:
        """See colorize_files.Colorizer."""
        painted = self._pictures[name]
        side = len(painted)
        return _as_file(file_format, side, sketch, references, rendering, lambda *_: painted, self._maker, name=name)

    def versions(self) -> Collection[str]:
        """See colorize_files.Colorizer."""
        return (self._maker,)


def _as_file(
    file_format: FileFormat,
    side: int,
    sketch: bytes,
    references: Sequence[bytes],
    rendering: RenderOptions,
    network: Network,
    maker: str,
    *,
    name: str,
) -> ColoredDrawing:
    """Return the files of a colored drawing; arguments are those of standalone.paint_as() and of Colorizer."""
    made = paint_as(OUTPUTS[file_format], side, sketch, references, rendering, network, thing=name)
    if file_format == "png":
        return ColoredDrawing(made.files["image"], maker, made.files["color_layer"])
    return ColoredDrawing(made.files[file_format], maker)


class LocalColorizer(BundleColorizer):
    """A colorize_files.Colorizer with a model that is loaded in this process.

    Args:
        settings: settings of the registry.
        model: bundle folder or URI, `starter`, or a registered version or alias; None is the champion, or the starter
            model without one.
        device: device of the model; by default CUDA if it is available, else the CPU.

    Raises:
        AnimeDiffusionError: the model does not exist or is damaged.
    """

    def __init__(self, settings: Settings, model: str | None = None, device: str | None = None) -> None:
        # Here, because it imports MLflow, which takes as long as torch and which bulk actors do not need.
        from animediffusion.serve.replica.model_source import ModelSource

        source = ModelSource(settings, model)
        version = source.resolve()
        folder = source.fetch(version)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(load_bundle(folder, device, name=model), version, min(4, os.cpu_count() or 1))
