"""Draw the figures of docs/method.md with a model, and take the picture of the README from a demo.

    python docs/pictures.py --model BUNDLE [--data DATASET_URI] [--ladder OUT] [--out docs/images]
    python docs/pictures.py --demo workspace/demo/before_after.png [--out docs/images]

All images in the figures are inputs or outputs of the model; the faces are drawn faces that no demo trains on. With
--data, rows of the dataset's `val` split replace them, except in the figure that needs one face in several colors.
--ladder takes the output folder of benchmarks/quality.py with the recipes in LADDER at seed 0, and adds a figure that
shows the effect of each ingredient.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from animediffusion.models.augmentation.augment import Batch
from animediffusion.models.augmentation.lineart import LUMA
from animediffusion.models.augmentation.patch_shuffle import patch_order, shuffle
from animediffusion.models.bundle import Bundle, SamplerDefaults, load_bundle
from animediffusion.models.colorize import colorize, noise_for
from animediffusion.models.diffusion.path import Path as NoisePath
from animediffusion.models.diffusion.path import PathConfig, build_path
from animediffusion.models.diffusion.sampler import build_sampler, sample_times
from animediffusion.models.tensors import to_tensor, to_uint8
from animediffusion.pipelines.data.stream import read_split
from animediffusion.pipelines.evaluation.metrics import score
from animediffusion.pipelines.evaluation.tracks import build
from animediffusion.pipelines.synthetic.dataset import make_row
from animediffusion.pipelines.synthetic.faces import draw, random_character, random_geometry
from animediffusion.pipelines.synthetic.palette import random_palette
from animediffusion.platform.images.codec import contact_sheet, decode_rgb

Array = NDArray[np.uint8]

SEED = 11
"""Seed of the faces and the noise. The demo trains on seed 0 and shows seed 2027."""
FACES = 3
LIMIT = 300_000
"""Largest file size of a figure in bytes; a larger figure is reduced to 256 colors."""
GUIDANCE = (0.0, 0.5, 1.0, 2.0, 3.0)
STEPS = (1, 2, 4, 10, 25)
LEVELS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Times of the forward process, in units of t_max."""
PATHS = {"linear": PathConfig(name="linear"), "cosine": PathConfig(name="cosine"), "flow": PathConfig()}
NOISY = (0.5, 0.9)
"""Times at which the figure shows phase 1, in units of t_max."""
GRADIENT_STEPS = 2
LADDER = {
    "flow-v": "flow, v",
    "flow-x0": "x0, noisy times",
    "muon": "+ Muon",
    "tokens": "+ tokens",
    "ours": "+ matcher",
    "ours-2": "+ phase 2",
}
"""Maps recipes of benchmarks/quality.py to labels; each recipe adds the labeled ingredient to the recipe before it."""
LADDER_SAMPLER, SCORED = SamplerDefaults(steps=4), 60
"""Sampler settings of these recipes, and the number of additional faces that their PSNR is measured on."""

CELL, GAP, EDGE = 118, 58, 28
PAPER, INK, FAINT = (246, 244, 240), (92, 86, 82), (186, 180, 172)
SIGNAL, NOISE = (58, 116, 168), (206, 110, 52)
ZOOM = 4
"""Lines are drawn enlarged by this factor and averaged down, for antialiasing."""


class Board:
    """A sheet for images, arrows and text at any position; x and y are in pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.sheet = Image.new("RGB", (width, height), PAPER)

    def picture(self, array: Array, x: int, y: int, below: str = "") -> None:
        """Draw an image of CELL pixels per side, with a label below it."""
        mask = Image.new("L", (ZOOM * CELL, ZOOM * CELL))
        ImageDraw.Draw(mask).rounded_rectangle((0, 0, ZOOM * CELL - 1, ZOOM * CELL - 1), CELL // 5, fill=255)
        image = Image.fromarray(array).convert("RGB").resize((CELL, CELL), Image.Resampling.BICUBIC)
        self.sheet.paste(image, (x, y), mask.resize((CELL, CELL), Image.Resampling.BOX))
        self.text(below, x + CELL // 2, y + CELL + 12)

    def text(self, words: str, x: float, y: float, size: int = 14, anchor: str = "mm", color: Any = INK) -> None:
        """Draw text; the anchor is Pillow's code of two letters."""
        font = ImageFont.load_default(size)
        ImageDraw.Draw(self.sheet).text((x, y), words, fill=color, font=font, anchor=anchor)

    def lines(self, points: Sequence[tuple[float, float]], color: Any, width: float = 2.0) -> None:
        """Draw an antialiased line through the points."""
        xs, ys = zip(*points, strict=True)
        left, top = int(min(xs)) - 4, int(min(ys)) - 4
        size = int(max(xs)) + 5 - left, int(max(ys)) + 5 - top
        mask = Image.new("L", (ZOOM * size[0], ZOOM * size[1]))
        inside = [(ZOOM * (x - left), ZOOM * (y - top)) for x, y in points]
        ImageDraw.Draw(mask).line(inside, fill=255, width=round(ZOOM * width), joint="curve")
        self.sheet.paste(Image.new("RGB", size, color), (left, top), mask.resize(size, Image.Resampling.BOX))

    def arrow(self, start: tuple[float, float], end: tuple[float, float], color: Any, both: bool = False) -> None:
        """Draw a horizontal or vertical arrow, with two heads if `both` is set."""
        self.lines([start, end], color)
        for tail, tip in ((start, end), (end, start))[: 2 if both else 1]:
            along = np.sign(np.subtract(tip, tail))
            back, across = np.array(tip) - 7 * along, 4.5 * along[::-1]
            self.lines([tuple(back + across), tip, tuple(back - across)], color)

    def array(self) -> Array:
        """Return the sheet as an array."""
        return np.array(self.sheet)


def forward_process(batch: Batch, size: int) -> Array:
    """Draw one face turning into noise on three paths, and each path's alpha and sigma over time."""
    noise, face = noise_for(SEED, size)[None], batch.target[:1]
    rows: list[list[Array]] = []
    for config in PATHS.values():
        path = build_path(config)
        times = torch.tensor(LEVELS) * path.t_max
        rows.append(list(_arrays(torch.cat([path.add_noise(face, noise, t[None]) for t in times]))))
    faces = contact_sheet(rows, [f"t = {t:g}" for t in LEVELS], names=list(PATHS), cell=CELL)
    board = Board(faces.shape[1], faces.shape[0] + 200)
    board.sheet.paste(Image.fromarray(faces))
    pitch = (faces.shape[1] - 2 * EDGE + 30) // len(PATHS)
    for number, (name, config) in enumerate(PATHS.items()):
        _curves(board, name, build_path(config), EDGE + number * pitch, faces.shape[0] + 22, pitch - 30)
    return board.array()


def _curves(board: Board, name: str, path: NoisePath, x: int, y: int, width: int) -> None:
    """Draw alpha and sigma over time, with their last values."""
    height = 120
    board.text(name, x, y - 14, anchor="lm")
    for level in (0.0, 0.5, 1.0):
        board.lines([(x, y + height * (1 - level)), (x + width, y + height * (1 - level))], FAINT, 1)
    t = torch.linspace(0, 1, 101, dtype=torch.float64) * path.t_max
    ends = ((path.alpha(t), "alpha", SIGNAL, x, "lm"), (path.sigma(t), "sigma", NOISE, x + width, "rm"))
    for values, word, color, end, anchor in ends:
        board.lines([(x + width * i / 100, y + height * (1 - float(v))) for i, v in enumerate(values)], color)
        board.text(f"{word} ends at {float(values[-1]):.2f}", end, y + height + 34, 13, anchor, color)
    board.text("t = 0", x, y + height + 13, 12, "lm")
    board.text("t_max", x + width, y + height + 13, 12, "rm")


class Trace(NamedTuple):
    """The states and estimates of phase 2's sampling, images [N, 3, S, S], and the times of the states."""

    states: Tensor
    estimates: Tensor
    times: list[float]


@torch.no_grad()
def _trace(bundle: Bundle, batch: Batch, steps: int) -> Trace:
    path = bundle.denoiser.path
    sampler, times = build_sampler("euler", path), sample_times(path, steps, shift=bundle.config.sampler.shift)
    condition = bundle.denoiser.encode(batch.sketch, batch.reference)
    state = sampler.start(noise_for(SEED, batch.target.shape[-1])[None], times)
    states, estimates = [state.x], []
    for _ in range(steps):
        estimates.append(bundle.denoiser(*sampler.query(state), condition))
        state = sampler.advance(state, estimates[-1])
        states.append(state.x)
    return Trace(torch.cat(states), torch.cat(estimates), times.tolist())


def two_phases(bundle: Bundle, batch: Batch) -> Array:
    """Draw the inputs, outputs and losses of both phases, and the path of the gradients."""
    row = CELL + 34
    board = Board(2 * EDGE + 6 * CELL + 5 * GAP, 4 * row + 4 * EDGE + 92)
    one = batch.rows(slice(1))
    _phase_1(board, bundle, one, EDGE + 24)
    _phase_2(board, bundle, one, 2 * row + 2 * EDGE + 54)
    y = board.sheet.height - EDGE
    for x, color, words in (
        (_column(0), FAINT, "no gradient"),
        (_column(1) + 20, NOISE, "the loss's gradient passes here"),
    ):
        board.arrow((x, y), (x + 34, y), color)
        board.text(words, x + 46, y, anchor="lm")
    return board.array()


@torch.no_grad()
def _phase_1(board: Board, bundle: Bundle, batch: Batch, top: int) -> None:
    board.text("Phase 1: a time drawn at random, one call of the network", EDGE, top - 20, 16, "lm")
    size, path = batch.target.shape[-1], bundle.denoiser.path
    condition = bundle.denoiser.encode(batch.sketch, batch.reference)
    for line, level in enumerate(NOISY):
        y = top + line * (CELL + 34)
        t = torch.tensor([level * path.t_max])
        x_t = path.add_noise(batch.target, noise_for(SEED, size)[None], t)
        estimate = bundle.denoiser(x_t, t, condition)
        cells = (batch.sketch, batch.reference, batch.target, x_t, estimate, batch.target)
        words = ("sketch", "reference", "truth x_0", f"x_t, t = {level:g}", "estimate of x_0", "truth x_0")
        for column, (tensor, word) in enumerate(zip(cells, words, strict=True)):
            board.picture(_arrays(tensor)[0], _column(column), y, word)
        _across(board, 2, y, FAINT)
        _across(board, 3, y, NOISE)
        _across(board, 4, y, NOISE, both=True)
        board.text("noise", _column(3) - GAP // 2, y + CELL // 2 - 14, 12)
        board.text("network", _column(4) - GAP // 2, y + CELL // 2 - 14, 12)
        board.text("loss", _column(5) - GAP // 2, y + CELL // 2 - 14, 12)


def _phase_2(board: Board, bundle: Bundle, batch: Batch, top: int) -> None:
    steps = min(4, max(2, bundle.config.sampler.steps))
    head = f"Phase 2: from pure noise, the {steps} steps that are deployed, the last {GRADIENT_STEPS} differentiated"
    board.text(head, EDGE, top - 20, 16, "lm")
    trace = _trace(bundle, batch, steps)
    below, shift = top + CELL + 76, 4 - steps
    for number in range(steps):
        column, x = number + shift, _column(number + shift)
        color = NOISE if number >= steps - GRADIENT_STEPS else FAINT
        word = "noise" if number == 0 else "x_t"
        board.picture(_arrays(trace.states)[number], x, top, f"{word}, t = {trace.times[number]:.2g}")
        board.picture(_arrays(trace.estimates)[number], x, below, "estimate of x_0")
        board.arrow((x + CELL // 2, top + CELL + 24), (x + CELL // 2, below - 6), color)
        board.text("network", x + CELL // 2 + 10, (top + CELL + 24 + below - 6) / 2, 12, "lm")
        _across(board, column, top, color)
        board.text("step", x + CELL + GAP // 2, top + CELL // 2 - 14, 12)
    board.picture(_arrays(trace.states)[-1], _column(4), top, "image")
    board.picture(_arrays(batch.target)[0], _column(5), top, "truth x_0")
    _across(board, 4, top, NOISE, both=True)
    board.text("loss", _column(5) - GAP // 2, top + CELL // 2 - 14, 12)


def _column(number: int) -> int:
    return EDGE + number * (CELL + GAP)


def _across(board: Board, column: int, y: int, color: Any, both: bool = False) -> None:
    """Draw an arrow from a column to the next."""
    middle = y + CELL // 2
    board.arrow((_column(column) + CELL + 8, middle), (_column(column + 1) - 8, middle), color, both)


def guidance(bundle: Bundle, batch: Batch) -> Array:
    """Draw results from the same noise at several guidance scales; 0 ignores the reference, 1 is no guidance."""
    own = bundle.config.sampler
    results = [(f"scale {scale:g}", replace(own, guidance_scale=scale)) for scale in GUIDANCE]
    return _sweep(bundle, batch, results)


def steps(bundle: Bundle, batch: Batch) -> Array:
    """Draw results from the same noise with rising numbers of steps."""
    own = replace(bundle.config.sampler, name="euler", guidance_scale=1.0)
    results = [(f"{n} step" + "s" * (n > 1), replace(own, steps=n)) for n in STEPS]
    return _sweep(bundle, batch, results)


def _sweep(bundle: Bundle, batch: Batch, results: Sequence[tuple[str, SamplerDefaults]]) -> Array:
    columns = [_arrays(batch.sketch), _arrays(batch.reference)]
    columns += [_color(bundle, batch.sketch, batch.reference, sampler) for _, sampler in results]
    labels = ["sketch", "reference", *(label for label, _ in results), "truth"]
    return contact_sheet(list(zip(*columns, _arrays(batch.target), strict=True)), labels, cell=128)


def references(bundle: Bundle) -> Array:
    """Draw results of one sketch with matching, differently colored, shuffled, unrelated and gray references."""
    size = bundle.config.image_size
    rng = np.random.default_rng([SEED, FACES])  # This seed gives a face that faces() does not use.
    character, geometry, other = random_character(rng), random_geometry(rng), random_geometry(rng)
    people = [character, *(replace(character, palette=random_palette(rng)) for _ in range(3))]
    given = [draw(person, other, size)[0] for person in people]
    truths = [draw(person, geometry, size)[0] for person in people]
    labels = ["sketch", "its colors", *(f"palette {n}" for n in (2, 3, 4)), "shuffled", "unrelated", "gray"]
    reference = _tensor(given + [given[0]] * 3)
    reference[4] = _shuffled(reference[4:5])[0]
    reference[5] = _tensor([_unrelated(rng, size)])[0]
    reference[6] = (reference[6] * torch.tensor(LUMA)[:, None, None]).sum(0)
    sketch = _tensor([draw(character, geometry, size)[1]] * len(reference))
    seen, colored = _arrays(reference), _color(bundle, sketch, reference, bundle.config.sampler)
    rows = [[_arrays(sketch)[0], *seen], [None, *colored], [None, *truths, truths[0]]]
    return contact_sheet(rows, labels, names=["reference", "colored", "truth"], cell=128)


def ingredients(ladder: Path, batch: Batch) -> Array:
    """Draw the same faces colored by models that were trained equally long, each with one more ingredient."""
    columns, labels = [_arrays(batch.sketch), _arrays(batch.reference)], ["sketch", "reference"]
    others = _drawn(range(FACES, FACES + SCORED), batch.target.shape[-1])
    for recipe, name in LADDER.items():
        bundle = load_bundle(ladder / "bundles" / f"{recipe}-0")
        columns.append(_color(bundle, batch.sketch, batch.reference, LADDER_SAMPLER))
        scores = score(_color(bundle, others.sketch, others.reference, LADDER_SAMPLER), _arrays(others.target))
        labels.append(f"{name}: {scores['psnr']:.1f}")
    return contact_sheet(list(zip(*columns, _arrays(batch.target), strict=True)), [*labels, "truth"], cell=128)


def _unrelated(rng: np.random.Generator, size: int) -> Array:
    """Return an image without a face: coarse colored noise."""
    return np.array(Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((size, size)))


def _shuffled(images: Tensor) -> Tensor:
    keys = torch.rand(len(images), 64, generator=torch.Generator().manual_seed(SEED))
    return shuffle(images, patch_order(torch.full((len(images),), 4), keys))


def _color(bundle: Bundle, sketch: Tensor, reference: Tensor, sampler: SamplerDefaults) -> Array:
    """Color all rows from the same noise; return uint8 [B, S, S, 3]."""
    return _arrays(colorize(bundle, sketch, reference, seeds=[SEED] * len(sketch), sampler=sampler))


def _arrays(images: Tensor) -> Array:
    array: Array = to_uint8(images.expand(-1, 3, -1, -1)).numpy()
    return array


def _tensor(arrays: Sequence[Array]) -> Tensor:
    return to_tensor(torch.from_numpy(np.stack(arrays)))


def faces(size: int, data: str | None) -> Batch:
    """Return drawn faces with their line art and, as reference, another drawing of each in the same colors.

    With data, return rows of the dataset's `val` split instead.
    """
    if data is not None:
        rows = read_split(data, "val", FACES)
        return build(rows, "cross" if rows["has_cross"].all() else "recolored")
    return _drawn(range(FACES), size)


def _drawn(numbers: Sequence[int], size: int) -> Batch:
    drawn = [make_row(SEED, number, size) for number in numbers]
    columns = zip(*((row.target, row.sketch, row.cross_reference) for row in drawn), strict=True)
    return Batch(*(_tensor(column) for column in columns))


def save(array: Array, path: Path) -> None:
    """Write a PNG of at most LIMIT bytes.

    Raises:
        ValueError: if the file is too large even with 256 colors.
    """
    image = Image.fromarray(array)
    data = _png(image)
    if len(data) > LIMIT:
        data = _png(image.quantize(256, kmeans=3))
    if len(data) > LIMIT:
        raise ValueError(f"{path} would be {len(data)} bytes, at most {LIMIT} are allowed")
    path.write_bytes(data)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main() -> None:
    """Draw and save all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a bundle folder")
    source.add_argument("--demo", type=Path, help="the picture of a demo, which becomes demo.png")
    parser.add_argument("--data", help="URI of a dataset whose val is shown in place of drawn faces")
    parser.add_argument("--ladder", type=Path, help="folder of benchmarks/quality.py with the recipes in LADDER")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.demo:
        save(decode_rgb(args.demo.read_bytes()), args.out / "demo.png")
        return
    bundle = load_bundle(args.model)
    size = bundle.config.image_size
    batch = faces(size, args.data)
    pictures: dict[str, Callable[[], Array]] = {
        "forward": lambda: forward_process(batch, size),
        "phases": lambda: two_phases(bundle, batch),
        "guidance": lambda: guidance(bundle, batch),
        "steps": lambda: steps(bundle, batch),
        "references": lambda: references(bundle),
    }
    if args.ladder:
        pictures["ingredients"] = lambda: ingredients(args.ladder, batch)
    for name, make in pictures.items():
        path = args.out / f"method-{name}.png"
        save(make(), path)
        print(f"{path} {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
