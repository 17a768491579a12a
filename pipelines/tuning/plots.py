"""Pictures of a search: a plot of quality against cost, and rows colored by points of the Pareto front."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from animediffusion.models.augmentation.augment import Batch
from animediffusion.models.bundle import Bundle
from animediffusion.models.colorize import colorize
from animediffusion.models.diffusion.sampler import SAMPLERS
from animediffusion.models.tensors import to_uint8
from animediffusion.models.training.ema import Averages
from animediffusion.pipelines.evaluation.measure import Measurement
from animediffusion.pipelines.tuning.pareto import pareto_front
from animediffusion.platform.images.codec import contact_sheet, encode_png

STRIP_ROWS, STRIP_POINTS = 4, 6
PAPER, INK, FAINT = "#f6f4f0", "#5c5652", "#bab4ac"
COLORS = {"euler": "#3a74a8", "heun": "#ce6e34", "dpmpp_2m": "#6a8f4e"}
SHOWN_DB = 3.0
"""Points more than this many dB below both the defaults and the front's cheapest point are not drawn: they would
compress the scale."""


def draw_front(points: Sequence[Measurement], chosen: Measurement) -> bytes:
    """Return a PNG of PSNR against cost, with the front as a line and labels at the defaults (points[0]) and choice."""
    figure = Figure(figsize=(8, 5), dpi=110, facecolor=PAPER)
    axes = figure.add_subplot(facecolor=PAPER)
    front, defaults = pareto_front(points), points[0]
    least = min(front[0].psnr, defaults.psnr) - SHOWN_DB
    shown = [point for point in points if point.psnr >= least]
    _draw_steps(axes, front, max(point.evaluations for point in points))
    for name in SAMPLERS:
        color = COLORS.get(name, INK)
        for guided in (False, True):
            some = [p for p in shown if p.sampler == name and (p.guidance_scale != 1) == guided]
            if some:
                fill = "none" if guided else color
                label = f"{name}, guided" if guided else name
                cost, quality = [p.evaluations for p in some], [p.psnr for p in some]
                axes.scatter(cost, quality, s=34, facecolors=fill, edgecolors=color, label=label, zorder=3)
    _annotate(axes, defaults, "defaults and choice" if chosen == defaults else "defaults", -26)
    if chosen != defaults:
        _annotate(axes, chosen, "choice", 18)
    axes.set_xscale("log", base=2)
    ticks = sorted({2**i for i in range(12) if 2**i <= 2 * max(p.evaluations for p in points)})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("network rows per image", color=INK)
    axes.set_ylabel("PSNR, dB", color=INK)
    left_out = len(points) - len(shown)
    hidden = f", {left_out} of them below the plot" if left_out else ""
    axes.set_title(f"{len(points)} settings of one model{hidden}", color=INK, fontsize=11, pad=14)
    axes.margins(y=0.15)  # room for the names
    axes.legend(frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.tick_params(colors=INK)
    axes.grid(color=FAINT, alpha=0.35, linewidth=0.6)
    for side in axes.spines.values():
        side.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", facecolor=PAPER)
    return buffer.getvalue()


def _draw_steps(axes: Axes, front: Sequence[Measurement], most: int) -> None:
    """Draw the front as steps: the best PSNR up to each cost."""
    cost, quality = [float(front[0].evaluations)], [front[0].psnr]
    for before, after in pairwise(front):
        cost += [after.evaluations, after.evaluations]
        quality += [before.psnr, after.psnr]
    axes.plot([*cost, max(most, cost[-1])], [*quality, quality[-1]], color=INK, linewidth=1.2, alpha=0.7, zorder=2)


def _annotate(axes: Axes, point: Measurement, text: str, below: int) -> None:
    place = (point.evaluations, point.psnr)
    axes.scatter(*place, s=150, facecolors="none", edgecolors=INK, linewidths=1.4, zorder=4)
    arrow = {"arrowstyle": "-", "color": INK, "linewidth": 0.8}
    axes.annotate(
        text, place, xytext=(16, below), textcoords="offset points", color=INK, fontsize=9, arrowprops=arrow, zorder=5
    )


def draw_strip(
    bundle: Bundle, averages: Averages, batch: Batch, front: Sequence[Measurement], chosen: Measurement
) -> bytes:
    """Return a PNG with one line per row: sketch, reference, the colors from points along the front, and the truth."""
    some = batch.rows(slice(STRIP_ROWS))
    points = spaced_points(front, chosen)
    columns = [some.sketch.expand(-1, 3, -1, -1), some.reference]
    seeds = range(len(some.target))
    with torch.no_grad():
        columns += [
            colorize(
                averages.use(bundle, point.ema_length), some.sketch, some.reference, seeds=seeds, sampler=point.settings
            ).cpu()
            for point in points
        ]
    pictures = [to_uint8(column).numpy() for column in (*columns, some.target)]
    labels = ["sketch", "reference", *(_label(point, chosen) for point in points), "truth"]
    return encode_png(contact_sheet([list(row) for row in zip(*pictures, strict=True)], labels, cell=160))


def spaced_points(front: Sequence[Measurement], chosen: Measurement) -> list[Measurement]:
    """Return at most STRIP_POINTS evenly spaced points of the front, its ends included, and the chosen point."""
    points = {*front, chosen}
    if len(points) > STRIP_POINTS:
        last = len(front) - 1
        points = {front[round(i * last / (STRIP_POINTS - 2))] for i in range(STRIP_POINTS - 1)} | {chosen}
    return sorted(points, key=lambda point: (point.evaluations, point.psnr))


def _label(point: Measurement, chosen: Measurement) -> str:
    mark = "choice: " if point == chosen else ""
    return f"{mark}{point.evaluations} at {point.psnr:.2f} dB"
