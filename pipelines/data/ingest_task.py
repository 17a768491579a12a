"""The tasks of an ingest: MakePart makes one part of the dataset, DropRows removes duplicates from a shard.

A part is the samples of one split that become one shard. Its record is written last, so a part with a record is done.
While a task writes, it holds up to three copies of the encoded rows of one part, about 64 MB each.
pipelines/data/ingest.py divides the samples into parts and runs the tasks.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from animediffusion.pipelines.data.formats.archives import Place
from animediffusion.pipelines.data.formats.catalog import read_picture
from animediffusion.pipelines.data.formats.layered import LINES, decode_composite, decode_lines, is_layered, to_luma
from animediffusion.pipelines.data.ingest_plan import Reject, Sample, id_rank
from animediffusion.pipelines.data.manifest import Shard, write_shard
from animediffusion.pipelines.data.shards import PICTURES, StoredRow, read_shard
from animediffusion.platform.errors import FileError, ImageError, StorageError
from animediffusion.platform.images.codec import decode_gray, decode_rgb, encode_lossless, fit_square
from animediffusion.platform.storage import storage

STATE = "_parts"
"""Folder of an unfinished ingest, below the destination."""
_THREADS = 4
"""Decoding releases the GIL, so these threads also use a second core."""
_REMOTE_THREADS = 16
"""More threads hide the latency of a remote store."""
_DARK = 128
"""Line art with a mean luma below this value counts as light on dark."""


class PartKey(NamedTuple):
    """The split of a part and its number within the split."""

    split: str
    number: int

    @property
    def record_name(self) -> str:
        """Name of the part's record inside the state folder."""
        return f"{self.split}-{self.number:05d}.json"


class RowRecord(BaseModel):
    """Record of a written row: its files, the sha256 of the target file, and the content_hash() of the row."""

    model_config = ConfigDict(frozen=True)

    id: str
    files: tuple[str, ...]
    source_sha256: str
    content: str


class Record(BaseModel):
    """Result of making a part; `shard` is None if no row was usable."""

    model_config = ConfigDict(frozen=True)

    split: str
    number: int
    shard: Shard | None
    rows: tuple[RowRecord, ...]
    rejects: tuple[Reject, ...]

    @property
    def part(self) -> PartKey:
        """The part that was made."""
        return PartKey(self.split, self.number)


def read_record(destination: str, part: PartKey) -> Record:
    """Read the record of a finished part."""
    return Record.model_validate_json(storage.read_bytes(storage.join(destination, STATE, part.record_name)))


@dataclass(frozen=True)
class MakePart:
    """Task that makes one part: it reads samples of one split, and writes a shard and then a record."""

    source: str
    destination: str
    size: int
    part: PartKey
    samples: tuple[Sample, ...]
    places: tuple[tuple[str, Place], ...] = ()
    """The paths that are not files of their own, and where they are."""
    in_order: bool = False
    """Whether the samples are in the order in which they are read, not in a pseudorandom one."""

    def __call__(self) -> Record:
        """Make the part and return its record."""
        storage.expect(self.source, self.destination)
        places = dict(self.places)
        threads = _REMOTE_THREADS if storage.is_remote(self.source) and not self.in_order else _THREADS
        with ThreadPoolExecutor(threads) as pool:
            made = list(pool.map(lambda sample: make_row(self.source, sample, self.size, places), self.samples))
        if self.in_order:
            order = sorted(range(len(made)), key=lambda number: id_rank(self.samples[number].id))
            made = [made[number] for number in order]
        rows = [row for row, _, _ in made if row is not None]
        record = Record(
            split=self.part.split,
            number=self.part.number,
            shard=write_shard(self.destination, self.part.split, self.part.number, rows) if rows else None,
            rows=tuple(entry for _, entry, _ in made if entry is not None),
            rejects=tuple(reject for _, _, rejects in made for reject in rejects),
        )
        uri = storage.join(self.destination, STATE, self.part.record_name)
        storage.write_bytes(uri, record.model_dump_json().encode())
        return record


@dataclass(frozen=True)
class DropRows:
    """Task that removes the rows with the given ids from a shard; it ignores ids that were removed before."""

    destination: str
    part: PartKey
    shard: Shard
    ids: frozenset[str]

    def __call__(self) -> tuple[PartKey, Shard | None]:
        """Return the part and its rewritten shard, which is None if no row is left."""
        storage.expect(self.destination)
        uri = storage.join(self.destination, self.shard.path)
        rows = [row for row in read_shard(uri) if row.id not in self.ids] if storage.exists(uri) else []
        if rows:
            return self.part, write_shard(self.destination, self.part.split, self.part.number, rows)
        storage.delete(uri)
        return self.part, None


def pack(task: Callable[[], object]) -> bytes:
    """Return a task as bytes for a row of a Ray table; compression reduces file names to a fifth."""
    return zlib.compress(pickle.dumps(task), level=1)


def run_packed(batch: dict[str, NDArray[Any]]) -> dict[str, list[bytes]]:
    """Run one packed task on a worker; return its result or its StorageError, pickled.

    The error is returned as a value because Ray would pass on only its text and print a long traceback.
    """
    task: Callable[[], object] = pickle.loads(zlib.decompress(batch["task"][0]))
    try:
        result = task()
    except StorageError as error:
        result = error
    return {"result": [pickle.dumps(result)]}


def make_row(
    source: str, sample: Sample, size: int, places: Mapping[str, Place] = MappingProxyType({})
) -> tuple[StoredRow | None, RowRecord | None, list[Reject]]:
    """Return a row for a shard and its record (both None if the target is unusable), and the rejected files.

    A row with unusable line art or an unusable reference stays without that picture, because training can make both
    from the target.
    """
    rejects: list[Reject] = []
    pictures: dict[str, NDArray[np.uint8]] = {}
    files = []
    digest = ""
    for role in PICTURES:
        path = getattr(sample, role)
        if path is None:
            continue
        place = places.get(path)
        try:
            data = _read(source, path, place)
            if data is None:
                if role == "target":
                    raise ImageError(path, "is empty", "give an image", reason="empty")
                continue
            pictures[role] = _decode(role, data, path, size)
        except ImageError as error:
            inside = f" (in {place.uri.partition('?')[0]})" if place is not None and place.kind != "table" else ""
            rejects.append(Reject(path, error.reason, error.found + inside))
            if role == "target":
                rejects += [Reject(other, "orphan", f"its target {path} was rejected") for other in sample.files[1:]]
                return None, None, rejects
            continue
        files.append(path)
        if role == "target":
            digest = hashlib.sha256(data).hexdigest()
    encoded = {role: encode_lossless(picture) for role, picture in pictures.items()}
    row = StoredRow(
        id=sample.id,
        split=sample.split,
        target=encoded["target"],
        sketch=encoded.get("sketch"),
        reference=encoded.get("reference"),
        cross_reference=encoded.get("cross_reference"),
        width=size,
        height=size,
        sha256=hashlib.sha256(encoded["target"]).hexdigest(),
    )
    entry = RowRecord(
        id=sample.id, files=tuple(files), source_sha256=digest, content=content_hash(sample.id, sample.split, pictures)
    )
    return row, entry, rejects


def content_hash(name: str, split: str, pictures: dict[str, NDArray[np.uint8]]) -> str:
    """Return the sha256 of a row's id, split and pixels, which does not depend on the image encoder's version."""
    digest = hashlib.sha256(json.dumps([name, split]).encode())
    for role in PICTURES:
        picture = pictures.get(role)
        digest.update(json.dumps([role, None if picture is None else picture.shape]).encode())
        if picture is not None:
            digest.update(np.ascontiguousarray(picture).tobytes())
    return digest.hexdigest()


def _read(source: str, path: str, place: Place | None) -> bytes | None:
    """Read one picture; a missing or forbidden file is an ImageError, a failing store remains a StorageError."""
    try:
        return read_picture(source, path, place)
    except FileError as error:
        raise ImageError(path, error.found, "a readable picture", reason="unreadable") from error


def _decode(role: str, data: bytes, path: str, size: int) -> NDArray[np.uint8]:
    if path.endswith(LINES):
        picture = decode_lines(data, path)
    elif is_layered(path):
        picture = decode_composite(data, path)
        picture = to_luma(picture) if role == "sketch" else picture
    else:
        picture = decode_gray(data, thing=path) if role == "sketch" else decode_rgb(data, thing=path)
    if role == "sketch" and picture.mean() < _DARK:
        raise ImageError(path, "is mostly dark: line art is dark on light", "invert it", reason="inverted")
    return fit_square(picture, size, crop=True)
