"""Measure what hints and a second reference add: PSNR by number of hints, Hint-AUC, doubt, and differences of tries.

    python benchmarks/hints.py MODEL DATA [--limit 100] [--hint-auc 20]

MODEL is a bundle folder and DATA a dataset of its size. The line art is extracted, and hints are points off the lines
with the target's mean color. Hint-AUC (Madono 2026) comes from the package `hintauc`, which is needed only for
--hint-auc: its dots, with the deterministic path method, on the wrong reference. The table is printed as Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from animediffusion.models.augmentation.augment import EVALUATION, Batch, Chance, bend, draw_warp, fixed_batch
from animediffusion.models.bundle import Bundle, load_bundle
from animediffusion.models.colorize import colorize
from animediffusion.models.doubt import doubt_map
from animediffusion.models.network.hints import hint_planes
from animediffusion.models.tensors import to_uint8
from animediffusion.pipelines.data.stream import read_split
from animediffusion.pipelines.evaluation.metrics import psnr

COUNTS = (0, 1, 2, 4, 8, 16, 32)
LINE_LEVEL = 0.5
PATCH = 4
"""Side of the patches in which doubt and error are averaged."""
TRIES = 3
GUIDANCE = (1.0, 1.5, 0.7)
"""Guidance of the first, second and third try."""


def hints_of(batch: Batch, count: int) -> Tensor | None:
    """Return planes with `count` random points per row, off the lines, with the mean color of 3 x 3 pixels."""
    if not count:
        return None
    generator, (rows, _, size, _) = torch.Generator().manual_seed(0), batch.target.shape
    light = -F.max_pool2d(-batch.sketch, 3, 1, 1)[:, 0]
    points = torch.full((rows, count, 2), -1)
    for row in range(rows):
        free = (light[row] > LINE_LEVEL).nonzero()
        chosen = free[torch.randperm(len(free), generator=generator)[:count]]
        points[row, : len(chosen)] = chosen.flip(-1)
    mean = F.avg_pool2d(batch.target, 3, 1, 1, count_include_pad=False)
    index = (points[..., 1] * size + points[..., 0]).clamp_min(0)[:, None].expand(-1, 3, -1)
    return hint_planes(points, mean.flatten(2).gather(2, index).transpose(1, 2), size)


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


def main() -> None:
    """Measure a model and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="bundle folder")
    parser.add_argument("data", help="URI of a dataset")
    parser.add_argument("--limit", type=int, default=100, help="pictures of val that are measured")
    parser.add_argument("--hint-auc", type=int, default=0, metavar="N", help="also measure Hint-AUC on N pictures")
    args = parser.parse_args()
    bundle = load_bundle(args.model)
    rows = {
        key: torch.from_numpy(value) for key, value in read_split(args.data, "val", args.limit).items() if key != "id"
    }
    batch = fixed_batch(rows, "same", torch.Generator().manual_seed(1))
    for part in (hint_lines, reference_lines, doubt_lines, try_lines):
        print("\n".join([*part(bundle, batch), ""]), flush=True)
    if args.hint_auc:
        print("\n".join(hint_auc(bundle, batch, args.hint_auc)))


if __name__ == "__main__":
    main()
