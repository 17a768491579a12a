"""Draw a strip of pictures, to judge the styles by eye as an artist would.

    python benchmarks/strip.py BUNDLE OUT.png [--drawn 4] [--pairs FOLDER] [--art FOLDER]

A row for each drawing: line art, reference, `painted`, `flat`, `shaded`, and `flat` with two hints, which give the two
largest regions inside of the figure other colors. The rows are faces drawn at 512 px, pairs N_sketch.png and
N_reference.png of a folder, and pictures of a folder of color art, whose line art is extracted; the reference of one is
the next. Real pictures are not the project's: keep OUT.png out of the repository.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from resolution import SEED, paint

from animediffusion.models.augmentation.lineart import xdog
from animediffusion.models.bundle import Bundle, load_bundle
from animediffusion.models.tensors import to_tensor
from animediffusion.pipelines.synthetic.dataset import make_row
from animediffusion.platform.errors import AnimeDiffusionError
from animediffusion.serve.rendering.render import RenderOptions, read_picture, read_sketch, render
from animediffusion.serve.rendering.sketch import Pixels, read_drawing

SIZE_PX = 512
HEIGHT_PX = 480
"""Height of a row."""
MARGIN_PX = 4
LINE_SIGMA = 0.8
"""Width of extracted lines, in pixels."""
HINTS = ("#d04040", "#3060c0")
BACKGROUND = 0.2
"""A region with more of the area is not colored by a hint: it may be the background."""


def main() -> None:
    """Write the strip."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--drawn", type=int, default=4, help="number of drawn faces")
    parser.add_argument("--pairs", type=Path, help="folder of N_sketch.png and N_reference.png")
    parser.add_argument("--art", type=Path, help="folder of color pictures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        bundle = load_bundle(options.bundle, "cpu")
        pairs = [*drawn(options.drawn), *sketches(options.pairs), *art(options.art)]
        rows = [row(bundle, *pair) for pair in pairs]
    except AnimeDiffusionError as error:
        raise SystemExit(f"error: {error}") from None
    joined(rows, axis=0).save(options.out)


def drawn(count: int) -> list[tuple[Pixels, Pixels]]:
    """Return line art and references [S, S, 3] of faces that no demo trains on."""
    rows = [make_row(SEED, index, SIZE_PX) for index in range(count)]
    return [(np.repeat(one.sketch.reshape(SIZE_PX, SIZE_PX, 1), 3, axis=2), one.cross_reference) for one in rows]


def sketches(folder: Path | None) -> list[tuple[Pixels, Pixels]]:
    """Return the sketches and references of a folder, each [H, W, 3]."""
    files = sorted(folder.glob("*_sketch.png")) if folder else []
    return [
        (
            read_sketch(file.read_bytes()).pixels,
            read_picture(file.with_name(file.name.replace("sketch", "reference")).read_bytes()),
        )
        for file in files
    ]


def art(folder: Path | None) -> list[tuple[Pixels, Pixels]]:
    """Return extracted line art and the next picture of a folder, for the first and the middle picture."""
    files = sorted(folder.glob("*.png")) if folder else []
    chosen = sorted({0, len(files) // 2}) if files else []
    return [
        (lines_of(read_picture(files[index].read_bytes())), read_picture(files[(index + 1) % len(files)].read_bytes()))
        for index in chosen
    ]


def lines_of(colors: Pixels) -> Pixels:
    """Return the line art of a color picture, [H, W, 3]."""
    picture = to_tensor(torch.from_numpy(colors.copy())[None])
    lines = np.rint(127.5 * (xdog(picture, torch.tensor([LINE_SIGMA]))[0, 0].numpy() + 1)).clip(0, 255).astype(np.uint8)
    return np.repeat(lines[..., None], 3, axis=2)


def row(bundle: Bundle, lines: Pixels, reference: Pixels) -> Image.Image:
    """Return one row of the strip."""
    drawing = read_drawing(lines)
    network = paint(bundle, drawing, reference)

    def finished(**options: str) -> Image.Image:
        look = RenderOptions(**options)  # type: ignore[arg-type]
        made = render(network, drawing, [reference], look.read_hints(drawing), options=look)
        return Image.open(io.BytesIO(made.files["image"]))

    made = render(network, drawing, [reference], output="layers", options=RenderOptions(style="flat"))
    labels = np.asarray(Image.open(io.BytesIO(made.files["labels"])))
    inside = [one for one in made.regions or () if one.area < BACKGROUND * labels.size and one.color != (255, 255, 255)]
    largest = sorted(inside, key=lambda region: -region.area)[: len(HINTS)]
    places = [np.argwhere(labels == region.id)[region.area // 2].tolist() for region in largest]
    hints = [{"x": x, "y": y, "color": color, "scope": "whole"} for (y, x), color in zip(places, HINTS, strict=False)]
    pictures = [Image.fromarray(lines), Image.fromarray(reference)]
    pictures += [finished(style=style) for style in ("painted", "flat", "shaded")]
    pictures.append(finished(style="flat", hints=json.dumps(hints)))
    sized = [one.resize((max(1, round(one.width * HEIGHT_PX / one.height)), HEIGHT_PX)) for one in pictures]
    return joined(sized, axis=1)


def joined(pictures: list[Image.Image], axis: int) -> Image.Image:
    """Place pictures below each other (axis 0) or side by side (axis 1), with gray margins."""
    sizes = np.array([(one.width, one.height) for one in pictures]) + MARGIN_PX
    along = 1 - axis
    total = sizes.max(axis=0)
    total[along] = sizes[:, along].sum()
    sheet = Image.new("RGB", (int(total[0]), int(total[1])), (128, 128, 128))
    starts = np.cumsum(sizes[:, along]) - sizes[:, along]
    for one, start in zip(pictures, starts.tolist(), strict=True):
        sheet.paste(one, (start, 0) if axis else (0, start))
    return sheet


if __name__ == "__main__":
    main()
