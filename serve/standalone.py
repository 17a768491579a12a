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

from animediffusion.models.bundle import Bundle, SamplerDefaults, load_bundle
from animediffusion.models.colorize import colorize
from animediffusion.models.sampler_options import ALLOWED, SamplerOptions, number, whole_number
from animediffusion.models.tensors import from_pixels, to_uint8
from animediffusion.platform.errors import AnimeDiffusionError, ConfigError
from animediffusion.platform.images.codec import letterbox
from animediffusion.serve.rendering.render import Size, read_picture, read_sketch, render
from animediffusion.serve.rendering.sketch import as_gray, for_network


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

    Raises:
        ImageError: the sketch or the reference is not usable.
    """
    drawing, side = read_sketch(sketch, thing=thing), bundle.config.image_size
    lines = from_pixels(for_network(as_gray(drawing), side))
    colors = from_pixels(letterbox(read_picture(reference), side)[0])
    with lock or nullcontext():
        painted = to_uint8(colorize(bundle, lines, colors, seeds=[seed], sampler=sampler))[0].cpu().numpy()
    made = render(painted, drawing, output="both", size=size)
    return made["image"], made["color_layer"]


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
    return parser
