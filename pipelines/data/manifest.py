"""Manifest of a dataset, which is a URI with `manifest.json` and Parquet shards.

pipelines/data/stream.py reads the rows of a dataset; pipelines/data/ingest.py makes a dataset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from animediffusion.pipelines.data.shards import StoredRow, to_parquet
from animediffusion.platform.errors import DataError
from animediffusion.platform.storage import storage

FORMAT: Literal["animediffusion-dataset-1"] = "animediffusion-dataset-1"
MANIFEST = "manifest.json"


class _Part(BaseModel):
    # A newer version may add keys; this version ignores them.
    model_config = ConfigDict(extra="ignore", frozen=True)


class Shard(_Part):
    """One Parquet file: its path relative to the dataset, number of rows, sha256 and size in bytes."""

    path: str
    rows: int
    sha256: str
    num_bytes: int

    @field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        """Reject paths outside the dataset, which a manifest from an untrusted source may contain."""
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ValueError(f"{path!r} is not within the dataset")
        return path


class Split(_Part):
    """The shards of one split."""

    rows: int
    shards: tuple[Shard, ...]


class Manifest(_Part):
    """Content of `manifest.json`."""

    format: Literal["animediffusion-dataset-1"] = FORMAT
    image_size: int
    """Pixels of a side; all pictures are square."""
    splits: dict[str, Split]
    num_files: int
    """Number of files that rows use plus the number of rejects."""
    num_rejects: int
    source: str
    content_hash: str
    """sha256 over ids, splits and pixels, which does not depend on the order of the rows or on the shards."""
    fingerprint: str = ""
    """sha256 over the source's listing and the settings; ingest compares it to detect changes."""

    @classmethod
    def load(cls, uri: str) -> Self:
        """Read the manifest of the dataset at `uri`.

        Raises:
            DataError: if there is no dataset, or its manifest has another format.
            StorageError: if the store is unreachable.
        """
        path = storage.join(uri, MANIFEST)
        if not storage.exists(path):
            raise DataError(uri, f"no dataset (no {MANIFEST})", "make one with `animediffusion data ingest`")
        try:
            return cls.model_validate_json(storage.read_bytes(path))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in first["loc"]) or "the file"
            found = f"is not a dataset manifest ({key}: {first['msg']})"
            raise DataError(path, found, "ingest the source again, into a new folder") from error

    def save(self, uri: str) -> None:
        """Write the manifest of the dataset at `uri`."""
        storage.write_bytes(storage.join(uri, MANIFEST), self.model_dump_json(indent=1).encode() + b"\n")

    def split(self, name: str) -> Split:
        """Return the split with this name.

        Raises:
            DataError: if the split does not exist or is empty; the message names the splits with rows.
        """
        if name not in self.splits or not self.splits[name].rows:
            existing = ", ".join(repr(key) for key, value in self.splits.items() if value.rows)
            raise DataError(
                f"split {name!r}", f"is not in the dataset from {self.source}", f"one of {existing or 'none'}"
            )
        return self.splits[name]


def write_shard(uri: str, split: str, number: int, rows: Sequence[StoredRow]) -> Shard:
    """Write rows as one shard of the dataset at `uri`; return its manifest entry."""
    data = to_parquet(rows)
    path = f"{split}/{number:05d}.parquet"
    storage.write_bytes(storage.join(uri, path), data)
    return Shard(path=path, rows=len(rows), sha256=hashlib.sha256(data).hexdigest(), num_bytes=len(data))
