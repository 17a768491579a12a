"""The order in which a training run reads the rows of a dataset: pure arithmetic on row numbers.

A run reads one endless stream of rows, epoch after epoch. The stream is cut into *read blocks* of equal length.
Read block b goes to rank b % world_size, so all ranks have always read the same number of rows, and a run that resumes
after n rows per rank needs only n to find all following rows.

    epoch 0                     epoch 1
    |groups in random order ... |groups in another order ...
    |block 0  |block 1  |block 2  |block 3 ...                rows permuted inside each block and epoch

A *group* is a series of neighboring rows in one shard, which one request reads. A run that rehearses an earlier dataset
reads a *mixture* of two streams: every read block has the same number of rows of each. pipelines/data/stream.py does
the reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GROUP_ROWS = 16
"""Rows of a group: neighbors on disk that stay together. A group is the smallest read, a Parquet row group."""
MIN_BLOCK_ROWS = 64
MAX_BLOCK_ROWS = 4096
MAX_BLOCK_BYTES = 32 * 2**20

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class ReadBlock:
    """One read block of a training run; its first `skip` rows were read before the run resumed."""

    number: int
    skip: int = 0


@dataclass(frozen=True)
class Stream:
    """The endless stream of a dataset's rows.

    Attributes:
        shard_rows: rows of each shard; row numbers of the dataset count through the shards in this order.
        seed: seed of the order.
        block_rows: rows of every read block.
    """

    shard_rows: tuple[int, ...]
    seed: int
    block_rows: int

    def __post_init__(self) -> None:
        if self.num_rows < 1 or self.block_rows < 1:
            raise ValueError(f"{self.num_rows} rows in read blocks of {self.block_rows}: both must be at least 1")

    @property
    def num_rows(self) -> int:
        """Number of rows in one epoch."""
        return sum(self.shard_rows)

    def rows(self, block: ReadBlock) -> tuple[Indices, Indices]:
        """Return the rows of a block without its skipped ones: positions in the stream, row numbers in the dataset."""
        first = block.number * self.block_rows
        pieces = []
        at = first
        while at < first + self.block_rows:
            epoch, offset = divmod(at, self.num_rows)
            length = min(self.num_rows - offset, first + self.block_rows - at)
            piece = self._in_group_order(epoch, offset, length)
            pieces.append(np.random.default_rng((self.seed, epoch, block.number)).permutation(piece))
            at += length
        positions = np.arange(first, first + self.block_rows, dtype=np.int64)
        return positions[block.skip :], np.concatenate(pieces)[block.skip :]

    def _in_group_order(self, epoch: int, offset: int, length: int) -> Indices:
        starts, stops = order(self.shard_rows, self.seed, epoch)
        ends = np.cumsum(stops - starts)
        first = int(np.searchsorted(ends, offset, side="right"))
        last = int(np.searchsorted(ends, offset + length, side="left"))
        chosen = zip(starts[first : last + 1], stops[first : last + 1], strict=True)
        rows = np.concatenate([np.arange(start, stop, dtype=np.int64) for start, stop in chosen])
        before = offset - int(ends[first - 1] if first else 0)
        return rows[before : before + length]


@dataclass(frozen=True)
class Mixture:
    """Several streams as one: a read block has the same block of every stream, with their rows evenly interleaved.

    So every batch has the same share of each stream, up to one row. Row numbers count through the streams.
    """

    streams: tuple[Stream, ...]

    @property
    def block_rows(self) -> int:
        """Rows of every read block."""
        return sum(stream.block_rows for stream in self.streams)

    def rows(self, block: ReadBlock) -> tuple[Indices, Indices]:
        """Return the rows of a block without its skipped ones: positions in the stream, row numbers."""
        pieces, places, base = [], [], 0
        for stream in self.streams:
            pieces.append(base + stream.rows(ReadBlock(block.number))[1])
            places.append((np.arange(stream.block_rows) + 0.5) / stream.block_rows)
            base += stream.num_rows
        mixed = np.argsort(np.concatenate(places), kind="stable")
        first = block.number * self.block_rows
        positions = np.arange(first, first + self.block_rows, dtype=np.int64)
        return positions[block.skip :], np.concatenate(pieces)[mixed][block.skip :]


def order(shard_rows: Sequence[int], seed: int, epoch: int) -> tuple[Indices, Indices]:
    """Return the first rows and the ends of all groups, in the order of this epoch."""
    starts, stops = groups(shard_rows)
    permutation = np.random.default_rng((seed, epoch)).permutation(len(starts))
    return starts[permutation], stops[permutation]


def groups(shard_rows: Sequence[int]) -> tuple[Indices, Indices]:
    """Return the first rows and the ends of all groups, in the order on disk; a shard's last group may be short."""
    starts, stops, base = [], [], 0
    for rows in shard_rows:
        for start in range(0, rows, GROUP_ROWS):
            starts.append(base + start)
            stops.append(base + min(start + GROUP_ROWS, rows))
        base += rows
    return np.array(starts, np.int64), np.array(stops, np.int64)


def read_blocks(block_rows: int, world_size: int, num_rows: int, start_rows: int = 0) -> list[ReadBlock]:
    """Return the read blocks that give every rank at least `num_rows` more rows after its first `start_rows` rows.

    Their number is a multiple of `world_size`, and all ranks always have the same number of rows.
    """
    first, skip = divmod(start_rows, block_rows)
    last = -(-(start_rows + num_rows) // block_rows)
    return [
        ReadBlock(number, skip if number < (first + 1) * world_size else 0)
        for number in range(first * world_size, last * world_size)
    ]


def choose_block_rows(num_rows: int, num_bytes: int, world_size: int) -> int:
    """Choose the rows per read block: one epoch divided by the number of ranks, bounded in rows and bytes.

    The result depends only on the dataset and the world size, so a resumed run has the same read blocks.
    """
    by_bytes = MAX_BLOCK_BYTES * num_rows // max(num_bytes, 1)
    most = max(GROUP_ROWS, min(MAX_BLOCK_ROWS, by_bytes))
    return min(max(MIN_BLOCK_ROWS, num_rows // world_size), most)
