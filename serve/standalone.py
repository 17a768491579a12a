"""Colors one drawing with only torch, safetensors, numpy and pillow. Exported models contain this file.

    picture, layer = paint(load_bundle(folder), sketch_bytes, reference_bytes, seed=7)
    sys.exit(main(Path("exported"), ["sketch.png", "reference.png", "out.png"]))

The command `colorize`, exported models and MLflow's `predict` all call this module, so their pictures are equal.
For many simultaneous requests see serve/engine/engine.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from animediffusion.models.bundle import Bundle, SamplerDefaults, load_bundle
from animediffusion.models.colorize import colorize
from animediffusion.models.sampler_options import ALLOWED, SamplerOptions, number, whole_number
from animediffusion.models.tensors import to_uint8
from animediffusion.platform.errors import AnimeDiffusionError, ConfigError
from animediffusion.serve.network_inputs import network_inputs
from animediffusion.serve.rendering.coloring import Background, Style
from animediffusion.serve.rendering.hints import points_for_network
from animediffusion.serve.rendering.render import (
    Inputs,
    Output,
    Rendered,
    RenderOptions,
    Size,
    hints_argument,
    palette_argument,
    read_picture,
    read_sketch,
    render,
)
from animediffusion.serve.rendering.sketch import Pixels, as_gray

Network = Callable[[Tensor, Sequence[Tensor], Tensor | None], Pixels]
"""Makes the picture [S, S, 3] of a sketch [1, 1, S, S] with references, each [1, 3, S, S], and hints [1, 4, S, S]."""


def paint(
    bundle: Bundle,
    sketch: bytes,
    reference: bytes,
    *,
    seed: int = 0,
    sampler: SamplerDefaults | None = None,
    size: Size = "native",
    thing: str = "sketch",
    lock: AbstractContextManager[object] | None = None,
    style: Style | None = None,
    background: Background | None = None,
    palette: str | bytes = "reference",
    more_references: Sequence[bytes] = (),
    hints: str | bytes | None = None,
) -> tuple[bytes, bytes]:
    """Return the colored drawing and its color layer, both as PNG.

    Registered versions call this function with these arguments: arguments may be added, but none may be renamed.

    Args:
        bundle: the model.
        sketch: bytes of an image file with dark lines on light paper.
        reference: bytes of an image file.
        seed: seed of the noise.
        sampler: sampler settings that replace the defaults of the bundle.
        size: size of the results: `native` is the size of the sketch, `model` the square of the network.
        thing: name of the sketch in error messages.
        lock: a lock that is held while the network runs; needed if several threads call this function.
        style: `flat`, `shaded` or `painted`, or None for the default; this and the next two are those of
            rendering/render.py's RenderOptions.
        background: `paper`, `white` or `reference`.
        palette: `reference`, `none`, a list of #RRGGBB, or the bytes of a palette file.
        more_references: up to three more image files.
        hints: colors of points, JSON or the bytes of a file (rendering/hints.py).

    Raises:
        ImageError: the sketch or the reference is not usable.
        ConfigError: the palette is not usable, or an option would change nothing.
    """
    options = RenderOptions(size=size, style=style, background=background, palette=palette, hints=hints)

    def network(lines: Tensor, colors: Sequence[Tensor], planes: Tensor | None) -> Pixels:
        with lock or nullcontext():
            return run_network(bundle, lines, colors, planes, seed=seed, sampler=sampler)

    side = bundle.config.image_size
    made = paint_as("both", side, sketch, (reference, *more_references), options, network, thing=thing)
    return made.files["image"], made.files["color_layer"]


def paint_as(
    output: Output,
    side: int,
    sketch: bytes,
    references: Sequence[bytes],
    options: RenderOptions,
    network: Network,
    *,
    thing: str = "sketch",
) -> Rendered:
    """Return the colored drawing as any of the outputs of render(); errors are those of paint().

    Args:
        output: the files to make.
        side: pixels per side of the network's pictures.
        sketch: an image file.
        references: 1 to 4 image files.
        options: settings of the finished picture.
        network: makes the network's picture.
        thing: name of the sketch in error messages.
    """
    inputs = read_inputs(output, sketch, references, options, thing=thing)
    return render(network_picture(inputs, side, network), *inputs, output=output, options=options)


def read_inputs(
    output: Output, sketch: bytes, references: Sequence[bytes], options: RenderOptions, *, thing: str = "sketch"
) -> Inputs:
    """Return what paint_as() needs of the files; arguments and errors are those of paint_as()."""
    options.check(output)
    drawing = read_sketch(sketch, thing=thing)
    hints = options.read_hints(drawing)  # A wrong hint is reported before the network runs.
    return Inputs(drawing, tuple(read_picture(reference) for reference in references), hints)


def network_picture(inputs: Inputs, side: int, network: Network) -> Pixels:
    """Return the network's picture [side, side, 3]."""
    points = points_for_network(inputs.hints)
    return network(*network_inputs(as_gray(inputs.drawing), inputs.references, points, side))


def run_network(
    bundle: Bundle,
    lines: Tensor,
    colors: Sequence[Tensor],
    hints: Tensor | None,
    *,
    seed: int,
    sampler: SamplerDefaults | None,
) -> Pixels:
    """Return the network's picture, see Network."""
    image = colorize(bundle, lines, colors, seeds=[seed], sampler=sampler, hints=hints)
    return to_uint8(image)[0].cpu().numpy()


def main(folder: Path, arguments: Sequence[str]) -> int:
    """Run the script colorize.py of an exported model.

    Args:
        folder: folder of the bundle.
        arguments: arguments of the command line.

    Returns:
        The exit code: 0, or 2 after an error message of one line on stderr.

    Raises:
        SystemExit: argparse rejects an argument.
    """
    given = _parser().parse_args(arguments)
    options = SamplerOptions(seed=given.seed, steps=given.steps, guidance_scale=given.guidance_scale)
    try:
        hints = None if given.hints is None else hints_argument(str(given.hints))
        look = RenderOptions(
            size=given.size, style=given.style, background=given.background, palette=given.palette, hints=hints
        )
        look.check(prefix="--")
        _check_files(given)
        bundle = load_bundle(folder, "cuda" if torch.cuda.is_available() else "cpu")
        picture, layer = paint(
            bundle,
            given.sketch.read_bytes(),
            given.reference.read_bytes(),
            seed=options.seed,
            sampler=options.apply_to(bundle.config.sampler),
            size=given.size,
            thing=str(given.sketch),
            style=given.style,
            background=given.background,
            palette=given.palette,
            hints=hints,
        )
        _write(given.out, picture)
        if given.layer is not None:
            _write(given.layer, layer)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; give files that can be read or written", file=sys.stderr)
        return 2
    except (AnimeDiffusionError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _check_files(given: argparse.Namespace) -> None:
    """Reject outputs that would overwrite an input or each other."""
    named = {"SKETCH": given.sketch, "REFERENCE": given.reference}
    if given.hints is not None:
        named["--hints"] = given.hints
    for name, file in (("OUT.png", given.out), ("--layer", given.layer)):
        if file is None:
            continue
        for other, used in named.items():
            if os.path.realpath(file) == os.path.realpath(used):
                raise ConfigError(name, f"{file} is also {other}", "give another file")
        named[name] = file


def _write(file: Path, data: bytes) -> None:
    try:
        file.write_bytes(data)
    except OSError as error:  # For a full disk, the system does not name the file.
        raise OSError(error.errno, error.strerror, str(file)) from error


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a file name")
    return Path(text)


def _option(name: str, read: Callable[[str], float]) -> Callable[[str], float]:
    """Return a function that reads a field of SamplerOptions, as the `type` of an argument."""

    def convert(text: str) -> float:
        try:
            value = read(text)
            SamplerOptions(**{name: value})  # type: ignore[arg-type]  # Checks the range.
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not {ALLOWED[name]}") from error
        return value

    return convert


def _palette(text: str) -> str | bytes:
    try:
        palette = palette_argument(text)
        RenderOptions(style="flat", palette=palette).check()
        return palette
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"{error.found}; {error.allowed}") from error


class _Once(argparse.Action):
    """Stores a value and rejects a second one, because argparse would silently use the last value."""

    def __call__(self, _: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, *__: Any) -> None:
        given = vars(namespace).setdefault("given", set())
        if self.dest in given:
            raise argparse.ArgumentError(self, "given twice")
        given.add(self.dest)
        setattr(namespace, self.dest, value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="colorize.py", description="Color a line drawing like a reference image.")
    parser.register("action", None, _Once)
    parser.add_argument("sketch", metavar="SKETCH", type=_path, help="PNG, JPEG or WebP: dark lines on light paper")
    parser.add_argument("reference", metavar="REFERENCE", type=_path, help="image with the colors")
    parser.add_argument("out", metavar="OUT.png", type=_path)
    parser.add_argument("--layer", metavar="FILE.png", type=_path, help="also write the color without the lines")
    parser.add_argument("--seed", type=_option("seed", whole_number), default=0)
    parser.add_argument("--steps", type=_option("steps", whole_number), help="the model's own default if omitted")
    parser.add_argument(
        "--guidance-scale", type=_option("guidance_scale", number), help="the model's own default if omitted"
    )
    parser.add_argument(
        "--size",
        choices=["native", "model"],
        default="native",
        help="size of the picture: that of the sketch, or of the model",
    )
    parser.add_argument(
        "--style",
        choices=["flat", "shaded", "painted"],
        help="one color in each region, which is the default, the same with soft shading, or the model's own colors",
    )
    parser.add_argument(
        "--background",
        choices=["paper", "white", "reference"],
        help="what is outside of the figure: paper (default of flat and shaded) keeps its color; white removes tint "
        "and shadows of scans and photographs, under the colors too, with any style; reference colors it",
    )
    parser.add_argument(
        "--palette",
        metavar="FILE|#RRGGBB,...|reference|none",
        type=_palette,
        default="reference",
        help="with flat or shaded, the colors of the regions: a .gpl or .ase file, a list, or those of the reference",
    )
    parser.add_argument(
        "--hints",
        metavar="FILE.json|FILE.png",
        type=_path,
        help='exact colors of regions: [{"x": 120, "y": 88, "color": "#e0b080"}], or a transparent PNG of strokes; '
        'with "learned": true, what looks alike gets the color, too',
    )
    return parser
