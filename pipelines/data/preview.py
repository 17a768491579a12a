"""Preview of a dataset: the number of rows and rejects, and a contact sheet of some pictures.

preview = show("workspace/data/faces64", out="sheet.png")
preview.splits          # {"train": 2700, "val": 300}
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from animediffusion.pipelines.data.manifest import MANIFEST, Manifest
from animediffusion.pipelines.data.stream import read_split
from animediffusion.platform.errors import DataError, ImageError
from animediffusion.platform.images.codec import contact_sheet, decode_gray, decode_rgb, encode_png
from animediffusion.platform.storage import storage

COLUMNS = ("target", "sketch", "reference", "cross_reference")
REJECTS = "rejects.jsonl"

_FLAGS = {"sketch": "has_sketch", "reference": "has_reference", "cross_reference": "has_cross"}
_BLANK = np.full((8, 8, 3), (238, 235, 230), np.uint8)

Cells = dict[str, list[NDArray[np.uint8] | None]]


@dataclass(frozen=True)
class DatasetPreview:
    """The counts of a dataset, as `data show --json` prints them."""

    splits: dict[str, int]
    """Number of rows by split."""
    image_size: int | None
    """Pixels of a side; None if the folder has no readable target."""
    num_rejects: int
    rejects: dict[str, int]
    """Number of rejected files by reason, the most frequent reason first."""
    sheet: str | None = None
    """Path or URI of the contact sheet; None if none was written."""


def show(uri: str, out: str | None, rows: int = 8) -> DatasetPreview:
    """Return the counts of a dataset or a synthesized folder, and write a contact sheet of its first val rows.

    The sheet shows the first split with rows if `val` is empty.

    Args:
        uri: a dataset, or a local folder SPLIT/{target,sketch,...}/STEM.png.
        out: path or URI of the PNG to write; None writes no PNG.
        rows: largest number of rows on the sheet.

    Raises:
        DataError: if `uri` is neither a dataset nor such a folder.
        StorageError: if a file cannot be read or written.
    """
    if storage.exists(storage.join(uri, MANIFEST)):
        preview, cells = _from_dataset(uri, rows)
    else:
        preview, cells = _from_folder(uri, rows)
    if out is not None:
        storage.write_bytes(out, encode_png(_sheet(cells)))
    return replace(preview, sheet=out)


def _from_dataset(uri: str, rows: int) -> tuple[DatasetPreview, Cells]:
    manifest = Manifest.load(uri)
    sizes = {name: split.rows for name, split in manifest.splits.items()}
    rejects = _rejects(uri) if manifest.num_rejects else {}
    preview = DatasetPreview(sizes, manifest.image_size, manifest.num_rejects, rejects)
    arrays = read_split(uri, _shown(uri, sizes), limit=rows)
    number = range(len(arrays["target"]))
    cells: Cells = {
        name: [arrays[name][i] if name not in _FLAGS or arrays[_FLAGS[name]][i] else None for i in number]
        for name in COLUMNS
    }
    return preview, cells


def _from_folder(uri: str, rows: int) -> tuple[DatasetPreview, Cells]:
    targets = {} if "://" in uri else {p.parent.name: _pictures(p) for p in sorted(Path(uri).glob("*/target"))}
    sizes = {name: len(files) for name, files in targets.items()}
    files = targets[_shown(uri, sizes)][:rows]
    cells: Cells = {name: [_read(path.parent.parent / name / path.name) for path in files] for name in COLUMNS}
    size = next((len(picture) for picture in cells["target"] if picture is not None), None)
    return DatasetPreview(sizes, size, 0, {}), cells


def _shown(uri: str, sizes: dict[str, int]) -> str:
    """Return the split to show: `val` if it has rows, else the first split with rows."""
    split = next((name for name in ("val", *sizes) if sizes.get(name)), None)
    if split is None:
        raise DataError(uri, "holds no dataset", "make one with `animediffusion data synthesize` or `data ingest`")
    return split


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.png") if not path.name.startswith("."))


def _read(path: Path) -> NDArray[np.uint8] | None:
    try:
        decode = decode_gray if path.parent.name == "sketch" else decode_rgb
        return decode(path.read_bytes(), thing=str(path))
    except (ImageError, OSError):
        return None


def _rejects(uri: str) -> dict[str, int]:
    lines = storage.read_bytes(storage.join(uri, REJECTS)).decode().splitlines()
    return dict(Counter(json.loads(line)["reason"] for line in lines if line.strip()).most_common())


def _sheet(cells: Cells) -> NDArray[np.uint8]:
    """Draw the contact sheet without empty columns; a light gray cell replaces a missing picture."""
    columns = [name for name in COLUMNS if any(picture is not None for picture in cells[name])]
    rows = [
        [_BLANK if picture is None else picture for picture in row]
        for row in zip(*(cells[name] for name in columns), strict=True)
    ]
    return contact_sheet(rows, [name.replace("_", " ") for name in columns])
