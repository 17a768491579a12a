"""Read the rows of a dataset from a CSV with the columns target[,sketch,reference,cross_reference,split].

The paths are in the source folder. Column names have the same aliases as folder names
(pipelines/data/source_layout.py). Commas, semicolons or tabs separate the cells; all line endings are
accepted, and UTF-8 or UTF-16 text.
"""

from __future__ import annotations

import csv
import io
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import PurePosixPath

from animediffusion.pipelines.data.ingest_plan import ROLES, IngestPlan, Reject, Sample, Samples
from animediffusion.pipelines.data.source_layout import ROLE_OF, SPLIT_OF, composed, hash_split
from animediffusion.platform.errors import DataError

_ALLOWED = "target[,sketch,reference,cross_reference,split]"
_DELIMITERS = ",;\t"


def plan_pairs(source: str, text: str, paths: Iterable[str], val_fraction: float) -> IngestPlan:
    """Plan rows from a pairs CSV, whose paths are relative to the source or absolute paths inside it.

    Equal rows count once.

    Args:
        source: the folder or URI.
        text: content of the CSV.
        paths: paths of all files in the source, relative to it.
        val_fraction: share of the targets that go to `val` if the CSV names no split.

    Raises:
        DataError: without a `target` column, on unknown columns or splits, or if no target exists.
    """
    find = _finder(source, paths)
    rejects: dict[str, Reject] = {}
    rows: dict[Sample, None] = {}
    missed = ""
    for line, cells in _read(text):
        found: dict[str, str] = {}
        for role in ROLES:
            path = find(cells.get(role, ""))
            if path is not None:
                found[role] = path
            elif cells.get(role):
                rejects[cells[role]] = Reject(cells[role], "unreadable", f"no such file (line {line} of the CSV)")
        if "target" in found:
            rows[Sample(_stem(found["target"]), _split(cells.get("split", ""), line), **found)] = None
            continue
        missed = missed or cells.get("target", "")
        for path in found.values():
            rejects.setdefault(path, Reject(path, "orphan", f"its target is missing (line {line} of the CSV)"))
    if not rows:
        first = f" (the first is {missed!r})" if missed else ""
        raise DataError(source, f"no target of the pairs CSV exists{first}", "paths are relative to the source folder")
    used = {path for row in rows for path in row.files}
    unused = tuple(reject for path, reject in rejects.items() if path not in used)
    return IngestPlan(
        Samples(_named(rows, val_fraction)), unused, shared=True, hashed=not any(row.split for row in rows)
    )


def _named(rows: Iterable[Sample], val_fraction: float) -> Iterator[Sample]:
    """Give every row a unique id and a split; without given splits, all rows of a target share a split."""
    rows = list(rows)
    splits = {row.split for row in rows}
    split_of = hash_split({row.id for row in rows}, val_fraction) if splits == {""} else None
    names = {"": "train", "test": "test" if "val" in splits else "val"}
    count: Counter[str] = Counter()
    taken = {row.id for row in rows}
    for row in rows:
        count[row.id] += 1
        unique = row.id if count[row.id] == 1 else f"{row.id}#{count[row.id]}"
        while count[row.id] > 1 and unique in taken:  # by a file whose name ends with #2
            unique += "#"
        taken.add(unique)
        yield replace(row, id=unique, split=split_of(row.id) if split_of else names.get(row.split, row.split))


def _read(text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the line number of every row, and its cells by column."""
    lines = io.StringIO(text.lstrip("\ufeff"), newline=None)
    header = next((line for line in lines if line.strip()), "")
    lines.seek(0)
    delimiter = max(_DELIMITERS, key=header.count)
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        columns = _columns(next(filter(None, reader), []))
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            pairs = list(zip_longest(columns, cells, fillvalue=""))
            surplus = next((place for place, (column, cell) in enumerate(pairs) if cell and not column), None)
            if surplus is not None:
                where = f"pairs CSV, line {reader.line_num}"
                if surplus < len(columns):
                    found = f"{cells[surplus]!r} is in column {surplus + 1}, which has no name"
                    raise DataError(where, found, "remove that column, or name it")
                raise DataError(where, f"{cells[surplus]!r} is not in any column", "quote paths that contain a comma")
            yield reader.line_num, dict(pairs)
    except csv.Error as error:
        where = f"pairs CSV, line {reader.line_num}"
        raise DataError(where, str(error), "write one row per line, and quote paths with commas or quotes") from error


def _columns(header: list[str]) -> list[str]:
    """Return the meaning of each column: one of ROLES, `split`, or "" for a column without a name."""
    names = [cell.strip() for cell in header]
    keys = [name.casefold().replace(" ", "_").replace("-", "_") for name in names]
    columns = ["split" if key == "split" else ROLE_OF.get(key, key) for key in keys]
    if "target" not in columns:
        raise DataError("pairs CSV", f"columns are {', '.join(names) or 'none'}", _ALLOWED)
    for name, column in zip(names, columns, strict=True):
        if column and column not in (*ROLES, "split"):
            raise DataError("pairs CSV", f"column {name!r} is not known", _ALLOWED)
        if column and columns.count(column) > 1:
            raise DataError("pairs CSV", f"column {name!r} is given twice, as {column}", "give each column once")
    return columns


def _finder(source: str, paths: Iterable[str]) -> Callable[[str], str | None]:
    """Return a function from the text of a cell to the path of its file, or to None if the file does not exist."""
    existing = set(paths)
    by_composed = {composed(path): path for path in existing if not path.isascii()}

    def find(cell: str) -> str | None:
        inside = posixpath.normpath(cell.replace("\\", "/").removeprefix(source.rstrip("/") + "/"))
        return next((path for path in (cell, inside) if path in existing), by_composed.get(composed(inside)))

    return find


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))


def _split(value: str, line: int) -> str:
    name = value.casefold()
    if name and name not in SPLIT_OF:
        raise DataError(f"pairs CSV, line {line}", f"split {value!r} is not known", "train, val or test")
    return SPLIT_OF.get(name, "")
