"""Rows of a dataset, streamed to the ranks of a training run or read at once.

    rows = training_dataset(uri, seed=0, world_size=2, num_rows=1000)           # on the driver
    for batch in ray.train.get_dataset_shard("train").iter_batches(batch_size=16, drop_last=True):
        arrays = decode_rows(batch)                                             # on every rank

To resume where every rank has taken n rows, build it again with start_rows=n: the rows that follow are the same.
Not here: the order of the rows, see pipelines/data/read_order.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.data._internal.execution.execution_callback import ExecutionCallback

from animediffusion.pipelines.data.manifest import Manifest, Shard
from animediffusion.pipelines.data.read_order import Stream, Visit, choose_visit_rows, visits
from animediffusion.pipelines.data.shards import PICTURES, STREAMED, read_rows
from animediffusion.platform.errors import StorageError
from animediffusion.platform.images.codec import decode_gray, decode_rgb
from animediffusion.platform.storage import files as storage

_PARALLEL_READS = 8
SCHEDULING_PAUSE_S = 0.02
MOST_VISITS = 16384
"""The most reads of one execution of Ray Data; its driver holds an object for each."""

Arrays = dict[str, NDArray[Any]]


class _Breath(ExecutionCallback):
    """A pause in every step of Ray Data's scheduling loop.

    While the trainer has all it can hold, that loop finds its read tasks ready at once, may not take their blocks, and
    asks again without waiting: it burns half a core that the workers need. Each of its steps handles all blocks there
    are, so a pause costs no throughput.
    """

    def on_execution_step(self, executor: object) -> None:  # noqa: ARG002
        time.sleep(SCHEDULING_PAUSE_S)


@dataclass(frozen=True)
class _Source:
    """What a read task needs to know."""

    uri: str
    shards: tuple[Shard, ...]
    stream: Stream


def training_dataset(
    uri: str, *, seed: int, world_size: int, num_rows: int, start_rows: int = 0, split: str = "train"
) -> ray.data.Dataset:
    """Encoded rows for all ranks of a training run: `position, id, target, sketch, reference, cross_reference`.

    `streaming_split(world_size, equal=True)`, which Ray Train does, gives every rank the same number of rows, in an
    order that depends on dataset, seed and world size only. `position` counts on through the epochs.

    Args:
        uri: the dataset.
        seed: of the order.
        world_size: ranks among which it will be split.
        num_rows: rows that every rank still takes. It gets up to one visit more, but never more than MOST_VISITS hold.
        start_rows: rows that every rank has taken before; the same dataset, seed and world size continue there.
        split: which rows.

    Raises:
        DataError: if the dataset or the split is missing.
    """
    silence_ray_data()
    uri = storage.absolute(uri)
    shards = Manifest.load(uri).split(split).shards
    counts = tuple(shard.rows for shard in shards)
    visit_rows = choose_visit_rows(sum(counts), sum(shard.num_bytes for shard in shards), world_size)
    most_rows = max(1, MOST_VISITS // world_size - 1) * visit_rows
    table = [
        {"number": visit.number, "skip": visit.skip}
        for visit in visits(visit_rows, world_size, min(num_rows, most_rows), start_rows)
    ]
    source = _Source(uri, shards, Stream(counts, seed, visit_rows))
    rows = ray.data.from_items(table, override_num_blocks=len(table)).map_batches(
        _read_visit, batch_size=1, fn_kwargs={"source": source}
    )
    rows.context.execution_options.preserve_order = True
    rows.context.custom_execution_callback_classes = [_Breath]
    return rows


def silence_ray_data() -> None:
    """Hide Ray Data's own progress bars and remarks; our verbs report progress themselves."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def decode_rows(batch: Mapping[str, Sequence[Any] | NDArray[Any]]) -> Arrays:
    """The pictures of encoded rows as uint8 arrays, zeros where there is none.

    Returns:
        target, reference, cross_reference [B, S, S, 3], sketch [B, S, S] (dark lines on white), and has_sketch,
        has_reference, has_cross [B] bool.
    """
    targets = np.stack([decode_rgb(data) for data in batch["target"]])
    arrays: Arrays = {"target": targets}
    for name, flag, decode, shape in (
        ("sketch", "has_sketch", decode_gray, targets.shape[:3]),
        ("reference", "has_reference", decode_rgb, targets.shape),
        ("cross_reference", "has_cross", decode_rgb, targets.shape),
    ):
        arrays[flag] = np.array([data is not None for data in batch[name]])
        arrays[name] = np.zeros(shape, np.uint8)
        for index in np.flatnonzero(arrays[flag]).tolist():
            arrays[name][index] = decode(batch[name][index])
    return arrays


def read_split(uri: str, split: str, limit: int | None = None) -> Arrays:
    """All rows of a split, or its first `limit`, decoded as by decode_rows(), with `id` [B]; without Ray.

    Raises:
        DataError: if the dataset or the split is missing.
    """
    shards = Manifest.load(uri).split(split).shards
    total = sum(shard.rows for shard in shards)
    table = _read(uri, shards, np.arange(total if limit is None else min(limit, total)))
    arrays = decode_rows({name: table.column(name).to_pylist() for name in PICTURES})
    arrays["id"] = np.array(table.column("id").to_pylist())
    return arrays


def _read_visit(batch: dict[str, NDArray[Any]], source: _Source) -> pa.Table:
    storage.expect(source.uri)
    visit = Visit(int(batch["number"][0]), int(batch["skip"][0]))
    positions, rows = source.stream.rows(visit)
    return _read(source.uri, source.shards, rows).add_column(0, "position", pa.array(positions))


def _read(uri: str, shards: Sequence[Shard], rows: NDArray[np.int64]) -> pa.Table:
    """The given rows of the dataset, in this order; each is fetched once, shards in parallel."""
    ends = np.cumsum([shard.rows for shard in shards])
    unique, places = np.unique(rows, return_inverse=True)
    shard_of = np.searchsorted(ends, unique, side="right")

    def fetch(index: int) -> pa.Table:
        shard = shards[index]
        within = unique[shard_of == index] - (ends[index] - shard.rows)
        return read_rows(storage.join(uri, shard.path), shard.sha256, within.tolist())

    needed = np.unique(shard_of).tolist()
    if not needed:
        raise StorageError(uri, "no rows asked for", "ask for at least one")
    with ThreadPoolExecutor(min(_PARALLEL_READS, len(needed))) as pool:
        tables = list(pool.map(fetch, needed))
    return pa.concat_tables(tables).select(list(STREAMED)).take(pa.array(places))
