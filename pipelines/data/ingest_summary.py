"""Summary of an ingest over all parts: counts, duplicates and the content hash, in 64 bytes per row.

pipelines/data/ingest_task.py makes the parts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from animediffusion.pipelines.data.ingest_plan import Reject
from animediffusion.pipelines.data.ingest_task import PartKey, Record, RowRecord
from animediffusion.pipelines.data.manifest import Shard, Split
from animediffusion.pipelines.data.source_layout import natural

_DIGEST_BYTES = 32
_HASH_ROWS = 65536


class Duplicate(NamedTuple):
    """A duplicate row to drop, its number in its part, and the file with the same bytes that stays."""

    row: RowRecord
    number: int
    first: str


class IngestSummary:
    """Summary of the records of all parts, added in any order; it stores only two digests per row.

    Args:
        rejects: files that were rejected before any part was made.
        shared: whether a file may be in several rows; if so, the uses of every file name are counted too.
    """

    def __init__(self, rejects: Iterable[Reject], *, shared: bool) -> None:
        self._rejects = {reject.path: reject for reject in rejects}
        self._shards: dict[PartKey, Shard | None] = {}
        self._first_rows: dict[PartKey, int] = {}
        self._sources, self._contents = bytearray(), bytearray()
        self._dropped: list[int] = []
        self._num_used = 0
        self._uses: Counter[str] | None = Counter() if shared else None
        self.num_done = len(self._rejects)
        """Number of processed files; a file in several rows counts several times."""

    @property
    def num_rejects(self) -> int:
        """Number of files rejected so far."""
        return len(self._rejects)

    @property
    def num_rows(self) -> int:
        """Number of rows, without the dropped ones."""
        return len(self._contents) // _DIGEST_BYTES - len(self._dropped)

    def add(self, record: Record) -> None:
        """Add the record of one part."""
        key = record.part
        self._first_rows[key] = len(self._contents) // _DIGEST_BYTES
        self._shards[key] = record.shard
        for row in record.rows:
            self._contents += bytes.fromhex(row.content)
            self._sources += bytes.fromhex(row.source_sha256)
            self._use(row.files, 1)
        for reject in record.rejects:
            self._rejects[reject.path] = reject
        self.num_done += sum(len(row.files) for row in record.rows) + len(record.rejects)

    def repeated(self) -> dict[PartKey, NDArray[np.int64]]:
        """Return, for each part, the numbers of the rows whose target has the same bytes as another row's target."""
        halves = np.frombuffer(bytes(self._sources), ">u8").reshape(-1, 4)[:, :2]
        order = np.lexsort((halves[:, 1], halves[:, 0]))
        same = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
        rows = np.unique(np.concatenate([order[1:][same], order[:-1][same]]))
        keys = list(self._first_rows)
        firsts = np.array([self._first_rows[key] for key in keys], np.int64)
        parts = np.searchsorted(firsts, rows, side="right") - 1
        # An empty part begins at the same row as the next part; side="right" finds the last of them, which has rows.
        return {keys[part]: rows[parts == part] - firsts[part] for part in np.unique(parts).tolist()}

    def drop(self, key: PartKey, duplicates: Iterable[Duplicate]) -> None:
        """Reject the files of duplicate rows of a part."""
        for duplicate in duplicates:
            self._dropped.append(self._first_rows[key] + duplicate.number)
            self._use(duplicate.row.files, -1)
            target, *others = duplicate.row.files
            self._rejects[target] = Reject(target, "duplicate", f"same bytes as {duplicate.first}")
            for path in others:
                self._rejects[path] = Reject(path, "orphan", f"its target {target} is a duplicate")

    def shard(self, key: PartKey) -> Shard | None:
        """Return the shard of a part."""
        return self._shards[key]

    def replace(self, key: PartKey, shard: Shard | None) -> None:
        """Set the rewritten shard of a part; None if no row is left."""
        self._shards[key] = shard

    def splits(self) -> dict[str, Split]:
        """Return the shards of every split, sorted by number."""
        found: dict[str, list[Shard]] = {}
        for (split, _), shard in sorted(self._shards.items(), key=lambda item: item[0]):
            if shard is not None:
                found.setdefault(split, []).append(shard)
        return {name: Split(rows=sum(s.rows for s in shards), shards=tuple(shards)) for name, shards in found.items()}

    def rejects(self) -> list[Reject]:
        """Return the rejected files that no row uses, in natural order."""
        uses: Mapping[str, int] = self._uses or {}
        return sorted((r for r in self._rejects.values() if not uses.get(r.path)), key=lambda r: natural(r.path))

    def num_used(self) -> int:
        """Return the number of files that rows use; each file counts once."""
        return self._num_used if self._uses is None else sum(count > 0 for count in self._uses.values())

    def content_hash(self) -> str:
        """Return the sha256 over the sorted digests of the remaining rows, as hexadecimal text."""
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


def find_duplicates(
    records: Iterable[Record], repeated: Mapping[PartKey, NDArray[np.int64]], *, favored: str | None = "val"
) -> dict[PartKey, list[Duplicate]]:
    """Return the duplicate rows to drop, by part.

    One row of those with the same target bytes stays: the first by name, where rows of the favored split precede all
    other rows.

    Args:
        records: the records of the parts in `repeated`.
        repeated: the result of IngestSummary.repeated().
        favored: a split that keeps its pictures. Use None where the hash of the id chose the splits: a favored `val`
            would get more than its share of the pictures that have copies.
    """
    owner: dict[str, str] = {}
    duplicates: dict[PartKey, list[Duplicate]] = {}
    entries = (
        (row, record.part, number)
        for record in records
        for number in repeated[record.part].tolist()
        for row in [record.rows[number]]
    )
    for row, key, number in sorted(entries, key=lambda entry: (entry[1][0] != favored, natural(entry[0].files[0]))):
        first = owner.setdefault(row.source_sha256, row.files[0])
        if first != row.files[0]:
            duplicates.setdefault(key, []).append(Duplicate(row, number, first))
    return duplicates
