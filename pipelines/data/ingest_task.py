"""One part of an ingest: read some samples, bring them to size, write one shard and a record of what happened.

The record is written last: a part with a record is done. A task holds the encoded rows of one part, about 64 MB, up to
three times while it writes them. Not here: which samples make a part, see pipelines/data/ingest.py.
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
from animediffusion.platform.errors import ImageError, StorageError
from animediffusion.platform.images.codec import decode_gray, decode_rgb, encode_lossless, fit_square
from animediffusion.platform.storage import files as storage

_THREADS = 4
"""Decoding releases the interpreter, so they use a second core too."""
_REMOTE_THREADS = 16
"""They hide the latency of a store."""
_DARK = 128
"""Mean luma below which line art is white on black."""


@dataclass(frozen=True)
class Part:
    """Samples of one split that become one shard."""

    split: str
    number: int
    samples: tuple[Sample, ...]

    def pack(self) -> bytes:
        """For a row of a Ray table; names compress to a fifth."""
        return zlib.compress(json.dumps(asdict(self)).encode(), level=1)

    @classmethod
    def unpack(cls, data: bytes) -> Part:
        """The inverse of pack()."""
        value = json.loads(zlib.decompress(data))
        return cls(value["split"], value["number"], tuple(Sample(**sample) for sample in value["samples"]))


class RowRecord(BaseModel):
    """A row that was written: its files, the sha256 of the target file and of everything a reader sees."""

    model_config = ConfigDict(frozen=True)

    id: str
    files: tuple[str, ...]
    source_sha256: str
    content: str


class Record(BaseModel):
    """What became of a part; `shard` is None if no row was usable."""

    model_config = ConfigDict(frozen=True)

    split: str
    number: int
    shard: Shard | None
    rows: tuple[RowRecord, ...]
    rejects: tuple[Reject, ...]


def record_path(split: str, number: int) -> str:
    """Name of a part's record inside the folder of an unfinished ingest."""
    return f"{split}-{number:05d}.json"


def read_record(uri: str) -> Record:
    """A record that an earlier run has written."""
    return Record.model_validate_json(storage.read_bytes(uri))


def make_part(
    batch: dict[str, NDArray[Any]], source: str, destination: str, state: str, size: int
) -> dict[str, list[str]]:
    """Body of a Ray Data task: one part in, its record out as `made`, or a StorageError as `error`.

    An error is a value here because Ray would carry its text alone, and print a page about it.
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
    """Body of a Ray Data task: a shard and ids in, the shard without them out as `made`, empty if nothing is left.

    Once more does no harm: rows that are gone already are not missed.
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
    """The error that a task returned, if it did.

    Raises:
        StorageError: of the same kind.
    """
    if row["error"]:
        kind, *parts = json.loads(row["error"])
        kinds = (storage.StoreFailedError, storage.UnreachableError, storage.FileError)
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
    """A row for a shard and its record, or None where the target is unusable; and the files set aside.

    A row whose line art or reference is unusable stays, without it: both can be made from the target.
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
    """sha256 of a row's id, split and pixels: the encoder's version plays no role."""
    digest = hashlib.sha256(json.dumps([name, split]).encode())
    for role in PICTURES:
        picture = pictures.get(role)
        digest.update(json.dumps([role, None if picture is None else picture.shape]).encode())
        if picture is not None:
            digest.update(np.ascontiguousarray(picture).tobytes())
    return digest.hexdigest()


def _read(source: str, path: str) -> bytes:
    """One file; one that is gone or forbidden is a bad file, a store that fails is not the file's fault."""
    try:
        return storage.read_bytes(storage.join(source, path))
    except storage.FileError as error:
        raise ImageError(path, error.found, "a readable picture", reason="unreadable") from error


def _decode(role: str, data: bytes, path: str, size: int) -> NDArray[np.uint8]:
    decode: Callable[..., NDArray[np.uint8]] = decode_gray if role == "sketch" else decode_rgb
    picture = decode(data, thing=path)
    if role == "sketch" and picture.mean() < _DARK:
        raise ImageError(path, "is mostly dark: line art is dark on light", "invert it", reason="inverted")
    return fit_square(picture, size, crop=True)
