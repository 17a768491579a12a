"""Measure how much further tries of a drawing differ, region by region, and what they cost.

    python benchmarks/tries.py MODEL [--rows 16] [--data URI] [--other]

The drawings are those of benchmarks/rendering.py: drawn faces of 512 px, or the val split of a dataset, recolored. Each
is colored three times in the style `flat`, as serving does, and the colors of the regions are compared off the lines:
the mean difference of two tries in 8-bit levels, the share of the area in which they are more than 5 and 10 CIEDE2000
apart, and the mean CIEDE2000 of all tries to the truth. --other takes the reference of the next row, another character,
where the truth means nothing. `page` are the first two further tries of the page, `page, later` the next two.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rendering import SAMPLE, Case, dataset_cases, drawn_cases
from resolution import paint
from skimage.color import deltaE_ciede2000, rgb2lab

from animediffusion.models.bundle import Bundle, load_bundle
from animediffusion.platform.errors import AnimeDiffusionError
from animediffusion.serve.rendering.coloring import color_regions
from animediffusion.serve.rendering.sketch import Pixels

Change = dict[str, float]
WAYS: dict[str, tuple[Change, Change]] = {
    "seed": ({}, {}),
    "guidance 1.5, 0.7": ({"guidance_scale": 1.5}, {"guidance_scale": 0.7}),
    "guidance 2, 0.5": ({"guidance_scale": 2}, {"guidance_scale": 0.5}),
    "steps 12, 1": ({"steps": 12}, {"steps": 1}),
    "page": ({"guidance_scale": 1.5, "steps": 12}, {"guidance_scale": 0.7, "steps": 1}),
    "page, later": ({"guidance_scale": 2, "steps": 12}, {"guidance_scale": 0.5, "steps": 12}),
}
"""What the second and the third try change besides the seed."""


def flats(bundle: Bundle, case: Case, change: Change, seed: int) -> Pixels:
    """Return the flat colors of one try."""
    painted = paint(bundle, case.drawing, case.reference, seed, replace(bundle.config.sampler, **change))
    return color_regions(painted, case.drawing, case.regions, references=[case.reference], background="reference").flats


def compared(tries: list[Pixels], case: Case) -> list[float]:
    """Return the mean difference in levels, both shares of the area, and the mean distance to the truth."""
    mask: NDArray[np.bool_] = case.off_lines[::SAMPLE, ::SAMPLE]
    lab = [rgb2lab(picture[::SAMPLE, ::SAMPLE]) for picture in (*tries, case.truth)]
    distances = []
    for one, other in combinations(range(len(tries)), 2):
        levels = np.abs(tries[one].astype(int) - tries[other])[::SAMPLE, ::SAMPLE]
        distance = deltaE_ciede2000(lab[one], lab[other])[mask]
        distances.append([levels[mask].mean(), (distance > 5).mean(), (distance > 10).mean()])
    return [
        *np.mean(distances, axis=0).tolist(),
        float(np.mean([deltaE_ciede2000(one, lab[-1])[mask].mean() for one in lab[:-1]])),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="bundle folder")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--data", help="URI of a dataset, instead of drawn faces")
    parser.add_argument("--other", action="store_true", help="take another character's reference")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        bundle = load_bundle(options.model, "cpu")
        cases = dataset_cases(options.data, options.rows) if options.data else drawn_cases(options.rows)
    except AnimeDiffusionError as error:
        raise SystemExit(f"error: {error}") from None
    if options.other:
        cases = [
            case._replace(reference=other.reference) for case, other in zip(cases, cases[1:] + cases[:1], strict=True)
        ]
    print("| tries differ by | levels | area over 5 | area over 10 | mean to the truth |")
    print("|---|---:|---:|---:|---:|")
    for name, changes in WAYS.items():
        found = []
        for index, case in enumerate(cases):
            tries = [flats(bundle, case, change, 1000 * n + index) for n, change in enumerate(({}, *changes))]
            found.append(compared(tries, case))
        levels, over_5, over_10, error = np.mean(found, axis=0)
        print(f"| {name} | {levels:.1f} | {over_5:.2f} | {over_10:.2f} | {error:.2f} |", flush=True)


if __name__ == "__main__":
    main()
