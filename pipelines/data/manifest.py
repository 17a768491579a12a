"""A dataset: a URI with `manifest.json` and Parquet shards.

Not here: reading its rows, see pipelines/data/stream.py; making one, see pipelines/data/ingest.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from animediffusion.pipelines.data.shards import to_parquet
from animediffusion.platform.errors import DataError
from animediffusion.platform.storage import files as storage

FORMAT: Literal["animediffusion-dataset-1"] = "animediffusion-dataset-1"
MANIFEST = "manifest.json"


class _Part(BaseModel):
    # A newer version may add keys; what is there is still readable.
    model_config = ConfigDict(extra="ignore", frozen=True)


class Shard(_Part):
    """One Parquet file: path relative to the dataset, rows, sha256 of the file, size."""

    path: str
    rows: int
    sha256: str
    num_bytes: int

    @field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        """A manifest from elsewhere must not name files that are not the dataset's."""
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ValueError(f"{path!r} is not within the dataset")
        return path


class Split(_Part):
    """The shards of one split."""

    rows: int
    shards: tuple[Shard, ...]


class Manifest(_Part):
    """What `manifest.json` says."""

    format: Literal["animediffusion-dataset-1"] = FORMAT
    image_size: int
    """Pixels of a side; all pictures are square."""
    splits: dict[str, Split]
    num_files: int
    """Files that were read: those in rows and the rejects."""
    num_rejects: int
    source: str
    content_hash: str
    """sha256 over ids, splits and pixels, whatever the order and the shards."""
    fingerprint: str = ""
    """sha256 over the source's listing and the settings: ingest knows by it that nothing changed."""

    @classmethod
    def load(cls, uri: str) -> Self:
        """Read the manifest of the dataset at `uri`.

        Raises:
            DataError: if there is no dataset, or it is of another format.
            StorageError: if the store cannot be reached.
        """
        place = storage.join(uri, MANIFEST)
        if not storage.exists(place):
            raise DataError(uri, f"no dataset (no {MANIFEST})", "make one with `animediffusion data ingest`")
        try:
            return cls.model_validate_json(storage.read_bytes(place))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in first["loc"]) or "it"
            found = f"is not a dataset manifest ({key}: {first['msg']})"
            raise DataError(place, found, "ingest the source again, into a new place") from error

    def save(self, uri: str) -> None:
        """Write it as the manifest of the dataset at `uri`."""
        storage.write_bytes(storage.join(uri, MANIFEST), self.model_dump_json(indent=1).encode() + b"\n")

    def split(self, name: str) -> Split:
        """One split that has rows.

        Raises:
            DataError: naming the splits there are.
        """
        if name not in self.splits or not self.splits[name].rows:
            there = ", ".join(repr(key) for key, value in self.splits.items() if value.rows)
            raise DataError(f"split {name!r}", f"is not in the dataset from {self.source}", f"one of {there or 'none'}")
        return self.splits[name]


def write_shard(uri: str, split: str, number: int, rows: Sequence[Mapping[str, Any]]) -> Shard:
    """Write rows (see pipelines/data/shards.py) as one shard of the dataset at `uri`, to be listed in its manifest."""
    data = to_parquet(rows)
    path = f"{split}/{number:05d}.parquet"
    storage.write_bytes(storage.join(uri, path), data)
    return Shard(path=path, rows=len(rows), sha256=hashlib.sha256(data).hexdigest(), num_bytes=len(data))
