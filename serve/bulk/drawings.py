"""The drawings of a bulk coloring, with their references and outputs: names only, local or remote.

drawings, faults = list_drawings(["s3://in"], "s3://out", "png", References(["hero.png"], csv_or_folder="refs.csv"))
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from animediffusion.models.sampler_options import MAX_REFERENCES
from animediffusion.platform.errors import ConfigError, DataError
from animediffusion.platform.images.picture_names import UPLOADED_SUFFIXES, is_junk
from animediffusion.platform.storage import storage
from animediffusion.platform.storage.addresses import split_options

_PAGE = 4096
"""Drawings that are compressed together."""


class BulkDrawing(NamedTuple):
    """A drawing, its references and the picture to write, as URIs."""

    sketch: str
    references: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class References:
    """Which references a drawing has.

    Args:
        common: references of drawings that have no others.
        of_drawing: references by the drawing's URI, file name or stem.
    """

    common: tuple[str, ...] = ()
    of_drawing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def find(self, sketch: str) -> tuple[str, ...]:
        """Return the references of a drawing, an empty tuple if it has none."""
        name = name_of(sketch)
        keys = (sketch, name, stem_of(name))
        return next((self.of_drawing[key] for key in keys if key in self.of_drawing), self.common)


def read_references(common: Sequence[str], uri: str | None) -> References:
    """Return the references of a command: `common` ones, and those of a CSV or a folder of files named as drawings.

    Raises:
        ConfigError: there are none, or too many for a drawing.
        DataError: the CSV is not usable, or the folder holds no pictures.
    """
    given = tuple(storage.absolute(one) for one in common)
    if len(given) > MAX_REFERENCES:
        raise ConfigError("--reference", f"{len(given)} images", f"1 to {MAX_REFERENCES} images")
    if uri is None:
        if not given:
            raise ConfigError("--reference", "is missing", "give an image with the colors, or --references")
        return References(given)
    uri = storage.absolute(uri)
    if name_of(uri).lower().endswith(".csv"):
        return References(given, _read_csv(uri))
    pictures = list(_pictures(uri))
    if not pictures:
        raise DataError(uri, "has no images", "give a folder of references with the names of the drawings, or a CSV")
    return References(given, {stem_of(name): (storage.join(uri, name),) for name in pictures})


class Drawings:
    """Many drawings in an order, compressed: about ten bytes each, so that a million of them fit into memory.

    Args:
        drawings: the drawings; they are read once.
    """

    def __init__(self, drawings: Iterable[BulkDrawing] = ()) -> None:
        self._pages = _Pages(drawings)

    def __len__(self) -> int:
        return self._pages.count

    def __iter__(self) -> Iterator[BulkDrawing]:
        return (BulkDrawing(sketch, tuple(references), output) for sketch, references, output in self._pages)


class _Pages:
    """Values of JSON in an order, compressed."""

    def __init__(self, values: Iterable[Any]) -> None:
        self.count = 0
        self._pages: list[bytes] = []
        values = iter(values)
        while page := list(itertools.islice(values, _PAGE)):
            self.count += len(page)
            self._pages.append(zlib.compress(json.dumps(page).encode()))

    def __iter__(self) -> Iterator[Any]:
        for page in self._pages:
            yield from json.loads(zlib.decompress(page))


def list_drawings(
    sketches: Sequence[str], out: str, suffix: str, references: References
) -> tuple[Drawings, list[tuple[str, str]]]:
    """List the drawings of files and folders, without opening any.

    Returns:
        The drawings, and (sketch, error) of those that cannot be colored.

    Raises:
        DataError: a path does not exist, or a folder has no images.
        ConfigError: the outputs would overwrite drawings.
    """
    out = storage.absolute(out)
    listed, made = array("q"), array("q")  # hashes of the sketches and the outputs

    def output_of(sketch: str) -> str:
        return storage.join(out, f"{stem_of(name_of(sketch))}.{suffix}")

    def list_all() -> Iterator[str]:
        for given in sketches:
            for sketch in _list_sketches(storage.absolute(given)):
                listed.append(hash(sketch))
                made.append(hash(output_of(sketch)))
                yield sketch

    found = _Pages(list_all())
    twice, shared, both = _repeated(listed), _repeated(made), set(np.intersect1d(listed, made).tolist())

    def once() -> Iterator[str]:
        seen: set[str] = set()
        for sketch in found:
            if hash(sketch) in twice:
                if sketch in seen:
                    continue
                seen.add(sketch)
            yield sketch

    overwritten = {sketch for sketch in found if both and hash(sketch) in both}
    if clash := next((output for output in map(output_of, found if both else ()) if output in overwritten), None):
        raise ConfigError("--out", f"{clash} is a sketch and would be overwritten", "choose another folder")
    count = Counter(output for output in map(output_of, once() if shared else ()) if hash(output) in shared)
    faults: list[tuple[str, str]] = []

    def usable() -> Iterator[BulkDrawing]:
        for sketch in once():
            output, colors = output_of(sketch), references.find(sketch)
            if count[output] > 1:
                fault = f"another drawing would become {output}, too; give them other names"
                faults.append((sketch, f"{sketch}: {fault}"))
            elif not colors:
                fault = "has no reference; name it in --references, or give a --reference"
                faults.append((sketch, f"{sketch}: {fault}"))
            else:
                yield BulkDrawing(sketch, colors, output)

    return Drawings(usable()), faults


def _repeated(hashes: Sequence[int]) -> set[int]:
    values, counts = np.unique(np.asarray(hashes, np.int64), return_counts=True)
    return set(values[counts > 1].tolist())


def _list_sketches(uri: str) -> Iterator[str]:
    """Yield a file, or the images in a folder."""
    if storage.file_size(uri) is not None:
        yield uri
        return
    if not storage.exists(uri):
        raise DataError(uri, "no such file or folder", "give sketches or folders of sketches")
    is_empty = True
    for name in _pictures(uri):
        is_empty = False
        yield storage.join(uri, name)
    if is_empty:
        raise DataError(uri, "has no images", f"give a folder of {', '.join(sorted(UPLOADED_SUFFIXES))} files")


def name_of(uri: str) -> str:
    """Return the file name of a path or URI."""
    return split_options(uri)[0].rstrip("/").rpartition("/")[2]


def stem_of(name: str) -> str:
    """Return a file name without its suffix."""
    return PurePosixPath(name).stem


def _pictures(folder: str) -> Iterator[str]:
    """Yield the names of the images in a folder, not in those below it."""
    for name in storage.list_names(folder):
        if not is_junk(name) and PurePosixPath(name).suffix.lower() in UPLOADED_SUFFIXES:
            yield name


def _read_csv(uri: str) -> dict[str, tuple[str, ...]]:
    """Read the columns sketch,reference[,reference2...]; references are relative to the CSV's folder."""
    base, options = split_options(uri)
    folder = base.rpartition("/")[0] + options
    try:
        rows = list(csv.reader(io.StringIO(storage.read_bytes(uri).decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(uri, f"is not a CSV ({error})", "save it as UTF-8 with commas") from error
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    if header[:2] != ["sketch", "reference"] or len(header) > 1 + MAX_REFERENCES:
        names = ", ".join(header) or "none"
        raise DataError(uri, f"its columns are {names}", f"sketch,reference[,reference2...], {MAX_REFERENCES} at most")
    found: dict[str, tuple[str, ...]] = {}
    for number, row in enumerate(rows[1:], start=2):
        sketch, *colors = [cell.strip() for cell in row] or [""]
        if not any(row):
            continue
        if not sketch or not any(colors):
            raise DataError(f"{uri}, line {number}", "lacks a sketch or a reference", "give both")
        if sketch in found:
            raise DataError(f"{uri}, line {number}", f"{sketch!r} is given twice", "give each drawing once")
        found[sketch] = tuple(_inside(folder, color) for color in colors if color)
    return found


def _inside(folder: str, path: str) -> str:
    return path if storage.is_remote(path) or path.startswith("/") else storage.join(folder, path)
