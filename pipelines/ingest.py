"""Make a dataset from a folder of pictures, on Ray Data: local or s3:// on both ends.

    job = prepare("photos", "s3://bucket/faces", size=64)     # names only: tells at once what is wrong
    cluster.connect(settings)
    manifest = job.run(progress)

Every file ends in a row or in rejects.jsonl. Work goes in parts, one shard each; a killed ingest continues after the
last finished part. Not here: which files belong together, see pipelines/layout.py; one part, see pipelines/parts.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

import ray

from animediffusion.pipelines.dataset import MANIFEST, Manifest, Shard, Split, silence_ray_data, write_shard
from animediffusion.pipelines.layout import LAYOUTS, Plan, Reject, id_rank, is_junk, natural, plan_folder, plan_pairs
from animediffusion.pipelines.parts import Part, Record, make_part, read_record, record_path
from animediffusion.pipelines.shards import read_shard
from animediffusion.platform import storage
from animediffusion.platform.errors import ConfigError, DataError, StorageError

PART_ROWS = 256
STATE = "_parts"
"""Folder of an unfinished ingest, below the destination."""
_PLAN = f"{STATE}/plan.json"
_VERSION = 1

Progress = Callable[[int, int, int], None]
"""Called with files done, files in all, rejects so far."""


@dataclass(frozen=True)
class Job:
    """What an ingest will do, or `done` with the manifest that is there already."""

    source: str
    destination: str
    size: int
    plan: Plan
    fingerprint: str
    done: Manifest | None = None
    continues: bool = False
    """Whether a part of it was made before."""

    def run(self, progress: Progress | None = None) -> Manifest:
        """Make what is missing and write the manifest; Ray is connected by the caller.

        Raises:
            DataError: if no picture is usable.
            StorageError: if source or destination fails; the same call continues later.
        """
        if self.done is not None:
            return self.done
        storage.write_bytes(storage.join(self.destination, _PLAN), json.dumps(self._state()).encode())
        return _finish(self, self._records(progress or _silent))

    def parts(self) -> list[Part]:
        """The work in pieces of one shard; rows in an order without meaning, so that neighbours are strangers."""
        parts = []
        for split in sorted({sample.split for sample in self.plan.samples}):
            rows = sorted(
                (sample for sample in self.plan.samples if sample.split == split),
                key=lambda sample: (id_rank(sample.id), sample.id),
            )
            for number, start in enumerate(range(0, len(rows), PART_ROWS)):
                parts.append(Part(split, number, tuple(rows[start : start + PART_ROWS])))
        return parts

    def _state(self) -> dict[str, str]:
        return {"fingerprint": self.fingerprint, "source": self.source}

    def _records(self, progress: Progress) -> list[Record]:
        """Records of all parts, made before or now."""
        parts = self.parts()
        finished = set(storage.list_files(storage.join(self.destination, STATE)))
        ready = [part for part in parts if record_path(part) in finished]
        missing = [part for part in parts if record_path(part) not in finished]
        total = len({path for sample in self.plan.samples for path in sample.files}) + len(self.plan.rejects)
        records: list[Record] = []
        seen = {reject.path for reject in self.plan.rejects}
        rejected = len(seen)
        earlier = (read_record(storage.join(self.destination, STATE, record_path(part))) for part in ready)
        for record in chain(earlier, _make(self, missing)):
            records.append(record)
            seen |= record.files
            rejected += len(record.rejects)
            progress(len(seen), total, rejected)
        return records


def ingest(
    source: str,
    destination: str,
    size: int = 64,
    pairs: str | None = None,
    val_fraction: float = 0.05,
    progress: Progress | None = None,
) -> Manifest:
    """prepare() and Job.run() in one; arguments and errors as theirs."""
    return prepare(source, destination, size, pairs, val_fraction).run(progress)


def prepare(source: str, destination: str, size: int = 64, pairs: str | None = None, val_fraction: float = 0.05) -> Job:
    """Look at names and settings and say what is to be done; opens no picture and needs no Ray.

    Args:
        source: folder of pictures, local or s3://.
        destination: where the dataset goes, local or s3://.
        size: pixels of a side; pictures are resized by the short side, and the middle is kept.
        pairs: a CSV with columns target[,sketch,reference,cross_reference,split], paths relative to the source.
        val_fraction: share of `val` where neither folders nor the CSV name splits.

    Raises:
        DataError: if the source holds nothing usable or the destination holds something else.
        StorageError: if one of them cannot be reached.
        ConfigError: if size or val_fraction is out of range.
    """
    if not 8 <= size <= 4096:
        raise ConfigError("size", str(size), "8 to 4096 pixels")
    if not 0 <= val_fraction < 1:
        raise ConfigError("val_fraction", str(val_fraction), "0 to below 1")
    source, destination = storage.absolute(source), storage.absolute(destination)
    if _inside(destination, source):
        raise DataError(destination, "lies inside the source", "choose a place outside of it")
    if not storage.exists(source):
        raise DataError(source, "no such folder", f"expected {LAYOUTS}")
    sizes = storage.list_sizes(source)
    text = _read_pairs(source, pairs) if pairs is not None else None
    plan = plan_folder(source, sizes, val_fraction) if text is None else plan_pairs(source, text, sizes, val_fraction)
    job = Job(source, destination, size, plan, _fingerprint(plan, sizes, size))
    return _compare(job)


def _compare(job: Job) -> Job:
    """The job with what the destination holds of it already."""
    listed = storage.list_files(job.destination) if storage.exists(job.destination) else []
    there = [path for path in listed if not is_junk(path)]
    if MANIFEST in there:
        manifest = Manifest.load(job.destination)
        if manifest.fingerprint == job.fingerprint:
            return replace(job, done=manifest)
        raise DataError(job.destination, f"holds another dataset (from {manifest.source})", "choose an empty place")
    if _PLAN in there:
        state = json.loads(storage.read_bytes(storage.join(job.destination, _PLAN)))
        if state.get("fingerprint") == job.fingerprint:
            return replace(job, continues=True)
        found = f"holds an unfinished ingest of other content (from {state.get('source')})"
        raise DataError(job.destination, found, "choose an empty place, or delete it")
    if there:
        raise DataError(job.destination, f"holds other files ({there[0]})", "choose an empty place")
    return job


def _inside(inner: str, outer: str) -> bool:
    inner, outer = (uri.partition("?")[0].rstrip("/") for uri in (inner, outer))
    return inner == outer or inner.startswith(outer + "/")


def _read_pairs(source: str, pairs: str) -> str:
    place = pairs
    if not storage.is_remote(pairs) and not Path(pairs).is_file():
        place = storage.join(source, pairs)
    if not storage.exists(place):
        raise DataError(pairs, "no such pairs CSV", "give a file with a column `target`")
    try:
        return storage.read_bytes(place).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(pairs, "is not UTF-8 text", "save the CSV as UTF-8") from error


def _fingerprint(plan: Plan, sizes: dict[str, int], size: int) -> str:
    """Equal for equal names, sizes in bytes, roles and splits: what was read is not read again to compare it."""
    rows = [[*asdict(sample).values(), *(sizes[path] for path in sample.files)] for sample in plan.samples]
    what = [_VERSION, size, sorted(rows, key=str), sorted(reject.path for reject in plan.rejects)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _make(job: Job, parts: list[Part]) -> Iterable[Record]:
    """Records of parts as Ray finishes them."""
    if not parts:
        return
    silence_ray_data()
    table = [{"part": part.to_json()} for part in parts]
    where = {"source": job.source, "destination": job.destination, "state": STATE, "size": job.size}
    made = ray.data.from_items(table, override_num_blocks=len(table)).map_batches(
        make_part, batch_size=1, fn_kwargs=where
    )
    for row in made.iter_rows():
        if row["error"]:
            raise StorageError(*json.loads(row["error"]))
        yield Record.model_validate_json(row["record"])


def _finish(job: Job, records: list[Record]) -> Manifest:
    """Set duplicates aside, list the shards, write rejects and manifest, and clear the state."""
    rejects = {reject.path: reject for reject in job.plan.rejects}
    for record in records:
        rejects.update({reject.path: reject for reject in record.rejects})
    twins = _duplicates(records)
    samples = {sample.id: sample for sample in job.plan.samples}
    for name, first in twins.items():
        target, *others = samples[name].files
        rejects[target] = Reject(target, "duplicate", f"same bytes as {first}")
        rejects.update({path: Reject(path, "orphan", f"its target {target} is a duplicate") for path in others})
    kept = [row for record in records for row in record.rows if row.id not in twins]
    used = {path for row in kept for path in row.files}
    final = sorted((reject for reject in rejects.values() if reject.path not in used), key=lambda r: natural(r.path))
    lines = "".join(json.dumps(asdict(reject)) + "\n" for reject in final)
    if not kept:
        storage.delete(storage.join(job.destination, STATE))
        reasons = ", ".join(sorted({reject.reason for reject in final}))
        raise DataError(job.source, f"no usable picture among {len(final)} files ({reasons})", "give readable pictures")
    splits: dict[str, list[Shard]] = {}
    for record in sorted(records, key=lambda record: (record.split, record.number)):
        shard = _without(job.destination, record, twins)
        if shard is not None:
            splits.setdefault(record.split, []).append(shard)
    manifest = Manifest(
        image_size=job.size,
        splits={
            name: Split(rows=sum(shard.rows for shard in shards), shards=tuple(shards))
            for name, shards in splits.items()
        },
        num_files=len(used) + len(final),
        num_rejects=len(final),
        source=job.source,
        content_hash=hashlib.sha256("".join(sorted(row.content for row in kept)).encode()).hexdigest(),
        fingerprint=job.fingerprint,
    )
    storage.write_bytes(storage.join(job.destination, "rejects.jsonl"), lines.encode())
    manifest.save(job.destination)
    storage.delete(storage.join(job.destination, STATE))
    return manifest


def _duplicates(records: list[Record]) -> dict[str, str]:
    """Ids of rows whose target's bytes another row has under another name, and that name; `val` keeps its pictures."""
    owner: dict[str, str] = {}
    twins = {}
    rows = [(record.split != "val", natural(row.files[0]), row) for record in records for row in record.rows]
    for _, _, row in sorted(rows, key=lambda entry: entry[:2]):
        first = owner.setdefault(row.source_sha256, row.files[0])
        if first != row.files[0]:
            twins[row.id] = first
    return twins


def _without(destination: str, record: Record, twins: dict[str, str]) -> Shard | None:
    """The shard of a part, written anew if it holds duplicates; None if nothing is left."""
    keep = {row.id for row in record.rows if row.id not in twins}
    if record.shard is None or len(keep) == len(record.rows):
        return record.shard
    place = storage.join(destination, record.shard.path)
    if not keep:
        storage.delete(place)
        return None
    rows = [row for row in read_shard(place) if row["id"] in keep]
    return write_shard(destination, record.split, record.number, rows)


def _silent(done: int, total: int, rejects: int) -> None:
    """No progress is shown."""
