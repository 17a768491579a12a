"""Write and read the Parquet shards of a dataset; a shard is a table of `StoredRow`s."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from animediffusion.pipelines.data.read_order import GROUP_ROWS
from animediffusion.platform.storage import storage

PICTURES = ("target", "sketch", "reference", "cross_reference")

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("target", pa.binary(), nullable=False),
        pa.field("sketch", pa.binary()),
        pa.field("reference", pa.binary()),
        pa.field("cross_reference", pa.binary()),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)


class StoredRow(NamedTuple):
    """One row of a dataset; pictures are encoded, and None where they are missing."""

    id: str
    split: str
    target: bytes
    sketch: bytes | None
    reference: bytes | None
    cross_reference: bytes | None
    width: int
    """Width in pixels, the same for all pictures of the row."""
    height: int
    sha256: str
    """sha256 of `target`, 64 hex digits."""


STREAMED = ("id", *PICTURES)
"""Columns that training and evaluation read."""


def to_parquet(rows: Sequence[StoredRow]) -> pa.Buffer:
    """Return one shard as Parquet bytes, without Parquet compression because the pictures are already compressed."""
    sink = pa.BufferOutputStream()
    table = pa.table([*zip(*rows, strict=True)], schema=SCHEMA)
    pq.write_table(
        table,
        sink,
        row_group_size=GROUP_ROWS,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        store_schema=False,
    )
    return sink.getvalue()


def read_rows(uri: str, version: str, rows: Sequence[int], columns: Sequence[str] = STREAMED) -> pa.Table:
    """Read the given rows of one shard, in the given order; only the row groups with these rows are fetched.

    Args:
        uri: URI of the shard.
        version: sha256 of the shard, so that the cached footer of an older version is not used for a rewritten shard.
        rows: row numbers within the shard.
        columns: names of the columns to read.

    Raises:
        StorageError: if the shard is missing or is not a Parquet file.
    """
    footer = _footer(uri, version)
    starts = np.cumsum([0] + [footer.row_group(group).num_rows for group in range(footer.num_row_groups)])
    group_of = np.searchsorted(starts, rows, side="right") - 1
    wanted, which = np.unique(group_of, return_inverse=True)

    def read(files: fs.FileSystem, path: str) -> pa.Table:
        with files.open_input_file(path) as source:
            shard = pq.ParquetFile(source, metadata=footer, pre_buffer=True)
            return shard.read_row_groups(wanted.tolist(), columns=list(columns), use_threads=False)

    table = storage.patiently(uri, read)
    sizes = starts[wanted + 1] - starts[wanted]
    begins = np.cumsum(sizes) - sizes
    return table.take(pa.array(np.asarray(rows) - starts[group_of] + begins[which]))


def read_shard(uri: str) -> list[StoredRow]:
    """Read all rows of one shard."""
    return [StoredRow(**row) for row in pq.read_table(io.BytesIO(storage.read_bytes(uri))).to_pylist()]


@functools.lru_cache(maxsize=1024)
def _footer(uri: str, version: str) -> pq.FileMetaData:  # noqa: ARG001
    def read(files: fs.FileSystem, path: str) -> pq.FileMetaData:
        with files.open_input_file(path) as source:
            return pq.read_metadata(source)

    return storage.patiently(uri, read)
