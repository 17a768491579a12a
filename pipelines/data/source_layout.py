"""Which files of a source folder belong together: names only, nothing is opened.

Pictures are paired by stem, never by position. Layouts that are understood:

    0001.jpg ...                                         color pictures alone
    {train,val}/{target,sketch,reference,cross_reference}/0001.png
    Anime/train/{reference,condition}/1.jpg              AnimeDiffusion: `reference` is the target
    Anime/{train_data,test_data}/{reference,sketch}/     SSIMBaD; test_data_shuffled holds the same pictures again
    {train,val}/0001_{gt,sketch,ref}.png                 roles in the names

Not here: pairs that a CSV names, see pipelines/data/pairs.py.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from animediffusion.pipelines.data.ingest_plan import ROLES, IngestPlan, Reject, Sample, Samples, id_rank
from animediffusion.platform.errors import DataError
from animediffusion.platform.images.picture_names import DECODED, is_junk

LAYOUTS = "color pictures alone, or folders target|color|gt, sketch|condition|line|lineart, reference, cross_reference"

_ROLES = {
    "target": ("target", "targets", "color", "colour", "gt"),
    "sketch": ("sketch", "sketches", "condition", "line", "lines", "lineart", "line_art"),
    "reference": ("reference", "references", "ref"),
    "cross_reference": ("cross_reference", "cross_references"),
}
ROLE_OF = {alias: role for role, aliases in _ROLES.items() for alias in aliases}
SPLIT_OF = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_SUFFIX = re.compile(r"(.+)[_-](cross_reference|" + "|".join(sorted(ROLE_OF, key=len, reverse=True)) + r")", re.I)


class _Named(NamedTuple):
    """A picture as its path tells it: `key` is the same for all pictures of one row."""

    path: str
    key: str
    role: str | None
    split: str | None


_PLACE = {role: place for place, role in enumerate(ROLES, start=1)}
_Row = list[str | None]
"""The split, and a path for each of ROLES."""
_Naming = Callable[[str], _Named]


def plan_folder(source: str, paths: Iterable[str], val_fraction: float) -> IngestPlan:
    """Rows from the names of all files of a folder.

    Names are looked at twice, and what is kept for a row while they are paired is half a kilobyte.

    Args:
        source: how error messages call the folder.
        paths: relative to it.
        val_fraction: share of the rows that go to `val` where no folder says train, val or test.

    Raises:
        DataError: if nothing can be a target, or line art and targets have no stem in common.
    """
    seen = [path for path in sorted(paths) if not is_junk(path)]
    pictures = [path for path in seen if _is_picture(path)]
    others = sorted(set(seen).difference(pictures)) if len(pictures) < len(seen) else []
    rejects = [Reject(path, "not_an_image", "no picture by its name") for path in others]
    name = _naming(pictures)
    copies = [path for path in pictures if _is_shuffled_copy(path)]
    rejects += [Reject(path, "duplicate", "a shuffled copy of the test pictures") for path in copies]
    rows, aside = _pair([path for path in pictures if not _is_shuffled_copy(path)] if copies else pictures, name)
    if not rows:
        found = f"none of its {len(seen)} files can be a target" if seen else "holds no files"
        raise DataError(source, found, f"expected {LAYOUTS}")
    if not any(row[_PLACE["sketch"]] for row in rows.values()) and any(
        name(path).role == "sketch" for path in pictures
    ):
        raise DataError(source, "no line art has the name of a target", "give both the same file name, or a pairs CSV")
    hashed = all(row[0] is None for row in rows.values())
    return IngestPlan(_samples(rows, val_fraction), tuple(rejects + aside), hashed=hashed)


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key: 2.jpg before 10.jpg, upper and lower case alike, and never a tie between different texts."""
    parts = re.split(r"(\d+)", text)
    key = [(0, int(part), "") if part.isdecimal() else (1, 0, part.lower()) for part in parts if part]
    return (*key, (2, 0, text))


def composed(path: str) -> str:
    """The path as most programs write accents and kana; macOS takes them apart (NFD)."""
    return path if path.isascii() else unicodedata.normalize("NFC", path)


def _stem_and_suffix(file: str) -> tuple[str, str]:
    dot = file.rfind(".")
    return (file[:dot], file[dot:]) if 0 < dot < len(file) - 1 else (file, "")


def _is_picture(path: str) -> bool:
    return _stem_and_suffix(path.rpartition("/")[2])[1].lower() in (*DECODED, "")


def _is_shuffled_copy(path: str) -> bool:
    return "_shuffled/" in path.lower()


@functools.lru_cache(maxsize=4096)
def _folder(path: str) -> tuple[str, str | None, str | None]:
    """What comes before the stem, the role that the folder nearest to the file gives, the split that any gives."""
    folders = path.split("/")[:-1]
    places = [index for index, folder in enumerate(folders) if folder.lower() in ROLE_OF]
    role = ROLE_OF[folders.pop(places[-1]).lower()] if places else None
    splits = [SPLIT_OF.get(folder.lower().removesuffix("_data")) for folder in folders]
    split = next((split for split in reversed(splits) if split), None)
    return "/".join([*folders, ""]), role, split


def _name(path: str) -> _Named:
    folder, slash, file = path.rpartition("/")
    before, role, split = _folder(folder + slash)
    return _Named(path, composed(before + _stem_and_suffix(file)[0]), role, split)


def _name_with_suffix(path: str) -> _Named:
    """A role as in 0001_gt.png."""
    named = _name(path)
    match = _SUFFIX.fullmatch(named.key)
    return named if match is None else named._replace(key=match[1], role=ROLE_OF[match[2].lower()])


def _naming(pictures: Sequence[str]) -> _Naming:
    """How to read the names of these pictures; the role is None for one that no role fits."""
    name = _name
    roles = {name(path).role for path in pictures}
    if roles == {None} and _has_suffix_pairs(pictures):
        name = _name_with_suffix
        roles = {name(path).role for path in pictures}
    if "target" in roles:
        return name
    if "reference" in roles and ("sketch" in roles or None not in roles):
        return lambda path: _as_target(name(path), "reference")
    return lambda path: _as_target(name(path), None)


def _as_target(named: _Named, role: str | None) -> _Named:
    return named._replace(role="target") if named.role == role else named


def _has_suffix_pairs(pictures: Iterable[str]) -> bool:
    """Whether line art and a color picture share a stem, as 0001_gt.png and 0001_sketch.png."""
    roles: dict[str, set[str]] = {}
    for path in pictures:
        named = _name_with_suffix(path)
        if named.role is not None:
            found = roles.setdefault(named.key, set())
            found.add(named.role)
            if "sketch" in found and found & {"target", "reference"}:
                return True
    return False


def _pair(pictures: Sequence[str], name: _Naming) -> tuple[dict[str, _Row], list[Reject]]:
    """Rows by key, each role once and always with a target; and the files that found no place."""
    alone = all(name(path).role == "target" for path in pictures)
    rows: dict[str, _Row] = {}
    rejects = []
    for item in map(name, pictures):
        if item.role is None:
            rejects.append(Reject(item.path, "orphan", "in none of the folders target, sketch, reference"))
            continue
        row = rows.setdefault(item.key, [None] * (1 + len(ROLES)))
        place = _PLACE[item.role]
        first = row[place]
        if first is not None and natural(item.path) < natural(first):
            row[place], item, first = item.path, name(first), item.path
        if first is None:
            row[place] = item.path
        elif alone:
            key = item.key + _stem_and_suffix(item.path)[1]
            while key in rows:
                key += "#"
            rows[key] = [item.split, item.path, None, None, None]
        else:
            rejects.append(Reject(item.path, "duplicate", f"same name as {first}"))
        if item.role == "target" and row[place] == item.path:
            row[0] = item.split
    for key in [key for key, row in rows.items() if row[_PLACE["target"]] is None]:
        rejects += [Reject(path, "orphan", "no target of this name") for path in rows.pop(key)[1:] if path]
    return rows, rejects


def _samples(rows: dict[str, _Row], val_fraction: float) -> Samples:
    """The rows as samples; each is taken out when its turn comes, so that not all exist twice."""
    splits = {row[0] for row in rows.values()}
    if splits == {None}:
        split_of = hash_split(rows, val_fraction)
        return Samples(_sample(key, split_of(key), rows.pop(key)) for key in list(rows))
    test = "test" if "val" in splits else "val"
    names = {None: "train", "train": "train", "val": "val", "test": test}
    return Samples(_sample(key, names[rows[key][0]], rows.pop(key)) for key in list(rows))


def _sample(key: str, split: str, row: _Row) -> Sample:
    return Sample(key, split, row[1] or "", *row[2:])


def hash_split(ids: Collection[str], val_fraction: float) -> Callable[[str], str]:
    """`val` by the hash of the id: a row stays where it is when others come or go."""
    if val_fraction <= 0 or len(ids) < 2:
        return lambda _: "train"
    first, last = min(map(id_rank, ids)), max(map(id_rank, ids))
    limit = max(val_fraction * 2.0**256, first)
    return lambda name: "val" if id_rank(name) <= limit and id_rank(name) < last else "train"
