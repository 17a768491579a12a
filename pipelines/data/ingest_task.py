"""One part of an ingest: read some samples, resize them, and write one shard and a record.

The record is written last, so a part with a record is done. While a task writes, it holds up to three copies of the
encoded rows of one part, about 64 MB each. pipelines/data/ingest.py divides the samples into parts.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from animediffusion.pipelines.data.ingest_plan import Reject, Sample
from animediffusion.pipelines.data.manifest import Shard, write_shard
from animediffusion.pipelines.data.shards import PICTURES, read_shard
from animediffusion.platform.errors import FileError, ImageError, StorageError, StoreFailedError, UnreachableError
from animediffusion.platform.images.codec import decode_gray, decode_rgb, encode_lossless, fit_square
from animediffusion.platform.storage import files as storage

_THREADS = 4
"""Decoding releases the GIL, so these threads also use a second core."""
_REMOTE_THREADS = 16
"""More threads hide the latency of a remote store."""
_DARK = 128
"""Line art with a mean luma below this value counts as light on dark."""


@dataclass(frozen=True)
class Part:
    """Samples of one split that become one shard."""

    split: str
    number: int
    samples: tuple[Sample, ...]

    def pack(self) -> bytes:
        """Return the part as bytes for a row of a Ray table; compression reduces names to a fifth."""
        return zlib.compress(json.dumps(asdict(self)).encode(), level=1)

    @classmethod
    def unpack(cls, data: bytes) -> Part:
        """Return the part that pack() converted to bytes."""
        value = json.loads(zlib.decompress(data))
        return cls(value["split"], value["number"], tuple(Sample(**sample) for sample in value["samples"]))


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


def record_path(split: str, number: int) -> str:
    """Return the name of a part's record inside the state folder of an unfinished ingest."""
    return f"{split}-{number:05d}.json"


def read_record(uri: str) -> Record:
    """Read the record of a finished part."""
    return Record.model_validate_json(storage.read_bytes(uri))


def make_part(
    batch: dict[str, NDArray[Any]], source: str, destination: str, state: str, size: int
) -> dict[str, list[str]]:
    """Make one part in a Ray Data task; return its record as `made`, or a StorageError as `error`.

    The error is returned as a value because Ray would pass on only its text and print a long traceback.
    """
    part = Part.unpack(batch["part"][0])
    storage.expect(source, destination)
    try:
        record = _make(part, source, destination, size).model_dump_json()
        storage.write_bytes(storage.join(destination, state, record_path(part.split, part.number)), record.encode())
    except StorageError as error:
        return _failed(error)
    return {"made": [record], "error": [""]}


def drop_rows(batch: dict[str, NDArray[Any]], destination: str) -> dict[str, list[str]]:
    """Remove the rows with the given ids from a shard in a Ray Data task.

    Returns the rewritten shard as `made`, which is empty if no row is left, or a StorageError as `error`. The task is
    idempotent: it ignores ids that were removed before.
    """
    shard, drop = Shard.model_validate_json(str(batch["shard"][0])), set(json.loads(str(batch["drop"][0])))
    split, number = str(batch["split"][0]), int(batch["number"][0])
    storage.expect(destination)
    place = storage.join(destination, shard.path)
    try:
        rows = [row for row in read_shard(place) if row["id"] not in drop] if storage.exists(place) else []
        if rows:
            made = write_shard(destination, split, number, rows).model_dump_json()
        else:
            storage.delete(place)
            made = ""
    except StorageError as error:
        return _failed(error)
    return {"split": [split], "number": [str(number)], "made": [made], "error": [""]}


def raise_failed(row: dict[str, Any]) -> None:
    """Raise the error that a task returned, if any.

    Raises:
        StorageError: if the task returned an error; the subclass is the same as in the task.
    """
    if row["error"]:
        kind, *parts = json.loads(row["error"])
        kinds = (StoreFailedError, UnreachableError, FileError)
        raise {cls.__name__: cls for cls in kinds}.get(kind, StorageError)(*parts)


def _failed(error: StorageError) -> dict[str, list[str]]:
    return {"made": [""], "error": [json.dumps([type(error).__name__, *error.args])]}


def _make(part: Part, source: str, destination: str, size: int) -> Record:
    with ThreadPoolExecutor(_REMOTE_THREADS if storage.is_remote(source) else _THREADS) as pool:
        made = list(pool.map(lambda sample: make_row(source, sample, size), part.samples))
    rows = [row for row, _, _ in made if row is not None]
    return Record(
        split=part.split,
        number=part.number,
        shard=write_shard(destination, part.split, part.number, rows) if rows else None,
        rows=tuple(entry for _, entry, _ in made if entry is not None),
        rejects=tuple(reject for _, _, rejects in made for reject in rejects),
    )


def make_row(source: str, sample: Sample, size: int) -> tuple[dict[str, Any] | None, RowRecord | None, list[Reject]]:
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
        try:
            data = _read(source, path)
            pictures[role] = _decode(role, data, path, size)
        except ImageError as error:
            rejects.append(Reject(path, error.reason, error.found))
            if role == "target":
                rejects += [Reject(other, "orphan", f"its target {path} is set aside") for other in sample.files[1:]]
                return None, None, rejects
            continue
        files.append(path)
        if role == "target":
            digest = hashlib.sha256(data).hexdigest()
    encoded = {role: encode_lossless(pictures[role]) if role in pictures else None for role in PICTURES}
    row = {
        "id": sample.id,
        "split": sample.split,
        **encoded,
        "width": size,
        "height": size,
        "sha256": hashlib.sha256(encoded["target"] or b"").hexdigest(),
    }
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


def _read(source: str, path: str) -> bytes:
    """Read one file; a missing or forbidden file is an ImageError, a failing store remains a StorageError."""
    try:
        return storage.read_bytes(storage.join(source, path))
    except FileError as error:
        raise ImageError(path, error.found, "a readable picture", reason="unreadable") from error


def _decode(role: str, data: bytes, path: str, size: int) -> NDArray[np.uint8]:
    decode: Callable[..., NDArray[np.uint8]] = decode_gray if role == "sketch" else decode_rgb
    picture = decode(data, thing=path)
    if role == "sketch" and picture.mean() < _DARK:
        raise ImageError(path, "is mostly dark: line art is dark on light", "invert it", reason="inverted")
    return fit_square(picture, size, crop=True)
