"""The rows that an ingest will make and the files it rejects: names only, stored in columns, about 100 bytes per row.

pipelines/data/source_layout.py and pipelines/data/pairs.py find the rows.
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
    """The id, the split and the files of one planned row; paths are relative to the source."""

    id: str
    split: str
    target: str
    sketch: str | None = None
    reference: str | None = None
    cross_reference: str | None = None

    def __iter__(self) -> Iterator[str | None]:
        """Iterate over the values in the order of the fields."""
        return iter((self.id, self.split, self.target, self.sketch, self.reference, self.cross_reference))

    @property
    def files(self) -> tuple[str, ...]:
        """All paths of the row, the target first."""
        every = (self.target, self.sketch, self.reference, self.cross_reference)
        return tuple(path for path in every if path is not None)


@dataclass(frozen=True, slots=True)
class Reject:
    """A rejected file with the reason, as written to rejects.jsonl."""

    path: str
    reason: str
    detail: str


class Samples:
    """Samples that are stored as Arrow columns and converted to objects on iteration."""

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
        """Return the samples with these row numbers, in the given order."""
        table = self._table.take(pa.array(rows, pa.int64()))
        return tuple(map(Sample, *(column.to_pylist() for column in table.columns)))

    @property
    def num_files(self) -> int:
        """Number of paths in all rows; a path in two rows counts twice."""
        return sum(len(self) - self._table.column(role).null_count for role in ROLES)

    def by_split(self, *, in_order: bool = False) -> dict[str, NDArray[np.int64]]:
        """Return the row numbers of each split, in their order or in a pseudorandom one, by the hash of the id."""
        ranks = np.frombuffer(b"".join(_digest(name)[:16] for name in self._column("id")), ">u8").reshape(-1, 2)
        order = np.arange(len(self)) if in_order else np.lexsort((ranks[:, 1], ranks[:, 0]))
        names = sorted(set(self._column("split")))
        splits = np.fromiter((names.index(name) for name in self._column("split")), np.int8, len(self))[order]
        return {name: order[splits == number] for number, name in enumerate(names)}

    def _column(self, name: str) -> Iterator[str]:
        for chunk in self._table.column(name).chunks:
            for start in range(0, len(chunk), 1024):
                yield from chunk.slice(start, 1024).to_pylist()


@dataclass(frozen=True)
class IngestPlan:
    """The rows and rejects of a source.

    Attributes:
        samples: the rows.
        rejects: files that no row can use.
        shared: whether a file may be in several rows.
        hashed: whether the hash of the id chose the splits, instead of folders or a CSV.
        in_order: whether neighboring rows are read together, as those of a table.
    """

    samples: Samples
    rejects: tuple[Reject, ...]
    shared: bool = False
    hashed: bool = False
    in_order: bool = False


def id_rank(name: str) -> int:
    """Return the sha256 of an id as a number below 2**256, which gives a pseudorandom order."""
    return int.from_bytes(_digest(name), "big")


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
