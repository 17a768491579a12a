"""Write a dataset of drawn anime faces as plain PNG folders.

    synthesize("workspace/data/faces", count=2000, size=64)

    DST/{train,val}/{target,sketch,reference,cross_reference}/000001.png      every tenth row goes to val

Row i depends only on (seed, i). So a larger count keeps the existing rows, a stopped run can be resumed, and the number
of processes does not change the result.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from animediffusion.pipelines.synthetic.canvas import FlatRegions
from animediffusion.pipelines.synthetic.faces import draw, draw_regions, random_character, random_geometry
from animediffusion.pipelines.synthetic.scenes.views import draw_view_regions, draw_views
from animediffusion.pipelines.synthetic.variety import FACES, Variety
from animediffusion.platform.errors import ConfigError, DataError
from animediffusion.platform.images.codec import encode_png

COLUMNS = ("sketch", "reference", "cross_reference", "target")
"""Pictures of a row in the order of writing; the target is last, so a row with a target is complete."""
SIZES = (16, 1024)
VAL_EVERY = 10

Record = dict[str, int | dict[str, float]]
_RECORD = ".synthesize.json"
_DRAWING = 1
"""Version of the drawing code; increase it when the pictures of a seed change."""
_TASK_PIXELS = 25 * 64**2


class DrawnRow(NamedTuple):
    """Four pictures of one character; `cross_reference` is another drawing of the same character."""

    target: NDArray[np.uint8]
    sketch: NDArray[np.uint8]
    reference: NDArray[np.uint8]
    cross_reference: NDArray[np.uint8]


def synthesize(
    destination: str,
    count: int,
    size: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
    variety: Variety = FACES,
) -> dict[str, int | float]:
    """Draw the missing rows of a dataset, and return `rows, train, val, seconds`.

    Args:
        destination: a local folder: new, empty, or with a dataset of the same size, seed and variety and no more rows.
        count: total number of rows, train and val together.
        size: side of the pictures in pixels.
        seed: seed of all random numbers.
        progress: a callback that gets (rows done, count).
        workers: number of processes; by default one per usable core, or only this process if there is little work.
        variety: how varied the drawings are.

    Raises:
        ConfigError: if count, size or seed is out of range, or the destination is not a local path.
        DataError: if the destination holds other files or a different dataset.
    """
    _check(destination, count, size, seed)
    folder, started = Path(destination), time.monotonic()
    _claim(folder, {"drawing": _DRAWING, "size": size, "seed": seed, "count": count, "variety": variety.record})
    missing = [index for index in range(count) if not _path(folder, index, "target").exists()]
    done = count - len(missing)
    for finished in _draw_all(folder, missing, size, seed, variety, workers):
        done += finished
        if progress:
            progress(done, count)
    val = sum(split_of(index) == "val" for index in range(count))
    return {"rows": count, "train": count - val, "val": val, "seconds": round(time.monotonic() - started, 3)}


def split_of(index: int) -> str:
    """Return `val` for every tenth row, starting with the second, so that two rows fill both splits; else `train`."""
    return "val" if index % VAL_EVERY == 1 else "train"


def make_row(seed: int, index: int, size: int, variety: Variety = FACES) -> DrawnRow:
    """Draw row `index` of the dataset with this seed and variety."""
    if variety != FACES:
        views, rng = draw_views(seed, index, size, variety)
        return DrawnRow(views.target, views.sketch, warp(views.target, rng), views.cross_reference)
    rng = np.random.default_rng([seed, index])
    character = random_character(rng)
    target, sketch = draw(character, random_geometry(rng), size)
    other, _ = draw(character, random_geometry(rng), size)
    return DrawnRow(target, sketch, warp(target, rng), other)


def make_regions(seed: int, index: int, size: int, variety: Variety = FACES) -> tuple[FlatRegions, FlatRegions]:
    """Return the exact regions of the target and of the cross reference of make_row() for the same arguments."""
    if variety != FACES:
        return draw_view_regions(seed, index, size, variety)
    rng = np.random.default_rng([seed, index])
    character = random_character(rng)
    target, other = (draw_regions(character, random_geometry(rng), size) for _ in range(2))
    return target, other


def warp(
    image: NDArray[np.uint8], rng: np.random.Generator, strength: float = 0.03, cells: int = 4
) -> NDArray[np.uint8]:
    """Return the picture under a smooth random deformation, which samples only inside the picture.

    Args:
        image: RGB [S, S, 3].
        rng: random generator of the deformation.
        strength: standard deviation of the shifts at the nodes, in fractions of the side.
        cells: nodes per side of the coarse grid; the shifts between nodes are interpolated.
    """
    side = image.shape[0]
    shifts = rng.normal(0, strength * side, (2, cells, cells)).astype(np.float32)
    steps = max(8, min(24, side // 12))
    ticks = np.linspace(0, side, steps + 1)
    fine = [np.array(Image.fromarray(s).resize((steps + 1, steps + 1), Image.Resampling.BICUBIC)) for s in shifts]
    x, y = np.clip(ticks[None, :] + fine[0], 1, side - 1), np.clip(ticks[:, None] + fine[1], 1, side - 1)
    edges = np.round(ticks).astype(int).tolist()
    mesh = []
    for i in range(steps):
        for j in range(steps):
            corners = ((i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1))  # upper left, then counterclockwise
            quad = tuple(float(axis[corner]) for corner in corners for axis in (x, y))
            mesh.append(((edges[j], edges[i], edges[j + 1], edges[i + 1]), quad))
    moved = Image.fromarray(image).transform((side, side), Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)
    return np.array(moved)


def _check(destination: str, count: int, size: int, seed: int) -> None:
    if "://" in destination:
        raise ConfigError(destination, "is not a local folder", "synthesize to a local folder, then ingest to any URI")
    if count < 1:
        raise ConfigError("count", str(count), "at least 1")
    if not SIZES[0] <= size <= SIZES[1]:
        raise ConfigError("size", str(size), f"{SIZES[0]} to {SIZES[1]} pixels")
    if seed < 0:
        raise ConfigError("seed", str(seed), "0 or more")


def _claim(folder: Path, record: Record) -> None:
    """Prepare the folder and write its record.

    Raises:
        DataError: if the folder holds anything but a dataset of the same drawing version, size, seed and variety with
            at most as many rows.
    """
    path = folder / _RECORD
    if folder.exists() and not folder.is_dir():
        raise DataError(str(folder), "is a file", "give a new folder")
    if path.exists():
        _compare(folder, _read_record(path), record)
    elif folder.exists() and any(folder.iterdir()):
        raise DataError(str(folder), "is not empty", "give a new or an empty folder")
    for split in ("train", "val"):
        for column in COLUMNS:
            (folder / split / column).mkdir(parents=True, exist_ok=True)
    _replace(path, (json.dumps(record) + "\n").encode())


def _read_record(path: Path) -> Record:
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(str(path), "is damaged", "give a new folder") from error
    return {"variety": {}, **record} if isinstance(record, dict) else {}


def _compare(folder: Path, there: Record, wanted: Record) -> None:
    for key, value in wanted.items():
        found = there.get(key)
        grows = key == "count" and isinstance(found, int) and isinstance(value, int) and found < value
        if found != value and not grows:
            raise DataError(
                str(folder), f"was drawn with {key} {_shown(found)}, not {_shown(value)}", "give a new folder"
            )


def _shown(value: int | dict[str, float] | None) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}={share:g}" for name, share in value.items()) or "faces"
    return str(value)


def _path(folder: Path, index: int, column: str) -> Path:
    """Return the path of a picture; files are numbered from 1 within each split."""
    block, place = divmod(index, VAL_EVERY)
    if split_of(index) == "val":
        return folder / "val" / column / f"{block + 1:06d}.png"
    return folder / "train" / column / f"{block * (VAL_EVERY - 1) + place - (place > 1) + 1:06d}.png"


def _draw_all(
    folder: Path, missing: list[int], size: int, seed: int, variety: Variety, workers: int | None
) -> Iterator[int]:
    """Write the missing rows, and yield the number of rows of each finished task."""
    step = max(1, _TASK_PIXELS // size**2)
    tasks = [missing[start : start + step] for start in range(0, len(missing), step)]
    if workers is None:  # for a few seconds of work, starting processes costs more than it saves
        workers = _usable_cores() if len(tasks) > 8 else 1
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from (_draw_rows(folder, rows, size, seed, variety) for rows in tasks)
        return
    # spawn, because a forked child of a process with threads (torch, Ray) may hang.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_draw_rows, folder, rows, size, seed, variety) for rows in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _draw_rows(folder: Path, indices: list[int], size: int, seed: int, variety: Variety) -> int:
    for index in indices:
        row = make_row(seed, index, size, variety)
        for column in COLUMNS:
            _replace(_path(folder, index, column), encode_png(getattr(row, column)))
    return len(indices)


def _replace(path: Path, data: bytes) -> None:
    """Write a file atomically (temporary file, then rename)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)


def _usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
