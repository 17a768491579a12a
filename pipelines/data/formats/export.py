"""`data export`: write a dataset as WebDataset tars or as Parquet that Hugging Face `datasets` loads.

    webdataset   SPLIT-000000.tar with KEY.target.webp, KEY.sketch.png, ... and KEY.json
    parquet      data/SPLIT-00000-of-00002.parquet with columns of images, and README.md

Pictures keep their bytes. Each shard becomes one file, which appears when it is whole and is then not written again, so
that the same command resumes.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from animediffusion.pipelines.data.manifest import Manifest
from animediffusion.pipelines.data.shards import PICTURES, StoredRow, read_shard
from animediffusion.platform.errors import DataError
from animediffusion.platform.images.formats import format_of
from animediffusion.platform.storage import storage

Format = Literal["webdataset", "parquet"]
FORMATS: dict[str, Format] = {"webdataset": "webdataset", "parquet": "parquet"}
_GROUP_ROWS = 100
"""Rows of a row group, as `datasets` has them: readers fetch a group for a row."""
_LIST = "export.json"
"""File of what is exported; written first, so that another export does not mix with it."""
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass(frozen=True, slots=True)
class ExportResult:
    """Result of `data export`; the field order is that of its JSON."""

    data: str
    destination: str
    format: Format
    rows: int
    files: int


def export(
    data: str, destination: str, form: Format, progress: Callable[[int, int], None] | None = None
) -> ExportResult:
    """Export a dataset.

    Args:
        data: URI of the dataset.
        destination: folder of the files, local or remote.
        form: what to write.
        progress: a callback for the rows that are done and all rows.

    Raises:
        DataError: if there is no dataset, or the destination holds other files.
        StorageError: if a store fails.
    """
    manifest = Manifest.load(data)
    state = json.dumps({"content_hash": manifest.content_hash, "format": form})
    existing = storage.list_files(destination) if storage.exists(destination) else []
    if existing and (_LIST not in existing or storage.read_bytes(storage.join(destination, _LIST)).decode() != state):
        raise DataError(destination, f"holds other files ({existing[0]})", "choose an empty folder")
    storage.write_bytes(storage.join(destination, _LIST), state.encode())
    total = sum(split.rows for split in manifest.splits.values())
    done = files = 0
    for split, held in manifest.splits.items():
        for number, shard in enumerate(held.shards):
            name = _file_name(form, split, number, len(held.shards))
            if name not in existing:
                rows = read_shard(storage.join(data, shard.path))
                content = to_tar(rows) if form == "webdataset" else to_table(rows)
                storage.write_bytes(storage.join(destination, name), content)
            done, files = done + shard.rows, files + 1
            if progress is not None:
                progress(done, total)
    if form == "parquet":
        storage.write_bytes(storage.join(destination, "README.md"), _card(manifest).encode())
    return ExportResult(data, destination, form, total, files)


def to_tar(rows: Sequence[StoredRow]) -> bytes:
    """Return rows as a tar of WebDataset; equal rows give equal bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for row in rows:
            key = key_of(row.id)
            about = json.dumps({"id": row.id, "width": row.width, "height": row.height}).encode()
            for suffix, data in [*_pictures(row), ("json", about)]:
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def to_table(rows: Sequence[StoredRow]) -> pa.Buffer:
    """Return rows as Parquet with columns of images, whose features `datasets` reads from the schema."""
    columns = {"id": pa.array([row.id for row in rows], pa.string())}
    for role in PICTURES:
        cells = [getattr(row, role) for row in rows]
        named = [
            None if cell is None else {"bytes": cell, "path": row.id} for cell, row in zip(cells, rows, strict=True)
        ]
        columns[role] = pa.array(named, _IMAGE)
    features = {"id": {"dtype": "string", "_type": "Value"}, **{role: {"_type": "Image"} for role in PICTURES}}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=_GROUP_ROWS, compression="none", use_dictionary=False)
    return sink.getvalue()


def key_of(name: str) -> str:
    """Return the key of a row in WebDataset, which ends at the first dot: dots of the id are written %2E."""
    return quote(name, safe="/ +=&,;:@!$'()~#").replace(".", "%2E").lstrip("/") or "%2F"


def _pictures(row: StoredRow) -> Iterator[tuple[str, bytes]]:
    for role in PICTURES:
        data: bytes | None = getattr(row, role)
        if data is not None:
            yield f"{role}.{(format_of(data) or 'bin').lower()}", data


def _file_name(form: Format, split: str, number: int, count: int) -> str:
    if form == "webdataset":
        return f"{split}-{number:06d}.tar"
    return f"data/{split}-{number:05d}-of-{count:05d}.parquet"


def _card(manifest: Manifest) -> str:
    """Return README.md with the header from which `datasets` learns the files of each split."""
    splits = "".join(f"  - split: {name}\n    path: data/{name}-*\n" for name in manifest.splits)
    size = manifest.image_size
    return (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}---\n\n"
        f"Color pictures of {size} x {size} pixels with line art and references, exported by "
        f"`animediffusion data export`.\n"
    )
