"""Color many drawings over Ray Data: actors with the model, drawings and pictures in any store, resumed after a kill.

    for outcome in color_on_cluster(settings, model, drawings, rendering_settings, note):
        ...

The driver holds names only. Each block of the stream is a few drawings; an actor colors it and yields one small row for
each, so that memory does not grow with the number of drawings. Nothing but the pictures records what is done: each says
from what it was made, so that the same command, or a batch that Ray repeats, skips it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy

from animediffusion.models.network.attention import chosen_attention
from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.platform.cluster import cluster
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ClusterError, StoreFailedError
from animediffusion.serve.bulk.drawings import BulkDrawing
from animediffusion.serve.bulk.worker import BulkSettings, ColorDrawings, DrawingColorizer, Outcome
from animediffusion.serve.client.colorize_files import FileFormat
from animediffusion.serve.client.local import LocalColorizer
from animediffusion.serve.rendering.render import RenderOptions
from animediffusion.serve.replica.model_source import ModelSource

BLOCK_ROWS = {"CPU": 16, "GPU": 128}
"""Drawings of a block: many for a GPU, whose batches are not full at the end of a block; else few, so that the last
blocks end together."""


class Pace:
    """Pictures per second and the time that is left, without the start of the actors.

    Args:
        total: number of drawings.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._clock = total, clock
        self._first: tuple[float, int] | None = None
        self.done = 0

    def add(self) -> None:
        """Count a drawing that is done."""
        self.done += 1
        if self._first is None:
            self._first = self._clock(), self.done

    def __str__(self) -> str:
        """Return the line that `colorize` prints."""
        text = f"colored {self.done:,} of {self._total:,}"
        since, before = self._first or (self._clock(), self.done)
        seconds = self._clock() - since
        if self.done <= before or seconds <= 0:
            return text
        rate = (self.done - before) / seconds
        left = (self._total - self.done) / rate
        remaining = f"{math.ceil(left)} s" if left < 120 else f"{math.ceil(left / 60):,} min"
        return f"{text}, {rate:.2f} pictures/s, {remaining} left"


def color_here(
    settings: Settings,
    model: str | None,
    drawings: Sequence[BulkDrawing],
    options: SamplerOptions,
    rendering: RenderOptions,
    file_format: FileFormat,
) -> Iterator[Outcome]:
    """Color drawings of any store in this process; errors are those of color_on_cluster()."""
    colorizer = LocalColorizer(settings, model)
    shared = _shared(colorizer.version, model, drawings, options, rendering, file_format)
    color = DrawingColorizer(colorizer, shared)
    with ThreadPoolExecutor(colorizer.max_concurrent) as pool:
        for outcome in pool.map(lambda one: color(one.sketch, one.references, one.output), drawings):
            yield _checked(outcome)


def color_on_cluster(
    settings: Settings,
    model: str | None,
    drawings: Sequence[BulkDrawing],
    options: SamplerOptions,
    rendering: RenderOptions,
    file_format: FileFormat,
    note: Callable[[str], object],
) -> Iterator[Outcome]:
    """Color drawings over Ray Data and yield their results in any order; the caller connects to Ray first.

    There is an actor for each GPU of the cluster, also of nodes that an autoscaler can add. Without GPUs, an actor
    takes as many CPUs as torch has threads in this process. Their number changes the rounding, so that the pictures are
    those of the command in one process. OMP_NUM_THREADS=1 gives the most actors.

    Args:
        settings: settings of the registry.
        model: bundle folder or URI, or a registered version or alias; None is the champion.
        drawings: what to color.
        options: sampler settings of all drawings.
        rendering: settings of the finished pictures.
        file_format: format of the pictures.
        note: a callback for a line while the cluster has no room for an actor.

    Raises:
        AnimeDiffusionError: the model does not exist or is damaged, or a store or the cluster fails.
    """
    if not drawings:
        return
    source = ModelSource(settings, model)
    version = source.resolve()
    folder = Path(source.fetch(version))
    files = ray.put({file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()})
    shared = _shared(version, model, drawings, options, rendering, file_format)
    now, limits = cluster.resources()
    kind = "GPU" if limits.get("GPU") else "CPU"
    blocks = _tables(drawings, BLOCK_ROWS[kind])
    threads = None if kind == "GPU" else min(torch.get_num_threads(), _cpus_of_a_node())
    most = max(1, min(int(limits.get(kind, 1)) // (threads or 1), len(blocks)))
    least = max(1, min(int(now.get(kind, 1)) // (threads or 1), most))
    cluster.silence_ray_data()
    colored = ray.data.from_arrow(blocks).map_batches(
        ColorDrawings,
        batch_size=None,  # a block
        compute=ActorPoolStrategy(min_size=1, max_size=most, initial_size=least),
        fn_constructor_args=(files, shared, threads),
        num_gpus=1 if kind == "GPU" else None,
        num_cpus=threads or 0,
    )
    names = [field.name for field in fields(Outcome)]
    try:
        with cluster.waits(note) as moved:
            for row in colored.iter_rows():
                moved()
                yield _checked(Outcome(**{name: row[name] for name in names}))
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        found = lines[-1] if lines else type(error).__name__
        raise ClusterError("colorize --on-cluster", found, "run the same command again to resume") from error


def _cpus_of_a_node() -> int:
    return max([1, *(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])])


def _shared(
    version: str,
    model: str | None,
    drawings: Sequence[BulkDrawing],
    options: SamplerOptions,
    rendering: RenderOptions,
    file_format: FileFormat,
) -> BulkSettings:
    stores = (drawings[0].sketch, drawings[0].output) if drawings else ()
    return BulkSettings(options, rendering, file_format, version, model, chosen_attention(), stores)


def _checked(outcome: Outcome) -> Outcome:
    if outcome.is_store_lost:
        raise StoreFailedError(outcome.sketch, outcome.error, "run the same command again when the store is available")
    return outcome


def _tables(drawings: Sequence[BulkDrawing], rows: int) -> list[pa.Table]:
    """Return the drawings as blocks, in their order."""
    blocks = [drawings[start : start + rows] for start in range(0, len(drawings), rows)]
    return [
        pa.table(
            {
                "sketch": [one.sketch for one in block],
                "references": ["\n".join(one.references) for one in block],
                "output": [one.output for one in block],
            }
        )
        for block in blocks
    ]
