"""Measure how near the colors of each style are to the truth, off the lines, and what the styles cost.

    python benchmarks/rendering.py [--rows 8] [--model BUNDLE] [--data URI] [--paper #RRGGBB]

Without --data, the drawings are faces drawn at 512 px with the character's other picture as reference. With --data,
they are the val split of a dataset: line art of its pictures, recolored, with the warped truth as reference (the track
`recolored` of pipelines/evaluation/tracks.py). A drawing is colored by a perfect network of 64 px, which is the
downscaled truth, and with --model by that model. The styles: `painted` enlarges the network's colors; `flat` and
`shaded` color by regions; `no palette` is `flat` with the network's own colors. The row `true regions` is an upper
bound: the median of the truth in each region that the lines enclose. The background is that of the reference, because
the truth has one. With --paper, the drawings are scans on paper of that color, whose left side gets 15 % less light.
Time is CPU time of this process without finding the regions, which benchmarks/regions.py measures.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import hardware
from numpy.typing import NDArray
from PIL import ImageColor
from resolution import SEED, finish, paint

from animediffusion.models.bundle import Bundle, load_bundle
from animediffusion.models.tensors import to_uint8
from animediffusion.pipelines.data.stream import read_split
from animediffusion.pipelines.evaluation.metrics import color_differences, off_lines
from animediffusion.pipelines.evaluation.tracks import build
from animediffusion.pipelines.synthetic.dataset import make_row
from animediffusion.platform.errors import AnimeDiffusionError
from animediffusion.platform.images.codec import letterbox
from animediffusion.serve.rendering.coloring import color_regions
from animediffusion.serve.rendering.regions import Regions, find_regions
from animediffusion.serve.rendering.sketch import Drawing, Pixels, read_drawing, with_white_paper
from animediffusion.serve.rendering.upsample import to_picture, to_rgba

SIZE_PX = 512
NETWORK_PX = 64
SAMPLE = 2
"""Every second pixel in each direction is compared."""
SHADOW = 0.15
"""Share of the light that the left side of a scan lacks."""


class Case(NamedTuple):
    """One drawing with its reference and its true colors."""

    drawing: Drawing
    reference: Pixels
    truth: Pixels
    off_lines: NDArray[np.bool_]
    """[H, W]: pixels that are compared, before SAMPLE."""
    regions: Regions


Method = Callable[[Pixels, Case], Pixels]
"""Makes the finished picture from the network's picture."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--model", type=Path, help="a bundle that also colors the drawings")
    parser.add_argument("--data", help="URI of a dataset, instead of drawn faces")
    parser.add_argument("--paper", type=ImageColor.getrgb, help="color of the paper of the drawings, #RRGGBB")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        bundle = load_bundle(options.model, "cpu") if options.model else None
        cases = dataset_cases(options.data, options.rows) if options.data else drawn_cases(options.rows)
    except AnimeDiffusionError as error:
        raise SystemExit(f"error: {error}") from None
    if options.paper:
        cases = [scanned(case, options.paper) for case in cases]
    print(f"{hardware(torch.device('cpu'))}, Python {platform.python_version()}, NumPy {np.__version__}, one core; "
          f"{len(cases)} drawings of {len(cases[0].truth)} px\n")  # fmt: skip
    print("| colored by | style | within 3 | within 6 | mean | median | s/Mpixel |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for painter in ("perfect", "model") if bundle else ("perfect",):
        paintings = [painting(case, bundle if painter == "model" else None) for case in cases]
        for name, method in METHODS.items():
            print(row(painter, name, paintings, cases, method), flush=True)
    for name, method in BOUNDS.items():
        print(row("-", name, [case.reference for case in cases], cases, method), flush=True)


def drawn_cases(count: int) -> list[Case]:
    """Draw faces that no demo trains on."""
    rows = [make_row(SEED, index, SIZE_PX) for index in range(count)]
    return [case_of(one.sketch, one.cross_reference, one.target) for one in rows]


def dataset_cases(uri: str, count: int) -> list[Case]:
    """Read the first rows of the val split, recolored."""
    batch = build(read_split(uri, "val", count), "recolored")
    sketches, references, truths = (to_uint8(one).numpy() for one in (batch.sketch, batch.reference, batch.target))
    return [case_of(*one) for one in zip(sketches, references, truths, strict=True)]


def case_of(sketch: Pixels, reference: Pixels, truth: Pixels) -> Case:
    """Make a case of line art [H, W] or [H, W, 1] and pictures [H, W, 3]."""
    lines = np.broadcast_to(sketch.reshape(*truth.shape[:2], -1), truth.shape)
    drawing = read_drawing(np.ascontiguousarray(lines))
    return Case(drawing, reference, truth, off_lines(lines[..., 0]), find_regions(drawing))


def scanned(case: Case, paper: tuple[int, ...]) -> Case:
    """Return the case with a drawing on paper of this color, whose left side gets less light."""
    light = np.linspace(1 - SHADOW, 1, case.truth.shape[1])[:, None] * np.array(paper)
    drawing = with_white_paper(read_drawing(np.rint(case.drawing.pixels / 255 * light).astype(np.uint8)))
    return case._replace(drawing=drawing, regions=find_regions(drawing))


def painting(case: Case, bundle: Bundle | None) -> Pixels:
    """Return the network's picture, or that of a perfect network without a bundle."""
    return paint(bundle, case.drawing, case.reference) if bundle else letterbox(case.truth, NETWORK_PX)[0]


def painted(network: Pixels, case: Case) -> Pixels:
    """Enlarge the network's colors up to the lines."""
    return finish(network, case.drawing)


def flat(network: Pixels, case: Case) -> Pixels:
    """Color regions with the reference's colors."""
    return by_regions(network, case)


def shaded(network: Pixels, case: Case) -> Pixels:
    """Color regions with the reference's colors and a shading."""
    return by_regions(network, case, style="shaded")


def no_palette(network: Pixels, case: Case) -> Pixels:
    """Color regions with the network's colors."""
    return by_regions(network, case, palette=None)


def by_regions(network: Pixels, case: Case, **options: str | None) -> Pixels:
    """Return the finished picture of a coloring by regions."""
    coloring = color_regions(
        network, case.drawing, case.regions, references=[case.reference], background="reference", **options
    )  # type: ignore[arg-type]
    layer = coloring.flats.astype(np.float32) / 255
    if coloring.shading is not None:
        layer = np.clip(layer * coloring.shading, 0, 1)
    return to_picture(to_rgba(layer), case.drawing)


def true_regions(_: Pixels, case: Case) -> Pixels:
    """Give each region the median of its true colors."""
    labels = case.regions.labels
    picture = np.empty_like(case.truth)
    for label in np.unique(labels):
        inside = labels == label
        seen = inside & case.off_lines
        picture[inside] = np.median(case.truth[seen if seen.any() else inside], axis=0)
    return picture


def copied(_: Pixels, case: Case) -> Pixels:
    """Copy the reference."""
    return case.reference


METHODS: dict[str, Method] = {"painted": painted, "flat": flat, "shaded": shaded, "no palette": no_palette}
BOUNDS: dict[str, Method] = {"true regions": true_regions, "copied reference": copied}


def row(painter: str, name: str, paintings: list[Pixels], cases: list[Case], method: Method) -> str:
    """Return a row of the table: means over the drawings."""
    scores, seconds, pixels = [], 0.0, 0
    for network, case in zip(paintings, cases, strict=True):
        started = time.process_time()
        picture = method(network, case)
        seconds += time.process_time() - started
        pixels += case.truth[..., 0].size
        error = color_error(picture, case.truth, case.off_lines)
        scores.append(((error <= 3).mean(), (error <= 6).mean(), error.mean(), np.median(error)))
    numbers = (*np.mean(scores, axis=0), seconds / pixels * 1e6)
    return f"| {painter} | {name} | " + " | ".join(f"{number:.2f}" for number in numbers) + " |"


def color_error(picture: Pixels, truth: Pixels, off_lines: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return CIEDE2000 at the compared pixels that are off the lines."""
    return color_differences(sampled(picture), sampled(truth), sampled(off_lines))


def sampled(array: NDArray[Any]) -> NDArray[Any]:
    """Return the compared pixels of an array [H, W, ...]."""
    return array[::SAMPLE, ::SAMPLE]


if __name__ == "__main__":
    main()
