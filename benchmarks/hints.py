"""Measure what hints and a second reference add: PSNR by number of hints, Hint-AUC, doubt, and differences of tries.

    python benchmarks/hints.py MODEL DATA [--limit 100] [--hint-auc 20]
    python benchmarks/hints.py MODEL DATA|drawn --finished [--limit 100] [--style flat]

MODEL is a bundle folder and DATA a dataset of its size. The line art is extracted, and hints are points off the lines
with the target's mean color. Hint-AUC (Madono 2026) comes from the package `hintauc`, which is needed only for
--hint-auc: its dots, with the deterministic path method, on the wrong reference. The table is printed as Markdown.

With --finished, the pictures are those that users get: they have the size of the drawing, and the regions under the
hints have exactly their colors. DATA is a dataset of any size, or `drawn` for the drawings of benchmarks/open.py. Hints
color whole regions, as a click in the page does: `exact` ones these alone, `learned` ones also what looks alike. The
targets have backgrounds, so `paper`, the default background, is an error that hints mend, and `reference` is not.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common import hardware
from open import draw_case
from PIL import Image
from torch import Tensor

from animediffusion.models.augmentation.augment import EVALUATION, Batch, Chance, bend, draw_warp, fixed_batch
from animediffusion.models.bundle import Bundle, load_bundle
from animediffusion.models.colorize import colorize
from animediffusion.models.doubt import doubt_map
from animediffusion.models.network.hints import hint_planes
from animediffusion.models.tensors import to_tensor, to_uint8
from animediffusion.pipelines.data.stream import read_split
from animediffusion.pipelines.evaluation.metrics import psnr
from animediffusion.serve.network_inputs import network_inputs
from animediffusion.serve.rendering.coloring import Background, Style
from animediffusion.serve.rendering.layers import hex_of
from animediffusion.serve.rendering.render import RenderOptions, render
from animediffusion.serve.rendering.sketch import Drawing, Pixels, as_gray, read_drawing

COUNTS = (0, 1, 2, 4, 8, 16, 32)
FINISHED_COUNTS = (0, 1, 2, 4, 8)
SEED = 0
LINE_LEVEL = 0.5
PATCH = 4
"""Side of the patches in which doubt and error are averaged."""
TRIES = 3
GUIDANCE = (1.0, 1.5, 0.7)
"""Guidance of the first, second and third try."""


Point = tuple[int, int, tuple[int, int, int]]
"""Column, row and color."""


class Case(NamedTuple):
    """A drawing of which finished pictures are measured."""

    drawing: Drawing
    reference: Pixels
    truth: Pixels
    points: list[Point]


def hints_of(batch: Batch, count: int) -> Tensor | None:
    """Return planes of points_of(); None without points."""
    return hint_planes(*points_of(batch, count), batch.target.shape[-1]) if count else None


def points_of(batch: Batch, count: int) -> tuple[Tensor, Tensor]:
    """Return `count` random points [B, N, 2] off the lines, -1 where there are fewer, and their colors [B, N, 3].

    A color is the mean of 3 x 3 pixels of the target.
    """
    generator, (rows, _, size, _) = torch.Generator().manual_seed(0), batch.target.shape
    light = -F.max_pool2d(-batch.sketch, 3, 1, 1)[:, 0]
    points = torch.full((rows, count, 2), -1)
    for row in range(rows):
        free = (light[row] > LINE_LEVEL).nonzero()
        chosen = free[torch.randperm(len(free), generator=generator)[:count]]
        points[row, : len(chosen)] = chosen.flip(-1)
    mean = F.avg_pool2d(batch.target, 3, 1, 1, count_include_pad=False)
    index = (points[..., 1] * size + points[..., 0]).clamp_min(0)[:, None].expand(-1, 3, -1)
    return points, mean.flatten(2).gather(2, index).transpose(1, 2)


def quality(image: Tensor, batch: Batch) -> float:
    """Return the mean PSNR in dB."""
    return float(psnr(to_uint8(image).numpy(), to_uint8(batch.target).numpy()).mean())


def halves(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return two views of the target: each is warped in its own way and shows one half, on either side of a line."""
    rows, _, size, _ = batch.target.shape
    chance = Chance(rows, torch.device("cpu"), torch.Generator().manual_seed(5))
    second = bend(batch.target, *draw_warp(EVALUATION, chance))
    angle = chance.uniform(-torch.pi, torch.pi)[:, None, None]
    y, x = torch.meshgrid(*2 * [torch.linspace(-1, 1, size)], indexing="ij")
    side = (angle.cos() * x + angle.sin() * y > 0)[:, None]
    return torch.where(side, batch.reference, 0.0), torch.where(side, 0.0, second)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's correlation of two vectors (ties are broken by position)."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def measure(bundle: Bundle, batch: Batch, references: Tensor | Sequence[Tensor], count: int = 0) -> float:
    """Return the PSNR in dB with these references and this number of hints."""
    seeds = range(len(batch.target))
    return quality(colorize(bundle, batch.sketch, references, seeds=seeds, hints=hints_of(batch, count)), batch)


def hint_lines(bundle: Bundle, batch: Batch) -> list[str]:
    """Return PSNR by the number of hints, with the reference of another character and with the own one."""
    lines = [f"| reference, number of hints | {' | '.join(map(str, COUNTS))} |", "|---" * (len(COUNTS) + 1) + "|"]
    for name, reference in (("another character", batch.reference.roll(1, 0)), ("own", batch.reference)):
        values = " | ".join(f"{measure(bundle, batch, reference, count):.2f}" for count in COUNTS)
        lines.append(f"| {name} | {values} |")
    return lines


def reference_lines(bundle: Bundle, batch: Batch) -> list[str]:
    """Return PSNR with one and with two references."""
    (first, second), wrong = halves(batch), batch.reference.roll(1, 0)
    given = {
        "first half": [first],
        "second half": [second],
        "both halves": [first, second],
        "another character": [wrong],
        "another character, own": [wrong, batch.reference],
        "own": [batch.reference],
        "own, another character": [batch.reference, wrong],
    }
    lines = ["| references | PSNR, dB |", "|---|---|"]
    return [*lines, *(f"| {name} | {measure(bundle, batch, some):.2f} |" for name, some in given.items())]


def doubt_lines(bundle: Bundle, batch: Batch) -> list[str]:
    """Return the rank correlation of doubt and error: over all pixels, and over the patches of a picture."""
    image = colorize(bundle, batch.sketch, batch.reference, seeds=range(len(batch.target)))
    doubt = doubt_map(bundle.denoiser.encode(batch.sketch, batch.reference), image)
    if doubt is None:
        return ["The model has no matcher, and no doubt."]
    error = (image - batch.target).abs().mean(1)
    patches = [F.avg_pool2d(x[:, None], PATCH).flatten(1) for x in (doubt, error)]
    within = np.mean([rank_correlation(a, b) for a, b in zip(*patches, strict=True)])
    pixels = rank_correlation(doubt.flatten(), error.flatten())
    return [f"Doubt and error: rank correlation {pixels:.2f} over pixels, {within:.2f} over patches of a picture."]


def try_lines(bundle: Bundle, batch: Batch) -> list[str]:
    """Return quality and mean difference of several tries, which differ by seed, or by seed and guidance."""
    lines = ["| tries | PSNR, dB | mean difference, 8-bit levels |", "|---|---|---|"]
    options = [bundle.config.sampler] * TRIES
    guided = [replace(one, guidance_scale=scale) for one, scale in zip(options, GUIDANCE, strict=True)]
    for name, samplers in (("seed", options), (f"seed and guidance {', '.join(map(str, GUIDANCE))}", guided)):
        images = [
            colorize(bundle, batch.sketch, batch.reference, seeds=range(n, n + len(batch.target)), sampler=sampler)
            for n, sampler in zip((0, 10_000, 20_000), samplers, strict=True)
        ]
        apart = np.mean([float((a - b).abs().mean()) * 127.5 for a, b in combinations(images, 2)])
        lines.append(f"| {name} | {np.mean([quality(image, batch) for image in images]):.2f} | {apart:.1f} |")
    return lines


def hint_auc(bundle: Bundle, batch: Batch, count: int) -> list[str]:
    """Return PSNR by hint ratio and the Hint-AUC, for `count` pictures with another character as reference."""
    import hintauc

    wrong = batch.reference.roll(1, 0)

    def colorizer(sample: dict[str, object]) -> np.ndarray:
        row, mask, color = sample["index"], sample["hint_mask"], sample["hint_color"]
        y, x = np.nonzero(mask)
        points = torch.from_numpy(np.stack([x, y], 1))[None]
        colors = torch.from_numpy(color[y, x, ::-1].copy())[None].float() / 127.5 - 1
        planes = hint_planes(points, colors, batch.target.shape[-1]) if len(x) else None
        some = slice(row, row + 1)
        image = colorize(bundle, batch.sketch[some], wrong[some], seeds=[row], hints=planes)
        return to_uint8(image)[0].numpy()[..., ::-1].copy()

    targets = to_uint8(batch.target[:count]).numpy()[..., ::-1]
    sketches = to_uint8(batch.sketch[:count].expand(-1, 3, -1, -1)).numpy()
    found = hintauc.evaluate_colorizer(
        colorizer,
        [(sketch, np.ascontiguousarray(target)) for sketch, target in zip(sketches, targets, strict=True)],
        hint_type="dot",
        metrics=("psnr",),
        size=batch.target.shape[-1],
        path_method="geodesic",
    )
    curve = {alpha: scores["psnr"] for alpha, scores in found["per_alpha"].items()}
    lines = [f"| hint ratio | {' | '.join(map(str, curve))} | Hint-AUC |", "|---" * (len(curve) + 2) + "|"]
    values = " | ".join(f"{value:.2f}" for value in curve.values())
    return [*lines, f"| PSNR, dB | {values} | {found['hint_auc']['psnr']:.2f} |"]


def cases_of(batch: Batch) -> list[Case]:
    """Return the drawings of a batch with the most points that are measured."""
    pictures = (to_uint8(one).numpy() for one in (batch.sketch.expand_as(batch.target), batch.reference, batch.target))
    points, colors = points_of(batch, FINISHED_COUNTS[-1])
    levels = ((colors + 1) * 127.5).round().long()
    return [
        Case(
            read_drawing(lines),
            reference,
            truth,
            [(x, y, (r, g, b)) for (x, y), (r, g, b) in zip(places.tolist(), rgb.tolist(), strict=True) if x >= 0],
        )
        for lines, reference, truth, places, rgb in zip(*pictures, points, levels, strict=True)
    ]


def drawn_batch(count: int) -> Batch:
    """Return the first drawings of benchmarks/open.py, with another view as the reference."""
    cases = [draw_case(row) for row in range(count)]
    sketch = [case.sketches["clean"].reshape(*case.truth.shape[:2], -1)[..., 0] for case in cases]
    references, targets = ([case.references["another view"][0] for case in cases], [case.truth for case in cases])
    return Batch(*(to_tensor(torch.from_numpy(np.stack(one))) for one in (targets, sketch, references)))


def painted(bundle: Bundle, case: Case, reference: Pixels, points: Sequence[Point]) -> Pixels:
    """Return the network's picture, with the points as learned hints."""
    given = network_inputs(as_gray(case.drawing), [reference], points, bundle.config.image_size)
    return to_uint8(colorize(bundle, given.sketch, given.references, seeds=[SEED], hints=given.hints))[0].numpy()


def finished(
    painting: Pixels, case: Case, reference: Pixels, points: Sequence[Point], options: RenderOptions, *, learned: bool
) -> Pixels:
    """Return the picture that a user gets with these points."""
    hints = [{"x": x, "y": y, "color": hex_of(rgb), "learned": learned, "scope": "whole"} for x, y, rgb in points]
    look = replace(options, hints=json.dumps(hints) if hints else None)
    made = render(painting, case.drawing, [reference], look.read_hints(case.drawing), options=look)
    return np.asarray(Image.open(io.BytesIO(made.files["image"])).convert("RGB"))


def print_finished(bundle: Bundle, batch: Batch, style: Style) -> None:
    """Print the PSNR of finished pictures by the number of hints."""
    cases = cases_of(batch)
    print(f"{hardware(torch.device('cpu'))}; {len(cases)} drawings of {len(cases[0].truth)} px, style {style}\n")
    print(f"| reference | hints | background | {' | '.join(map(str, FINISHED_COUNTS))} |")
    print("|---|---|---" + "|---:" * len(FINISHED_COUNTS) + "|")
    backgrounds: tuple[Background | None, ...] = (None,) if style == "painted" else ("paper", "reference")
    own = [case.reference for case in cases]
    for name, references in (("own", own), ("another character", [own[-1], *own[:-1]])):
        for kind in ("exact", "learned"):
            table = [
                picture_scores(bundle, case, reference, style, backgrounds, learned=kind == "learned")
                for case, reference in zip(cases, references, strict=True)
            ]
            for background, row in zip(backgrounds, np.mean(table, axis=0), strict=True):
                cells = " | ".join(f"{value:.2f}" for value in row)
                print(f"| {name} | {kind} | {background or 'reference'} | {cells} |", flush=True)


def picture_scores(
    bundle: Bundle,
    case: Case,
    reference: Pixels,
    style: Style,
    backgrounds: Sequence[Background | None],
    *,
    learned: bool,
) -> list[list[float]]:
    """Return the PSNR of the pictures of a drawing, for each background and each number of hints."""
    table: list[list[float]] = [[] for _ in backgrounds]
    for count in FINISHED_COUNTS:
        points = case.points[:count]
        if learned or not count:
            painting = painted(bundle, case, reference, points)
        for background, row in zip(backgrounds, table, strict=True):
            options = RenderOptions(style=style, background=background)
            picture = finished(painting, case, reference, points, options, learned=learned)
            row.append(float(psnr(picture[None], case.truth[None])[0]))
    return table


def main() -> None:
    """Measure a model and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="bundle folder")
    parser.add_argument("data", help="URI of a dataset; with --finished also `drawn`")
    parser.add_argument("--limit", type=int, default=100, help="pictures of val that are measured")
    parser.add_argument("--hint-auc", type=int, default=0, metavar="N", help="also measure Hint-AUC on N pictures")
    parser.add_argument("--finished", action="store_true", help="measure finished pictures instead")
    parser.add_argument("--style", choices=["flat", "shaded", "painted"], default="flat", help="of finished pictures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bundle = load_bundle(args.model)
    if args.finished and args.data == "drawn":
        print_finished(bundle, drawn_batch(args.limit), args.style)
        return
    rows = {
        key: torch.from_numpy(value) for key, value in read_split(args.data, "val", args.limit).items() if key != "id"
    }
    batch = fixed_batch(rows, "same", torch.Generator().manual_seed(1))
    if args.finished:
        print_finished(bundle, batch, args.style)
        return
    for part in (hint_lines, reference_lines, doubt_lines, try_lines):
        print("\n".join([*part(bundle, batch), ""]), flush=True)
    if args.hint_auc:
        print("\n".join(hint_auc(bundle, batch, args.hint_auc)))


if __name__ == "__main__":
    main()
