"""One part of an ingest: read some samples, bring them to size, write one shard and a record of what happened.

The record is written last: a part with a record is done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from animediffusion.pipelines.dataset import Shard, write_shard
from animediffusion.pipelines.layout import Reject, Sample
from animediffusion.pipelines.shards import PICTURES
from animediffusion.platform import storage
from animediffusion.platform.errors import ImageError, StorageError
from animediffusion.platform.images import decode_gray, decode_rgb, encode_lossless, fit_square

_THREADS = 4
"""They hide the latency of a store; decoding releases the interpreter, so they use a second core too."""
_DARK = 128
"""Mean luma below which line art is white on black."""


@dataclass(frozen=True)
class Part:
    """Samples of one split that become one shard."""

    split: str
    number: int
    samples: tuple[Sample, ...]

    def to_json(self) -> str:
        """For a row of a Ray table."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Part:
        """The inverse of to_json()."""
        value = json.loads(text)
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

    @property
    def files(self) -> set[str]:
        """All files that the part has dealt with."""
        return {path for row in self.rows for path in row.files} | {reject.path for reject in self.rejects}


def record_path(part: Part) -> str:
    """Name of the record inside the folder of an unfinished ingest."""
    return f"{part.split}-{part.number:05d}.json"


def read_record(uri: str) -> Record:
    """A record that an earlier run has written."""
    return Record.model_validate_json(storage.read_bytes(uri))


def make_part(
    batch: dict[str, NDArray[Any]], source: str, destination: str, state: str, size: int
) -> dict[str, list[str]]:
    """Body of a Ray Data task: one part in, its record out, or the parts of a StorageError as `error`.

    An error is a value here because Ray would carry its text alone, and print a page about it.
    """
    part = Part.from_json(str(batch["part"][0]))
    try:
        record = _make(part, source, destination, size).model_dump_json()
        storage.write_bytes(storage.join(destination, state, record_path(part)), record.encode())
    except StorageError as error:
        return {"record": [""], "error": [json.dumps(error.args)]}
    return {"record": [record], "error": [""]}


def _make(part: Part, source: str, destination: str, size: int) -> Record:
    with ThreadPoolExecutor(_THREADS) as pool:
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
    """One file; a file that cannot be read is a bad file, a store that does not answer is not the file's fault."""
    try:
        return storage.read_bytes(storage.join(source, path))
    except storage.UnreachableError:
        raise
    except StorageError as error:
        raise ImageError(path, error.found, "a readable picture", reason="unreadable") from error


def _decode(role: str, data: bytes, path: str, size: int) -> NDArray[np.uint8]:
    decode: Callable[..., NDArray[np.uint8]] = decode_gray if role == "sketch" else decode_rgb
    picture = decode(data, thing=path)
    if role == "sketch" and picture.mean() < _DARK:
        raise ImageError(path, "white lines on black", "dark lines on white", reason="inverted")
    return fit_square(picture, size, crop=True)
