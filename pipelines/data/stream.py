"""Stream the rows of a dataset to the ranks of a training run, or read a split as a whole.

    rows = training_dataset(uri, seed=0, world_size=2, num_rows=1000)           # on the driver
    for batch in ray.train.get_dataset_shard("train").iter_batches(batch_size=16, drop_last=True):
        arrays = decode_rows(batch)                                             # on every rank

To resume after n rows per rank, call training_dataset() with start_rows=n: the following rows are the same. With
`rehearse`, every batch also has rows of a second dataset.
pipelines/data/read_order.py defines the order of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from animediffusion.pipelines.data.manifest import Manifest, Shard
from animediffusion.pipelines.data.read_order import Mixture, ReadBlock, Stream, choose_block_rows, read_blocks
from animediffusion.pipelines.data.shards import PICTURES, STREAMED, read_rows
from animediffusion.platform.errors import StorageError
from animediffusion.platform.images.codec import decode_gray, decode_rgb
from animediffusion.platform.storage import storage

if TYPE_CHECKING:
    import ray

_PARALLEL_READS = 8
MOST_BLOCKS = 16384
"""Most read blocks of one Ray Data execution, because its driver holds an object for each of them."""

Arrays = dict[str, NDArray[Any]]
PlacedShard = tuple[str, Shard]
"""A shard with the URI of its dataset."""


@dataclass(frozen=True)
class Rehearsal:
    """A second dataset whose rows a training run mixes into every batch, and their share of it."""

    uri: str
    share: float
    """Above 0 and below 1."""


@dataclass(frozen=True)
class ReadSource:
    """The arguments that are the same for all read tasks."""

    shards: tuple[PlacedShard, ...]
    stream: Stream | Mixture


def training_dataset(
    uri: str,
    *,
    seed: int,
    world_size: int,
    num_rows: int,
    start_rows: int = 0,
    split: str = "train",
    rehearse: Rehearsal | None = None,
    read_cpus: float = 1.0,
) -> ray.data.Dataset:
    """Return encoded rows for all ranks of a training run: `position, id, target, sketch, reference, cross_reference`.

    Ray Train calls `streaming_split(world_size, equal=True)`, which gives every rank the same number of rows, in an
    order that depends only on dataset, seed and world size. `position` counts across epochs.

    Args:
        uri: the dataset.
        seed: seed of the order.
        world_size: number of ranks that share the rows.
        num_rows: rows that every rank still needs. A rank gets up to one read block more; the total of all ranks is at
            most MOST_BLOCKS read blocks.
        start_rows: rows that every rank read before, with the same dataset, seed and world size.
        split: name of the split.
        rehearse: a second dataset of which every batch has some rows, from the split of the same name.
        read_cpus: CPUs of a task that reads a block.

    Raises:
        DataError: if a dataset or the split is missing.
    """
    # Here, because reading a whole split needs no Ray, which takes long to import.
    import ray.data

    from animediffusion.platform.cluster import cluster
    from animediffusion.platform.cluster.ray_compat import pause_scheduling

    cluster.silence_ray_data()
    source, block_rows = open_source(uri, split, seed, world_size, rehearse)
    most_rows = max(1, MOST_BLOCKS // world_size - 1) * block_rows
    table = [
        {"number": block.number, "skip": block.skip}
        for block in read_blocks(block_rows, world_size, min(num_rows, most_rows), start_rows)
    ]
    rows = ray.data.from_items(table, override_num_blocks=len(table)).map_batches(
        _read_block, batch_size=1, num_cpus=read_cpus, fn_kwargs={"source": source}
    )
    rows.context.execution_options.preserve_order = True
    pause_scheduling(rows.context)
    return rows


def open_source(uri: str, split: str, seed: int, world_size: int, rehearse: Rehearsal | None) -> tuple[ReadSource, int]:
    """Return what the read tasks need, and the rows of a read block."""
    uris = [storage.absolute(uri), *([storage.absolute(rehearse.uri)] if rehearse is not None else [])]
    datasets = [Manifest.load(one).split(split).shards for one in uris]
    counts = [tuple(shard.rows for shard in shards) for shards in datasets]
    num_rows = sum(map(sum, counts))
    # As if all rows were those of the dataset with larger rows, because a block may have mostly those.
    num_bytes = max(
        sum(shard.num_bytes for shard in shards) * num_rows // sum(rows)
        for shards, rows in zip(datasets, counts, strict=True)
    )
    block_rows = choose_block_rows(num_rows, num_bytes, world_size)
    shards = tuple((one, shard) for one, shards in zip(uris, datasets, strict=True) for shard in shards)
    if rehearse is None:
        return ReadSource(shards, Stream(counts[0], seed, block_rows)), block_rows
    rehearsed = min(block_rows - 1, max(1, round(rehearse.share * block_rows)))
    sizes = (block_rows - rehearsed, rehearsed)
    streams = tuple(Stream(rows, seed, size) for rows, size in zip(counts, sizes, strict=True))
    return ReadSource(shards, Mixture(streams)), block_rows


def decode_rows(batch: Mapping[str, Sequence[Any] | NDArray[Any]]) -> Arrays:
    """Decode the pictures of encoded rows to uint8 arrays; a missing picture becomes zeros.

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


def read_split(uri: str, split: str, limit: int | None = None, start: int = 0) -> Arrays:
    """Read the rows of a split, or at most `limit`, from the row `start` on, without Ray.

    Returns:
        The arrays of decode_rows(), and `id` [B].

    Raises:
        DataError: if the dataset or the split is missing.
    """
    shards = Manifest.load(uri).split(split).shards
    total = sum(shard.rows for shard in shards)
    wanted = np.arange(start, total if limit is None else min(start + limit, total))
    table = read_in_order([(uri, shard) for shard in shards], wanted)
    arrays = decode_rows({name: table.column(name).to_pylist() for name in PICTURES})
    arrays["id"] = np.array(table.column("id").to_pylist())
    return arrays


def _read_block(batch: dict[str, NDArray[Any]], source: ReadSource) -> pa.Table:
    storage.expect(*{uri for uri, _ in source.shards})
    block = ReadBlock(int(batch["number"][0]), int(batch["skip"][0]))
    positions, rows = source.stream.rows(block)
    return read_in_order(source.shards, rows).add_column(0, "position", pa.array(positions))


def read_in_order(shards: Sequence[PlacedShard], rows: NDArray[np.int64]) -> pa.Table:
    """Read the given rows, counted through the shards, in the given order.

    Each row is fetched once, and shards in parallel.
    """
    ends = np.cumsum([shard.rows for _, shard in shards])
    unique, positions = np.unique(rows, return_inverse=True)
    shard_of = np.searchsorted(ends, unique, side="right")

    def fetch(index: int) -> pa.Table:
        uri, shard = shards[index]
        within = unique[shard_of == index] - (ends[index] - shard.rows)
        return read_rows(storage.join(uri, shard.path), shard.sha256, within.tolist())

    needed = np.unique(shard_of).tolist()
    if not needed:
        raise StorageError(shards[0][0], "no rows were requested", "request at least one")
    with ThreadPoolExecutor(min(_PARALLEL_READS, len(needed))) as pool:
        tables = list(pool.map(fetch, needed))
    return pa.concat_tables(tables).select(list(STREAMED)).take(pa.array(positions))
