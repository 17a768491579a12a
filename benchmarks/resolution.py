"""Measure cost and quality of upsampling colors to the drawing's resolution, compared with plain enlargement.

    python benchmarks/resolution.py [--sizes 320 640 1280] [--rows 4] [--network 64] [--model BUNDLE]

The benchmark uses drawn faces, whose true colors are known at every size. The downscaled target is the output of a
perfect network; with --model, a real network colors the drawing too. Both are upsampled to the drawing's size and
compared with the target outside of lines by CIEDE2000, separately near lines (within one pixel of the network's image)
and farther from them. The "open" drawings are the same drawings with 25 gaps in their lines. Time is CPU time of this
process, which runs on one core, so other work on the machine affects it little; it excludes decoding, encoding and the
network.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import distance_transform_edt
from skimage.color import deltaE_ciede2000, rgb2lab

from animediffusion.models.bundle import Bundle, SamplerDefaults, load_bundle
from animediffusion.models.colorize import colorize
from animediffusion.models.tensors import to_tensor, to_uint8
from animediffusion.pipelines.synthetic.dataset import make_row
from animediffusion.platform.images.codec import letterbox, unletterbox
from animediffusion.serve.rendering.sketch import Drawing, Pixels, as_gray, for_network, read_drawing
from animediffusion.serve.rendering.upsample import layer_of, to_picture

SEED = 2025
"""Seed of faces that no model of this project is trained on."""
NUM_GAPS = 25
SAMPLE = 2
"""Every second pixel in each direction is compared."""


class Case(NamedTuple):
    """One drawing, its colors at the network's size, and the truth."""

    drawing: Drawing
    painted: Pixels
    """Output of the network, or the downscaled target."""
    truth: NDArray[np.float64]
    """Target in CIELAB at the compared pixels."""
    distance: NDArray[np.float64]
    """Distance of the compared pixels to the nearest line of the closed drawing, in pixels of the network's image."""


def main() -> None:
    """Print the tables."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    arguments.add_argument(
        "--sizes", type=int, nargs="+", default=[320, 640, 1280], help="sides of drawings, at most 1280"
    )
    arguments.add_argument("--rows", type=int, default=4)
    arguments.add_argument("--network", type=int, default=64, help="side of the network's picture without --model")
    arguments.add_argument("--model", type=Path, help="a bundle that also colors the drawings")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    bundle = load_bundle(options.model, "cpu") if options.model else None
    network = bundle.config.image_size if bundle else options.network
    print(f"{platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}, one core; "
          f"{options.rows} drawn faces, network of {network} px\n")  # fmt: skip
    print("| drawing | colored by | lines | enlarged: near | elsewhere | ours: near | elsewhere | s/Mpixel |")
    print("|---:|---|---|---:|---:|---:|---:|---:|")
    for size in options.sizes:
        for painter in ("perfect", "model") if bundle else ("perfect",):
            for lines in ("closed", "open"):
                cases = [make_case(row, size, network, lines, bundle if painter == "model" else None)
                         for row in range(options.rows)]  # fmt: skip
                plain, ours = errors(cases, enlarge), errors(cases, finish)
                cells = [*plain, *ours]
                print(f"| {size} | {painter} | {lines} | " + " | ".join(f"{cell:.2f}" for cell in cells)
                      + f" | {seconds(cases):.2f} |", flush=True)  # fmt: skip


def make_case(index: int, size: int, network: int, lines: str, bundle: Bundle | None) -> Case:
    """Make drawing `index` at this size, colored by the bundle, or by a perfect network if there is no bundle."""
    row = make_row(SEED, index, min(size, 1024))
    target, closed = (np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC))
                      for one in (row.target, row.sketch))  # fmt: skip
    closed = closed if closed.ndim == 3 else np.repeat(closed[..., None], 3, 2)
    drawing = read_drawing(with_gaps(closed, index) if lines == "open" else closed)
    painted = letterbox(target, network)[0] if bundle is None else paint(bundle, drawing, row.cross_reference)
    distance = distance_transform_edt(closed[..., 0] > 200) / (size / network)
    return Case(drawing, painted, rgb2lab(target[::SAMPLE, ::SAMPLE]), distance[::SAMPLE, ::SAMPLE])


def with_gaps(sketch: Pixels, seed: int) -> Pixels:
    """Return the sketch with NUM_GAPS gaps in its lines, each up to 1.5 pixels of a 64 px network image wide."""
    rng, broken = np.random.default_rng(seed), sketch.copy()
    rows, columns = np.nonzero(sketch[..., 0] < 100)
    for place in rng.integers(0, len(rows), NUM_GAPS):
        y, x, half = rows[place], columns[place], int(len(sketch) / 64 * rng.uniform(0.4, 0.75))
        broken[max(0, y - half) : y + half, max(0, x - half) : x + half] = 255
    return broken


def paint(
    bundle: Bundle, drawing: Drawing, reference: Pixels, seed: int = 7, sampler: SamplerDefaults | None = None
) -> Pixels:
    """Return the model's image of a drawing, at the network's size."""
    size = bundle.config.image_size
    sketch, colors = (to_tensor(torch.from_numpy(np.ascontiguousarray(one))[None])
                      for one in (for_network(as_gray(drawing), size), letterbox(reference, size)[0]))  # fmt: skip
    return np.asarray(to_uint8(colorize(bundle, sketch, colors, seeds=[seed], sampler=sampler))[0].numpy())


def finish(painted: Pixels, drawing: Drawing) -> Pixels:
    """Upsample the network's image as serving does."""
    return to_picture(layer_of(painted, drawing), drawing)


def enlarge(painted: Pixels, drawing: Drawing) -> Pixels:
    """Enlarge the network's image without using the drawing's lines."""
    height, width = drawing.darkness.shape
    return unletterbox(painted, letterbox(np.zeros((height, width), np.uint8), len(painted))[1])


def errors(cases: list[Case], method: Callable[[Pixels, Drawing], Pixels]) -> tuple[float, float]:
    """Return the mean CIEDE2000 near lines and far from lines; pixels on lines are not compared."""
    near, elsewhere = [], []
    for case in cases:
        picture = method(case.painted, case.drawing)
        found = deltaE_ciede2000(rgb2lab(picture[::SAMPLE, ::SAMPLE]), case.truth)
        scale = len(case.painted) / len(picture)
        off = case.distance > 1.5 * scale
        near.append(found[off & (case.distance <= 1)].mean())
        elsewhere.append(found[off & (case.distance > 1)].mean())
    return float(np.mean(near)), float(np.mean(elsewhere))


def seconds(cases: list[Case]) -> float:
    """Return CPU seconds per megapixel for computing the color layer and multiplying it with the drawing."""
    started, pixels = time.process_time(), 0
    for case in cases:
        layer = layer_of(case.painted, case.drawing)
        to_picture(layer, case.drawing)
        pixels += case.drawing.darkness.size
    return (time.process_time() - started) / pixels * 1e6


if __name__ == "__main__":
    main()
