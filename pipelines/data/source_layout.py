"""Find the files of a source folder that belong together, from their names alone.

Pictures are paired by stem, never by position. These layouts are supported:

    0001.jpg ...                                         color pictures alone
    {train,val}/{target,sketch,reference,cross_reference}/0001.png
    Anime/train/{reference,condition}/1.jpg              AnimeDiffusion: `reference` is the target
    Anime/{train_data,test_data}/{reference,sketch}/     SSIMBaD; test_data_shuffled holds the same pictures again
    {train,val}/0001_{gt,sketch,ref}.png                 roles in the names, also 0001.sketch.png as in WebDataset
    FILM/scene_1/{sketch,color,composition}/0001.png     AnitaDataset; the composition has a background
    a.psd, a.ora, a.kra                                  composite and line layer are a pair

pipelines/data/pairs.py reads pairs from a CSV.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from animediffusion.pipelines.data.formats.layered import LINES, is_layered
from animediffusion.pipelines.data.formats.layered import SUFFIXES as LAYERED_SUFFIXES
from animediffusion.pipelines.data.ingest_plan import ROLES, IngestPlan, Reject, Sample, Samples, id_rank
from animediffusion.platform.errors import DataError
from animediffusion.platform.images.picture_names import DECODED_SUFFIXES, is_junk

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
_ASIDE = "composition"
"""AnitaDataset's folder of colored frames on their backgrounds: targets where a frame has no other."""
_SUFFIX = re.compile(r"(.+?)[._-](cross_reference|" + "|".join(sorted(ROLE_OF, key=len, reverse=True)) + r")", re.I)


class _Named(NamedTuple):
    """A picture's path with the key, role and split that follow from it; all pictures of a row share the `key`."""

    path: str
    key: str
    role: str | None
    split: str | None


_INDEX = {role: index for index, role in enumerate(ROLES, start=1)}
_Row = list[str | None]
"""The split, followed by a path for each of ROLES."""
_Naming = Callable[[str], _Named]


def plan_folder(
    source: str, paths: Iterable[str], val_fraction: float, split_of: Callable[[str], str | None] | None = None
) -> IngestPlan:
    """Plan rows from the names of all files in a folder.

    Pairing takes half a kilobyte per row.

    Args:
        source: the folder's name in error messages.
        paths: paths relative to the folder.
        val_fraction: share of the rows that go to `val` if no folder name gives a split.
        split_of: a function that gives the split of a path whose folders give none.

    Raises:
        DataError: if no file can be a target, or if line art and targets have no stem in common.
    """
    files = [path for path in sorted(paths) if not is_junk(path)]
    pictures = [path for path in files if _is_picture(path)]
    others = sorted(set(files).difference(pictures)) if len(pictures) < len(files) else []
    rejects = [Reject(path, "not_an_image", "no picture by its name") for path in others]
    name = _with_splits(_naming(pictures), split_of)
    copies = _shuffled_copies(pictures)
    rejects += [Reject(path, "duplicate", "a shuffled copy of the test pictures") for path in copies]
    rows, unpaired = _pair([path for path in pictures if path not in copies] if copies else pictures, name)
    if not rows:
        found = f"none of its {len(files)} files can be a target" if files else "holds no files"
        raise DataError(source, found, f"expected {LAYOUTS}")
    if not any(row[_INDEX["sketch"]] for row in rows.values()) and any(
        name(path).role == "sketch" for path in pictures
    ):
        raise DataError(source, "no line art has the name of a target", "give both the same file name, or a pairs CSV")
    hashed = all(row[0] is None for row in rows.values())
    return IngestPlan(_samples(rows, val_fraction), tuple(rejects + unpaired), hashed=hashed)


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that puts 2.jpg before 10.jpg, ignores case, and never ties for different texts."""
    parts = re.split(r"(\d+)", text)
    key = [(0, int(part), "") if part.isdecimal() else (1, 0, part.lower()) for part in parts if part]
    return (*key, (2, 0, text))


def composed(path: str) -> str:
    """Return the path in Unicode NFC, the form that most programs write; macOS decomposes accents and kana (NFD)."""
    return path if path.isascii() else unicodedata.normalize("NFC", path)


def _stem_and_suffix(file: str) -> tuple[str, str]:
    dot = file.rfind(".")
    return (file[:dot], file[dot:]) if 0 < dot < len(file) - 1 else (file, "")


def _is_picture(path: str) -> bool:
    return _stem_and_suffix(path.rpartition("/")[2])[1].lower() in (*DECODED_SUFFIXES, *LAYERED_SUFFIXES, "")


def _shuffled_copies(pictures: Sequence[str]) -> dict[str, None]:
    """Return the pictures in folders NAME_shuffled that are next to a folder NAME with pictures."""
    originals = {
        path: path[: path.lower().index("_shuffled/")] + "/" for path in pictures if "_shuffled/" in path.lower()
    }
    existing = {folder for folder in set(originals.values()) if any(path.startswith(folder) for path in pictures)}
    return {path: None for path, folder in originals.items() if folder in existing}


@functools.lru_cache(maxsize=4096)
def _folder(path: str) -> tuple[str, str | None, str | None]:
    """Return the path without the role's folder, the role, and the split; of several names the last one decides."""
    folders = path.split("/")[:-1]
    indices = [index for index, folder in enumerate(folders) if folder.lower() in (*ROLE_OF, _ASIDE)]
    role = ROLE_OF.get(folder := folders.pop(indices[-1]).lower(), folder) if indices else None
    splits = [SPLIT_OF.get(folder.lower().removesuffix("_data")) for folder in folders]
    split = next((split for split in reversed(splits) if split), None)
    return "/".join([*folders, ""]), role, split


def _name(path: str) -> _Named:
    folder, slash, file = path.rpartition("/")
    before, role, split = _folder(folder + slash)
    return _Named(path, composed(before + _stem_and_suffix(file)[0]), role, split)


def _name_with_suffix(path: str) -> _Named:
    """Return the name of a picture whose suffix may give the role, as in 0001_gt.png."""
    named = _name(path)
    match = _SUFFIX.fullmatch(named.key)
    return named if match is None else named._replace(key=match[1], role=ROLE_OF[match[2].lower()])


def _naming(pictures: Sequence[str]) -> _Naming:
    """Return a function that reads the names of these pictures; the role of a picture may be None."""
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


def _with_splits(name: _Naming, split_of: Callable[[str], str | None] | None) -> _Naming:
    if split_of is None:
        return name

    def with_split(path: str) -> _Named:
        named = name(path)
        return named if named.split else named._replace(split=split_of(path))

    return with_split


def _as_target(named: _Named, role: str | None) -> _Named:
    return named._replace(role="target") if named.role == role else named


def _has_suffix_pairs(pictures: Iterable[str]) -> bool:
    """Return whether line art and a color picture share a stem, as in 0001_gt.png and 0001_sketch.png."""
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
    """Return the rows by key, each with a target and at most one file per role, and the rejected files."""
    alone = all(name(path).role == "target" for path in pictures)
    rows: dict[str, _Row] = {}
    rejects = []
    aside = [item for item in map(name, pictures) if item.role == _ASIDE]
    for item in map(name, pictures):
        if item.role == _ASIDE:
            continue
        if item.role is None:
            rejects.append(Reject(item.path, "orphan", "in none of the folders target, sketch, reference"))
            continue
        row = rows.setdefault(item.key, [None] * (1 + len(ROLES)))
        index = _INDEX[item.role]
        first = row[index]
        if first is not None and _preference(item.path) < _preference(first):
            row[index], item, first = item.path, name(first), item.path
        if first is None:
            row[index] = item.path
        elif alone and is_layered(first) == is_layered(item.path):
            key = item.key + _stem_and_suffix(item.path)[1]
            while key in rows:
                key += "#"
            rows[key] = [item.split, item.path, None, None, None]
        else:
            rejects.append(Reject(item.path, "duplicate", f"same name as {first}"))
        if item.role == "target" and row[index] == item.path:
            row[0] = item.split
    for item in aside:
        row = rows.setdefault(item.key, [None] * (1 + len(ROLES)))
        if row[_INDEX["target"]] is None:
            row[0], row[_INDEX["target"]] = item.split, item.path
        else:
            rejects.append(Reject(item.path, "orphan", f"its frame has the target {row[_INDEX['target']]}"))
    for key in [key for key, row in rows.items() if row[_INDEX["target"]] is None]:
        rejects += [Reject(path, "orphan", "no target of this name") for path in rows.pop(key)[1:] if path]
    return rows, rejects


def _preference(path: str) -> tuple[bool, tuple[tuple[int, int, str], ...]]:
    """Return a sort key of files of the same name and role: layers hold more than the picture exported from them."""
    return not is_layered(path), natural(path)


def _samples(rows: dict[str, _Row], val_fraction: float) -> Samples:
    """Convert the rows to samples, and remove each row on conversion so that memory does not hold all rows twice."""
    splits = {row[0] for row in rows.values()}
    if splits == {None}:
        split_of = hash_split(rows, val_fraction)
        return Samples(_sample(key, split_of(key), rows.pop(key)) for key in list(rows))
    return Samples(_sample(key, final_split(rows[key][0], splits), rows.pop(key)) for key in list(rows))


def final_split(split: str | None, splits: Collection[str | None]) -> str:
    """Return the split of a row in the dataset: `test` is `val` where there is no other."""
    return "val" if split == "test" and "val" not in splits else split or "train"


def _sample(key: str, split: str, row: _Row) -> Sample:
    target, sketch = row[1] or "", row[2]
    if sketch is None and is_layered(target):
        sketch = target + LINES
    return Sample(key, split, target, sketch, *row[3:])


def hash_split(ids: Collection[str], val_fraction: float) -> Callable[[str], str]:
    """Return a function from an id to `train` or `val`, by the hash of the id.

    A row keeps its split if other rows are added or removed, unless a split would be empty.
    """
    if val_fraction <= 0 or len(ids) < 2:
        return lambda _: "train"
    first, last = min(map(id_rank, ids)), max(map(id_rank, ids))
    limit = max(val_fraction * 2.0**256, first)
    return lambda name: "val" if id_rank(name) <= limit and id_rank(name) < last else "train"
