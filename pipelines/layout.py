"""Which files of a source folder belong together: names only, nothing is opened.

Pictures are paired by stem, never by position. Layouts that are understood:

    0001.jpg ...                                         color pictures alone
    {train,val}/{target,sketch,reference,cross_reference}/0001.png
    Anime/train/{reference,condition}/1.jpg              AnimeDiffusion: `reference` is the target
    Anime/{train_data,test_data}/{reference,sketch}/     SSIMBaD; test_data_shuffled holds the same pictures again
    {train,val}/0001_{gt,sketch,ref}.png                 roles in the names
    pairs.csv                                            columns target[,sketch,reference,cross_reference,split]
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from animediffusion.platform.errors import DataError

LAYOUTS = "color pictures alone, or folders target|color|gt, sketch|condition|line|lineart, reference, cross_reference"

_ROLES = {
    "target": ("target", "targets", "color", "colour", "gt"),
    "sketch": ("sketch", "sketches", "condition", "line", "lines", "lineart", "line_art"),
    "reference": ("reference", "references", "ref"),
    "cross_reference": ("cross_reference", "cross_references"),
}
_ROLE_OF = {alias: role for role, aliases in _ROLES.items() for alias in aliases}
_SPLIT_OF = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_SUFFIX = re.compile(r"(.+)[_-](cross_reference|" + "|".join(sorted(_ROLE_OF, key=len, reverse=True)) + r")", re.I)
_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ""})
_JUNK = frozenset({"thumbs.db", "desktop.ini", "__macosx"})


@dataclass(frozen=True)
class Sample:
    """One row to be: paths relative to the source."""

    id: str
    split: str
    target: str
    sketch: str | None = None
    reference: str | None = None
    cross_reference: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """All its paths, the target first."""
        every = (self.target, self.sketch, self.reference, self.cross_reference)
        return tuple(path for path in every if path is not None)


@dataclass(frozen=True)
class Reject:
    """A file that is set aside, and why; reasons as in rejects.jsonl."""

    path: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Plan:
    """What to make of a source."""

    samples: tuple[Sample, ...]
    rejects: tuple[Reject, ...]


@dataclass(frozen=True)
class _Named:
    """A picture as its path tells it: `key` is the same for all pictures of one row."""

    path: str
    key: str
    role: str | None
    split: str | None


def plan_folder(source: str, paths: Iterable[str], val_fraction: float) -> Plan:
    """Rows from the names of all files of a folder.

    Args:
        source: how error messages call the folder.
        paths: relative to it.
        val_fraction: share of the rows that go to `val` where no folder says train, val or test.

    Raises:
        DataError: if nothing can be a target, or line art and targets have no stem in common.
    """
    seen = [path for path in sorted(paths, key=natural) if not is_junk(path)]
    rejects = [Reject(path, "not_an_image", "no picture by its name") for path in seen if not _is_picture(path)]
    named = _roles(_name(path) for path in seen if _is_picture(path))
    copies = [item for item in named if _is_shuffled_copy(item.path)]
    rejects += [Reject(item.path, "duplicate", "a shuffled copy of the test pictures") for item in copies]
    rows, aside = _pair([item for item in named if item not in copies])
    if not rows:
        found = f"none of its {len(seen)} files can be a target" if seen else "holds no files"
        raise DataError(source, found, f"expected {LAYOUTS}")
    if any(item.role == "sketch" for item in named) and not any("sketch" in row for row in rows.values()):
        raise DataError(source, "no line art has the name of a target", "give both the same file name, or a pairs CSV")
    return Plan(_samples(rows, val_fraction), tuple(rejects + aside))


def plan_pairs(source: str, text: str, paths: Iterable[str], val_fraction: float) -> Plan:
    """Rows from a pairs CSV, whose paths are relative to the source.

    Raises:
        DataError: without a `target` column, on an unknown split, or if no target exists.
    """
    there = set(paths)
    reader = csv.DictReader(io.StringIO(text.removeprefix("\ufeff")))
    if "target" not in (reader.fieldnames or []):
        columns = ", ".join(reader.fieldnames or []) or "none"
        raise DataError("pairs CSV", f"columns are {columns}", "target[,sketch,reference,cross_reference,split]")
    rejects: dict[str, Reject] = {}
    samples: list[Sample] = []
    names: dict[str, int] = {}
    for line, row in enumerate(reader, start=2):
        found: dict[str, str] = {}
        for role in _ROLES:
            path = (row.get(role) or "").strip().replace("\\", "/").removeprefix("./")
            if path in there:
                found[role] = path
            elif path:
                rejects[path] = Reject(path, "unreadable", f"no such file (line {line} of the CSV)")
        if "target" not in found:
            for path in found.values():
                rejects.setdefault(path, Reject(path, "orphan", f"its target is missing (line {line} of the CSV)"))
            continue
        stem = str(PurePosixPath(found["target"]).with_suffix(""))
        names[stem] = names.get(stem, 0) + 1
        unique = stem if names[stem] == 1 else f"{stem}#{names[stem]}"
        samples.append(Sample(unique, _csv_split(row.get("split"), line), **found))
    if not samples:
        raise DataError(source, "no target of the pairs CSV exists", "paths are relative to the source folder")
    if not any(sample.split for sample in samples):
        samples = _hash_split(samples, val_fraction)
    used = {path for sample in samples for path in sample.files}
    return Plan(
        _test_is_val(replace(sample, split=sample.split or "train") for sample in samples),
        tuple(reject for path, reject in rejects.items() if path not in used),
    )


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key: 2.jpg before 10.jpg, upper and lower case alike, and never a tie between different texts."""
    parts = re.split(r"(\d+)", text)
    key = [(0, int(part), "") if part.isdecimal() else (1, 0, part.lower()) for part in parts if part]
    return (*key, (2, 0, text))


def is_junk(path: str) -> bool:
    """Whether a path is hidden or one of the files that desktops leave behind."""
    return any(part.startswith(".") or part.lower() in _JUNK for part in PurePosixPath(path).parts)


def _is_picture(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in _PICTURES


def _is_shuffled_copy(path: str) -> bool:
    return any(part.lower().endswith("_shuffled") for part in PurePosixPath(path).parts[:-1])


def _name(path: str) -> _Named:
    """The role that the folder nearest to the file gives; the split that any folder gives."""
    folders = list(PurePosixPath(path).parts[:-1])
    places = [index for index, folder in enumerate(folders) if folder.lower() in _ROLE_OF]
    role = _ROLE_OF[folders.pop(places[-1]).lower()] if places else None
    splits = [_SPLIT_OF.get(folder.lower().removesuffix("_data")) for folder in folders]
    split = next((split for split in reversed(splits) if split), None)
    return _Named(path, "/".join([*folders, PurePosixPath(path).stem]), role, split)


def _roles(named: Iterable[_Named]) -> list[_Named]:
    """Every picture with its final role; None for one that no role fits."""
    items = list(named)
    if not any(item.role for item in items):
        items = _roles_from_suffixes(items)
    roles = {item.role for item in items}
    if "target" in roles:
        return items
    if "reference" in roles and ("sketch" in roles or None not in roles):
        return [replace(item, role="target") if item.role == "reference" else item for item in items]
    return [replace(item, role="target") if item.role is None else item for item in items]


def _roles_from_suffixes(items: list[_Named]) -> list[_Named]:
    """Roles as in 0001_gt.png and 0001_sketch.png, where line art and a color picture share a stem."""
    renamed = []
    roles: dict[str, set[str]] = {}
    for item in items:
        match = _SUFFIX.fullmatch(item.key)
        if match is None:
            renamed.append(item)
            continue
        role = _ROLE_OF[match[2].lower()]
        roles.setdefault(match[1], set()).add(role)
        renamed.append(replace(item, key=match[1], role=role))
    paired = any("sketch" in found and found & {"target", "reference"} for found in roles.values())
    return renamed if paired else items


def _pair(named: list[_Named]) -> tuple[dict[str, dict[str, _Named]], list[Reject]]:
    """Rows by key, each role once and always with a target; and the files that found no place."""
    alone = all(item.role == "target" for item in named)
    rows: dict[str, dict[str, _Named]] = {}
    rejects = []
    for item in named:
        if item.role is None:
            rejects.append(Reject(item.path, "orphan", "in none of the folders target, sketch, reference"))
            continue
        row = rows.setdefault(item.key, {})
        if item.role not in row:
            row[item.role] = item
        elif alone:
            rows[item.key + PurePosixPath(item.path).suffix] = {"target": item}
        else:
            rejects.append(Reject(item.path, "duplicate", f"same name as {row[item.role].path}"))
    for key in [key for key, row in rows.items() if "target" not in row]:
        rejects += [Reject(item.path, "orphan", "no target of this name") for item in rows.pop(key).values()]
    return rows, rejects


def _samples(rows: Mapping[str, Mapping[str, _Named]], val_fraction: float) -> tuple[Sample, ...]:
    samples = [
        Sample(key, row["target"].split or "", **{role: item.path for role, item in row.items()})
        for key, row in rows.items()
    ]
    if not any(sample.split for sample in samples):
        return tuple(_hash_split(samples, val_fraction))
    return _test_is_val(replace(sample, split=sample.split or "train") for sample in samples)


def _hash_split(samples: list[Sample], val_fraction: float) -> list[Sample]:
    """`val` by the hash of the id: a row stays where it is when others come or go."""
    if val_fraction <= 0 or len(samples) < 2:
        return [replace(sample, split="train") for sample in samples]
    ranks = {sample.id: id_rank(sample.id) for sample in samples}
    first, last = min(ranks.values()), max(ranks.values())
    limit = val_fraction * 2.0**256
    return [
        replace(sample, split="val" if ranks[sample.id] <= max(limit, first) and ranks[sample.id] < last else "train")
        for sample in samples
    ]


def id_rank(name: str) -> int:
    """A number below 2**256 that depends on the id alone: an order without meaning."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest(), "big")


def _test_is_val(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    rows = tuple(samples)
    if any(row.split == "val" for row in rows):
        return rows
    return tuple(replace(row, split="val") if row.split == "test" else row for row in rows)


def _csv_split(value: str | None, line: int) -> str:
    name = (value or "").strip().lower()
    if name and name not in _SPLIT_OF:
        raise DataError(f"pairs CSV, line {line}", f"split {value!r} is not known", "train, val or test")
    return _SPLIT_OF.get(name, "")
