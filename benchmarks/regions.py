"""Compare the regions found in drawings with the exact regions of drawn faces, and with two simpler methods.

    python benchmarks/regions.py [--sizes 512 1024] [--gaps 0 3 6 12] [--rows 12]

Drawn faces have exact regions (pipelines/synthetic). Their lines are opened by 25 gaps of the given width, and all
methods get the open drawing. The table shows, as means over the drawings:

- border F: F-score of border pixels, which match within 2 px of a 512 px drawing (4 px of a 1,024 px drawing)
- IoU of truth, IoU of found: best intersection over union of each true region with any found region, weighted by area,
  and the reverse; leaks lower the first, needless cuts the second
- VI: variation of information in bits, 0 is best; the first part rises with needless cuts, the second with leaks
- leaked: share of the area that is in a found region whose main true region is another one
- stable: agreement of the labels after a flip of one random pixel, the lowest of 2 flips of each drawing
- found/true: number of regions found, divided by the number of true regions
- s/Mpixel: processor time of one core

The simpler methods are connected components of the thresholded paper, and trapped balls (radii 8, 4, 2, 1 px of a
512 px drawing, flooded from the largest).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import platform
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from animediffusion.pipelines.synthetic.dataset import make_regions, make_row
from animediffusion.serve.rendering.regions import find_regions
from animediffusion.serve.rendering.sketch import Drawing, Pixels, read_drawing

SEED = 5
"""Seed of faces that no demo trains on."""
NUM_GAPS = 25
TOLERANCE = 2 / 512
"""Distance within which border pixels match, as a share of the drawing's side."""
DARK = 0.5
"""Darkness from which the simpler methods see a line."""
NUM_FLIPS = 2

Labels = NDArray[np.int32]
Method = Callable[[Drawing], Labels]


class Score(NamedTuple):
    """Scores of one drawing, in the order of the table's columns; see the module's docstring."""

    border: float
    iou_true: float
    iou_found: float
    cuts: float
    leaks: float
    leaked: float
    stable: float
    ratio: float
    seconds: float


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    arguments.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], help="sides of drawings, at most 1024")
    arguments.add_argument("--gaps", type=int, nargs="+", default=[0, 3, 6, 12], help="widths of gaps in pixels")
    arguments.add_argument("--rows", type=int, default=12)
    arguments.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = arguments.parse_args()
    print(f"{platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}, one core; "
          f"{options.rows} drawn faces\n")  # fmt: skip
    print("| drawing | gaps | method | border F | IoU of truth | IoU of found | VI | leaked | stable | found/true "
          "| s/Mpixel |")  # fmt: skip
    print("|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for size in options.sizes:
        truths = [make_regions(SEED, row, size)[0].labels for row in range(options.rows)]
        sketches = [make_row(SEED, row, size).sketch for row in range(options.rows)]
        for gap in options.gaps:
            drawings = [to_drawing(with_gaps(sketch, gap, row)) for row, sketch in enumerate(sketches)]
            for name in options.methods:
                scores = [score(METHODS[name], *pair) for pair in zip(drawings, truths, strict=True)]
                mean = Score(*np.mean(scores, axis=0))._replace(stable=min(one.stable for one in scores))
                print(f"| {size} | {gap} | {name} | {mean.border:.3f} | {mean.iou_true:.3f} | {mean.iou_found:.3f} "
                      f"| {mean.cuts:.2f} + {mean.leaks:.2f} | {mean.leaked:.3f} | {mean.stable:.3f} "
                      f"| {mean.ratio:.2f} | {mean.seconds:.2f} |", flush=True)  # fmt: skip


def with_gaps(sketch: Pixels, gap: int, seed: int) -> Pixels:
    """Return the sketch [S, S] with NUM_GAPS square gaps of side `gap` pixels, each centered on a line."""
    rng, broken = np.random.default_rng(seed), sketch.copy()
    rows, columns = np.nonzero(sketch < 100)
    for place in rng.integers(0, len(rows), NUM_GAPS if gap else 0):
        top, left = max(0, rows[place] - gap // 2), max(0, columns[place] - gap // 2)
        # Lines are thicker than a narrow gap is wide: cut across the whole line, in the direction that crosses it.
        across, down = _extent(sketch, rows[place], columns[place])
        if across < down:
            left, width, height = max(0, columns[place] - across), 2 * across + 1, gap
        else:
            top, width, height = max(0, rows[place] - down), gap, 2 * down + 1
        broken[top : top + height, left : left + width] = 255
    return broken


def _extent(sketch: Pixels, row: int, column: int) -> tuple[int, int]:
    """Return how far the line at a pixel reaches horizontally and vertically, in pixels."""
    horizontal, vertical = sketch[row] < 250, sketch[:, column] < 250
    return _run(horizontal, column), _run(vertical, row)


def _run(line: NDArray[np.bool_], place: int) -> int:
    """Return the larger distance from a place to the end of its run of true values."""
    after, before = np.flatnonzero(~line[place:]), np.flatnonzero(~line[place::-1])
    return int(max(after[0] if len(after) else len(line), before[0] if len(before) else len(line)))


def to_drawing(sketch: Pixels) -> Drawing:
    """Return a sketch [S, S] as a drawing."""
    return read_drawing(np.repeat(sketch[..., None], 3, axis=2))


def score(method: Method, drawing: Drawing, truth: Labels) -> Score:
    """Return the scores of a method on one drawing with the true labels [S, S]."""
    started = time.process_time()
    found = method(drawing)
    seconds = (time.process_time() - started) / found.size * 1e6
    table = contingency(found, truth)
    joint, rows, columns = table / table.sum(), table.sum(axis=1), table.sum(axis=0)
    overlap = table / (rows[:, None] + columns[None] - table)
    cuts, leaks = entropy(joint) - entropy(joint.sum(axis=0)), entropy(joint) - entropy(joint.sum(axis=1))
    return Score(
        border_score(found, truth),
        float((overlap.max(axis=0) * columns).sum() / truth.size),
        float((overlap.max(axis=1) * rows).sum() / truth.size),
        cuts,
        leaks,
        float(1 - table.max(axis=1).sum() / truth.size),
        stability(method, drawing, found),
        len(rows) / len(columns),
        seconds,
    )


def contingency(one: Labels, other: Labels) -> NDArray[np.int64]:
    """Return the number of pixels with each pair of labels, [labels of one, labels of other]."""
    rows, columns = (np.unique(labels, return_inverse=True)[1].ravel() for labels in (one, other))
    counts = np.bincount(rows * (columns.max() + 1) + columns, minlength=(rows.max() + 1) * (columns.max() + 1))
    return counts.reshape(rows.max() + 1, columns.max() + 1)


def entropy(shares: NDArray[np.float64]) -> float:
    """Return the entropy in bits."""
    positive = shares[shares > 0]
    return float(-(positive * np.log2(positive)).sum())


def border_score(found: Labels, truth: Labels) -> float:
    """Return the F-score of the border pixels."""
    borders = [border(labels) for labels in (found, truth)]
    tolerance = TOLERANCE * len(truth)
    near = [ndimage.distance_transform_edt(~one) <= tolerance for one in borders]
    precision = near[1][borders[0]].mean() if borders[0].any() else 1.0
    recall = near[0][borders[1]].mean()
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def border(labels: Labels) -> NDArray[np.bool_]:
    """Return the pixels whose right or lower neighbor has another label, [S, S]."""
    found = np.zeros(labels.shape, bool)
    found[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    found[:-1] |= labels[:-1] != labels[1:]
    return found


def stability(method: Method, drawing: Drawing, found: Labels) -> float:
    """Return the lowest share of the area whose label stays after a flip of one pixel of the drawing."""
    rng, lowest = np.random.default_rng(0), 1.0
    for flip in range(NUM_FLIPS):
        darkness = drawing.darkness.copy()
        rows, columns = np.nonzero(darkness > DARK if flip % 2 else darkness <= DARK)
        place = rng.integers(len(rows))
        darkness[rows[place], columns[place]] = 1 - flip % 2
        table = contingency(found, method(drawing._replace(darkness=darkness)))
        lowest = min(lowest, table.max(axis=0).sum() / found.size, table.max(axis=1).sum() / found.size)
    return lowest


def connected_paper(drawing: Drawing) -> Labels:
    """Return the connected components of the paper; pixels of lines belong to the nearest component."""
    labels, _ = ndimage.label(drawing.darkness < DARK)
    return spread(labels)


def trapped_balls(drawing: Drawing) -> Labels:
    """Return what balls of falling radius reach without touching a line; the rest belongs to the nearest region."""
    paper = drawing.darkness < DARK
    labels, count = np.zeros(paper.shape, np.int32), 0
    for radius in np.array((8, 4, 2, 1)) * len(paper) / 512:
        free = paper & (labels == 0)
        centers = ndimage.distance_transform_edt(np.pad(free, 1))[1:-1, 1:-1] > radius
        balls, number = ndimage.label(centers)
        distance, (rows, columns) = ndimage.distance_transform_edt(~centers, return_indices=True)
        reached = free & (distance <= radius)
        labels[reached] = balls[rows, columns][reached] + count
        count += number
    return spread(labels)


def spread(labels: Labels) -> Labels:
    """Give pixels with label 0 the label of the nearest labeled pixel."""
    rows, columns = ndimage.distance_transform_edt(labels == 0, return_distances=False, return_indices=True)
    nearest: Labels = labels[rows, columns]
    return nearest


METHODS: dict[str, Method] = {
    "paper's components": connected_paper,
    "trapped balls": trapped_balls,
    "ours": lambda drawing: find_regions(drawing).labels,
}

if __name__ == "__main__":
    main()
