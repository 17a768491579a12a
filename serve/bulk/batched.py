"""A Colorizer that fills the batches of a GPU with several drawings, by the engine that also serves requests.

Its pictures are those of BundleColorizer up to rounding: other drawings in a batch change a level of 8 bits by at most
one. On a CPU a batch is no faster than its drawings one by one, so that bulk coloring uses BundleColorizer there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from animediffusion.models.bundle import Bundle
from animediffusion.models.network.hints import draw_hints
from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.models.tensors import from_pixels
from animediffusion.platform.images.codec import letterbox, letterbox_points
from animediffusion.serve.client.colorize_files import OUTPUTS, ColoredDrawing, FileFormat
from animediffusion.serve.engine.engine import Engine, Request
from animediffusion.serve.rendering.hints import points_for_network
from animediffusion.serve.rendering.render import DEFAULTS, RenderOptions, read_picture, read_sketch, render
from animediffusion.serve.rendering.sketch import as_gray, for_network


class BatchedColorizer:
    """A colorize_files.Colorizer with an engine.

    Args:
        bundle: the model, on its device.
        version: name of the version in results and metadata.
        max_batch: rows of the network that are evaluated together.
    """

    def __init__(self, bundle: Bundle, version: str, max_batch: int) -> None:
        self.version, self.max_concurrent = version, 2 * max_batch
        self._engine = Engine(bundle, max_batch=max_batch, max_queue=self.max_concurrent)

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
        """See colorize_files.Colorizer. While drawings wait for the engine, other threads decode and render."""
        output, bundle = OUTPUTS[file_format], self._engine.bundle
        rendering.check(output)
        side = bundle.config.image_size
        drawing, pictures = read_sketch(sketch, thing=name), [read_picture(one) for one in references]
        height, width = drawing.darkness.shape
        hints = points_for_network(rendering.read_hints(drawing))
        sees_hints = bundle.config.network.hints
        request = Request(
            sketch=from_pixels(for_network(as_gray(drawing), side))[0],
            references=tuple(from_pixels(letterbox(picture, side)[0])[0] for picture in pictures),
            options=options,
            hints=draw_hints(letterbox_points(hints, height, width, side), side) if sees_hints else None,
        )
        made = render(self._engine.submit(request).result(), drawing, pictures, output=output, options=rendering)
        if file_format == "png":
            return ColoredDrawing(made.files["image"], self.version, made.files["color_layer"])
        return ColoredDrawing(made.files[file_format], self.version)

    def versions(self) -> Collection[str]:
        """See colorize_files.Colorizer."""
        return (self.version,)
