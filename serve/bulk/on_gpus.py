"""Bulk coloring on a cluster with GPUs: actors with the network on a GPU, and tasks that finish the pictures on CPUs.

Regions and files take longer than the network on a GPU, so that every CPU of the cluster works on them, not only the
process that has the GPU. Between the two, Ray has the network's picture alone, and a task reads the drawing again.
Pictures are those of serve/bulk/worker.py up to rounding: drawings share the batches of an engine, and the others in a
batch change a level of 8 bits by at most one.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from animediffusion.models.bundle import Bundle
from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.platform.storage import storage
from animediffusion.serve.bulk.worker import BulkSettings, DrawingColorizer, Outcome, columns_of, load_model, rows_of
from animediffusion.serve.client.local import BundleColorizer, PaintedColorizer
from animediffusion.serve.engine.engine import Engine, Request
from animediffusion.serve.rendering.sketch import Pixels

BATCH = 16
"""Rows of the network in an evaluation."""
FINISHED_AT_ONCE = 2
"""Drawings that a task handles at once: one is rendered, another one read or written."""


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


class PaintDrawings:
    """The network, as a class for Ray Data's map_batches(): an instance per actor.

    Args:
        files: a reference to the files of the bundle in Ray's object store.
        settings: what all drawings share.
        threads: threads of torch; None is its default.
    """

    def __init__(
        self, files: ray.ObjectRef[Mapping[str, bytes]], settings: BulkSettings, threads: int | None = None
    ) -> None:
        bundle = load_model(files, settings, "cuda" if torch.cuda.is_available() else "cpu", threads)
        self._settings = settings
        self._colorizer = BatchedColorizer(bundle, settings.version, BATCH)
        self._drawings = DrawingColorizer(self._colorizer, settings)
        self._actor = ray.get_runtime_context().get_actor_id() or ""
        self._pool = ThreadPoolExecutor(self._colorizer.max_concurrent)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, Any]:
        """Add to a block of bulk.py what finish_drawings() needs: above all the pictures, or outcomes without one."""
        painted = list(self._pool.map(lambda row: pickle.dumps(self._painted(*row)), rows_of(batch)))
        made_by = {"actor": [self._actor] * len(painted), "maker": [self._colorizer.maker] * len(painted)}
        return {**batch, **made_by, "painted": painted}

    def _painted(self, sketch: str, references: Sequence[str], output: str) -> Pixels | Outcome:
        settings = self._settings

        def work() -> Pixels | Outcome:
            files = self._drawings.read(sketch, references)
            return self._drawings.done(files, sketch, output) or self._colorizer.network_picture(
                files.sketch, files.references, settings.options, settings.rendering, settings.file_format, name=sketch
            )

        return self._drawings.attempt(sketch, work)


def finish_drawings(batch: dict[str, NDArray[Any]], settings: BulkSettings) -> dict[str, NDArray[Any]]:
    """Render and write what PaintDrawings has painted, and return the outcomes; a function for map_batches().

    Args:
        batch: a block of PaintDrawings.
        settings: what all drawings share.
    """
    storage.expect(*settings.stores)
    rows, actors = list(rows_of(batch)), batch["actor"].tolist()
    made = [pickle.loads(data) for data in batch["painted"].tolist()]
    pictures = {sketch: one for (sketch, *_), one in zip(rows, made, strict=True) if not isinstance(one, Outcome)}
    color = DrawingColorizer(PaintedColorizer(pictures, batch["maker"][0]), settings)
    with ThreadPoolExecutor(FINISHED_AT_ONCE) as pool:
        finished = pool.map(lambda row, one: one if isinstance(one, Outcome) else color(*row), rows, made)
        return columns_of(replace(one, actor=actor) for one, actor in zip(finished, actors, strict=True))
