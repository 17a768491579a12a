"""The corrections store: requests that were answered lately, and corrections of their pictures by people.

    store = Corrections("s3://bucket/corrections")
    store.keep(request)                       # by a server, for each request that it answers
    kept = store.find("studio", "5f0c2a9e1b7d4c38")
    store.save(correction)                    # when somebody corrects the picture
    store.delete("studio")                    # all of one API key

    kept/KEY/REQUEST.zip                      answered requests, for KEEP_S at most
    corrections/KEY/VERSION/REQUEST.zip       corrections, until they are deleted
    counts.json                               how many requests each model version answered, see counts.py

Each file is written whole, so that several servers on several machines can share a store. A file of one key cannot be
found with another key, because the key is a part of its path. KEY is `_` for requests without a key.
Not here: reading and drawing pictures, see serve/api/corrections.py.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple

from pyarrow import fs

from animediffusion.platform.corrections.counts import VersionCounts, add_counts, read_counts
from animediffusion.platform.errors import DataError, FileError
from animediffusion.platform.storage import storage

FORMAT = "animediffusion-correction-1"
RECORD = "record.json"
"""The member of a correction that describes it."""
REQUEST = "request.json"
"""The member of a kept request that describes it."""
KEEP_S = 7 * 24 * 3600
"""How long an answered request can be corrected, in seconds."""
MAX_KEPT = 10_000
MAX_KEPT_BYTES = 20 * 2**30
"""Above these, the oldest requests are deleted first, those of the key with the most requests before others."""
NO_KEY = "_"
"""Folder of requests without a key; no key has this name."""
_KEPT, _CORRECTIONS, _COUNTS = "kept", "corrections", "counts.json"
_THREADS = 16

Saved = Literal["stored", "replaced", "known"]
"""What save() did: `known` if the store has the same correction already."""


@dataclass(frozen=True, kw_only=True)
class KeptRequest:
    """A request that was answered: its form as the client sent it, and what the network painted."""

    request_id: str
    key: str
    """Name of the API key; empty without keys."""
    time: str
    """When it was answered, ISO 8601, UTC."""
    model_version: str
    options: dict[str, Any]
    """The text fields of the form."""
    sketch: bytes
    references: tuple[bytes, ...]
    picture: bytes
    """PNG of the network's picture, from which the answer was rendered."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Further fields of the form that were files, by name: `palette` and `hints`."""

    @property
    def num_bytes(self) -> int:
        """Size of its files."""
        return sum(map(len, (self.sketch, *self.references, self.picture, *self.files.values())))


@dataclass(frozen=True, kw_only=True)
class Correction:
    """A correction of a picture."""

    record: dict[str, Any]
    """Content of record.json; contains at least request_id, key, model_version, answered and sha256."""
    files: dict[str, bytes]
    """PNGs by name: sketch.png, lines.png, reference-1.png ..., result.png, corrected.png."""


class Entry(NamedTuple):
    """One file of a correction, as the listing of the store shows it."""

    key: str
    """Name of the API key; empty without keys."""
    path: str
    """Path below the store."""
    num_bytes: int
    modified: datetime
    """When it was written, UTC."""


class Deleted(NamedTuple):
    """How many files delete() removed."""

    corrections: int
    requests: int


class Corrections:
    """The corrections store at a folder or s3:// URI.

    Args:
        uri: the folder, which need not exist yet; servers on several machines must share it.

    Raises:
        StorageError: by every method, if the store fails.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def prepare(self) -> None:
        """Check that the store can be written, before a server needs it."""
        if storage.is_remote(self.uri):
            storage.s3_object(self.uri)  # Others have no conditional writes.
        self.add_counts({})

    # --- answered requests ------------------------------------------------------------------------------------------

    def keep(self, request: KeptRequest) -> None:
        """Keep an answered request, so that it can be corrected."""
        about = {name: getattr(request, name) for name in ("request_id", "key", "time", "model_version", "options")}
        references = {f"reference-{number}": data for number, data in enumerate(request.references, start=1)}
        files = {"sketch": request.sketch, **references, "picture.png": request.picture, **request.files}
        storage.write_bytes(self._kept(request.key, request.request_id), _pack(REQUEST, about, files))

    def find(self, key: str, request_id: str) -> KeptRequest | None:
        """Return a request that was answered for this key at most KEEP_S ago, else None."""
        try:
            about, files = _unpack(REQUEST, storage.read_bytes(self._kept(key, request_id)))
        except FileError:
            return None
        if datetime.now(UTC) - datetime.fromisoformat(about["time"]) > timedelta(seconds=KEEP_S):
            return None
        references = sorted(name for name in files if name.startswith("reference-"))
        return KeptRequest(
            **about,
            sketch=files.pop("sketch"),
            references=tuple(files.pop(name) for name in references),
            picture=files.pop("picture.png"),
            files=files,
        )

    def clean(self, now: datetime | None = None) -> int:
        """Delete the kept requests that are too old or too many; return their number."""
        surplus = surplus_of(self._list(_KEPT), now or datetime.now(UTC))
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(storage.delete, (storage.join(self.uri, entry.path) for entry in surplus)))
        return len(surplus)

    # --- corrections ------------------------------------------------------------------------------------------------

    def save(self, correction: Correction) -> Saved:
        """Save a correction; a second one of the same request replaces the first.

        The first correction of a request is counted for its model version.
        """
        record = correction.record
        path = _correction_path(record["key"], record["model_version"], record["request_id"])
        uri = storage.join(self.uri, path)
        before = self._read_record(path) if storage.exists(uri) else None
        if before is not None and before["sha256"] == record["sha256"]:
            return "known"
        storage.write_bytes(uri, _pack(RECORD, record, correction.files))
        if before is not None:
            return "replaced"
        self.add_counts({(record["answered"][:10], record["model_version"]): VersionCounts(0, 1)})
        return "stored"

    def entries(self, key: str | None = None) -> list[Entry]:
        """Return the files of all corrections, or of those of one key, sorted by path."""
        found = self._list(_CORRECTIONS if key is None else f"{_CORRECTIONS}/{_folder(key)}")
        return [entry for entry in found if not storage.is_partial(entry.path)]

    def read_records(self, entries: Iterable[Entry]) -> list[dict[str, Any] | DataError | FileError]:
        """Return record.json of each correction, or why it cannot be read: damaged, or deleted since it was listed."""

        def read(entry: Entry) -> dict[str, Any] | DataError | FileError:
            try:
                return self._read_record(entry.path)
            except (DataError, FileError) as error:
                return error

        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(read, entries))

    def delete(self, key: str) -> Deleted:
        """Delete all corrections and all kept requests of a key; the counts, which name nobody, stay."""
        there = self.num_of(key)
        for folder in (_CORRECTIONS, _KEPT):
            storage.delete(storage.join(self.uri, folder, _folder(key)))  # An empty folder would still name the key.
        return there

    def num_of(self, key: str) -> Deleted:
        """Return what delete() would remove."""
        return Deleted(len(self.entries(key)), len(self._list(f"{_KEPT}/{_folder(key)}")))

    # --- counts -----------------------------------------------------------------------------------------------------

    def add_counts(self, more: Mapping[tuple[str, str], VersionCounts]) -> None:
        """Add the counts of each (day, model version); a day is YYYY-MM-DD, in UTC."""
        add_counts(storage.join(self.uri, _COUNTS), more)

    def counts(self, since: str = "") -> dict[str, VersionCounts]:
        """Return the requests answered and corrected by model version, since a day or ever.

        A correction counts for the day on which its request was answered. Deleted corrections stay counted, and so do
        requests that are not kept any more.
        """
        return read_counts(storage.join(self.uri, _COUNTS), since)

    def _kept(self, key: str, request_id: str) -> str:
        return storage.join(self.uri, _KEPT, _folder(key), f"{request_id}.zip")

    def _read_record(self, path: str) -> dict[str, Any]:
        def read(files: fs.FileSystem, inner: str) -> dict[str, Any]:
            with files.open_input_file(inner) as source:
                try:
                    with zipfile.ZipFile(source) as archive:
                        record: dict[str, Any] = json.loads(archive.read(RECORD))
                except (zipfile.BadZipFile, KeyError, ValueError) as error:
                    raise DataError(path, "is not a correction", "delete the file") from error
            if record.get("format") != FORMAT:
                raise DataError(path, f"has the format {record.get('format')!r}", f"this version reads {FORMAT}")
            return record

        return storage.patiently(storage.join(self.uri, path), read)

    def _list(self, folder: str) -> list[Entry]:
        def find(files: fs.FileSystem, path: str) -> list[Entry]:
            start = len(path) - len(folder)
            infos = files.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
            return [
                Entry(_key(parts[1]), info.path[start:], info.size, datetime.fromtimestamp(info.mtime_ns / 1e9, UTC))
                for info in infos
                if info.is_file and len(parts := info.path[start:].split("/")) > 2
            ]

        return sorted(storage.patiently(storage.join(self.uri, folder), find))


def surplus_of(kept: Iterable[Entry], now: datetime) -> list[Entry]:
    """Return the kept requests to delete: those that are too old, then so many that the others are within the limits.

    Each key keeps its newest requests, so a client that sends a thousand requests does not displace those of other
    keys.
    """
    surplus, fair = [], []
    rank: Counter[str] = Counter()
    for entry in sorted(kept, key=lambda entry: entry.modified, reverse=True):
        if now - entry.modified > timedelta(seconds=KEEP_S):
            surplus.append(entry)
            continue
        fair.append((rank[entry.key], entry))
        rank[entry.key] += 1
    num_bytes = 0
    for number, (_, entry) in enumerate(sorted(fair, key=lambda one: one[0])):
        num_bytes += entry.num_bytes
        if number >= MAX_KEPT or num_bytes > MAX_KEPT_BYTES:
            surplus.append(entry)
    return surplus


def now() -> str:
    """Return the time, ISO 8601, UTC, in seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _folder(key: str) -> str:
    return key or NO_KEY


def _key(folder: str) -> str:
    return "" if folder == NO_KEY else folder


def _correction_path(key: str, version: str, request_id: str) -> str:
    return f"{_CORRECTIONS}/{_folder(key)}/{version.replace(':', '-')}/{request_id}.zip"


def _pack(name: str, about: Mapping[str, Any], files: Mapping[str, bytes]) -> bytes:
    """Return a ZIP archive of a JSON object and files, which are not compressed: pictures are compressed already."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member, data in {name: json.dumps(about, indent=1).encode() + b"\n", **files}.items():
            archive.writestr(zipfile.ZipInfo(member), data)
    return buffer.getvalue()


def _unpack(name: str, data: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {member: archive.read(member) for member in archive.namelist()}
    return json.loads(files.pop(name)), files
