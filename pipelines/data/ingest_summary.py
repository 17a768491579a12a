"""What the parts of an ingest add up to: counts, duplicates and the content hash, in 64 bytes a row.

Not here: making parts, see pipelines/data/ingest_task.py.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from animediffusion.pipelines.data.ingest_plan import Reject
from animediffusion.pipelines.data.ingest_task import Record, RowRecord
from animediffusion.pipelines.data.manifest import Shard, Split
from animediffusion.pipelines.data.source_layout import natural

_DIGEST_BYTES = 32
_HASH_ROWS = 65536

Key = tuple[str, int]
"""Split and number of a part."""


class Twin(NamedTuple):
    """A row to drop, its number in its part, and the file that has the same bytes."""

    row: RowRecord
    number: int
    first: str


class Tally:
    """Takes the records of all parts, in any order, and keeps of a row only two digests.

    Args:
        rejects: files that were set aside before.
        shared: whether a file may be in several rows; then names are counted, too.
    """

    def __init__(self, rejects: Iterable[Reject], *, shared: bool) -> None:
        self._rejects = {reject.path: reject for reject in rejects}
        self._shards: dict[Key, Shard | None] = {}
        self._first_rows: dict[Key, int] = {}
        self._sources, self._contents = bytearray(), bytearray()
        self._dropped: list[int] = []
        self._num_used = 0
        self._uses: Counter[str] | None = Counter() if shared else None
        self.num_done = len(self._rejects)
        """Files dealt with; one in several rows counts several times."""

    @property
    def num_rejects(self) -> int:
        """Files set aside so far."""
        return len(self._rejects)

    @property
    def num_rows(self) -> int:
        """Rows that stay."""
        return len(self._contents) // _DIGEST_BYTES - len(self._dropped)

    def add(self, record: Record) -> None:
        """Count one part."""
        key = record.split, record.number
        self._first_rows[key] = len(self._contents) // _DIGEST_BYTES
        self._shards[key] = record.shard
        for row in record.rows:
            self._contents += bytes.fromhex(row.content)
            self._sources += bytes.fromhex(row.source_sha256)
            self._use(row.files, 1)
        for reject in record.rejects:
            self._rejects[reject.path] = reject
        self.num_done += sum(len(row.files) for row in record.rows) + len(record.rejects)

    def repeated(self) -> dict[Key, NDArray[np.int64]]:
        """By part, the numbers of its rows whose target has bytes that another row's target has, too."""
        halves = np.frombuffer(bytes(self._sources), ">u8").reshape(-1, 4)[:, :2]
        order = np.lexsort((halves[:, 1], halves[:, 0]))
        same = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
        rows = np.unique(np.concatenate([order[1:][same], order[:-1][same]]))
        keys = list(self._first_rows)
        firsts = np.array([self._first_rows[key] for key in keys], np.int64)
        parts = np.searchsorted(firsts, rows, side="right") - 1
        # A part without rows begins where the next one does; searchsorted finds the last of them, which has some.
        return {keys[part]: rows[parts == part] - firsts[part] for part in np.unique(parts).tolist()}

    def drop(self, key: Key, twins: Iterable[Twin]) -> None:
        """Set the files of rows aside that are there already."""
        for twin in twins:
            self._dropped.append(self._first_rows[key] + twin.number)
            self._use(twin.row.files, -1)
            target, *others = twin.row.files
            self._rejects[target] = Reject(target, "duplicate", f"same bytes as {twin.first}")
            for path in others:
                self._rejects[path] = Reject(path, "orphan", f"its target {target} is a duplicate")

    def shard(self, key: Key) -> Shard | None:
        """The shard of a part."""
        return self._shards[key]

    def replace(self, key: Key, shard: Shard | None) -> None:
        """The shard of a part that was written anew, None if nothing is left of it."""
        self._shards[key] = shard

    def splits(self) -> dict[str, Split]:
        """All shards, by split and number."""
        found: dict[str, list[Shard]] = {}
        for (split, _), shard in sorted(self._shards.items(), key=lambda item: item[0]):
            if shard is not None:
                found.setdefault(split, []).append(shard)
        return {name: Split(rows=sum(s.rows for s in shards), shards=tuple(shards)) for name, shards in found.items()}

    def rejects(self) -> list[Reject]:
        """Files that are in no row, in natural order."""
        uses: Mapping[str, int] = self._uses or {}
        return sorted((r for r in self._rejects.values() if not uses.get(r.path)), key=lambda r: natural(r.path))

    def num_used(self) -> int:
        """Files that are in rows, each counted once."""
        return self._num_used if self._uses is None else sum(count > 0 for count in self._uses.values())

    def content_hash(self) -> str:
        """sha256 over the sorted digests of the rows that stay, as hexadecimal text."""
        rows = np.frombuffer(bytes(self._contents), f"S{_DIGEST_BYTES}")
        kept = np.sort(np.delete(rows, self._dropped))
        digest = hashlib.sha256()
        for start in range(0, len(kept), _HASH_ROWS):
            digest.update(kept[start : start + _HASH_ROWS].tobytes().hex().encode())
        return digest.hexdigest()

    def _use(self, files: tuple[str, ...], change: int) -> None:
        self._num_used += change * len(files)
        if self._uses is not None:
            for path in files:
                self._uses[path] += change


def find_twins(
    records: Iterable[Record], repeated: Mapping[Key, NDArray[np.int64]], *, favored: str | None = "val"
) -> dict[Key, list[Twin]]:
    """Which of the repeated rows to drop: all but the first by name, those of a favored split before others.

    Args:
        records: of the parts in `repeated`.
        repeated: as Tally.repeated() gives it.
        favored: a split that keeps its pictures. None where ids chose the splits: there `val` would get more of the
            pictures that have copies than of others.
    """
    owner: dict[str, str] = {}
    twins: dict[Key, list[Twin]] = {}
    entries = (
        (row, (record.split, record.number), number)
        for record in records
        for number in repeated[record.split, record.number].tolist()
        for row in [record.rows[number]]
    )
    for row, key, number in sorted(entries, key=lambda entry: (entry[1][0] != favored, natural(entry[0].files[0]))):
        first = owner.setdefault(row.source_sha256, row.files[0])
        if first != row.files[0]:
            twins.setdefault(key, []).append(Twin(row, number, first))
    return twins
