"""Make a dataset from a folder of pictures with Ray Data; source and destination are local or s3://.

    job = prepare("photos", "s3://bucket/faces", size=64)     # checks names and settings, opens no picture
    cluster.connect(settings)
    manifest = job.run(progress)

Every file ends in a row or in rejects.jsonl. The work is split into parts of one shard each, which run in parallel on
the whole cluster. If the driver or a worker is killed at any moment, the same call resumes and ends with the same
content; it skips every part that has a record.

Memory of the driver: for each row, 120 bytes of names (half a kilobyte during pairing, plus the listing of the source),
then 64 bytes for two digests; for each part, its shard; and all rejects. The driver keeps neither pictures nor records.
pipelines/data/source_layout.py decides which files belong together, pipelines/data/ingest_task.py makes one part, and
pipelines/data/ingest_summary.py sums up all parts.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray

from animediffusion.pipelines.data.formats.catalog import Catalog, read_catalog, single_file
from animediffusion.pipelines.data.formats.corrections import MAX_SHARE, SCHEME, plan_corrections, store_of
from animediffusion.pipelines.data.ingest_plan import IngestPlan, Reject, Sample
from animediffusion.pipelines.data.ingest_summary import Duplicate, IngestSummary, find_duplicates
from animediffusion.pipelines.data.ingest_task import (
    STATE,
    DropRows,
    MakePart,
    PartKey,
    Record,
    pack,
    read_record,
    run_packed,
)
from animediffusion.pipelines.data.manifest import MANIFEST, Manifest
from animediffusion.pipelines.data.pairs import plan_pairs
from animediffusion.pipelines.data.source_layout import LAYOUTS, plan_folder
from animediffusion.platform.cluster import cluster
from animediffusion.platform.errors import ConfigError, DataError, StorageError
from animediffusion.platform.images.picture_names import DECODED_SUFFIXES, is_junk
from animediffusion.platform.storage import storage

MIN_PART_ROWS = 256
MAX_PART_ROWS = 4096
"""This limit keeps the work that is lost with a worker below a minute of one core."""
PART_BYTES = 64 * 2**20
"""Approximate size of a shard: large enough for an object store, small enough for the memory of a task."""
MAX_FILE_BYTES = 512 * 2**20
"""Size of the largest decodable picture without compression; a larger file does not fit into a worker's memory."""
MANY_PARTS = 64
"""Target number of parts for a small source, so that this many cores have work."""
_PLAN = f"{STATE}/plan.json"
_VERSION = 1
_OLD_PART_ROWS = 256
"""Rows per part of an unfinished ingest whose plan file does not contain `part_rows`."""
_READERS = 16

Progress = Callable[[int, int, int], None]
"""A callback that gets the files done, the total number of files, and the rejects so far."""
T = TypeVar("T")


def run_tasks(tasks: Iterable[Callable[[], T]], note: Callable[[str], None]) -> Iterator[T]:
    """Run tasks on the cluster and yield their results in any order; Ray retries the task of a worker that dies.

    Ray Data's own CheckpointConfig does not fit: its driver reads back the ids of all rows that are done, and its
    writers name files by task, so a second run would cut different shards. A record for each shard costs one name in a
    listing.

    Args:
        tasks: functions that can be pickled; a task is released when it is packed.
        note: a callback that gets a line while the cluster has no room for a task.

    Raises:
        StorageError: if a task raised it.
    """
    table = [{"task": pack(task)} for task in tasks]
    if not table:
        return
    cluster.silence_ray_data()
    rows = ray.data.from_items(table, override_num_blocks=len(table)).map_batches(run_packed, batch_size=1)
    with cluster.waits(note) as moved:
        for row in rows.iter_rows():
            moved()
            result = pickle.loads(row["result"])
            if isinstance(result, StorageError):
                raise result
            yield result


@dataclass(frozen=True)
class IngestJob:
    """The planned work of an ingest; `done` is the manifest if the dataset already exists."""

    source: str
    destination: str
    size: int
    plan: IngestPlan
    fingerprint: str
    part_rows: int
    catalog: Catalog
    done: Manifest | None = None
    continues: bool = False
    """Whether this job resumes an unfinished ingest."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many corrections of each API key are left out, because the key has more than its share."""

    def run(self, progress: Progress | None = None, note: Callable[[str], None] | None = None) -> Manifest:
        """Make the missing parts and write the manifest; the caller connects to Ray first.

        Args:
            progress: a callback for the numbers of files.
            note: a callback for a line that says which resources the ingest waits for.

        Raises:
            DataError: if no picture is usable.
            StorageError: if source or destination fails; the same call resumes later.
        """
        if self.done is not None:
            _clear(self)
            return self.done
        progress, note = progress or _silent, note or _silent
        state = {"fingerprint": self.fingerprint, "source": self.source, "part_rows": self.part_rows}
        storage.write_bytes(storage.join(self.destination, _PLAN), json.dumps(state).encode())
        summary = IngestSummary(self.plan.rejects, shared=self.plan.shared)
        total = self.plan.samples.num_files + len(self.plan.rejects)
        parts = self.parts()
        finished = set(storage.list_files(storage.join(self.destination, STATE)))
        for record in _read_records(self.destination, [part for part in parts if part.record_name in finished]):
            summary.add(record)
        progress(summary.num_done, total, summary.num_rejects)
        missing = (
            self._make_part(part, self.plan.samples.take(rows))
            for part, rows in parts.items()
            if part.record_name not in finished
        )
        for record in run_tasks(missing, note):
            summary.add(record)
            progress(summary.num_done, total, summary.num_rejects)
        _drop_duplicates(self, summary, note)
        return _finish(self, summary)

    def _make_part(self, part: PartKey, samples: tuple[Sample, ...]) -> MakePart:
        paths = ((path, self.catalog.place(path)) for sample in samples for path in sample.files)
        places = tuple((path, place) for path, place in paths if place is not None)
        source = self.catalog.source
        return MakePart(source, self.destination, self.size, part, samples, places, self.plan.in_order)

    def parts(self) -> dict[PartKey, NDArray[np.int64]]:
        """Return the row numbers of each part, by the hash of the id or in the order of a table."""
        return {
            PartKey(split, number): rows[start : start + self.part_rows]
            for split, rows in self.plan.samples.by_split(in_order=self.plan.in_order).items()
            for number, start in enumerate(range(0, len(rows), self.part_rows))
        }


def ingest(
    source: str,
    destination: str,
    size: int = 64,
    pairs: str | None = None,
    val_fraction: float = 0.05,
    progress: Progress | None = None,
) -> Manifest:
    """Call prepare() and IngestJob.run(), with the arguments and errors of both functions."""
    return prepare(source, destination, size, pairs, val_fraction).run(progress)


def prepare(
    source: str,
    destination: str,
    size: int = 64,
    pairs: str | None = None,
    val_fraction: float = 0.05,
    max_share: float | None = None,
) -> IngestJob:
    """Plan an ingest from file names and settings; it opens no picture and does not need Ray.

    Args:
        source: folder of pictures, archives or tables, or one archive or table, local or remote; or `corrections://`,
            the store of ANIMEDIFFUSION_CORRECTIONS, or `corrections://ADDRESS`.
        destination: folder of the dataset, local or s3://.
        size: pixels of a side; pictures are resized by the short side and cropped to the middle.
        pairs: a CSV with columns target[,sketch,reference,cross_reference,split], paths relative to the source.
        val_fraction: share of the rows that go to `val` if neither folders nor the CSV name splits.
        max_share: largest share of the rows that the corrections of one API key may be, 0.5 if None.

    Raises:
        DataError: if the source holds nothing usable, or the destination holds other files or another dataset.
        StorageError: if source or destination is unreachable.
        ConfigError: if an argument is out of range or does not fit the source.
    """
    if not 8 <= size <= 4096:
        raise ConfigError("--size", str(size), "8 to 4096 pixels")
    if not 0 <= val_fraction < 1:
        raise ConfigError("--val-fraction", str(val_fraction), "0 to below 1")
    if source.startswith(SCHEME):
        return _prepare_corrections(source, storage.absolute(destination), size, pairs, val_fraction, max_share)
    if max_share is not None:
        raise ConfigError("--max-share", f"is given for {source}", f"leave it out: it is for {SCHEME}")
    source, destination = storage.absolute(source), storage.absolute(destination)
    if _inside(destination, source):
        raise DataError(destination, "lies inside the source", "choose a folder outside of it")
    if not storage.exists(source):
        raise DataError(source, "no such folder", f"expected {LAYOUTS}")
    catalog, rejects = _survey(source)
    rejected = {reject.path for reject in rejects}
    paths = [path for path in catalog.paths if path not in rejected]
    if pairs is not None:
        if catalog.tables:
            raise ConfigError("--pairs", f"is given for tables ({catalog.tables[0].path})", "leave it out")
        plan = plan_pairs(source, _read_pairs(catalog.source, pairs), paths, val_fraction)
    elif catalog.tables:
        plan = catalog.plan_tables(val_fraction)
    else:
        plan = plan_folder(source, paths, val_fraction, catalog.split_of if len(catalog.places) else None)
    plan = replace(plan, rejects=plan.rejects + rejects)
    fingerprint = _fingerprint(plan, catalog.num_bytes, size)
    return _resume(IngestJob(source, destination, size, plan, fingerprint, choose_part_rows(plan, size), catalog))


def _prepare_corrections(
    source: str, destination: str, size: int, pairs: str | None, val_fraction: float, max_share: float | None
) -> IngestJob:
    if pairs is not None:
        raise ConfigError("--pairs", "is given for corrections", "leave it out")
    if max_share is not None and not 0 < max_share <= 1:
        raise ConfigError("--max-share", str(max_share), "above 0, at most 1")
    store = store_of(source)
    if _inside(destination, store):
        raise DataError(destination, "lies inside the corrections store", "choose a folder outside of it")
    found = plan_corrections(store, val_fraction, MAX_SHARE if max_share is None else max_share)
    fingerprint, part_rows = _fingerprint(found.plan, found.stamps, size), choose_part_rows(found.plan, size)
    job = IngestJob(SCHEME + store, destination, size, found.plan, fingerprint, part_rows, found.catalog)
    return _resume(replace(job, left_out=found.left_out))


def _survey(source: str) -> tuple[Catalog, tuple[Reject, ...]]:
    """List a folder, or a source that is one archive or table; return the pictures in it and what cannot be used."""
    single = single_file(source)
    num_bytes = storage.file_size(source) if single is not None else None
    if single is not None and num_bytes is not None:
        folder, name = single
        catalog = read_catalog(folder, {name: num_bytes})
        return catalog, catalog.rejects
    sizes, faults = storage.survey(source)
    rejects = _unusable(source, sizes, faults)
    catalog = read_catalog(source, sizes)
    return catalog, rejects + catalog.rejects


def _unusable(source: str, sizes: dict[str, int], faults: dict[str, str]) -> tuple[Reject, ...]:
    """Return the rejects that names and sizes reveal: unusable names and folders, files too large for memory."""
    found = [Reject(path, "unreadable", fault) for path, fault in sorted(faults.items()) if not is_junk(path)]
    if found and not sizes:
        first = f"{found[0].path}: {found[0].detail}"
        raise DataError(source, f"none of its files can be used ({first})", "rename them, or check their permissions")
    for path, size in sizes.items():
        if size > MAX_FILE_BYTES and PurePosixPath(path).suffix.lower() in DECODED_SUFFIXES and not is_junk(path):
            found.append(Reject(path, "too_large", f"has {size:,} bytes, at most {MAX_FILE_BYTES:,}"))
    return tuple(found)


def choose_part_rows(plan: IngestPlan, size: int) -> int:
    """Choose the rows of a part: shards get a good size for a store, and small sources still make many parts."""
    rows = max(1, len(plan.samples))
    # Losslessly compressed pictures of this kind rarely take more than half of their raw bytes.
    row_bytes = 1.5 * size**2 * plan.samples.num_files / rows
    most = min(MAX_PART_ROWS, int(PART_BYTES / row_bytes))
    return max(1, min(most, max(MIN_PART_ROWS, rows // MANY_PARTS)))


def _resume(job: IngestJob) -> IngestJob:
    """Return the job, updated with the finished or unfinished ingest that the destination holds."""
    listed = storage.list_files(job.destination) if storage.exists(job.destination) else []
    existing = [path for path in listed if not is_junk(path)]
    if MANIFEST in existing:
        manifest = Manifest.load(job.destination)
        if manifest.fingerprint == job.fingerprint:
            return replace(job, done=manifest)
        raise DataError(job.destination, f"holds another dataset (from {manifest.source})", "choose an empty folder")
    if _PLAN in existing:
        state = json.loads(storage.read_bytes(storage.join(job.destination, _PLAN)))
        if state.get("fingerprint") == job.fingerprint:
            # The number of rows must match the existing parts.
            return replace(job, continues=True, part_rows=state.get("part_rows", _OLD_PART_ROWS))
        found = f"holds an unfinished ingest of other content (from {state.get('source')})"
        raise DataError(job.destination, found, "choose an empty folder, or delete this one")
    if existing:
        raise DataError(job.destination, f"holds other files ({existing[0]})", "choose an empty folder")
    return job


def _inside(inner: str, outer: str) -> bool:
    inner, outer = (uri.partition("?")[0].rstrip("/") for uri in (inner, outer))
    return inner == outer or inner.startswith(outer + "/")


def _read_pairs(source: str, pairs: str) -> str:
    uri = pairs
    if not storage.is_remote(pairs) and not Path(pairs).is_file():
        uri = storage.join(source, pairs)
    if not storage.exists(uri):
        raise DataError(pairs, "no such pairs CSV", "give a file with a column `target`")
    data = storage.read_bytes(uri)
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(pairs, "is not UTF-8 text", "save the CSV as UTF-8") from error


def _fingerprint(plan: IngestPlan, num_bytes: Callable[[str], int], size: int) -> str:
    """Hash the names, sizes in bytes, roles and splits, so that a rerun detects changes without reading pictures."""
    # The rows are hashed one by one as JSON: one json.dumps() of everything would hold all rows as lists.
    rows = sorted(map(_texts, ([*sample, *map(num_bytes, sample.files)] for sample in plan.samples)))
    head, tail = json.dumps([_VERSION, size])[:-1], json.dumps(sorted(reject.path for reject in plan.rejects))
    digest = hashlib.sha256(f"{head}, [".encode())
    for number, (_, row) in enumerate(rows):
        digest.update(f"{', ' if number else ''}{row}".encode())
    digest.update(f"], {tail}]".encode())
    return digest.hexdigest()


def _texts(row: list[Any]) -> tuple[str, str]:
    return str(row), json.dumps(row)


def _read_records(destination: str, parts: Sequence[PartKey]) -> Iterator[Record]:
    """Read the records of finished parts, a few at a time."""
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(parts), 2 * _READERS):
            yield from pool.map(partial(read_record, destination), parts[start : start + 2 * _READERS])


def _drop_duplicates(job: IngestJob, summary: IngestSummary, note: Callable[[str], None]) -> None:
    """Rewrite shards without duplicate rows; a run that is killed here repeats this step as a whole."""
    repeated = summary.repeated()
    found = _find_duplicates(job, repeated, None if job.plan.hashed else "val")
    if job.plan.hashed and _drops_all(found, "val", summary):
        found = _find_duplicates(job, repeated, "val")
    tasks = []
    for part, duplicates in found.items():
        summary.drop(part, duplicates)
        shard = summary.shard(part)
        if shard is not None:
            tasks.append(DropRows(job.destination, part, shard, frozenset(one.row.id for one in duplicates)))
    for part, shard in run_tasks(tasks, note):
        summary.replace(part, shard)


def _find_duplicates(
    job: IngestJob, repeated: dict[PartKey, NDArray[np.int64]], favored: str | None
) -> dict[PartKey, list[Duplicate]]:
    return find_duplicates(_read_records(job.destination, list(repeated)), repeated, favored=favored)


def _drops_all(found: dict[PartKey, list[Duplicate]], split: str, summary: IngestSummary) -> bool:
    """Return whether dropping these duplicates would empty a split."""
    splits = summary.splits()
    dropped = sum(len(duplicates) for part, duplicates in found.items() if part.split == split)
    return split in splits and dropped == splits[split].rows


def _finish(job: IngestJob, summary: IngestSummary) -> Manifest:
    """Write rejects and manifest, and delete the state folder."""
    rejects = summary.rejects()
    if not summary.num_rows:
        storage.delete(storage.join(job.destination, STATE))
        reasons = ", ".join(sorted({reject.reason for reject in rejects}))
        found = f"no usable picture among {len(rejects)} files ({reasons})"
        raise DataError(job.source, found, "give readable pictures")
    manifest = Manifest(
        image_size=job.size,
        splits=summary.splits(),
        num_files=summary.num_used() + len(rejects),
        num_rejects=len(rejects),
        source=job.source,
        content_hash=summary.content_hash(),
        fingerprint=job.fingerprint,
    )
    lines = "".join(json.dumps(asdict(reject)) + "\n" for reject in rejects)
    storage.write_bytes(storage.join(job.destination, "rejects.jsonl"), lines.encode())
    manifest.save(job.destination)
    _clear(job)
    return manifest


def _clear(job: IngestJob) -> None:
    """Delete the state folder and the partial files of killed runs."""
    files = storage.list_files(job.destination)
    if any(name.startswith(f"{STATE}/") for name in files):
        storage.delete(storage.join(job.destination, STATE))
    for name in files:
        if storage.is_partial(name):
            storage.delete(storage.join(job.destination, name))


def _silent(*_: object) -> None:
    """Ignore progress and notes."""
