"""List all pictures of a source: files, members of archives and rows of tables, each by a path, without opening any.

    catalog = read_catalog("s3://bucket/faces", storage.survey("s3://bucket/faces").sizes)
    catalog.paths                          # "a.png", "000123.jpg" of an archive, "train.parquet#12/image" of a table
    catalog.places["000123.jpg"]           # the archive, and where its bytes are

A member of an archive is named by its path inside the archive. Where two archives have members of the same name, or the
archives are named after roles as in sketch.zip and color.zip, each archive is a folder. A folder with tables is read
from the tables alone, because their repositories hold other files, too.
Memory: 40 bytes for each member, in addition to its name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import PurePosixPath
from typing import NamedTuple, TypeVar

import numpy as np

from animediffusion.pipelines.data.formats.archives import ArchiveMember, Place, index_archive, read_member
from animediffusion.pipelines.data.formats.layered import LINES
from animediffusion.pipelines.data.formats.tables import describe_table, read_cell, read_names
from animediffusion.pipelines.data.ingest_plan import IngestPlan, Reject, Sample, Samples
from animediffusion.pipelines.data.source_layout import ROLE_OF, SPLIT_OF, final_split, hash_split, natural
from animediffusion.platform.errors import DataError
from animediffusion.platform.images.picture_names import is_junk
from animediffusion.platform.storage import storage
from animediffusion.platform.storage.addresses import split_options

ARCHIVES = (".tar", ".zip")
TABLES = (".parquet", ".arrow", ".feather")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_IMAGE_COLUMNS = ("image", "img", "picture", "png", "jpg", "jpeg", "webp")
_SPLIT_PREFIX = re.compile(rf"({'|'.join(sorted(SPLIT_OF, key=len, reverse=True))})(?:[-_.]|\d|$)", re.I)
_THREADS = 16
T = TypeVar("T")


class Places:
    """The archives' members by their paths, in columns that are searched by a hash of the path."""

    def __init__(
        self, members: Iterable[tuple[str, int, ArchiveMember]] = (), containers: Sequence[tuple[str, str]] = ()
    ) -> None:
        """Take (path, number of the container, member), and (URI, path) of each container."""
        rows = [(_hash(path), number, m.place.position, m.place.length, m.num_bytes) for path, number, m in members]
        table = np.array(sorted(rows), np.int64).reshape(-1, 5)
        self._hashes, self._numbers, self._positions, self._lengths, self._sizes = np.ascontiguousarray(table.T)
        self._containers = tuple(containers)

    def __len__(self) -> int:
        return len(self._hashes)

    def get(self, path: str) -> Place | None:
        """Return the place of a member, or None if the path is a file of its own."""
        row = self._row(path)
        if row is None:
            return None
        uri, name = self._containers[self._numbers[row]]
        return Place(
            uri, "zip" if name.lower().endswith(".zip") else "tar", int(self._positions[row]), int(self._lengths[row])
        )

    def container(self, path: str) -> str | None:
        """Return the path of the archive that holds a member."""
        row = self._row(path)
        return None if row is None else self._containers[self._numbers[row]][1]

    def num_bytes(self, path: str) -> int | None:
        """Return the unpacked size of a member."""
        row = self._row(path)
        return None if row is None else int(self._sizes[row])

    def _row(self, path: str) -> int | None:
        if not len(self):
            return None
        wanted = _hash(path)
        row = int(np.searchsorted(self._hashes, wanted))
        return row if row < len(self) and self._hashes[row] == wanted else None


class _Table(NamedTuple):
    """A table and the columns of its pictures by role."""

    path: str
    columns: dict[str, str]
    rows: int
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Catalog:
    """All pictures of a source."""

    source: str
    """The folder; the parent of a source that is one file."""
    files: Mapping[str, int]
    """Size of every file, archives and tables included."""
    paths: tuple[str, ...] = ()
    """Files and members that are no archives or tables."""
    places: Places = field(default_factory=Places)
    tables: tuple[_Table, ...] = ()
    rejects: tuple[Reject, ...] = ()

    def num_bytes(self, path: str) -> int:
        """Return the size that stands for a picture in the fingerprint: that of its file, member or table."""
        names = path, path.rpartition("#")[0]  # what is after # is the row of a table or the layer of a file
        found = (self.files.get(name, self.places.num_bytes(name)) for name in names)
        return next((num_bytes for num_bytes in found if num_bytes is not None), 0)

    def split_of(self, path: str) -> str | None:
        """Return the split that the name of a member's archive gives, as train-00000.tar or val/00000.tar."""
        container = self.places.container(path)
        return None if container is None else split_of_file(container)

    def place(self, path: str) -> Place | None:
        """Return where a picture is, or None if it is a file of its own."""
        if self.tables:
            file, _, cell = path.rpartition("#")
            return Place(storage.join(self.source, file), "table", int(cell.partition("/")[0]), 0)
        return self.places.get(path.removesuffix(LINES))

    def plan_tables(self, val_fraction: float) -> IngestPlan:
        """Plan the rows of the tables, in their order.

        Raises:
            DataError: if the tables have no rows.
        """
        if not any(table.rows for table in self.tables):
            raise DataError(self.source, "its tables have no rows", "give a table with pictures")
        splits = {table.path: split_of_file(table.path) for table in self.tables}
        named = {split for split in splits.values() if split}
        ids = self._ids()
        split_of = None if named else hash_split(ids, val_fraction)
        rows = ((table, row) for table in self.tables for row in range(table.rows))

        def sample(name: str, table: _Table, row: int) -> Sample:
            split = split_of(name) if split_of else final_split(splits[table.path], named)
            pictures = {role: f"{table.path}#{row}/{column}" for role, column in table.columns.items()}
            return Sample(name, split, **pictures)

        samples = Samples(sample(name, table, row) for name, (table, row) in zip(ids, rows, strict=True))
        others = [path for path in self.paths if not is_junk(path)]
        aside = tuple(Reject(path, "orphan", "the source is read from its tables") for path in others)
        return IngestPlan(samples, aside, hashed=split_of is not None, in_order=True)

    def _ids(self) -> list[str]:
        """Return unique ids of all rows: paths of the targets, a column of ids, or file and number."""
        columns = [["target"], *([name] for name in dict.fromkeys(chain(*(table.ids for table in self.tables))))]
        for [column] in columns:
            if column != "target" and not all(column in table.ids for table in self.tables):
                continue
            ids: list[str] = []
            for table in self.tables:
                name = table.columns["target"] if column == "target" else column
                for text in read_names(storage.join(self.source, table.path), table.path, name):
                    if not text:
                        break
                    ids.append(_stem(text) if column == "target" else text)
            if len(ids) == sum(table.rows for table in self.tables) == len(set(ids)):
                return ids
        return [f"{_stem(table.path)}/{row:06d}" for table in self.tables for row in range(table.rows)]


def read_catalog(source: str, files: Mapping[str, int]) -> Catalog:
    """List the pictures of a source.

    Args:
        source: the folder.
        files: sizes of its files by relative path.

    Raises:
        DataError: if the source holds nothing but archives or tables that cannot be used.
        StorageError: if the store fails.
    """
    usable = [path for path in files if not is_junk(path)]
    rejects: list[Reject] = []
    described = _collect(source, _ending(usable, TABLES), _describe, rejects, len(usable))
    tables = [table for table in described if table is not None]
    if tables:
        others = tuple(path for path in files if not path.lower().endswith(TABLES))
        return Catalog(source, files, others, tables=tuple(tables), rejects=tuple(rejects))
    archives = _ending(usable, (*ARCHIVES, *_COMPRESSED))
    found = _collect(source, archives, _index, rejects, len(usable))
    taken = {reject.path for reject in rejects} | set(archives) | set(_ending(usable, TABLES))
    loose = tuple(path for path in files if path not in taken)
    if not archives:
        return Catalog(source, files, loose, rejects=tuple(rejects))
    members = list(_named(found, set(loose)))
    rejects += [reject for _, _, faults in found for reject in faults]
    places = Places(members, [(storage.join(source, path), path) for path, _, _ in found])
    return Catalog(source, files, (*loose, *(path for path, _, _ in members)), places, rejects=tuple(rejects))


def single_file(uri: str) -> tuple[str, str] | None:
    """Return (folder, name) of a source that is one archive or table by its name, else None."""
    base, options = split_options(uri)
    folder, _, name = base.rpartition("/")
    return (folder + options, name) if name.lower().endswith((*ARCHIVES, *TABLES, *_COMPRESSED)) else None


def read_picture(source: str, path: str, place: Place | None) -> bytes | None:
    """Return the bytes of a picture, or None for an empty cell of a table.

    Raises:
        ImageError: if this picture cannot be read.
        StorageError: if the store fails.
    """
    if place is None:
        return storage.read_bytes(storage.join(source, path.removesuffix(LINES)))
    if place.kind == "table":
        return read_cell(place.uri, place.position, path.rpartition("#")[2].partition("/")[2], path)
    return read_member(place, path)


def split_of_file(path: str) -> str | None:
    """Return the split that the name of an archive or table, or of a folder above it, gives."""
    *folders, file = path.split("/")
    match = _SPLIT_PREFIX.match(file)
    names = [SPLIT_OF.get(folder.lower().removesuffix("_data")) for folder in folders]
    if match is not None:
        names.append(SPLIT_OF[match[1].lower()])
    return next((name for name in reversed(names) if name), None)


def _ending(paths: Iterable[str], suffixes: tuple[str, ...]) -> list[str]:
    return sorted((path for path in paths if path.lower().endswith(suffixes)), key=natural)


def _collect(
    source: str,
    paths: Sequence[str],
    read: Callable[[str, str, list[Reject]], T],
    rejects: list[Reject],
    num_files: int,
) -> list[T]:
    """Read some containers in threads; one that cannot be used becomes a reject, or an error where nothing else is."""
    found: list[T] = []
    faults: list[DataError] = []

    def one(path: str) -> T | DataError:
        try:
            return read(source, path, rejects)
        except DataError as error:
            return error

    with ThreadPoolExecutor(_THREADS) as pool:
        for path, result in zip(paths, pool.map(one, paths), strict=True):
            if isinstance(result, DataError):
                faults.append(result)
                rejects.append(Reject(path, "unreadable", f"{result.found}; {result.allowed}"))
            else:
                found.append(result)
    if len(faults) == num_files and faults:
        raise faults[0]
    return found


def _index(source: str, path: str, _: list[Reject]) -> tuple[str, list[ArchiveMember], list[Reject]]:
    return path, *index_archive(storage.join(source, path), path)


def _describe(source: str, path: str, rejects: list[Reject]) -> _Table | None:
    info = describe_table(storage.join(source, path), path)
    if not info.pictures:
        rejects.append(Reject(path, "not_an_image", "has no column of pictures"))
        return None
    return _Table(path, _roles(path, info.pictures), info.rows, info.ids)


def _roles(path: str, columns: Sequence[str]) -> dict[str, str]:
    """Return the column of each role, the target first."""
    found: dict[str, str] = {}
    for column in columns:
        role = ROLE_OF.get(column.lower())
        if role is not None:
            found.setdefault(role, column)
    if "target" not in found:
        image = next((column for column in columns if column.lower() in _IMAGE_COLUMNS), None)
        if image is None and "sketch" in found and "reference" in found:
            image = found.pop("reference")  # the paper's naming
        if image is None and len(columns) == 1:
            image, found = columns[0], {}
        if image is None:
            named = ", ".join(columns)
            raise DataError(path, f"none of its columns of pictures ({named}) is a target", "name it target or image")
        found["target"] = image
    return {"target": found.pop("target"), **found}


def _named(
    found: Sequence[tuple[str, list[ArchiveMember], list[Reject]]], loose: set[str]
) -> Iterator[tuple[str, int, ArchiveMember]]:
    """Yield (path, number of the archive, member); the path begins with the archive's only where it must."""
    stems = [_stem(path) for path, _, _ in found]
    names = [member.name for _, members, _ in found for member in members]
    bare = not any(PurePosixPath(stem).name.lower() in ROLE_OF for stem in stems)
    bare = bare and len(set(names)) == len(names) and loose.isdisjoint(names)
    for number, (_, members, _) in enumerate(found):
        for member in members:
            yield member.name if bare else f"{stems[number]}/{member.name}", number, member


def _stem(path: str) -> str:
    """Return a path without its suffix; a file name may also be one that starts with a dot."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)


def _hash(path: str) -> int:
    digest = hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
