"""Train and measure the names of parts: hair, skin, eyes, clothes and background of drawn faces and varied drawings.

    python benchmarks/parts.py [--rows 40]
    python benchmarks/parts.py --train 300 serve/rendering/parts/weights.py

Drawn rows have exact parts (pipelines/synthetic/parts.py). They are colored by the starter model with the character's
other picture as reference, at 512 px, and the regions are named (serve/rendering/parts/naming.py). The table shows, for
each part, the precision, which is the share of the area with that name that shows the part, and the recall, which is
the share of the part's area that has its name. All are shares of pixels off the lines. Seeds differ from training.
Cropped drawings show a square window, whose frame cuts hair and clothes as portraits do.

Training draws twice as many varied rows as faces, at several sizes, each also mirrored. A fifth of the rows has another
character's reference and a quarter a perfect network, so that names do not depend on right colors.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from resolution import paint

from animediffusion.models.bundle import Bundle, load_bundle
from animediffusion.pipelines.synthetic.dataset import make_row
from animediffusion.pipelines.synthetic.parts import draw_parts
from animediffusion.pipelines.synthetic.variety import PRESETS
from animediffusion.platform.images.character_parts import PARTS
from animediffusion.platform.images.codec import letterbox
from animediffusion.platform.registry.downloads import STARTER_FOLDER
from animediffusion.serve.rendering.coloring import Coloring, color_regions
from animediffusion.serve.rendering.parts.naming import (
    NamingStage,
    RegionFeatures,
    look_at,
    name_regions,
    second_features,
)
from animediffusion.serve.rendering.regions import find_regions
from animediffusion.serve.rendering.sketch import Pixels, read_drawing

TRAIN_SEEDS = {"diverse": 501, "faces": 502}
TEST_SEEDS = {"diverse": 903, "faces": 904}
SIZES_PX = (256, 320, 384, 512)
SIZE_PX = 512
NETWORK_PX = 64
OFF_LINES = 0.3
"""Pixels at least this dark are lines and not counted."""
WINDOW = (0.5, 0.85)
"""Side of the window of a cropped drawing, as a share of the drawing's."""
HIDDEN = 32
"""Units of each stage."""
EPOCHS, BATCH = 60, 2048


class Case(NamedTuple):
    """A colored drawing."""

    coloring: Coloring
    votes: NDArray[np.int64]
    """[N, parts]: number of pixels of each part in each region."""


def main() -> None:
    """Print the table, or train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--train", nargs=2, metavar=("ROWS", "FILE"), help="write the weights to this file instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bundle = load_bundle(STARTER_FOLDER, "cpu")
    if options.train:
        train(bundle, int(options.train[0]), Path(options.train[1]))
        return
    print(f"| drawings | regions named, of the area | right, of it | {' | '.join(PARTS[1:])} | ms |")
    print("|---|---:|---:|" + "---:|" * len(PARTS))
    for variety in ("faces", "diverse"):
        for name, cropped in ((variety, False), (f"{variety}, cropped", True)):
            cases = [case(bundle, TEST_SEEDS[variety], row, variety, cropped=cropped) for row in range(options.rows)]
            print(line(name, cases), flush=True)


def case(
    bundle: Bundle,
    seed: int,
    row: int,
    variety: str,
    rng: np.random.Generator | None = None,
    *,
    cropped: bool = False,
) -> Case:
    """Draw and color a row; with `rng`, at a random size and, in part, with a wrong reference or a perfect network."""
    size = int(rng.choice(SIZES_PX)) if rng else SIZE_PX
    drawn, parts = make_row(seed, row, size, PRESETS[variety]), draw_parts(seed, row, size, PRESETS[variety])
    window = window_of(size, np.random.default_rng([seed, row])) if cropped else (slice(None), slice(None))
    lines, target, parts = drawn.sketch.reshape(size, size, 1)[window], drawn.target[window], parts[window]
    drawing = read_drawing(np.repeat(lines, 3, axis=2))
    chance, paper = rng.random(2).tolist() if rng else (0.5, 0.0)
    reference = drawn.cross_reference
    if chance < 0.2:
        reference = make_row(seed + 1000, row, SIZES_PX[0], PRESETS[variety]).cross_reference
    perfect: Pixels = letterbox(target, NETWORK_PX)[0]
    coloring = color_regions(
        perfect if chance > 0.75 else paint(bundle, drawing, reference),
        drawing,
        find_regions(drawing),
        references=[reference],
        background="paper" if paper < 0.6 else "reference",
    )
    codes = (coloring.labels.astype(np.int64) - 1) * len(PARTS) + parts
    shape = (len(coloring.regions), len(PARTS))
    counts = np.bincount(codes[drawing.darkness < OFF_LINES], minlength=shape[0] * shape[1])
    return Case(coloring, counts.reshape(shape))


def window_of(size: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """Return a random square window of a drawing, whose middle is the more likely the nearer it is to the drawing's."""
    side = int(size * rng.uniform(*WINDOW))
    top, left = (int((size - side) * rng.triangular(0, 0.5, 1)) for _ in range(2))
    return slice(top, top + side), slice(left, left + side)


def line(name: str, cases: Sequence[Case]) -> str:
    """Return a row of the table."""
    name_regions(cases[0].coloring)
    started = time.process_time()
    named = [name_regions(one.coloring).regions for one in cases]
    spent = 1e3 * (time.process_time() - started) / len(cases)
    names = np.array([PARTS.index(one.name) if one.name in PARTS else 0 for regions in named for one in regions])
    votes = np.concatenate([one.votes for one in cases])
    right = votes[names > 0, names[names > 0]].sum()
    cells = []
    for part in range(1, len(PARTS)):
        chosen = votes[names == part]
        precision, recall = (chosen[:, part].sum() / max(area.sum(), 1) for area in (chosen, votes[:, part]))
        cells.append(f"{precision:.2f}, {recall:.2f}")
    area = votes[names > 0].sum()
    return f"| {name} | {area / votes.sum():.2f} | {right / area:.3f} | {' | '.join(cells)} | {spent:.1f} |"


def train(bundle: Bundle, rows: int, out: Path) -> None:
    """Train both stages and write them as Python."""
    cases = list(training_cases(bundle, rows))
    looks = [(look(one.coloring), one.votes) for one in cases]
    looks += [(look(mirrored(one.coloring)), one.votes) for one in cases]
    # The second stage learns from what the first says about drawings that it was not trained on.
    folds = [[*range(fold, len(cases), 2), *range(len(cases) + fold, len(looks), 2)] for fold in (0, 1)]
    shares: dict[int, NDArray[np.float64]] = {}
    for fold in (0, 1):
        stage = fit([looks[index] for index in folds[1 - fold]], [looks[index][0].base for index in folds[1 - fold]])
        shares |= {index: stage(looks[index][0].base) for index in folds[fold]}
    second = fit(looks, [second_features(scene, shares[index]) for index, (scene, _) in enumerate(looks)])
    write([fit(looks, [scene.base for scene, _ in looks]), second], out)


def training_cases(bundle: Bundle, rows: int) -> Iterator[Case]:
    """Yield `rows` varied rows and half as many faces."""
    for variety, count in (("diverse", rows), ("faces", rows // 2)):
        for row in range(count):
            yield case(bundle, TRAIN_SEEDS[variety], row, variety, np.random.default_rng([TRAIN_SEEDS[variety], row]))


def look(coloring: Coloring) -> RegionFeatures:
    """Measure the regions of a coloring."""
    return look_at(coloring.labels, coloring.regions, coloring.drawing.darkness)


def mirrored(coloring: Coloring) -> Coloring:
    """Return the coloring with left and right exchanged."""
    width = coloring.labels.shape[1]
    regions = tuple(
        replace(one, box=(width - one.box[2], one.box[1], width - one.box[0], one.box[3])) for one in coloring.regions
    )
    drawing = coloring.drawing._replace(darkness=coloring.drawing.darkness[:, ::-1])
    return replace(coloring, labels=coloring.labels[:, ::-1], regions=regions, drawing=drawing)


def fit(
    looks: Sequence[tuple[RegionFeatures, NDArray[np.int64]]], features: Sequence[NDArray[np.float64]]
) -> NamingStage:
    """Train one stage; regions count by the root of their area."""
    torch.manual_seed(0)
    rows = np.concatenate(features)
    mean, deviation = rows.mean(axis=0), rows.std(axis=0) + 1e-3
    inputs = torch.tensor(np.clip((rows - mean) / deviation, -5, 5), dtype=torch.float32)
    parts = torch.tensor(np.concatenate([votes.argmax(axis=1) for _, votes in looks]))
    weights = torch.tensor(np.concatenate([np.sqrt(scene.area) + 1e-3 for scene, _ in looks]), dtype=torch.float32)
    weights /= weights.mean()
    network = torch.nn.Sequential(
        torch.nn.Linear(rows.shape[1], HIDDEN),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.15),
        torch.nn.Linear(HIDDEN, len(PARTS)),
    )
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.03)
    steps = -(-len(inputs) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=EPOCHS * steps)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(inputs)).split(BATCH):
            noisy = inputs[index] + 0.05 * torch.randn_like(inputs[index])
            losses = torch.nn.functional.cross_entropy(
                network(noisy), parts[index], reduction="none", label_smoothing=0.02
            )
            optimizer.zero_grad()
            (losses * weights[index]).mean().backward()
            optimizer.step()
            schedule.step()
    hidden, hidden_bias, out, out_bias = (one.detach().numpy().T for one in network.parameters())
    return NamingStage(mean.astype(np.float32), deviation.astype(np.float32), hidden, hidden_bias, out, out_bias)


def write(stages: Sequence[NamingStage], path: Path) -> None:
    """Write the weights as a Python module."""
    lines = [
        '"""The weights of naming.py, as benchmarks/parts.py --train writes them: shapes, and 16-bit floats."""',
        "",
        "STAGES: list[list[tuple[tuple[int, ...], str]]] = [",
    ]
    for stage in stages:
        lines.append("    [")
        for array in stage:
            digits = array.astype("<f2").tobytes().hex()
            lines += ["        (", f"            {array.shape!r},"]
            lines += [f'            "{digits[start : start + 104]}"' for start in range(0, len(digits), 104)]
            lines[-1] += ","
            lines.append("        ),")
        lines.append("    ],")
    path.write_text("\n".join([*lines, "]"]) + "\n")


if __name__ == "__main__":
    main()
