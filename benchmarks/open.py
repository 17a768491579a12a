"""Compare methods that color line art, on drawn characters whose regions and colors are known exactly.

    python benchmarks/open.py [--rows 24] [--method module:function ...] [--model BUNDLE ...] [--sheet PICTURE]

Nothing is downloaded: the drawings come from a fixed seed, and the hash that is printed names them. Each --method is a
function color(sketch, references, hints) of a module, docs/benchmark.md describes it; each --model is a bundle, for
example of the authors' recipe. Every condition changes one thing of `base`: clean lines without gaps, another view of
the character as the reference, no hints. A method that the change does not affect has no row there. Scores are means
over the drawings, off the lines:

- mean, median: CIEDE2000 to the truth
- within 3, within 6: share of the area with at most this CIEDE2000
- regions: share of the regions whose larger part is within 6, of those that the other view shows too
- s: CPU seconds of a drawing of 512 px
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import hashlib
import importlib
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from common import hardware
from numpy.typing import NDArray
from regions import connected_paper, to_drawing, with_gaps
from rendering import color_error, sampled
from scipy.ndimage import distance_transform_edt

from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.pipelines.evaluation.metrics import off_lines
from animediffusion.pipelines.synthetic.canvas import Canvas, FlatRegions
from animediffusion.pipelines.synthetic.dataset import warp
from animediffusion.pipelines.synthetic.linework import Manner
from animediffusion.pipelines.synthetic.palette import Tone
from animediffusion.pipelines.synthetic.scenes.cast import Cast, draw_cast, random_cast, random_geometries
from animediffusion.pipelines.synthetic.shading import Shading, random_shading
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import AnimeDiffusionError, ConfigError
from animediffusion.platform.images.codec import contact_sheet, decode_rgb, encode_png
from animediffusion.serve.client.local import LocalColorizer
from animediffusion.serve.rendering.coloring import Style
from animediffusion.serve.rendering.layers import hex_of
from animediffusion.serve.rendering.render import RenderOptions
from animediffusion.serve.rendering.sketch import Pixels

SEED = 2026
"""Seed of the drawings; no model of this project is trained on it."""
SIZE_PX = 512
FIGURES = frozenset(("heads", "hair", "figures", "props", "palettes", "backgrounds"))
"""What every second drawing varies; the others are the usual faces."""
MANNERS = {
    "pencil": Manner(width=1.1, pressure=(0.45, 0.8), taper=0.6, gaps=0.1, wobble=0.001, grain=0.3, ground=0.05),
    "rough": Manner(width=0.6, pressure=(0.3, 0.9), taper=0.5, jitter=0.005, overshoot=0.01, repeats=3, grain=0.2),
    "extracted": Manner(extracted=True),
}
"""Manners of lines other than clean."""
MIN_PIXELS = 20
"""A region with fewer compared pixels is not counted."""
RESULT = Path(__file__).parent / "results" / "open.md"

Point = tuple[int, int, tuple[int, int, int]]
"""A hint: column and row in the drawing's pixels, and the color that the region there should get."""
Method = Callable[[Pixels, list[Pixels], list[Point]], Pixels]
"""color(sketch, references, hints), see docs/benchmark.md."""


class Condition(NamedTuple):
    """What a method gets."""

    name: str
    lines: str = "clean"
    gap: int = 0
    """Width of 25 gaps in the lines, in pixels; 0 = none."""
    hints: int = 0
    references: str = "another view"


CONDITIONS = (
    Condition("base"),
    *(Condition(f"{name} lines", lines=name) for name in MANNERS),
    Condition("gaps of 6 px", gap=6),
    Condition("gaps of 12 px", gap=12),
    Condition("8 hints", hints=8),
    Condition("two other views", references="two views"),
    Condition("same view, warped", references="same view"),
)


class Case(NamedTuple):
    """One drawing with all that conditions choose from; pictures are [S, S, 3], sketches [S, S]."""

    sketches: dict[str, Pixels]
    """By manner of lines; `clean` is the truth's own."""
    references: dict[str, list[Pixels]]
    truth: Pixels
    regions: FlatRegions
    known: NDArray[np.bool_]
    """[N]: whether the other view shows a counterpart of the region."""
    off_lines: NDArray[np.bool_]
    """[S, S]: pixels that are compared."""
    hints: list[Point]
    """One in each of some regions."""


class Score(NamedTuple):
    """The numbers of the table, of one drawing or as a mean."""

    mean: float
    median: float
    within_3: float
    within_6: float
    regions: float
    seconds: float


def main() -> None:
    """Print the table and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=24, help="number of drawings")
    parser.add_argument(
        "--method", action="append", default=[], metavar="MODULE:FUNCTION", help="a method to compare; may be repeated"
    )
    parser.add_argument("--model", action="append", default=[], metavar="BUNDLE", help="another bundle of this project")
    parser.add_argument("--sheet", type=Path, help="also write a picture of what the methods made of `base`")
    parser.add_argument("--out", type=Path, default=RESULT, help="Markdown file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        check(options)
        methods = {**own_methods(options.model), **{name: imported(name) for name in options.method}}
        cases = [draw_case(row) for row in range(options.rows)]
        text = f"{heading(cases)}\n\n{table(methods, cases)}"
    except AnimeDiffusionError as error:
        raise SystemExit(f"error: {error}") from None
    options.out.write_text(f"# Open benchmark\n\n{text}\n")
    if options.sheet:
        options.sheet.write_bytes(encode_png(sheet(methods, cases)))


def check(options: argparse.Namespace) -> None:
    """Raise a ConfigError for what would fail only after minutes."""
    if options.rows < 1:
        raise ConfigError("--rows", str(options.rows), "at least 1")
    for option in ("out", "sheet"):
        path = getattr(options, option)
        if path and not path.resolve().parent.is_dir():
            raise ConfigError(f"--{option} {path}", "its folder does not exist", "a file in an existing folder")


def heading(cases: Sequence[Case]) -> str:
    """Return what was measured where, and print it."""
    text = (
        f"`python benchmarks/open.py --rows {len(cases)}`: drawings of {SIZE_PX} px, sha256 {digest(cases)[:16]}.\n"
        f"{hardware(torch.device('cpu'))}, one core, Python {platform.python_version()}, NumPy "
        f"{np.__version__}, torch {torch.__version__}. docs/benchmark.md explains the conditions and the scores."
    )
    print(text + "\n", flush=True)
    return text


def table(methods: dict[str, Method], cases: Sequence[Case]) -> str:
    """Measure all methods under all conditions; print and return the table."""
    lines = ["| condition | method | mean | median | within 3 | within 6 | regions | s |", "|---|---|" + "---:|" * 6]
    print("\n".join(lines), flush=True)
    found: dict[str, list[Score]] = {name: [] for name in methods}
    for condition in CONDITIONS:
        for name, method in methods.items():
            scores = [score(name, method, case, condition) for case in cases]
            found[name].append(Score(*np.mean(scores, axis=0)))
            if condition != CONDITIONS[0] and found[name][-1][:-1] == found[name][0][:-1]:
                continue  # the same picture
            lines.append(table_row(condition.name, name, found[name][-1]))
            print(lines[-1], flush=True)
    for name, scores in found.items():
        lines.append(table_row("mean of all", name, Score(*np.mean(scores, axis=0))))
        print(lines[-1], flush=True)
    return "\n".join(lines)


def table_row(condition: str, method: str, found: Score) -> str:
    """Return a row of the table."""
    return f"| {condition} | {method} | " + " | ".join(f"{number:.2f}" for number in found) + " |"


def draw_case(row: int) -> Case:
    """Draw a character three times, the first view also in other manners of lines."""
    rng, extra = np.random.default_rng([SEED, row]), np.random.default_rng([SEED, row, 1])
    varied = FIGURES if row % 2 else frozenset()
    shading = random_shading(extra) if varied else Shading()
    cast = random_cast(rng, extra, varied, shading.shadow)
    geometries = [random_geometries(cast, rng, extra) for _ in range(3)]

    def view(number: int, manner: Manner | None = None, *, keep_fills: bool = False) -> Canvas:
        lines, places = (np.random.default_rng([SEED, row, 2 + number, part]) for part in range(2))
        canvas = Canvas(SIZE_PX, cast.ground, shading, manner, lines, keep_fills=keep_fills)
        draw_cast(canvas, cast, geometries[number], places)
        return canvas

    first, second = view(0, keep_fills=True), view(1, keep_fills=True)
    regions, others = first.regions(tones_of(cast)), second.regions(tones_of(cast))
    truth, clean = first.finish()
    views = [second.finish()[0], view(2).finish()[0]]
    sketches = {"clean": clean, **{name: view(0, manner).finish()[1] for name, manner in MANNERS.items()}}
    references = {"another view": views[:1], "two views": views, "same view": [warp(truth, rng)]}
    compared = off_lines(clean)
    known = regions.counterparts(others).any(axis=1)
    return Case(sketches, references, truth, regions, known, compared, hints_of(regions, compared, rng))


def tones_of(cast: Cast) -> list[Tone]:
    """Return the materials whose shadows and lights belong to one region."""
    tones = [tone for thing in cast.props for tone in thing.tones]
    for member in cast.members:
        tones += member.character.palette[:6]
        tones += [member.outfit.bottom, member.outfit.socks, member.outfit.shoes] if member.outfit else []
    return tones + ([cast.setting.ground, *cast.setting.tones] if cast.setting else [])


def hints_of(regions: FlatRegions, compared: NDArray[np.bool_], rng: np.random.Generator) -> list[Point]:
    """Return a hint in the middle of each of some regions, which are chosen at random."""
    sizes = np.bincount(regions.labels[compared], minlength=len(regions.colors) + 1)[1:]
    large = np.flatnonzero(sizes >= MIN_PIXELS)
    found = []
    for region in rng.permutation(large)[: max(condition.hints for condition in CONDITIONS)].tolist():
        depth = distance_transform_edt((regions.labels == region + 1) & compared)
        y, x = np.unravel_index(depth.argmax(), depth.shape)
        red, green, blue = regions.colors[region].tolist()
        found.append((int(x), int(y), (red, green, blue)))
    return found


def inputs(case: Case, condition: Condition) -> tuple[Pixels, list[Pixels], list[Point]]:
    """Return what a method gets under a condition."""
    sketch = with_gaps(case.sketches[condition.lines], condition.gap, seed=0)
    return sketch, list(case.references[condition.references]), case.hints[: condition.hints]


def score(name: str, method: Method, case: Case, condition: Condition) -> Score:
    """Return the scores of a method on one drawing under a condition.

    Raises:
        ConfigError: the method returns something that is not a picture of the drawing's size.
    """
    given = inputs(case, condition)
    started = time.process_time()
    picture = method(*given)
    seconds = time.process_time() - started
    if not isinstance(picture, np.ndarray) or picture.shape != case.truth.shape or picture.dtype != np.uint8:
        found = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
        raise ConfigError(name, f"returned {found}", f"a NumPy array, uint8 {case.truth.shape}")
    error = color_error(picture, case.truth, case.off_lines)
    label = sampled(case.regions.labels)[sampled(case.off_lines)] - 1
    counts, right = (np.bincount(label, some, minlength=len(case.known)) for some in (None, error <= 6))
    counted = case.known & (counts >= MIN_PIXELS / 4)
    share = (right[counted] > counts[counted] / 2).mean() if counted.any() else 1.0
    near = [float((error <= limit).mean()) for limit in (3, 6)]
    return Score(float(error.mean()), float(np.median(error)), *near, float(share), seconds)


def own_methods(bundles: Sequence[str]) -> dict[str, Method]:
    """Return the starter model and other bundles in two styles, and what needs no model."""
    settings = Settings(workspace=Path(tempfile.gettempdir()))
    styles: tuple[Style, ...] = ("flat", "painted")
    found: dict[str, Method] = {}
    for model in ("starter", *bundles):
        colorizer = LocalColorizer(settings, model, "cpu")
        name = model if model == "starter" else str(colorizer.bundle.config.provenance.get("recipe", model))
        found |= {f"{name}, {style}": served(colorizer, style) for style in styles}
    return found | {"copied reference": copied, "mean color": mean_color, "flooded hints": flooded}


def served(colorizer: LocalColorizer, style: Style) -> Method:
    """Return the method that `animediffusion colorize` is."""

    def color(sketch: Pixels, references: list[Pixels], hints: list[Point]) -> Pixels:
        points = [{"x": x, "y": y, "color": hex_of(rgb), "scope": "whole"} for x, y, rgb in hints]
        rendering = RenderOptions(
            style=style,
            background=None if style == "painted" else "reference",
            hints=json.dumps(points) if points else None,
        )
        colors = [encode_png(one) for one in references]
        made = colorizer.colorize(encode_png(sketch), colors, SamplerOptions(seed=0), rendering, name="drawing")
        return decode_rgb(made.picture)

    return color


def copied(_sketch: Pixels, references: list[Pixels], _hints: list[Point]) -> Pixels:
    """Return the first reference."""
    return references[0]


def mean_color(_sketch: Pixels, references: list[Pixels], _hints: list[Point]) -> Pixels:
    """Return the mean color of the first reference."""
    mean = references[0].reshape(-1, 3).mean(axis=0)
    return np.broadcast_to(np.rint(mean).astype(np.uint8), references[0].shape)


def flooded(sketch: Pixels, references: list[Pixels], hints: list[Point]) -> Pixels:
    """Flood the paper around each hint up to the lines; the rest has the mean color of the reference."""
    picture = mean_color(sketch, references, hints).copy()
    labels = connected_paper(to_drawing(sketch))
    for x, y, color in hints:
        picture[labels == labels[y, x]] = color
    return picture


def imported(name: str) -> Method:
    """Return a function that is named as module:function; modules of the current folder are found.

    Raises:
        ConfigError: there is no such function.
    """
    sys.path.insert(0, os.getcwd())
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--method {name}", str(error), "module:function, as in my_method:color") from error
    return found


def digest(cases: Sequence[Case]) -> str:
    """Return the sha256 of all that methods get and are compared with."""
    found = hashlib.sha256()
    for case in cases:
        pictures = [*case.sketches.values(), *(one for some in case.references.values() for one in some)]
        for array in (*pictures, case.truth, case.regions.labels, case.regions.colors, case.off_lines):
            found.update(np.ascontiguousarray(array))
        found.update(json.dumps(case.hints).encode())
    return found.hexdigest()


def sheet(methods: dict[str, Method], cases: Sequence[Case]) -> Pixels:
    """Return a picture of what the methods made under the first condition."""
    rows = []
    for case in cases:
        sketch, references, hints = inputs(case, CONDITIONS[0])
        made = [method(sketch, references, hints) for method in methods.values()]
        rows.append([sketch, references[0], *made, case.truth])
    return contact_sheet(rows, ["sketch", "reference", *methods, "truth"])


if __name__ == "__main__":
    main()
