"""Color many drawings over Ray Data: actors with the model, drawings and pictures in any store, resumed after a kill.

    for outcome in color_on_cluster(settings, model, drawings, rendering_settings, note):
        ...

The driver holds compressed names only. Each block of the stream is a few drawings; an actor colors it and yields one
small row for each, so that memory does not grow with the number of drawings. Nothing but the pictures records what is
done: each says from what it was made, so that the same command, or a batch that Ray repeats, skips it.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import ray
import torch

from animediffusion.models.bundle import bundle_files
from animediffusion.models.network.attention import chosen_attention
from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.platform.cluster.actors import actor_device, run_on_actors
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import StoreFailedError
from animediffusion.platform.registry.downloads import STARTER
from animediffusion.serve.bulk.drawings import BulkDrawing, Drawings
from animediffusion.serve.bulk.on_gpus import PaintDrawings, finish_drawings
from animediffusion.serve.bulk.worker import BulkSettings, ColorDrawings, DrawingColorizer, Outcome
from animediffusion.serve.client.colorize_files import FileFormat
from animediffusion.serve.client.local import STARTER_COLORS, LocalColorizer
from animediffusion.serve.rendering.render import RenderOptions
from animediffusion.serve.replica.model_source import ModelSource

BLOCK_ROWS = {"CPU": 16, "GPU": 128}
"""Drawings of a block: many for a GPU, whose batches are not full at the end of a block; else few, so that the last
blocks end together."""
MOST_BLOCKS = 4096
"""Most blocks of one execution of Ray Data, because its driver holds an object for each of them. The next execution
starts its own actors, which takes seconds after an hour of work."""


class Pace:
    """Pictures per second and the time that is left, without the start of the actors.

    Args:
        total: number of drawings.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._clock = total, clock
        self._first: tuple[float, int] | None = None
        self.done = 0
        self.shares = Counter[str]()
        """Drawings of each actor."""

    def add(self, actor: str = "") -> None:
        """Count a drawing that is done, and the actor that colored it."""
        self.done += 1
        if actor:
            self.shares[actor] += 1
        if self._first is None:
            self._first = self._clock(), self.done

    def __str__(self) -> str:
        """Return the line that `colorize` prints."""
        text = f"colored {self.done:,} of {self._total:,}"
        text += f" on {len(self.shares)} actor{'s' * (len(self.shares) > 1)}" if self.shares else ""
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
    drawings: Drawings | Sequence[BulkDrawing],
    options: SamplerOptions,
    rendering: RenderOptions,
    file_format: FileFormat,
    note: Callable[[str], object],
) -> Iterator[Outcome]:
    """Color drawings of any store in this process; arguments and errors are those of color_on_cluster()."""
    colorizer = LocalColorizer(settings, model)
    _note_starter(model, colorizer.version, note)
    shared = _shared(colorizer.version, model, drawings, options, rendering, file_format)
    color = DrawingColorizer(colorizer, shared)
    with ThreadPoolExecutor(colorizer.max_concurrent) as pool:
        rest = iter(drawings)
        running = deque[Future[Outcome]]()
        try:
            # Executor.map() would hold an object for every drawing.
            while True:
                for one in itertools.islice(rest, 2 * colorizer.max_concurrent - len(running)):
                    running.append(pool.submit(color, one.sketch, one.references, one.output))
                if not running:
                    return
                yield _checked(running.popleft().result())
        finally:
            for future in running:
                future.cancel()


def color_on_cluster(
    settings: Settings,
    model: str | None,
    drawings: Drawings | Sequence[BulkDrawing],
    options: SamplerOptions,
    rendering: RenderOptions,
    file_format: FileFormat,
    note: Callable[[str], object],
) -> Iterator[Outcome]:
    """Color drawings over Ray Data and yield their results in any order; the caller connects to Ray first.

    There is an actor for each GPU of the cluster, also of nodes that an autoscaler can add; all CPUs finish the
    pictures. Without GPUs, an actor takes as many CPUs as torch has threads in this process. Their number changes the
    rounding, so that the pictures are those of the command in one process. OMP_NUM_THREADS=1 gives the most actors.

    Args:
        settings: settings of the registry.
        model: bundle folder or URI, or a registered version or alias; None is the champion.
        drawings: what to color.
        options: sampler settings of all drawings.
        rendering: settings of the finished pictures.
        file_format: format of the pictures.
        note: a callback for a line on the model that colors.

    Raises:
        AnimeDiffusionError: the model does not exist or is damaged, or a store or the cluster fails.
    """
    if not drawings:
        return
    source = ModelSource(settings, model)
    version = source.resolve()
    _note_starter(model, version, note)
    files = ray.put(bundle_files(Path(source.fetch(version))))
    shared = _shared(version, model, drawings, options, rendering, file_format)
    device = actor_device()
    rows = BLOCK_ROWS[device]
    actor: type = PaintDrawings if device == "GPU" else ColorDrawings
    finish = functools.partial(finish_drawings, settings=shared) if device == "GPU" else None
    names = [field.name for field in fields(Outcome)]
    threads, rest = torch.get_num_threads(), iter(drawings)
    while some := list(itertools.islice(rest, MOST_BLOCKS * rows)):
        blocks = _tables(some, rows)
        for row in run_on_actors(
            blocks, actor, (files, shared), threads=threads, command="colorize --on-cluster", finish=finish
        ):
            yield _checked(Outcome(**{name: row[name] for name in names}))


def _note_starter(model: str | None, version: str, note: Callable[[str], object]) -> None:
    if model is None and version == STARTER:
        note(STARTER_COLORS)


def _shared(
    version: str,
    model: str | None,
    drawings: Drawings | Sequence[BulkDrawing],
    options: SamplerOptions,
    rendering: RenderOptions,
    file_format: FileFormat,
) -> BulkSettings:
    first = next(iter(drawings), None)
    stores = (first.sketch, first.output) if first else ()
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
