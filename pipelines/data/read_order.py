"""In which order a training run meets the rows of a dataset: pure arithmetic on row numbers.

A run reads one endless stream, epoch after epoch. It is cut into *visits* of equal length; visit v goes to rank
v % world_size, so all ranks have always taken the same number of rows, and after n rows per rank everything that
follows is known from n alone.

    epoch 0                     epoch 1
    |groups in random order ... |groups in another order ...
    |visit 0  |visit 1  |visit 2  |visit 3 ...                rows permuted inside each visit and epoch

A *group* is a run of neighbouring rows in one shard, read by one request. Not here: reading, see
pipelines/data/dataset.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GROUP_ROWS = 16
"""Rows that are neighbours on disk and stay together: the smallest read, a Parquet row group."""
MIN_VISIT_ROWS = 64
MAX_VISIT_ROWS = 4096
MAX_VISIT_BYTES = 32 * 2**20

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Visit:
    """One read of a training run: `skip` rows at its head were already taken before a resume."""

    number: int
    skip: int = 0


@dataclass(frozen=True)
class Stream:
    """The endless order of a dataset's rows.

    Attributes:
        shard_rows: rows of each shard; row i of the dataset counts through the shards in this order.
        seed: another seed, another order.
        visit_rows: rows of every visit.
    """

    shard_rows: tuple[int, ...]
    seed: int
    visit_rows: int

    def __post_init__(self) -> None:
        if self.num_rows < 1 or self.visit_rows < 1:
            raise ValueError(f"{self.num_rows} rows in visits of {self.visit_rows}: both must be at least 1")

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return sum(self.shard_rows)

    def rows(self, visit: Visit) -> tuple[Indices, Indices]:
        """Positions in the stream and row numbers in the dataset, of the rows that a visit still has to give."""
        first = visit.number * self.visit_rows
        pieces = []
        at = first
        while at < first + self.visit_rows:
            epoch, offset = divmod(at, self.num_rows)
            length = min(self.num_rows - offset, first + self.visit_rows - at)
            piece = self._in_group_order(epoch, offset, length)
            pieces.append(np.random.default_rng((self.seed, epoch, visit.number)).permutation(piece))
            at += length
        positions = np.arange(first, first + self.visit_rows, dtype=np.int64)
        return positions[visit.skip :], np.concatenate(pieces)[visit.skip :]

    def _in_group_order(self, epoch: int, offset: int, length: int) -> Indices:
        starts, stops = order(self.shard_rows, self.seed, epoch)
        ends = np.cumsum(stops - starts)
        first = int(np.searchsorted(ends, offset, side="right"))
        last = int(np.searchsorted(ends, offset + length, side="left"))
        chosen = zip(starts[first : last + 1], stops[first : last + 1], strict=True)
        rows = np.concatenate([np.arange(start, stop, dtype=np.int64) for start, stop in chosen])
        before = offset - int(ends[first - 1] if first else 0)
        return rows[before : before + length]


def order(shard_rows: Sequence[int], seed: int, epoch: int) -> tuple[Indices, Indices]:
    """First rows and ends of all groups, in the order in which this epoch meets them."""
    starts, stops = groups(shard_rows)
    permutation = np.random.default_rng((seed, epoch)).permutation(len(starts))
    return starts[permutation], stops[permutation]


def groups(shard_rows: Sequence[int]) -> tuple[Indices, Indices]:
    """First rows and ends of all groups, as on disk; the last group of a shard may be short."""
    starts, stops, base = [], [], 0
    for rows in shard_rows:
        for start in range(0, rows, GROUP_ROWS):
            starts.append(base + start)
            stops.append(base + min(start + GROUP_ROWS, rows))
        base += rows
    return np.array(starts, np.int64), np.array(stops, np.int64)


def visits(visit_rows: int, world_size: int, num_rows: int, start_rows: int = 0) -> list[Visit]:
    """The visits of a run from where every rank has taken `start_rows` until it has `num_rows` more, at least.

    Their number is a multiple of `world_size`, and at every point all ranks have the same number of rows.
    """
    first, skip = divmod(start_rows, visit_rows)
    last = -(-(start_rows + num_rows) // visit_rows)
    return [
        Visit(number, skip if number < (first + 1) * world_size else 0)
        for number in range(first * world_size, last * world_size)
    ]


def choose_visit_rows(num_rows: int, num_bytes: int, world_size: int) -> int:
    """Rows per visit: one epoch shared among the ranks, bounded in rows and bytes.

    It depends on the dataset and the world size alone, so that a resumed run finds the same visits.
    """
    by_bytes = MAX_VISIT_BYTES * num_rows // max(num_bytes, 1)
    most = max(GROUP_ROWS, min(MAX_VISIT_ROWS, by_bytes))
    return min(max(MIN_VISIT_ROWS, num_rows // world_size), most)
