"""Rows from the corrections store: corrections by people of pictures that a server gave them.

    source = plan_corrections("s3://bucket/corrections", val_fraction=0.05, max_share=0.5)

The target of a row is the corrected picture, the sketch is the lines as the network saw them, and the cross reference
is the first reference of the request: another picture with the right colors. The id is KEY/VERSION/REQUEST.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from animediffusion.pipelines.data.formats.archives import ArchiveMember, index_archive
from animediffusion.pipelines.data.formats.catalog import Catalog, Places
from animediffusion.pipelines.data.ingest_plan import IngestPlan, Reject, Sample, Samples
from animediffusion.pipelines.data.source_layout import hash_split
from animediffusion.platform.config import Settings
from animediffusion.platform.corrections.store import Corrections, Entry
from animediffusion.platform.errors import ConfigError, DataError, FileError
from animediffusion.platform.storage import storage

SCHEME = "corrections://"
MAX_SHARE = 0.5
"""Default of the largest share of the rows that the corrections of one API key may be."""
_ROLES = {"target": "corrected.png", "sketch": "lines.png", "cross_reference": "reference-1.png"}
_THREADS = 16


@dataclass(frozen=True)
class CorrectionsSource:
    """The rows of a corrections store."""

    catalog: Catalog
    plan: IngestPlan
    stamps: Callable[[str], int]
    """A function from a path of a row to a number that changes with the correction."""
    left_out: Counter[str]
    """How many corrections of each key are left out, because the key has more than its share."""


class _Row(NamedTuple):
    """One correction: its file, its record, and the members of its archive by name."""

    entry: Entry
    record: dict[str, Any]
    members: dict[str, ArchiveMember]

    @property
    def id(self) -> str:
        """KEY/VERSION/REQUEST."""
        return _id(self.entry)

    @property
    def request(self) -> tuple[str, ...]:
        """What is equal for two tries of one person with the same drawing and the same references."""
        pictures = sorted(name for name in self.record["sha256"] if name.startswith(("sketch", "reference")))
        return (self.record["key"], *(self.record["sha256"][name] for name in pictures))


def store_of(source: str) -> str:
    """Return the address of the store that `corrections://` or `corrections://ADDRESS` names.

    Raises:
        ConfigError: if the address is neither given nor set.
    """
    found = source.removeprefix(SCHEME) or Settings.from_environment().corrections_uri
    if not found:
        what_to_do = "set it to the store of your servers, or write corrections://FOLDER or corrections://s3://..."
        raise ConfigError("ANIMEDIFFUSION_CORRECTIONS", "is not set", what_to_do)
    return storage.absolute(found)


def plan_corrections(store: str, val_fraction: float, max_share: float) -> CorrectionsSource:
    """Plan the rows of a corrections store.

    Of several corrections of one person for the same drawing and the same references, the newest counts. If there are
    many keys, the corrections of one key are at most `max_share` of the rows, the newest ones; with fewer keys than
    1 / max_share, each key gives as many as the key with the fewest, and a single key gives all.

    Args:
        store: folder or URI of the store.
        val_fraction: share of the drawings whose rows go to `val`.
        max_share: above 0, at most 1.

    Raises:
        DataError: if the store has no correction that can be read.
        StorageError: if the store fails.
    """
    entries = Corrections(store).entries()
    if not entries:
        raise DataError(store, "no corrections yet", "they come from servers with ANIMEDIFFUSION_CORRECTIONS")
    rows, rejects = _read(store, entries)
    if not rows:
        raise DataError(store, f"none of its {len(entries)} corrections can be read", rejects[0].detail)
    rows, earlier = _newest(rows)
    rows, over = _bounded(rows, max_share)
    rejects += [reject for row in earlier for reject in _left_out(row, "duplicate", "corrected again later")]
    allowed = f"{max_share:g} of the rows"
    rejects += [
        reject for row in over for reject in _left_out(row, "share", f"corrections of its key are over {allowed}")
    ]
    split_of = hash_split({row.record["sha256"]["sketch.png"] for row in rows}, val_fraction)
    samples = [
        Sample(
            row.id,
            split_of(row.record["sha256"]["sketch.png"]),
            **{role: f"{row.id}/{name}" for role, name in _ROLES.items()},
        )
        for row in rows
    ]
    members = [(f"{row.id}/{name}", number, row.members[name]) for number, row in enumerate(rows) for name in _names()]
    containers = [(storage.join(store, row.entry.path), row.entry.path) for row in rows]
    stamps = {f"{row.id}/corrected.png": int(row.record["sha256"]["corrected.png"][:12], 16) for row in rows}
    catalog = Catalog(store, {}, tuple(path for path, _, _ in members), Places(members, containers))
    plan = IngestPlan(Samples(samples), tuple(rejects), hashed=True)
    return CorrectionsSource(catalog, plan, lambda path: stamps.get(path, 0), Counter(row.entry.key for row in over))


def most_rows(numbers: Sequence[int], max_share: float) -> int:
    """Return how many rows one key may give, from the number of rows that each key has."""
    share = max(max_share, 1 / len(numbers))
    most = max(numbers)
    while most > (allowed := share * sum(min(number, most) for number in numbers) + 1e-9):
        most = min(most - 1, int(allowed))
    return most


def _names() -> Iterable[str]:
    return _ROLES.values()


def _id(entry: Entry) -> str:
    return entry.path.partition("/")[2].removesuffix(".zip")


def _read(store: str, entries: Sequence[Entry]) -> tuple[list[_Row], list[Reject]]:
    """Read the records and the directories of the archives; an archive that cannot be used is a reject."""

    def index(entry: Entry) -> dict[str, ArchiveMember] | DataError | FileError:
        try:
            members, _ = index_archive(storage.join(store, entry.path), entry.path)
        except (DataError, FileError) as error:
            return error
        return {member.name: member for member in members}

    rows, rejects = [], []
    with ThreadPoolExecutor(_THREADS) as pool:
        found = zip(entries, Corrections(store).read_records(entries), pool.map(index, entries), strict=True)
    for entry, record, members in found:
        if isinstance(record, dict) and isinstance(members, dict) and members.keys() >= set(_names()):
            rows.append(_Row(entry, record, members))
            continue
        faults = [one for one in (record, members) if isinstance(one, DataError | FileError)]
        rejects.append(Reject(_id(entry), "unreadable", faults[0].found if faults else "lacks a picture"))
    return rows, rejects


def _newest(rows: Iterable[_Row]) -> tuple[list[_Row], list[_Row]]:
    """Return the newest correction of each drawing with its references by each person, newest first, and the others."""
    newest: dict[tuple[str, ...], _Row] = {}
    in_order = sorted(rows, key=lambda row: (row.record["time"], row.id), reverse=True)
    others = [row for row in in_order if newest.setdefault(row.request, row) is not row]
    return list(newest.values()), others


def _bounded(rows: Sequence[_Row], max_share: float) -> tuple[list[_Row], list[_Row]]:
    """Return the rows that are within their key's share, and those that are over it."""
    most = most_rows(list(Counter(row.entry.key for row in rows).values()), max_share)
    within: list[_Row] = []
    over: list[_Row] = []
    number: Counter[str] = Counter()
    for row in rows:
        number[row.entry.key] += 1
        (within if number[row.entry.key] <= most else over).append(row)
    return within, over


def _left_out(row: _Row, reason: str, detail: str) -> list[Reject]:
    target, *others = (f"{row.id}/{name}" for name in _names())
    return [
        Reject(target, reason, detail),
        *(Reject(path, "orphan", f"its target {target} is left out") for path in others),
    ]
