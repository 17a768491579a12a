"""Read pictures from Parquet and Arrow tables, the layout of Hugging Face `datasets` included.

A picture is a column of bytes, or of struct{bytes, path} as `datasets` writes it.

    info = describe_table(uri, "train-00000.parquet")
    names = list(read_names(uri, "train-00000.parquet", info.pictures[0]))
    data = read_cell(uri, 12, "target", "row 12")

Rows are read by blocks: row groups of Parquet, record batches of Arrow. A process keeps two blocks in memory.
pipelines/data/formats/catalog.py gives columns their roles.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from animediffusion.platform.errors import AnimeDiffusionError, DataError, ImageError
from animediffusion.platform.storage import storage

MAX_BLOCK_BYTES = 512 * 2**20
"""Largest block without compression; two of them must fit into the memory of a task."""
_IDS = ("id", "__key__", "key", "file_name")
_ARROW_FILE = b"ARROW1"
_READ_BLOCKS = 2


class TableInfo(NamedTuple):
    """What a table holds."""

    pictures: tuple[str, ...]
    """Columns of pictures."""
    rows: int
    ids: tuple[str, ...]
    """Columns of text that may name a row."""


class _Block(NamedTuple):
    """Position of a block in its file, and the number of its first row."""

    position: int
    start: int


@dataclass(frozen=True)
class _TableLayout:
    """Columns and blocks of one file; `footer` is None for an Arrow file."""

    schema: pa.Schema
    blocks: tuple[_Block, ...]
    rows: int
    footer: Any = None


def describe_table(uri: str, thing: str) -> TableInfo:
    """Return the columns and the number of rows of a table.

    Raises:
        DataError: if it cannot be read as a table, or a block is too large for memory.
    """
    layout = _layout(uri, thing)
    pictures = tuple(field.name for field in layout.schema if _is_picture(field))
    ids = tuple(name for name in _IDS if name in layout.schema.names and _is_text(layout.schema.field(name).type))
    return TableInfo(pictures, layout.rows, ids)


def read_names(uri: str, thing: str, column: str) -> Iterator[str | None]:
    """Yield the text of a column for every row, or the `path` of a column of pictures, whose bytes Parquet skips."""
    layout = _layout(uri, thing)
    field = layout.schema.field(column)
    if _is_text(field.type):
        path = column
    elif pa.types.is_struct(field.type) and field.type.get_field_index("path") >= 0:
        path = f"{column}.path"
    else:
        yield from (None for _ in range(layout.rows))
        return
    for number in range(len(layout.blocks)):
        for value in _read_block(uri, layout, number, [path])[column].to_pylist():
            yield value["path"] if isinstance(value, dict) else value


def read_cell(uri: str, row: int, column: str, thing: str) -> bytes | None:
    """Return the bytes of a picture, or None if the row has none.

    Raises:
        ImageError: if the row names a file instead of holding its bytes, or the block is damaged.
    """
    layout = _layout(uri, thing)
    number = int(np.searchsorted([block.start for block in layout.blocks], row, side="right")) - 1
    try:
        table = _BLOCKS.get(uri, layout, number)
    except (pa.ArrowException, EOFError, ValueError, IndexError) as error:
        found = " ".join(str(error).split())[:200]
        raise ImageError(thing, f"its part of the table is damaged ({found})", "copy the table again") from error
    value = table[column][row - layout.blocks[number].start].as_py()
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            raise ImageError(thing, f"names the file {value['path']!r}", "embed the bytes of the pictures")
        value = value.get("bytes")
    return None if value is None else bytes(value)


class _BlockCache:
    """The blocks that were read last; threads that need the same block read it once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: dict[tuple[str, int], pa.Table] = {}

    def get(self, uri: str, layout: _TableLayout, number: int) -> pa.Table:
        key = uri, number
        with self._lock:
            if key not in self._blocks:
                while len(self._blocks) >= _READ_BLOCKS:
                    del self._blocks[next(iter(self._blocks))]
                columns = [field.name for field in layout.schema if _is_picture(field)]
                self._blocks[key] = _read_block(uri, layout, number, columns)
            return self._blocks[key]


_BLOCKS = _BlockCache()


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_picture(field: pa.Field) -> bool:
    if pa.types.is_struct(field.type):
        index = field.type.get_field_index("bytes")
        return index >= 0 and _is_bytes(field.type.field(index).type)
    return _is_bytes(field.type)


@functools.lru_cache(maxsize=64)
def _layout(uri: str, thing: str) -> _TableLayout:
    def work(files: fs.FileSystem, path: str) -> _TableLayout:
        with files.open_input_file(path) as source:
            read = _parquet_layout if source.read_at(4, 0) == b"PAR1" else _arrow_layout
            try:
                return read(source, thing)
            except AnimeDiffusionError:
                raise
            except Exception as error:  # pyarrow raises errors of its own and of Python for damaged tables
                found = " ".join(str(error).split())[:200]
                if isinstance(error, OSError) and (error.errno or re.search("AWS|HTTP|curl|network", found)):
                    raise  # the store failed, not the table: pyarrow has no other sign
                raise DataError(thing, f"is not a whole Parquet or Arrow table ({found})", "copy it again") from error

    return storage.patiently(uri, work)


def _parquet_layout(source: Any, thing: str) -> _TableLayout:
    footer = pq.read_metadata(source)
    starts = np.cumsum([0] + [footer.row_group(group).num_rows for group in range(footer.num_row_groups)])
    for group in range(footer.num_row_groups):
        _check_size(thing, f"row group {group}", footer.row_group(group).total_byte_size)
    blocks = tuple(_Block(group, int(start)) for group, start in enumerate(starts[:-1]))
    return _TableLayout(footer.schema.to_arrow_schema(), blocks, footer.num_rows, footer)


def _arrow_layout(source: Any, thing: str) -> _TableLayout:
    """Read the places of all record batches; `datasets` writes streams, which have no index."""
    size, stream = source.size(), pa.PythonFile(_BoundedReads(source, thing), mode="r")
    if source.read_at(len(_ARROW_FILE), 0) == _ARROW_FILE:
        stream.seek(8)  # a file is a stream after its magic bytes, followed by an index that is not needed
    schema = pa.ipc.read_schema(pa.ipc.read_message(stream))
    if any(pa.types.is_dictionary(field.type) for field in schema):
        raise DataError(thing, "has columns with dictionaries", "write it as Parquet")
    blocks, rows = [], 0
    while (start := stream.tell()) < size:
        if source.read_at(8, start)[4:] in (b"", bytes(4)):  # the end of the stream
            break
        message = pa.ipc.read_message(stream)
        if message.type == "record batch":
            blocks.append(_Block(start, rows))
            rows += _read_batch(message, schema).num_rows
    return _TableLayout(schema, tuple(blocks), rows)


def _read_batch(message: pa.Message, schema: pa.Schema) -> pa.RecordBatch:
    """Read and validate a batch: pyarrow ends the process where lengths or offsets of a damaged one are used."""
    batch = pa.ipc.read_record_batch(message, schema)
    if batch.num_rows < 0:
        raise pa.ArrowInvalid("a record batch has a negative length")
    batch.validate(full=True)
    return batch


class _BoundedReads:
    """A file for pyarrow, which reads as many bytes as a message says; more than MAX_BLOCK_BYTES is an error."""

    closed = False

    def __init__(self, source: Any, thing: str) -> None:
        self._source, self._thing, self._position = source, thing, 0

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, _: int = 0) -> int:
        self._position = position
        return position

    def read(self, size: int) -> bytes:
        _check_size(self._thing, "a record batch", size)
        total = self._source.size()
        data = bytes(self._source.read_at(min(size, max(0, total - self._position)), min(self._position, total)))
        self._position += len(data)
        return data


def _check_size(thing: str, block: str, num_bytes: int) -> None:
    if num_bytes > MAX_BLOCK_BYTES:
        allowed = f"at most {MAX_BLOCK_BYTES:,}: write it with fewer rows per group or batch"
        raise DataError(thing, f"{block} has {num_bytes:,} bytes", allowed)


def _read_block(uri: str, layout: _TableLayout, number: int, columns: Sequence[str]) -> pa.Table:
    def work(files: fs.FileSystem, path: str) -> pa.Table:
        with files.open_input_file(path) as source:
            if layout.footer is not None:
                table = pq.ParquetFile(source, metadata=layout.footer)
                return table.read_row_group(layout.blocks[number].position, columns=list(columns), use_threads=False)
            source.seek(layout.blocks[number].position)
            batch = _read_batch(pa.ipc.read_message(source), layout.schema)
            names = [column.partition(".")[0] if column not in layout.schema.names else column for column in columns]
            return pa.Table.from_batches([batch]).select(names)

    return storage.patiently(uri, work)
