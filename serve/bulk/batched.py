"""A Colorizer that fills the batches of a GPU with several drawings, by the engine that also serves requests.

Its pictures are those of BundleColorizer up to rounding: other drawings in a batch change a level of 8 bits by at most
one. On a CPU a batch is no faster than its drawings one by one, so that bulk coloring uses BundleColorizer there.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from animediffusion.models.bundle import Bundle
from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.serve.client.local import BundleColorizer
from animediffusion.serve.engine.engine import Engine, Request
from animediffusion.serve.rendering.sketch import Pixels


class BatchedColorizer(BundleColorizer):
    """A BundleColorizer whose drawings share the batches of an engine.

    Args:
        bundle: the model, on its device.
        version: name of the version in results and metadata.
        max_batch: rows of the network that are evaluated together.
    """

    def __init__(self, bundle: Bundle, version: str, max_batch: int) -> None:
        super().__init__(bundle, version, 2 * max_batch)
        self._engine = Engine(bundle, max_batch=max_batch, max_queue=self.max_concurrent)

    def run_network(
        self, options: SamplerOptions, lines: Tensor, colors: Sequence[Tensor], hints: Tensor | None
    ) -> Pixels:
        """See BundleColorizer. Other drawings may be in the same batch."""
        references = tuple(one[0] for one in colors)
        planes = None if hints is None else hints[0]
        request = Request(sketch=lines[0], references=references, options=options, hints=planes)
        return self._engine.submit(request).result()
