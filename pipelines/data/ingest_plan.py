"""The rows that an ingest will make, and the files it sets aside: names only, in columns, a hundred bytes a row.

Not here: how they are found, see pipelines/data/source_layout.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

ROLES = ("target", "sketch", "reference", "cross_reference")
_COLUMNS = ("id", "split", *ROLES)
_CHUNK_ROWS = 65536
_SCHEMA = pa.schema(
    [(name, pa.dictionary(pa.int8(), pa.string()) if name == "split" else pa.large_string()) for name in _COLUMNS]
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One row to be: paths relative to the source."""

    id: str
    split: str
    target: str
    sketch: str | None = None
    reference: str | None = None
    cross_reference: str | None = None

    def __iter__(self) -> Iterator[str | None]:
        """Its values, in the order of the fields."""
        return iter((self.id, self.split, self.target, self.sketch, self.reference, self.cross_reference))

    @property
    def files(self) -> tuple[str, ...]:
        """All its paths, the target first."""
        every = (self.target, self.sketch, self.reference, self.cross_reference)
        return tuple(path for path in every if path is not None)


@dataclass(frozen=True, slots=True)
class Reject:
    """A file that is set aside, and why; reasons as in rejects.jsonl."""

    path: str
    reason: str
    detail: str


class Samples:
    """Many samples, kept as Arrow columns and made into objects one by one."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        stream = iter(samples)
        chunks = []
        while chunk := list(islice(stream, _CHUNK_ROWS)):
            columns = [pa.array([getattr(sample, name) for sample in chunk], pa.string()) for name in _COLUMNS]
            chunks.append(pa.table(columns, list(_COLUMNS)).cast(_SCHEMA))
        self._table = pa.concat_tables(chunks).combine_chunks() if chunks else _SCHEMA.empty_table()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __iter__(self) -> Iterator[Sample]:
        for batch in self._table.to_batches(max_chunksize=1024):
            yield from map(Sample, *(column.to_pylist() for column in batch.columns))

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> tuple[Sample, ...]:
        """The samples of these row numbers, in this order."""
        table = self._table.take(pa.array(rows, pa.int64()))
        return tuple(map(Sample, *(column.to_pylist() for column in table.columns)))

    @property
    def num_files(self) -> int:
        """Paths in all rows; one that is in two counts twice."""
        return sum(len(self) - self._table.column(role).null_count for role in ROLES)

    def by_split(self) -> dict[str, NDArray[np.int64]]:
        """Row numbers of each split, in an order without meaning: neighbours are strangers."""
        ranks = np.frombuffer(b"".join(_digest(name)[:16] for name in self._column("id")), ">u8").reshape(-1, 2)
        order = np.lexsort((ranks[:, 1], ranks[:, 0]))
        names = sorted(set(self._column("split")))
        splits = np.fromiter((names.index(name) for name in self._column("split")), np.int8, len(self))[order]
        return {name: order[splits == number] for number, name in enumerate(names)}

    def _column(self, name: str) -> Iterator[str]:
        for chunk in self._table.column(name).chunks:
            for start in range(0, len(chunk), 1024):
                yield from chunk.slice(start, 1024).to_pylist()


@dataclass(frozen=True)
class IngestPlan:
    """What to make of a source.

    Attributes:
        samples: the rows.
        rejects: files that no row can use.
        shared: whether a file may be in several rows.
        hashed: whether ids chose the splits, not folders or a CSV.
    """

    samples: Samples
    rejects: tuple[Reject, ...]
    shared: bool = False
    hashed: bool = False


def id_rank(name: str) -> int:
    """A number below 2**256 that depends on the id alone: an order without meaning."""
    return int.from_bytes(_digest(name), "big")


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
